"""The compiler in a hurry: where it is asked for, and nowhere else."""

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler

from tests.support.compilers import known, quickly


def options() -> dict:
    return dict(compiler.get_compile_options(1, 1).env_option_overrides)


def test_a_test_compiles_as_users_do():
    assert options() == {}


@pytest.mark.quick_compile
def test_a_marked_test_compiles_quickly():
    assert options() == known()


@pytest.mark.quick_compile
@pytest.mark.quick_compile(False)
def test_a_test_of_a_marked_file_can_compile_as_users_do():
    assert options() == {}


def test_what_was_compiled_quickly_is_used_in_that_context_alone(monkeypatch):
    compiled = []
    usual = compiler.compile_or_get_cached

    def recorded(backend, module, devices, compile_options, *rest):
        compiled.append(dict(compile_options.env_option_overrides))
        return usual(backend, module, devices, compile_options, *rest)

    x, double = jnp.ones(3), jax.jit(lambda x: 2 * jnp.sin(x))
    monkeypatch.setattr(compiler, "compile_or_get_cached", recorded)
    for quick in (True, False, True, False):
        with quickly(quick):
            double(x)
    assert compiled == [known(), {}]
