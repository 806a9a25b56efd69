"""Programs are read by their structure."""

import jax
import jax.numpy as jnp
import pytest

from tests.support.hlo import Collective, Instruction, compiled, operations, parse, primitives

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%inner (x: f32[2]) -> f32[2] {
  ROOT %x = f32[2]{0} parameter(0), metadata={op_name="jit(f)/%deep (x" stack_frame_id=1}
}

%branch (a: (f32[2], (s32[], pred[3,1]))) -> f32[2] {
  %a = (f32[2]{0}, (s32[], /*index=2*/pred[3,1]{1,0:T(8,128)})) parameter(0)
  %b = f32[2]{0} get-tuple-element(%a), index=0
  ROOT %c.1 = f32[2]{0} fusion(f32[2]{0} %b), kind=kLoop, calls=%inner
}

%other (y: f32[2]) -> f32[2] {
  ROOT %y = f32[2]{0} parameter(0)
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  %start = (f32[2]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}
  %zero = s32[] constant(0)
  ROOT %d = f32[2]{0} conditional(%zero, %p, %p), branch_computations={%branch, %other}
}
"""


def test_a_text_becomes_computations_of_instructions():
    program = parse(TEXT)
    assert program.entry == "%main"
    assert {name: [*inside] for name, inside in program.computations.items()} == {
        "%inner": ["%x"],
        "%branch": ["%a", "%b", "%c.1"],
        "%other": ["%y"],
        "%main": ["%p", "%start", "%zero", "%d"],
    }
    (fusion,) = program.instructions("fusion")
    text = "  ROOT %c.1 = f32[2]{0} fusion(f32[2]{0} %b), kind=kLoop, calls=%inner"
    assert fusion == Instruction("%c.1", "fusion", "f32[2]{0}", ("%b",), ("%inner",), text)
    assert (fusion.root, fusion.started, fusion.bytes) == (True, False, [8])
    pair = program.computations["%branch"]["%a"]
    assert (pair.shapes, pair.numbers, pair.bytes) == ([(2,), (), (3, 1)], 6, [8, 4, 3])
    (gather,) = program.instructions("all-gather")
    assert (gather.name, gather.root, gather.started) == ("%start", False, True)
    assert program.collectives() == [Collective("all-gather", 2, 8, False)]
    assert program.inputs() == {"%p"}
    assert [each.name for each in program.readers({"%p"})] == ["%start", "%d"]
    assert program.conditional() == {"%branch", "%other", "%inner"}


def test_what_is_no_program_is_an_error():
    with pytest.raises(AssertionError, match="no program of XLA"):
        parse("module @jit_f { }")


def function(x, n):
    x = jax.lax.cond(n > 3, lambda x: x @ x, lambda x: x * 2, x)
    return jax.lax.fori_loop(0, n, lambda _, x: jnp.sin(x) @ x, x)


def test_a_compiled_program_is_read():
    program = compiled(jax.jit(function), jnp.ones((3, 3)), 4)
    assert [each.shapes for each in program.instructions("dot")] == [[(3, 3)]] * 2
    inside = [name for name, it in program.computations.items() if "dot" in str(it.values())]
    assert len(inside) == 2
    assert len(program.conditional().intersection(inside)) == 1
    assert sum(program.types().values()) == len(program.instructions())


def test_a_program_of_jax_is_read_with_all_that_is_inside():
    found = primitives(jax.jit(function), jnp.ones((3, 3)), 4)
    assert (found["dot_general"], found["sin"], found["cond"], found["mul"]) == (2, 1, 1, 1)
    found = operations(jax.jit(function), jnp.ones((3, 3)), 4)
    assert (found["dot_general"], found["sine"], found["case"]) == (2, 1, 1)
