"""What a compiled program sends between devices, read from XLA's text."""

import math
import re
from typing import Any

# The kind of each collective, and how many numbers leave each device.
Sent = list[tuple[str, int]]

COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|send|recv)(-start)?"
)
COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{$(.*?)^\}", re.M | re.S)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)", re.M)


def collectives(compiled: Any, arguments: tuple, *, conditional: bool = False) -> Sent:
    """The collectives of a program, each with the numbers that each device gives it.

    Those that a step always runs, or those inside a branch of some condition.
    """
    computations = dict(COMPUTATION.findall(compiled.lower(*arguments).compile().as_text()))
    types, found, inside = {}, [], branches(computations)
    for name, text in computations.items():
        for result, kind, operation, operands in INSTRUCTION.findall(text):
            types[name, result] = kind
            if COLLECTIVE.fullmatch(operation) and (name in inside) == conditional:
                given = [numbers(types[name, o]) for o in re.findall(r"%[\w.-]+", operands)]
                found.append((operation.removesuffix("-start"), sum(given)))
    return sorted(found)


def branches(computations: dict[str, str]) -> set[str]:
    """The names of the computations that run on a condition."""

    def named(text: str) -> set[str]:
        return set(re.findall(r"%[\w.-]+", text)) & computations.keys()

    conditionals = re.findall(r"^.* conditional\(.*$", "\n".join(computations.values()), re.M)
    found, new = set(), named("\n".join(conditionals))
    while new:
        found |= new
        new = named("\n".join(computations[name] for name in new)) - found
    return found


def numbers(kind: str) -> int:
    """How many numbers a type such as `(f32[5]{0}, f32[2,3]{1,0})` holds."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", kind)
    return sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
