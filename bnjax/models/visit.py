"""One call of any known batch norm."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from bnjax.core.batch_norm import batch_norm
from bnjax.core.moments import working_dtype
from bnjax.core.policies import Policy
from bnjax.layers.conventions import bank_of, rows
from bnjax.models import checks
from bnjax.models.attributes import COLLECTION, setting, variables_of
from bnjax.models.compat import is_mapped
from bnjax.models.conventions import OWN, Facts
from bnjax.models.registered import Bound
from bnjax.models.statistics import Path

_AS_GIVEN: Any = object()


@dataclasses.dataclass
class Visit:
    """One call of a batch norm.

    Attributes:
        layer: the layer, linen or nnx.
        path: its path in the model.
        facts: what it does, under the active settings.
        x: its input.
        mask: the mask of the call; None if all positions count.
        running: whether it was asked to normalize with its running statistics; None if unspecified.
        given: the mode passed to the call, if any.
        extra: other arguments of the call: `bank`, `scale` and `bias`.
    """

    layer: Any
    path: Path
    facts: Facts
    x: Any
    mask: chex.Array | None
    running: bool | None
    given: bool | None
    extra: dict[str, Any]
    _call: Callable
    _fields: dict[str, Any]
    _bound: Bound | None  # for a layer of a registered class

    def run(
        self,
        *,
        x: Any = _AS_GIVEN,
        running: bool | None = None,
        here: bool = False,
        plain: bool = False,
    ) -> jax.Array:
        """Run the call and return its output.

        Args:
            x: an input to use instead.
            running: the mode, overriding layer, call and settings.
            here: pool only over axes that are mapped here.
            plain: ignore any policy of the layer and the settings.
        """
        fields, options = dict((self.unmapped() if here else self)._fields), dict(self.extra)
        x = self.x if x is _AS_GIVEN else x
        if plain and (isinstance(self.layer, OWN) or "using" in fields):
            fields["using"] = None
        if "using" in fields and not isinstance(self.layer, OWN):
            policy = fields.pop("using")
            if policy is not None and not checks.is_initializing(self.layer):
                return self._by_policy(policy, x, self.running if running is None else running)
        if self._bound is not None:
            mode = fields.pop("use_running_average", self.running)
            mode = mode if running is None else running
            masked = {} if mode else {"mask": self.mask}
            changed = self._bound.changed(x=x, use_running_average=mode, **masked, **fields)
            args, kwargs, fields = changed
            with setting(self.layer, **fields):
                return self._call(*args, **kwargs)
        if self.mask is not None:
            options["mask"] = self.mask
        forced = fields.pop("use_running_average", None)
        mode = forced if running is None else running
        if mode is None:
            options |= {} if self.given is None else {"use_running_average": self.given}
        elif isinstance(self.layer, nn.Module):
            fields["use_running_average"] = mode
        else:
            options["use_running_average"] = mode
        with setting(self.layer, **fields):
            if self.mask is None or isinstance(self.layer, OWN) or mode or self.running:
                return self._call(x, **options)
            # If no example counted, Flax's output and statistics would be NaN.
            some, before = jnp.any(self.mask), self.statistics
            y = self._call(x, **{**options, "mask": self.mask | ~some})
            self.put({k: jnp.where(some, new, before[k]) for k, new in self.statistics.items()})
            return y

    def _by_policy(self, policy: Policy, x: Any, running: bool | None) -> jax.Array:
        """The output of a Flax or registered layer under a policy."""
        dtype = jax.eval_shape(lambda: self.run(x=x, running=True, here=True, plain=True)).dtype
        stats = {name: self.statistics[name] for name in ("mean", "var")}
        settings = {"eps": self.facts.eps, "momentum": self.facts.momentum, "dtype": dtype}
        settings |= {"correction": self.facts.correction, "using": policy}
        visit = dataclasses.replace(self, x=x)
        y, moved = visit._core(self.parameters, stats, mutable=not running, **settings)
        if not running:
            self.put({name: moved[name].astype(stats[name].dtype) for name in stats})
        return y

    @property
    def parameters(self) -> dict[str, jax.Array]:
        """The scale and bias that the layer has."""
        return dict(meta.unbox(variables_of(self.layer).get("params", {})))

    @property
    def bank(self) -> Any:
        """The number of the call's bank, or one for each example; None without banks."""
        return bank_of(self.layer, self.extra.get("bank"))

    def of(self, batch: Mapping[str, Any]) -> "Visit":
        """The same call, with the mask and the banks of a batch."""
        visit = self.where(batch.get("mask"))
        if "bank" not in batch or self.facts.banks is None or "bank" in self.extra:
            return visit
        return dataclasses.replace(visit, extra={**visit.extra, "bank": batch["bank"]})

    def where(self, examples: chex.Array | None) -> "Visit":
        """The same call, counting only these examples: bool (N,), or None for all."""
        if examples is None:
            return self
        checks.has_examples(self.layer, jnp.shape(self.x), examples.size, "/".join(self.path))
        mask = examples.reshape(-1, *(1,) * (jnp.ndim(self.x) - 1))
        if self.mask is not None:
            mask = mask & jnp.asarray(self.mask, bool)
        return dataclasses.replace(self, mask=mask)

    def unmapped(self) -> "Visit":
        """The same call, pooled only over axes that are mapped here."""
        if self.devices[0] == self.facts.axis_name:
            return self
        names = dict(zip(("axis_name", "axis_index_groups"), self.devices, strict=True))
        return dataclasses.replace(self, _fields=self._fields | names)

    @property
    def frozen(self) -> bool:
        """Whether it uses its running statistics regardless of the call."""
        fixed = self.facts.by_mutability and self.facts.running
        return bool(self._fields.get("use_running_average") or fixed)

    @property
    def mode_is_forced(self) -> bool:
        """Whether a context sets its mode."""
        return "use_running_average" in self._fields

    @property
    def statistics(self) -> dict[str, chex.Array]:
        """The arrays of the layer in `batch_stats`, by name."""
        return dict(variables_of(self.layer).get(COLLECTION, {}))

    def put(self, values: Mapping[str, chex.Array]) -> None:
        """Write statistics to the layer."""
        for name, value in values.items():
            if isinstance(self.layer, nn.Module):
                self.layer.put_variable(COLLECTION, name, value)
            else:
                getattr(self.layer, name)[...] = value

    @property
    def devices(self) -> tuple[Any, Any]:
        """`axis_name` and `axis_index_groups`, restricted to axes that are mapped here."""
        names = self.facts.axis_name
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        here = tuple(name for name in names if is_mapped(name))
        if here == names:
            return self.facts.axis_name, self.facts.axis_index_groups
        return here or None, None

    def seen(self) -> dict[str, jax.Array]:
        """`mean` and `var` of this batch, as they enter the running ones; NaN where there are none.

        They respect the layer's mask, correction, axes and virtual batches.
        """
        shape = [*rows(self.facts), *(jnp.shape(self.x)[axis] for axis in self.axes)]
        none = jnp.full(shape, -1, working_dtype(jnp.result_type(self.x)))
        stats = {"mean": none, "var": jnp.real(none)}
        found = self._core({}, stats, momentum=1.0, correction=self.facts.correction)[1]
        # A channel without finite statistics keeps the impossible variance of -1.
        return {name: jnp.where(found["var"] < 0, jnp.nan, found[name]) for name in found}

    def by_batch(self) -> jax.Array:
        """The input normalized by the batch, as in training, without writing anything."""
        dtype = jax.eval_shape(lambda: self.run(running=True, here=True)).dtype
        stats = {name: self.statistics[name] for name in ("mean", "var") if self.facts.banks}
        return self._core(self.parameters, stats, eps=self.facts.eps, dtype=dtype)[0]

    @property
    def axes(self) -> tuple[int, ...]:
        """The feature axes of x."""
        return checks.feature_axes(self.facts.axis, jnp.ndim(self.x))

    def _core(self, params: Any, stats: Any, **settings: Any) -> tuple[jax.Array, dict[str, Any]]:
        axis_name, groups = self.devices
        extra = {**self.extra, "bank": self.bank} if params else {"bank": self.bank}
        return batch_norm(
            params,
            stats,
            self.x,
            axis=self.axes,
            mask=None if self.mask is None else jnp.asarray(self.mask, bool),
            axis_name=axis_name,
            axis_index_groups=groups,
            virtual_batch_size=self.facts.virtual_batch_size,
            **{"mutable": True, **extra, **settings},
        )
