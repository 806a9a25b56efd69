"""Measure what the batch norms of a model see over some batches, O(C) numbers per layer."""

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.core import meta

from bnjax.models import checks
from bnjax.models.batches import Layout, LossFn
from bnjax.models.conventions import banks_of, label_of_bank, place_of_bank
from bnjax.models.diagnosis.devices import readings
from bnjax.models.diagnosis.passes import Kind, Passes, Seen, compare, passes_of
from bnjax.models.freezing import batch_norms
from bnjax.models.nnx_copies import Copy
from bnjax.models.statistics import Path, impossible

Part = tuple[Path, int | None]  # a layer, or one of its banks


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A batch norm's running statistics, and those of the batches; in float64, each (C,).

    Each bank counts as a layer of its own.
    """

    path: str
    kind: Kind
    dtype: Any  # of its running statistics
    mean: np.ndarray  # the running ones
    var: np.ndarray
    scale: np.ndarray | None  # if one is learned
    batch_mean: np.ndarray  # over all batches
    # The average over batches, with the layer's correction: what the running one converges to.
    batch_var: np.ndarray
    all_var: np.ndarray  # the biased one of all batches pooled, including that of their means
    # Standard deviations, from batch to batch, of the mean and of the logarithm of the variance.
    mean_spread: np.ndarray
    var_spread: np.ndarray
    values: float  # per channel in the largest batch
    limited: np.ndarray  # the fraction of batches with batch renormalization at its limits
    lost: np.ndarray  # in how many batches the statistics were not finite
    seen: bool  # whether it ran in training; not if it is frozen, or batches are too small

    @property
    def where(self) -> str:
        """Its place in words."""
        return checks.where([self.path])

    @property
    def absent(self) -> bool:
        """Whether it is a bank of which there was no example."""
        return self.kind.banks is not None and not self.kind.frozen and not self.values

    @property
    def std(self) -> np.ndarray:
        """The divisor in training: the square root of the batches' variance plus eps."""
        return np.sqrt(self.batch_var + self.kind.eps)

    @property
    def mean_distance(self) -> np.ndarray:
        """From the batches' mean to the running one, in standard deviations, signed."""
        return np.real(self.mean - self.batch_mean) / self.std

    @property
    def var_ratio(self) -> np.ndarray:
        """The running variance as a multiple of the batches', both with eps.

        The batches' variance may be their average, which training converges to, or that of all
        batches pooled, as from `recalibrate`. Anything in between counts as equal.
        """
        right = np.clip(self.var, self.batch_var, np.maximum(self.all_var, self.batch_var))
        return (self.var + self.kind.eps) / (right + self.kind.eps)

    @property
    def poisoned(self) -> np.ndarray:
        """The channels with running statistics that are not finite, or a negative variance."""
        return impossible(self.mean, self.var)

    @property
    def fresh(self) -> bool:
        """Whether the running statistics have their initial values."""
        return not self.mean.any() and bool((self.var == 1).all())

    @property
    def compared(self) -> bool:
        """Whether there are running and batch statistics to compare, in at least one channel."""
        return self.seen and not self.poisoned.all()

    @property
    def mean_off(self) -> float:
        """`mean_distance`, as root mean square over the channels that can be compared."""
        return float(np.sqrt(np.mean(self.mean_distance[~self.poisoned] ** 2)))

    @property
    def var_off(self) -> float:
        """`var_ratio`, as geometric mean over the channels that can be compared."""
        return float(np.exp(np.mean(np.log(self.var_ratio[~self.poisoned]))))

    @property
    def distance(self) -> float:
        """From running to batch statistics, in standard deviations of the output.

        The root mean square over the channels of the distance of the means and the logarithm of
        the ratio of standard deviations.
        """
        if not self.compared:
            return 0.0
        with np.errstate(invalid="ignore", divide="ignore"):
            square = self.mean_distance**2 + (np.log(self.var_ratio) / 2) ** 2
        return float(np.sqrt(np.mean(square[~self.poisoned])))

    @property
    def spread(self) -> float:
        """The same from one batch to the next."""
        square = (self.mean_spread / self.std) ** 2 + (self.var_spread / 2) ** 2
        return float(np.sqrt(np.mean(square))) if self.seen else 0.0


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model over some batches; layers are in the order of their first calls."""

    layers: tuple[Layer, ...]  # those that keep statistics
    untracked: tuple[str, ...]  # paths of those that keep none
    by_batch: tuple[str, ...]  # paths of those that keep some but do not use them in evaluation
    by_policy: Mapping[str, str]  # policies, by path, that take the batch in evaluation
    training: tuple[str, ...]  # paths of those in an nnx model that are in training mode
    batches: int
    examples: int  # in the largest batch
    moved: tuple[str, ...]  # paths of statistics that an evaluation changed
    # Root mean square difference of the outputs in evaluation from those in training, and from
    # those with other batch mates, as a fraction of their standard deviation over the examples.
    gap: float
    mates: float
    losses: dict[str, dict[str, float]]  # means in "train" and "eval"; empty without a loss_fn
    strangers: Mapping[str, str]  # classes, by path, of unknown modules that keep statistics
    unequal: dict[str, float]  # by how many deviations the statistics of devices differ, by path
    params_norm: float  # of all parameters together
    nnx: bool
    kwargs: Mapping[str, Any]  # the extra arguments of the model's call


def measured(
    model: nn.Module | nnx.Module,
    variables: Any,
    batches: Iterable[Any],
    loss_fn: LossFn | None,
    layout: Layout,
    kwargs: Mapping[str, Any],
) -> Measured:
    """Run the batches through the model, and one of them again with other batch mates."""
    checks.several_batches(batches)
    run = None
    for batch in map(layout.named, batches):
        run = run or _Run(*_fitting(model, variables, batch, loss_fn, layout, kwargs))
        run.add(batch)
    checks.some_batch(run is not None)
    assert run is not None
    return run.end(_training(model))


def _training(model: Any) -> set[str]:
    """The batch norms of an nnx model that are in training mode, by path."""
    norms: Iterable[tuple[str, Any]] = batch_norms(model) if isinstance(model, nnx.Module) else ()
    return {p for p, layer in norms if getattr(layer, "use_running_average", None) is False}


def _fitting(
    model: Any, variables: Any, batch: Any, loss_fn: LossFn | None, layout: Layout, kwargs: Any
) -> tuple[Passes, Any, dict[str, float]]:
    """The passes and the variables that fit the model, possibly merged from several devices."""
    checks.flax_model(model)
    failures = []
    for reading in readings(model, variables):
        try:
            one, tree, unequal = reading()
            passes = passes_of(one, loss_fn, layout, kwargs)
            with checks.variables_fit(tree, layout.call(batch)):
                notes = passes.step.trace(tree, batch)
        except Exception as error:  # of the model, or of a tree that does not fit it
            failures.append(error)
        else:
            checks.some_batch_norm(bool(notes["kinds"]), passes.strangers)
            return passes, tree, unequal
    raise failures[0]


class _Run:
    """The sums over the batches so far."""

    def __init__(self, passes: Passes, variables: Any, unequal: dict[str, float]) -> None:
        self.passes, self.variables, self.unequal = passes, variables, unequal
        self.sums: dict[Part, _Sums] = {}
        self.kinds: dict[Path, Kind] = {}
        self.moved: set[str] = set()
        self.gaps = np.zeros(2)
        self.losses: Any = None
        self.batches = self.examples = self.used = self.counts = 0
        self.first: tuple[Any, Any] | None = None

    def add(self, batch: Any) -> None:
        """Run one more batch."""
        found, notes = self.passes.step(self.variables, batch)
        self.kinds |= notes["kinds"]
        outputs, layout = found.pop("outputs"), self.passes.layout
        size, counts = layout.size(batch), float(layout.counted(batch))
        if self.first is None and size > 1:
            self.first = batch, jax.device_get(outputs)
        found = jax.device_get(found)
        self.batches, self.counts = self.batches + 1, self.counts + counts
        self.examples = max(self.examples, size)
        for path, changed in jax.tree.leaves_with_path(found["moved"]):
            if changed:
                self.moved.add(jax.tree_util.keystr(path[:-1], simple=True, separator="/"))
        layers: dict[Part, Seen] = {}
        for path, seen in found["layers"].items():
            for bank in banks_of(self.kinds[path]):
                at = place_of_bank(bank, np.shape(seen.mean), self.kinds[path])
                layers[path, bank] = Seen(*(part[at] for part in seen))
        for path, bank in layers.keys() - self.sums:
            self.sums[path, bank] = _Sums(self.kinds[path].correction)
        if any([self.sums[part].lost_in(seen) for part, seen in layers.items()]):
            return  # this batch says nothing about the other layers
        for part, seen in layers.items():
            self.sums[part].add(seen)
        self.gaps += found["gap"]
        self.used += counts
        losses = jax.tree.map(lambda mean: float(mean) * counts, found["losses"])
        self.losses = jax.tree.map(operator.add, self.losses, losses) if self.losses else losses

    def end(self, training: set[str]) -> Measured:
        """All that was measured."""
        checks.some_batch(self.counts, "example that counts")
        kinds = {"/".join(path): kind for path, kind in self.kinds.items()}
        losses = self.losses or {"train": {}, "eval": {}}
        return Measured(
            layers=tuple(
                self._layer(path, bank)
                for path, kind in self.kinds.items()
                for bank in banks_of(kind)
                if (path, bank) in self.sums
            ),
            untracked=tuple(path for path, kind in kinds.items() if not kind.tracked),
            by_batch=tuple(p for p, kind in kinds.items() if kind.tracked and not kind.running),
            by_policy={p: repr(kind.using) for p, kind in kinds.items() if _asked(kind)},
            training=tuple(p for p, kind in kinds.items() if p in training and kind.has_mode),
            batches=self.batches,
            examples=self.examples,
            moved=tuple(sorted(self.moved)),
            gap=_ratio(*self.gaps) if self.used else float("nan"),
            mates=self._mates(),
            losses=jax.tree.map(lambda total: total / max(self.used, 1), losses),
            strangers=self.passes.strangers,
            unequal=self.unequal,
            params_norm=float(optax.tree.norm(self.variables.get("params", {}))),
            nnx=isinstance(self.passes.model, Copy),
            kwargs=self.passes.kwargs,
        )

    def _layer(self, path: Path, bank: int | None) -> Layer:
        def held(collection: str) -> Mapping[str, Any]:
            tree = self.variables.get(collection, {})
            for name in path:
                tree = tree.get(name, {})
            return {name: np.asarray(meta.unbox(leaf)) for name, leaf in tree.items()}

        def wide(array: np.ndarray) -> np.ndarray:
            return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64).ravel()

        stats, params, kind = held("batch_stats"), held("params"), self.kinds[path]
        scale = params.get("scale")
        if bank is not None:
            at = place_of_bank(bank, stats["mean"].shape, kind)
            scale = scale[at] if scale is not None and scale.ndim == stats["mean"].ndim else scale
            scale = scale + params["bank_scale"][at] if "bank_scale" in params else scale
            stats = {name: value[at] for name, value in stats.items()}
        return Layer(
            path="/".join(path) + label_of_bank(bank, kind),
            kind=kind,
            dtype=stats["var"].dtype,
            mean=wide(stats["mean"]),
            var=wide(stats["var"]),
            scale=None if scale is None else wide(scale),
            **self.sums[path, bank].statistics(),
        )

    def _mates(self) -> float:
        """How much the outputs of the first half of a batch depend on the other half."""
        if self.first is None:
            return 0.0
        batch, outputs = self.first
        size = self.passes.layout.size(batch)
        half = size // 2
        index = np.r_[:half, np.arange(size - half) % half]

        def mixed(leaf: Any, each: bool) -> Any:
            return np.asarray(leaf)[index] if each else leaf

        among = jax.tree.map(mixed, batch, self.passes.layout.each(batch))
        others = jax.device_get(self.passes.step(self.variables, among)[0]["outputs"])

        def mine(outputs: Any) -> list[Any]:
            leaves = jax.tree.leaves(outputs)
            return [leaf[:half] for leaf in leaves if jnp.ndim(leaf) and leaf.shape[0] == size]

        examples = batch["mask"][:half] if "mask" in batch else None
        difference, _ = compare(mine(others), mine(outputs), half, examples)
        _, deviation = compare(outputs, outputs, size, batch.get("mask"))
        return _ratio(float(difference) * size / half, float(deviation))


class _Sums:
    """Averages by count of what a layer saw, per channel, in float64 (Welford 1962)."""

    def __init__(self, correction: int) -> None:
        self.correction, self.values, self.total = correction, 0.0, 0.0
        self.batches: Any = 0
        self.lost: Any = 0
        self.limited: Any = 0
        self.mean: Any = 0.0
        self.var = self.biased = self.log = self.between = self.log_between = self.mean

    def lost_in(self, seen: Seen) -> bool:
        """Record channels with statistics that are not finite; return whether there are any."""
        values = np.asarray(seen.values).ravel()
        self.values = max(self.values, float(values.max(initial=0)))
        fine = np.isfinite(seen.mean) & np.isfinite(seen.var)
        lost = (np.asarray(seen.calls) > 0) & (np.asarray(seen.values) > 0) & ~fine
        self.lost = self.lost + lost.ravel()
        return bool(lost.any())

    def add(self, seen: Seen) -> None:
        """Add a batch in which each channel is finite or has no values."""
        calls, mean, var, between, values, limited = (
            np.asarray(part, np.result_type(part, np.float64)).ravel() for part in seen
        )
        fine = (calls > 0) & (values > 0)
        mean, var, between = (np.where(fine, part, 0) for part in (mean, var, between))
        self.batches = self.batches + fine
        self.limited = self.limited + np.where(fine, limited / np.maximum(calls, 1), 0)
        added = np.where(fine, values, 0)
        self.total = self.total + added
        weight = added / np.maximum(self.total, 1)
        between = between / np.maximum(calls, 1)
        biased = var * np.maximum(values - self.correction, 0) / np.maximum(values, 1) + between
        log = np.log(np.maximum(var, np.finfo(np.float32).tiny))
        delta, log_delta = mean - self.mean, log - self.log
        self.mean = self.mean + weight * delta
        self.log = self.log + weight * log_delta
        self.between = self.between + added * np.real(np.conj(delta) * (mean - self.mean))
        self.log_between = self.log_between + added * log_delta * (log - self.log)
        self.var = self.var + weight * (var - self.var)
        self.biased = self.biased + weight * (biased - self.biased)

    def statistics(self) -> dict[str, Any]:
        """The fields of a `Layer` that are measured."""
        # Smaller batches vary more and count less; together, as much as the largest would.
        freedom = np.maximum(self.batches - 1, 1) * max(self.values, 1.0)
        return {
            "batch_mean": self.mean,
            "batch_var": self.var,
            "all_var": self.biased + self.between / np.maximum(self.total, 1),
            "mean_spread": np.sqrt(self.between / freedom),
            "var_spread": np.sqrt(self.log_between / freedom),
            "values": self.values,
            "lost": self.lost,
            "limited": self.limited / np.maximum(self.batches, 1),
            "seen": bool(np.any(self.batches > 0)),
        }


def _asked(kind: Kind) -> bool:
    return kind.using is not None and kind.using.by_batch(False)


def _ratio(squares: float, scale: float) -> float:
    return float(np.sqrt(squares / scale)) if scale else float(np.sqrt(squares))
