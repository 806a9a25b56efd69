"""Kernels, and what they read and write, of a compiled program."""

import re
from typing import Any, NamedTuple

from tests.support.hlo import COLLECTIVES, Instruction, Program

# What runs no kernel.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
_FREE |= {"partition-id", "replica-id", "optimization-barrier"}
_ON_CONDITION = {"conditional", "while"}
# Copies beside the kernels, between a TPU's two memories.
_COPIES = {"copy", "slice", "async"}
_PARTS = {"slice", "dynamic-slice", "gather"}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NUMBER = re.compile(r"parameter\((\d+)\)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Kernel(NamedTuple):
    """One, with the bytes of each array that it reads and writes.

    Attributes:
        name: of its instruction.
        reads: without what a slice or gather leaves out.
        writes: the results; of an update in place the new part alone.
        cycles: XLA's estimate, where it makes one.
        in_branch: whether it runs on a condition.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    cycles: int
    in_branch: bool

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.reads) + sum(self.writes)


def kernels(program: Program) -> list[Kernel]:
    """All that a program launches, collectives and copies between a TPU's memories apart."""
    return _kernels(program, program.entry, False)


def summary(found: list[Kernel], unit: int) -> dict[str, Any]:
    """How many kernels, and their readings and writings of arrays of x's size in units of x."""

    def large(sizes: list[int]) -> float:
        return sum(size for size in sizes if size >= unit / 2) / unit

    return {
        "kernels": len(found),
        "reads": large([size for kernel in found for size in kernel.reads]),
        "writes": large([size for kernel in found for size in kernel.writes]),
        "bytes": sum(kernel.bytes for kernel in found),
        "cycles": sum(kernel.cycles for kernel in found),
    }


def _kernels(program: Program, computation: str, in_branch: bool) -> list[Kernel]:
    found = []
    for each in program.computations[computation].values():
        if each.opcode in _ON_CONDITION or each.opcode == "call":
            inside = in_branch or each.opcode in _ON_CONDITION
            for name in each.calls:
                found += _kernels(program, name, inside)
        elif _is_kernel(each):
            reads, writes = _moved(program, computation, each)
            cycles = _CYCLES.search(each.text)
            cost = int(cycles[1]) if cycles else 0
            found.append(Kernel(each.name, tuple(reads), tuple(writes), cost, in_branch))
    return found


def _is_kernel(each: Instruction) -> bool:
    if each.opcode in _FREE | COLLECTIVES or each.opcode.endswith(("-done", "-update")):
        return False
    if each.started and each.opcode in _COPIES:
        return False
    # Slices that were copied one by one lie side by side.
    return "ConcatBitcast" not in _target(each)


def _target(each: Instruction) -> str:
    found = _TARGET.search(each.text) if each.opcode == "custom-call" else None
    return found[1] if found else ""


def _moved(program: Program, computation: str, each: Instruction) -> tuple[list[int], list[int]]:
    given = program.computations[computation]
    if each.opcode == "fusion":
        return _moved_by_fusion(program, each)
    reads = [size for name in dict.fromkeys(each.operands) for size in given[name].bytes]
    if each.opcode in _PARTS:
        reads = [min(size, sum(each.bytes)) for size in reads]
    # A call of a library gives its workspace beside its result.
    return reads, each.bytes[:1] if each.opcode == "custom-call" else each.bytes


def _moved_by_fusion(program: Program, each: Instruction) -> tuple[list[int], list[int]]:
    fused = program.computations[each.calls[0]]
    parts = {
        (each.operands[_number(inner)], _read(program, each.calls[0], inner))
        for inner in fused.values()
        if inner.opcode == "parameter"
    }
    writes = each.bytes
    root = next(inner for inner in fused.values() if inner.root)
    if root.opcode == "dynamic-update-slice":
        writes = fused[root.operands[1]].bytes
    return [size for _, size in sorted(parts)], writes


def _number(parameter: Instruction) -> int:
    found = _NUMBER.search(parameter.text)
    assert found is not None, parameter.text
    return int(found[1])


def _read(program: Program, computation: str, value: Instruction) -> int:
    """How many bytes of a value a fusion reads: less than all if it only looks at parts."""
    whole, total = sum(value.bytes), 0
    for user in program.computations[computation].values():
        if value.name not in user.operands:
            continue
        if user.opcode in _PARTS and user.operands[0] == value.name:
            total += sum(user.bytes)
        elif user.opcode in ("bitcast", "reshape"):
            total += _read(program, computation, user)
        elif user.opcode == "fusion":
            for inner in program.computations[user.calls[0]].values():
                if inner.opcode == "parameter" and user.operands[_number(inner)] == value.name:
                    total += _read(program, user.calls[0], inner)
        else:
            return whole
    return min(total, whole)
