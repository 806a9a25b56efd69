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
INSTRUCTION = re.compile(r"\s+(?:ROOT )?(%[\w.-]+) = ")
NAME = re.compile(r"%[\w.-]+")
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
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of the arrays that it gives."""
        shapes = [shape for _, shape in ARRAY.findall(self.type)]
        return [tuple(int(n.strip("<=")) for n in s.split(",") if n) for s in shapes]

    @property
    def numbers(self) -> int:
        """How many it gives."""
        return sum(map(math.prod, self.shapes))


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
    lines: dict[str, str] = {}
    for line in text.splitlines():
        if header := COMPUTATION.fullmatch(line):
            lines = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif head := INSTRUCTION.match(line):
            lines[head[1]] = line[head.end() :]
    assert entry, "no program of XLA"
    read = {
        computation: {name: instruction(name, line, set(computations)) for name, line in it.items()}
        for computation, it in computations.items()
    }
    return Program(read, entry)


def instruction(name: str, line: str, computations: set[str]) -> Instruction:
    """One from a line such as `(f32[2], s32[]) while(%a), body=%b`."""
    line = QUOTED.sub("", line)
    end = parentheses(line) if line.startswith("(") else line.index(" ")
    opcode, _, rest = line[end + 1 :].partition("(")
    end = parentheses(f"({rest}") - 1
    operands, calls = (NAME.findall(part) for part in (rest[:end], rest[end:]))
    calls = tuple(each for each in calls if each in computations)
    return Instruction(
        name,
        opcode.removesuffix("-start"),
        line[: line.index(f" {opcode}(")],
        tuple(operands),
        calls,
    )


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
    program = compiled(function, *arguments)
    found, inside = [], program.conditional()
    for name, instructions in program.computations.items():
        if (name in inside) == conditional:
            for each in instructions.values():
                if each.opcode in COLLECTIVES:
                    given = [instructions[operand].numbers for operand in each.operands]
                    found.append((each.opcode, sum(given)))
    return sorted(found)


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
