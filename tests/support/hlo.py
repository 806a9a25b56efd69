"""Programs, read by their structure: of JAX before XLA, and of XLA's text when it has compiled."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxlib.mlir import ir

# The kind of each collective, and how many numbers leave each device.
Sent = list[tuple[str, int]]

COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "recv",
    "reduce-scatter",
    "send",
}
COMPUTATION = re.compile(r"(ENTRY )?(%[\w.-]+) \(.*\) -> .* \{")
INSTRUCTION = re.compile(r"\s+(ROOT )?(%[\w.-]+) = ")
NAME = re.compile(r"%[\w.-]+")
NUMBER = re.compile(r"\d+")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


class Instruction(NamedTuple):
    """One instruction of a compiled program.

    Attributes:
        name: the one under which others read it.
        opcode: what it does; `all-gather` also where it starts here and is done later.
        type: what it gives, in XLA's words, layouts included.
        operands: the names of what it reads.
        calls: the names of the computations that it runs.
        text: all of it, in XLA's words.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    text: str

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the arrays that it gives."""
        shapes = [shape for _, shape in ARRAY.findall(self.type)]
        return [tuple(int(n.strip("<=")) for n in s.split(",") if n) for s in shapes]

    @property
    def numbers(self) -> int:
        """How many it gives."""
        return sum(map(math.prod, self.shapes))

    @property
    def root(self) -> bool:
        """Whether its computation gives what it gives."""
        return self.text.lstrip().startswith("ROOT ")

    @property
    def started(self) -> bool:
        """Whether it is only started here, and done later."""
        return f" {self.opcode}-start(" in self.text

    @property
    def bytes(self) -> list[int]:
        """The size of each array that it gives."""
        kinds = [kind for kind, _ in ARRAY.findall(self.type)]
        pairs = zip(kinds, self.shapes, strict=True)
        return [math.ceil(math.prod(shape) * bits(kind) / 8) for kind, shape in pairs]


class Collective(NamedTuple):
    """What devices say to each other once.

    Attributes:
        kind: its opcode.
        numbers: how many each device gives.
        bytes: the size of these.
        conditional: whether it is said on a condition alone.
    """

    kind: str
    numbers: int
    bytes: int
    conditional: bool


class Program(NamedTuple):
    """The instructions of each computation, by their names, and which of these runs first."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def instructions(self, opcode: str | None = None) -> list[Instruction]:
        """Those of all computations, or the ones that do this."""
        every = [each for inside in self.computations.values() for each in inside.values()]
        return [each for each in every if opcode in (None, each.opcode)]

    def types(self) -> Counter[tuple[str, str]]:
        """How often which opcode gives what type."""
        return Counter((each.type, each.opcode) for each in self.instructions())

    def steps(self) -> list[Instruction]:
        """Those of the computation that runs first."""
        return list(self.computations[self.entry].values())

    def inputs(self) -> set[str]:
        """The names of the arguments."""
        return {each.name for each in self.steps() if each.opcode == "parameter"}

    def readers(self, names: set[str]) -> list[Instruction]:
        """The steps that read any of these."""
        return [each for each in self.steps() if names.intersection(each.operands)]

    def collectives(self) -> list[Collective]:
        """What the devices say to each other."""
        found, inside = [], self.conditional()
        for name, instructions in self.computations.items():
            for each in instructions.values():
                if each.opcode in COLLECTIVES:
                    given = [instructions[operand] for operand in each.operands]
                    numbers, size = sum(g.numbers for g in given), sum(sum(g.bytes) for g in given)
                    found.append(Collective(each.opcode, numbers, size, name in inside))
        return found

    def conditional(self) -> set[str]:
        """The names of the computations that run on a condition, or inside of one that does."""
        found: set[str] = set()
        new = {name for each in self.instructions("conditional") for name in each.calls}
        while new:
            found |= new
            inside = [each for name in new for each in self.computations[name].values()]
            new = {name for each in inside for name in each.calls} - found
        return found


def compiled(function: Any, *arguments: Any) -> Program:
    """What XLA makes of a function that JAX compiles, for arguments or their shapes."""
    return parse(str(function.lower(*arguments).compile(OPTIONS).as_text()))


def parse(text: str) -> Program:
    """A program from what `as_text()` gives."""
    computations, entry = {}, ""
    lines: list[str] = []
    for line in text.splitlines():
        if header := COMPUTATION.fullmatch(line):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif INSTRUCTION.match(line):
            lines.append(line)
    assert entry, "no program of XLA"
    read = {
        computation: {
            each.name: each for each in (instruction(line, set(computations)) for line in it)
        }
        for computation, it in computations.items()
    }
    return Program(read, entry)


def instruction(text: str, computations: set[str]) -> Instruction:
    """One from a line such as `  ROOT %d = (f32[2], s32[]) while(%a), body=%b`."""
    head = INSTRUCTION.match(text)
    assert head is not None, text
    line = QUOTED.sub("", text[head.end() :])
    end = parentheses(line) if line.startswith("(") else line.index(" ")
    opcode, _, rest = line[end + 1 :].partition("(")
    end = parentheses(f"({rest}") - 1
    operands, calls = (NAME.findall(part) for part in (rest[:end], rest[end:]))
    return Instruction(
        head[2],
        opcode.removesuffix("-start"),
        line[: line.index(f" {opcode}(")],
        tuple(operands),
        tuple(each for each in calls if each in computations),
        text,
    )


def bits(kind: str) -> int:
    """How many a number of this type has, as `bf16`; a token has none."""
    found = NUMBER.search(kind)
    return int(found[0]) if found else 8 * (kind == "pred")


def parentheses(text: str) -> int:
    """Where the pair closes with which a text begins."""
    depth = 0
    for place, sign in enumerate(text, 1):
        depth += (sign == "(") - (sign == ")")
        if not depth:
            return place
    raise ValueError(f"never closed: {text}")


def collectives(function: Any, arguments: tuple, *, conditional: bool = False) -> Sent:
    """The collectives of a program, each with the numbers that each device gives it.

    Those that a step always runs, or those inside a branch of some condition.
    """
    found = compiled(function, *arguments).collectives()
    return sorted((each.kind, each.numbers) for each in found if each.conditional == conditional)


def operations(function: Any, *arguments: Any, platform: str = "cpu") -> Counter[str]:
    """How often each operation of StableHLO stands in what XLA gets for a platform."""
    found: Counter[str] = Counter()

    def count(operation: Any) -> ir.WalkResult:
        found[operation.name.removeprefix("stablehlo.")] += 1
        return ir.WalkResult.ADVANCE

    lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
    lowered.compiler_ir("stablehlo").operation.walk(count)
    return found


def primitives(function: Callable, *arguments: Any) -> Counter[str]:
    """How often each primitive of JAX stands in a program, whatever is inside of what."""
    program = jax.make_jaxpr(function)(*arguments)
    return Counter(equation.primitive.name for equation in equations(program.jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a program and of the programs inside."""

    def is_program(value: Any) -> bool:
        return hasattr(value, "eqns")

    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from equations(value)
