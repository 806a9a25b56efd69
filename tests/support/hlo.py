"""Parse programs: from JAX, before XLA compiles them, and from XLA's text, afterwards."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jaxlib.mlir import ir

# The opcode of each collective, and how many numbers each device sends.
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
    """An instruction of a compiled program.

    Attributes:
        name: its name as an operand.
        opcode: its operation; `all-gather` also if it only starts here.
        type: its result type in XLA's notation, including layouts.
        operands: the names of its operands.
        calls: the names of the computations that it calls.
        text: its whole line.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    text: str

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its results."""
        shapes = [shape for _, shape in ARRAY.findall(self.type)]
        return [tuple(int(n.strip("<=")) for n in s.split(",") if n) for s in shapes]

    @property
    def numbers(self) -> int:
        """The number of elements in its results."""
        return sum(map(math.prod, self.shapes))

    @property
    def root(self) -> bool:
        """Whether its computation returns its result."""
        return self.text.lstrip().startswith("ROOT ")

    @property
    def started(self) -> bool:
        """Whether it only starts here and finishes later."""
        return f" {self.opcode}-start(" in self.text

    @property
    def bytes(self) -> list[int]:
        """The size of each result."""
        kinds = [kind for kind, _ in ARRAY.findall(self.type)]
        pairs = zip(kinds, self.shapes, strict=True)
        return [math.ceil(math.prod(shape) * bits(kind) / 8) for kind, shape in pairs]


class Collective(NamedTuple):
    """A collective operation.

    Attributes:
        kind: its opcode.
        numbers: how many numbers each device sends.
        bytes: their size.
        conditional: whether it runs only on a condition.
    """

    kind: str
    numbers: int
    bytes: int
    conditional: bool


class Program(NamedTuple):
    """The instructions of each computation by name, and the entry computation."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def instructions(self, opcode: str | None = None) -> list[Instruction]:
        """The instructions of all computations, optionally with this opcode."""
        every = [each for inside in self.computations.values() for each in inside.values()]
        return [each for each in every if opcode in (None, each.opcode)]

    def types(self) -> Counter[tuple[str, str]]:
        """How often each opcode produces each type."""
        return Counter((each.type, each.opcode) for each in self.instructions())

    def steps(self) -> list[Instruction]:
        """The instructions of the entry computation."""
        return list(self.computations[self.entry].values())

    def inputs(self) -> set[str]:
        """The names of the arguments."""
        return {each.name for each in self.steps() if each.opcode == "parameter"}

    def readers(self, names: set[str]) -> list[Instruction]:
        """The steps that read any of these names."""
        return [each for each in self.steps() if names.intersection(each.operands)]

    def collectives(self) -> list[Collective]:
        """All collectives."""
        found, inside = [], self.conditional()
        for name, instructions in self.computations.items():
            for each in instructions.values():
                if each.opcode in COLLECTIVES:
                    given = [instructions[operand] for operand in each.operands]
                    numbers, size = sum(g.numbers for g in given), sum(sum(g.bytes) for g in given)
                    found.append(Collective(each.opcode, numbers, size, name in inside))
        return found

    def conditional(self) -> set[str]:
        """The names of computations that run on a condition, directly or nested."""
        found: set[str] = set()
        new = {name for each in self.instructions("conditional") for name in each.calls}
        while new:
            found |= new
            inside = [each for name in new for each in self.computations[name].values()]
            new = {name for each in inside for name in each.calls} - found
        return found


def compiled(function: Any, *arguments: Any) -> Program:
    """Compile a jitted function for arguments or their shapes."""
    return parse(str(function.lower(*arguments).compile(OPTIONS).as_text()))


def parse(text: str) -> Program:
    """Parse the output of `as_text()`."""
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
    """Parse a line such as `  ROOT %d = (f32[2], s32[]) while(%a), body=%b`."""
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
    """The number of bits of a type such as `bf16`; 0 for a token."""
    found = NUMBER.search(kind)
    return int(found[0]) if found else 8 * (kind == "pred")


def parentheses(text: str) -> int:
    """The position after the parenthesis that closes the first one."""
    depth = 0
    for place, sign in enumerate(text, 1):
        depth += (sign == "(") - (sign == ")")
        if not depth:
            return place
    raise ValueError(f"never closed: {text}")


def collectives(function: Any, arguments: tuple, *, conditional: bool = False) -> Sent:
    """The collectives of a program, each with how many numbers each device sends.

    Either those that always run, or those inside a conditional branch.
    """
    found = compiled(function, *arguments).collectives()
    return sorted((each.kind, each.numbers) for each in found if each.conditional == conditional)


def operations(function: Any, *arguments: Any, platform: str = "cpu") -> Counter[str]:
    """How often each StableHLO operation occurs in the program lowered for a platform."""
    found: Counter[str] = Counter()

    def count(operation: Any) -> ir.WalkResult:
        found[operation.name.removeprefix("stablehlo.")] += 1
        return ir.WalkResult.ADVANCE

    lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
    lowered.compiler_ir("stablehlo").operation.walk(count)
    return found


def primitives(function: Callable, *arguments: Any) -> Counter[str]:
    """How often each JAX primitive occurs in a program, including nested programs."""
    program = jax.make_jaxpr(function)(*arguments)
    return Counter(equation.primitive.name for equation in equations(program.jaxpr))


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program and of nested programs."""

    def is_program(value: Any) -> bool:
        return hasattr(value, "eqns")

    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from equations(value)
