"""The flattened program of a forward pass, and where its layers are.

While the forward pass is traced, each layer marks its input, variables and output with
`checkpoint_name`, an equation that changes nothing. The traced program (a jaxpr) then shows every
use of a value, and the marks show which layer the value belongs to.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from bnjax.models import checks
from bnjax.models.attributes import path_of, variables_of
from bnjax.models.folding.calls import Call, linear_facts, norm_facts
from bnjax.models.statistics import Path
from bnjax.models.visit import Visit
from bnjax.models.visits import visiting

# Equations that run another program once, on the same values, unlike loops.
_CALLS = {"jit", "pjit", "remat", "remat2", "checkpoint", "closed_call", "core_call"} | {
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
_MARK = "bnjax.fold"
OUTPUT = "the model's output"


class Step(NamedTuple):
    """An equation of the flat program. Values are numbered, the inputs first."""

    name: str
    operands: list[int]
    results: list[int]
    mark: tuple[int, str] | None
    eqn: JaxprEqn | None


@dataclasses.dataclass
class Place:
    """Where a call is in the program, and the values that it reads and returns.

    Attributes:
        call: what it does.
        start: the position of its first step.
        source: its input.
        leaves: its variables.
        end: the position of its last step.
        result: its output.
    """

    call: Call
    start: int
    source: int
    leaves: dict[str, int] = dataclasses.field(default_factory=dict)
    end: int = 0
    result: int = 0


class Program:
    """The flattened program of a forward pass, and where its layers are."""

    def __init__(self, apply: Callable[[Any, Any], Any], variables: Any, x: Any) -> None:
        self.calls: list[Call] = []
        self.steps: list[Step] = []
        self.lost: dict[int, str] = {}  # calls that can't be followed, and why
        self.literals: dict[int, Any] = {}  # values that are constants
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
        self.steps.append(Step(OUTPUT, results, [], None, None))
        self.uses: dict[int, list[int]] = defaultdict(list)
        self.makers: dict[int, int] = {}
        for position, step in enumerate(self.steps):
            for value in step.operands:
                self.uses[value].append(position)
            self.makers |= dict.fromkeys(step.results, position)
        self.visits = self._find_visits()
        self.starting = {visit.start: visit for visit in self.visits}

    def _norm(self, visit: Visit) -> Any:
        run = lambda x: visit.run(x=x)  # noqa: E731 - a call with one argument
        return self._marked(visit.layer, jnp.asarray(visit.x), run, True, norm_facts(visit))

    def _linear(self, layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        rest = {name: value for name, value in kwargs.items() if args or name != "inputs"}
        x = jnp.asarray(args[0] if args else kwargs["inputs"])
        run = lambda x: call(x, *args[1:], **rest)  # noqa: E731 - a call with one argument
        return self._marked(layer, x, run, False, linear_facts(layer, x))

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
        if not hasattr(y, "dtype"):  # from a registered class
            self.calls[number] = self.calls[number]._replace(reason="it returns more than an array")
            return y
        y = mark(y, "exit")
        self.calls[number] = self.calls[number]._replace(dtypes=(x.dtype, y.dtype))
        return y

    def _new(self, number: int) -> list[int]:
        self._count += number
        return list(range(self._count - number, self._count))

    def _literal(self, literal: Literal) -> int:
        (number,) = self._new(1)
        self.literals[number] = literal.val
        return number

    def _flatten(self, program: Jaxpr, inputs: list[int]) -> list[int]:
        """Append the steps of a program that is called on these inputs; return its outputs."""
        values: dict[Any, int] = dict(zip(program.invars, inputs, strict=True))
        values |= zip(program.constvars, self._new(len(program.constvars)), strict=True)

        def read(variables: Sequence[Any]) -> list[int]:
            return [self._literal(v) if isinstance(v, Literal) else values[v] for v in variables]

        for eqn in program.eqns:
            operands, inner = read(eqn.invars), list(_programs(eqn))
            if eqn.primitive.name in _CALLS and len(inner) == 1:
                results = self._flatten(inner[0], operands)
            else:
                results = self._new(len(eqn.outvars))
                mark = _mark(eqn)
                self.steps.append(Step(eqn.primitive.name, operands, results, mark, eqn))
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

    def _find_visits(self) -> list[Place]:
        visits, begun = [], {}
        for position, step in enumerate(self.steps):
            number, role = step.mark or (-1, "")
            if number in self.lost or (role != "enter" and number not in begun):
                continue  # even the trial run of a loop leaves marks of its constants behind
            if role == "enter":
                begun[number] = Place(self.calls[number], position, step.operands[0])
                visits.append(begun[number])
            elif role == "exit":
                begun[number].end, begun[number].result = position, step.results[0]
            else:
                begun[number].leaves[role] = step.operands[0]
        return visits

    def named(self, position: int) -> str:
        """The name of a step for the report: an operation or a layer."""
        mark = self.steps[position].mark
        return quoted(self.calls[mark[0]].path) if mark else self.steps[position].name

    def trouble(self, visit: Place) -> str | None:
        """Why a call can't be folded, regardless of those around it; None if it can."""
        if not visit.end:
            return visit.call.reason
        path = visit.call.path
        spans = [(v.start, v.end) for v in self.visits if v.call.path == path]
        for name, value in visit.leaves.items():
            key = tuple(name.split("/", 1))
            here = f"the {key[1]} of {quoted(path)}"
            if value >= len(self.inputs) or self.inputs[value] != (key[0], *path, key[1]):
                return f"{here} is computed in the model"
            if any(not any(s <= u <= e for s, e in spans) for u in self.uses[value]):
                return f"{here} is used outside it"
        return visit.call.reason


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


def quoted(path: Path) -> str:
    """A path in quotes, for the report."""
    return f"'{'/'.join(path)}'"
