"""A policy costs next to nothing, and no policy costs nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.policies import Renorm
from tests.benchmarks import cases
from tests.benchmarks.policies import PLAIN, counted, programs
from tests.support.cases import Case
from tests.support.ways import CORE

pytestmark = pytest.mark.quick_compile


def kept(using: Any, dtype: Any, size: int | None = None) -> list[int]:
    """The sizes in bytes of the large arrays that a forward pass keeps for its gradient."""
    case = Case("images", (16, 8, 8, 6), -1, bnjax.BatchNorm2d)
    rng = np.random.default_rng(0)
    params, stats = case.params(rng), case.batch_stats(rng)

    def f(params: Any, x: Any) -> Any:
        settings = {"mutable": True, "using": using, "virtual_batch_size": size}
        return bnjax.batch_norm(params, stats, jnp.sin(x), **settings)[0]

    _, pull = jax.vjp(f, params, jnp.asarray(case.values(rng), dtype))
    arrays = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")]
    return sorted((leaf.size * leaf.dtype.itemsize) for leaf in arrays if leaf.size >= 1000)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [None, 4])
def test_renorm_keeps_no_more_for_the_backward_pass(dtype, size):
    plain = kept(None, dtype, size)
    assert plain  # the input of sin, and of the layer
    assert kept(Renorm(1.5, 0.25), dtype, size) == plain


def text(using: Any, mutable: bool) -> str:
    params, stats = bnjax.init(CORE.channels)
    settings: Any = {"mutable": mutable} | ({} if using == "left out" else {"using": using})
    f = lambda params, stats, x: bnjax.batch_norm(params, stats, x, **settings)  # noqa: E731
    grad = jax.value_and_grad(lambda *held: jnp.sum(f(*held)[0] ** 2), (0, 2))
    x = jnp.zeros(CORE.shape)
    return str(jax.make_jaxpr(f)(params, stats, x)) + str(jax.make_jaxpr(grad)(params, stats, x))


@pytest.mark.parametrize("mutable", [True, False])
def test_without_a_policy_the_program_is_that_of_batch_norm(mutable):
    assert text(None, mutable) == text("left out", mutable)
    # In evaluation renorm is batch norm, and so is its program.
    assert (text(Renorm(), mutable) == text(None, mutable)) == (not mutable)


@pytest.mark.quick_compile(False)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 14, 14, 64), (512, 64)])
def test_renorm_reads_writes_and_computes_what_batch_norm_does(shape, dtype):
    case, policies = cases.Case(shape, dtype=dtype), {PLAIN: None, "renorm": Renorm()}
    for which in (cases.FORWARD, cases.BACKWARD):
        compiled = programs(case, which, cases.inputs(case), policies)
        plain, own = (counted(compiled[name]) for name in policies)
        assert plain["bytes"] > 100_000
        for name, number in plain.items():  # r and d are some numbers for each channel
            assert own[name] <= 1.01 * number + 5_000, (which, name)
