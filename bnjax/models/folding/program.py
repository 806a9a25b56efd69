"""Which conv and dense layers of a model give their output to one batch norm and nothing else.

Every layer marks its input, its variables and its output while the forward pass is traced, with
`checkpoint_name`, which is an equation that changes nothing. The traced program (a jaxpr) then
has each use of each value, and the marks say whose values they are.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from bnjax.models import checks
from bnjax.models.conventions import LINEAR, own_type
from bnjax.models.visits import Path, Visit, path_of, variables_of, visiting

# Equations that run another program once, on the same values; a loop is not among them.
_CALLS = {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call"} | {
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
# Equations that leave each value where it is: a batch norm may follow them.
_SAME = {"name", "convert_element_type", "sharding_constraint", "copy", "copy_p"}
_MARK = "bnjax.fold"
_OUTPUT = "the model's output"


class Call(NamedTuple):
    """A call of a conv, dense or batch norm layer, as the layer said it would be."""

    path: Path
    norm: bool
    reason: str | None  # why it can't be folded, if that is known from the layer alone
    affine: tuple[str, ...]  # which of scale and bias it has
    dtypes: tuple[Any, Any]  # of input and output
    shapes: dict[str, tuple[int, ...]]  # of all that it marked, as the layer saw it
    axes: tuple[int, ...] = ()  # of a batch norm: its channels
    eps: float = 0.0
    features: int = 0  # of a linear layer: how many last axes are its channels
    transposed: bool = False
    bias_shape: tuple[int, ...] = ()


class _Step(NamedTuple):
    """An equation of the flat program. Values are numbers, those of the inputs first."""

    name: str
    operands: list[int]
    results: list[int]
    mark: tuple[int, str] | None
    eqn: JaxprEqn | None


@dataclasses.dataclass
class _Visit:
    """Where in the program a call stands, and the values that it takes and gives."""

    call: Call
    start: int
    source: int
    leaves: dict[str, int] = dataclasses.field(default_factory=dict)
    end: int = 0
    result: int = 0


class Program:
    """The program of a forward pass, flat, and where in it the layers are."""

    def __init__(self, apply: Callable[[Any, Any], Any], variables: Any, x: Any) -> None:
        self.calls: list[Call] = []
        self.steps: list[_Step] = []
        self.lost: dict[int, str] = {}  # calls that can't be followed, and why
        with (
            checks.variables_fit(variables, ((x,), {})),
            visiting(self._norm, self._linear) as strangers,
        ):
            traced = jax.make_jaxpr(apply)(variables, x)
        self.strangers = strangers
        leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
        self.inputs = [tuple(k.key for k in keys if hasattr(k, "key")) for keys, _ in leaves]
        self._count = len(traced.jaxpr.invars)
        results = self._flatten(traced.jaxpr, list(range(self._count)))
        self.dtypes = {each.dtype for each in traced.out_avals}  # of outputs, and of layers
        self.dtypes |= {call.dtypes[1] for call in self.calls}
        self.steps.append(_Step(_OUTPUT, results, [], None, None))
        self.uses: dict[int, list[int]] = defaultdict(list)
        self.makers: dict[int, int] = {}
        for position, step in enumerate(self.steps):
            for value in step.operands:
                self.uses[value].append(position)
            self.makers |= dict.fromkeys(step.results, position)
        self.visits = self._find_visits()

    def _norm(self, visit: Visit) -> Any:
        run = lambda x: visit.run(x=x)  # noqa: E731 - a call with one argument
        return self._marked(visit.layer, jnp.asarray(visit.x), run, True, _norm_facts(visit))

    def _linear(self, layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        rest = {name: value for name, value in kwargs.items() if args or name != "inputs"}
        x = jnp.asarray(args[0] if args else kwargs["inputs"])
        run = lambda x: call(x, *args[1:], **rest)  # noqa: E731 - a call with one argument
        return self._marked(layer, x, run, False, _linear_facts(layer))

    def _marked(
        self, layer: Any, x: jax.Array, run: Callable, norm: bool, facts: dict[str, Any]
    ) -> Any:
        number, shapes = len(self.calls), {}
        self.calls.append(
            Call(path_of(layer), norm, dtypes=(x.dtype, None), shapes=shapes, **facts)
        )

        def mark(value: Any, role: str) -> Any:
            shapes[role] = jnp.shape(value)
            return checkpoint_name(value, f"{_MARK}/{number}/{role}")

        x = mark(x, "enter")
        for collection, tree in variables_of(layer).items():
            for leaf, value in tree.items():
                mark(meta.unbox(value), f"{collection}/{leaf}")
        y = run(x)
        if not hasattr(y, "dtype"):  # of a class that was registered
            self.calls[number] = self.calls[number]._replace(reason="it returns more than an array")
            return y
        y = mark(y, "exit")
        self.calls[number] = self.calls[number]._replace(dtypes=(x.dtype, y.dtype))
        return y

    def _new(self, number: int) -> list[int]:
        self._count += number
        return list(range(self._count - number, self._count))

    def _flatten(self, program: Jaxpr, inputs: list[int]) -> list[int]:
        """Append the steps of a program to which these inputs are given; its outputs."""
        values: dict[Any, int] = dict(zip(program.invars, inputs, strict=True))
        values |= zip(program.constvars, self._new(len(program.constvars)), strict=True)

        def read(variables: Sequence[Any]) -> list[int]:
            return [self._new(1)[0] if isinstance(v, Literal) else values[v] for v in variables]

        for eqn in program.eqns:
            operands, inner = read(eqn.invars), list(_programs(eqn))
            if eqn.primitive.name in _CALLS and len(inner) == 1:
                results = self._flatten(inner[0], operands)
            else:
                results = self._new(len(eqn.outvars))
                mark = _mark(eqn)
                self.steps.append(_Step(eqn.primitive.name, operands, results, mark, eqn))
                self._lose(inner, eqn.primitive.name)
                if mark and self.calls[mark[0]].shapes[mark[1]] != _aval(eqn.invars).shape:
                    self.lost[mark[0]] = "mapped by vmap"
            values |= zip(eqn.outvars, results, strict=True)
        return read(program.outvars)

    def _lose(self, programs: list[Jaxpr], name: str) -> None:
        for eqn in (eqn for program in programs for eqn in program.eqns):
            if mark := _mark(eqn):
                self.lost[mark[0]] = f"inside a {name}"
            self._lose(list(_programs(eqn)), name)

    def _find_visits(self) -> list[_Visit]:
        visits, begun = [], {}
        for position, step in enumerate(self.steps):
            number, role = step.mark or (-1, "")
            if number in self.lost or (role != "enter" and number not in begun):
                continue  # a loop leaves marks of its constants behind, even of a mere trial run
            if role == "enter":
                begun[number] = _Visit(self.calls[number], position, step.operands[0])
                visits.append(begun[number])
            elif role == "exit":
                begun[number].end, begun[number].result = position, step.results[0]
            else:
                begun[number].leaves[role] = step.operands[0]
        return visits

    def named(self, position: int) -> str:
        """What a step is, for a reader: an operation or a layer."""
        mark = self.steps[position].mark
        return _quoted(self.calls[mark[0]].path) if mark else self.steps[position].name

    def follow(self, visit: _Visit) -> tuple[_Visit | None, str | None]:
        """The batch norm that the output of a layer goes into, and why it can't be folded."""
        value, ndim = visit.result, len(visit.call.shapes["exit"])
        axes = list(range(ndim))
        while True:
            users = self.uses[value]
            norms = [v for v in self.visits if v.call.norm and v.start in users]
            if len(users) != 1:
                names = " and ".join(sorted({self.named(u) for u in users})) or "nothing"
                only = "only " if norms else ""
                reason = f"its output goes into {names}, not {only}into a batch norm"
                return next(iter(norms), None), reason
            step = self.steps[users[0]]
            if norms:
                break
            if step.name == "transpose" and step.eqn is not None:
                axes = [axes[a] for a in step.eqn.params["permutation"]]
            elif step.mark or step.name not in _SAME or not _real(step):
                return None, f"its output goes into {self.named(users[0])}, not into a batch norm"
            value = step.results[0]
        call = norms[0].call
        over = [axes[a] for a in call.axes]
        if over != list(range(ndim - len(over), ndim)) or len(over) > visit.call.features:
            found, channels = (", ".join(map(str, a)) for a in (over, range(ndim)[-1:]))
            where = (
                f"the batch norm is over axis {found} of its output, its channels are {channels}"
            )
            return norms[0], where
        return norms[0], self.trouble(visit) or self.trouble(norms[0])

    def trouble(self, visit: _Visit) -> str | None:
        """Why a call can't be folded, whatever stands around it; None if it can."""
        if not visit.end:
            return visit.call.reason
        path = visit.call.path
        spans = [(v.start, v.end) for v in self.visits if v.call.path == path]
        for name, value in visit.leaves.items():
            key = tuple(name.split("/", 1))
            here = f"the {key[1]} of {_quoted(path)}"
            if value >= len(self.inputs) or self.inputs[value] != (key[0], *path, key[1]):
                return f"{here} is computed in the model"
            if any(not any(s <= u <= e for s, e in spans) for u in self.uses[value]):
                return f"{here} is used outside of it"
        return visit.call.reason


def pair(program: Program) -> tuple[list[tuple[Call, Call]], list[tuple[Path, Path, str | None]]]:
    """The layers with their batch norms, and all layers: paths, and why not if not."""
    links: dict[Path, list[tuple[_Visit, _Visit | None, str | None]]] = defaultdict(list)
    reasons: dict[Path, str] = {}
    for number, why in program.lost.items():
        reasons.setdefault(program.calls[number].path, why)
    for visit in program.visits:
        if not visit.call.norm:
            links[visit.call.path].append((visit, *program.follow(visit)))
    targets: dict[Path, list[Path]] = {}
    for path, found in links.items():
        norms = targets[path] = sorted({norm.call.path for _, norm, _ in found if norm})
        whys = [why for _, _, why in found if why]
        if len(norms) > 1:
            whys = [f"it is used {len(found)} times, before {' and '.join(map(_quoted, norms))}"]
        reasons |= {path: whys[0]} if whys else {}
    for _ in targets:
        fed = {id(norm) for path in links if path not in reasons for _, norm, _ in links[path]}
        left = {v.call.path for v in program.visits if v.call.norm and id(v) not in fed}
        left |= {program.calls[number].path for number in program.lost}
        for path, norms in targets.items():
            for norm in left.intersection(norms):
                reasons.setdefault(path, f"{_quoted(norm)} is used for another input too")
    pairs = []
    for path, found in links.items():
        visit, norm, _ = found[0]
        if path not in reasons and norm is not None:
            pairs.append((visit.call, norm.call))
    return pairs, _lines(program, targets, reasons)


def _lines(
    program: Program, targets: dict[Path, list[Path]], reasons: dict[Path, str]
) -> list[tuple[Path, Path, str | None]]:
    """A line for each layer in the order of the calls, and for each batch norm without one."""
    seen = {v.call.path: v for v in program.visits}
    there = {program.calls[number].path for number in program.lost} | set(seen)
    paired = {norm for norms in targets.values() for norm in norms}
    lines = []
    for path, norm in {call.path: call.norm for call in program.calls}.items():
        if not norm and path in there:
            lines += [(path, after, reasons.get(path)) for after in targets.get(path) or [()]]
        elif norm and path in there - paired:
            why = reasons.get(path) or program.trouble(seen[path])
            if why is None:
                maker = program.makers.get(seen[path].source)
                what = "an input of the model" if maker is None else program.named(maker)
                why = f"its input comes from {what}, not from a conv or dense layer"
            lines.append(((), path, why))
    return lines


def _norm_facts(visit: Visit) -> dict[str, Any]:
    does = visit.facts
    if does.tracked and not visit.running:
        raise ValueError(
            f"`model` must be in evaluation, but the batch norm at {checks.where(visit.path)} is "
            "in training mode. Pass what turns that off, as in `apply_kwargs={'train': False}`."
        )
    reason = None
    if not does.tracked:
        reason = "the batch norm has no running statistics"
    elif visit.mask is not None:
        reason = "the batch norm is given a mask, which it does not need in evaluation"
    axes = checks.feature_axes(does.axis, jnp.ndim(visit.x))
    return {"reason": reason, "affine": does.affine, "axes": axes, "eps": does.eps}


def _linear_facts(layer: Any) -> dict[str, Any]:
    kind, reason = own_type(layer), None
    base = next(c for c in kind.__mro__ if c in LINEAR)
    if any(getattr(kind, name, 0) is not getattr(base, name, 0) for name in ("__call__", "param")):
        reason = f"{kind.__name__} changes what {base.__name__} computes"
    shape = jnp.shape(meta.unbox(variables_of(layer).get("params", {}).get("kernel", 0)))
    features, transposed = 1, getattr(layer, "transpose_kernel", False)
    bias_shape = shape[-1:]
    if base in (nn.DenseGeneral, nnx.LinearGeneral):
        out = layer.features if base is nn.DenseGeneral else layer.out_features
        batch = layer.batch_dims if base is nn.DenseGeneral else layer.batch_axis
        features = len(out) if isinstance(out, Sequence) else 1
        bias_shape = shape[: len(batch)] + shape[-features:]
    elif base is nn.ConvLocal:
        bias_shape = shape[:-2] + shape[-1:]
    elif transposed:
        bias_shape = shape[-2:-1]
    affine = ("bias",) if layer.use_bias else ()
    facts = {"features": features, "transposed": transposed, "bias_shape": bias_shape}
    return {"reason": reason, "affine": affine, **facts}


def _programs(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs inside an equation."""
    for param in eqn.params.values():
        for inner in param if isinstance(param, tuple | list) else (param,):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner


def _mark(eqn: JaxprEqn) -> tuple[int, str] | None:
    """The number of the call and the role of the value that an equation marks."""
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    if not isinstance(name, str) or not name.startswith(_MARK):
        return None
    _, number, role = name.split("/", 2)
    return int(number), role


def _aval(variables: Sequence[Any]) -> Any:
    return variables[0].aval


def _real(step: _Step) -> bool:
    return step.eqn is not None and jnp.issubdtype(_aval(step.eqn.outvars).dtype, jnp.inexact)


def _quoted(path: Path) -> str:
    return f"'{'/'.join(path)}'"
