"""Each mistake with banks, and with a scale or bias in the call, has its own error."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from tests.support.mistakes import NC, Mistake, untyped

PARAMS, STATS = bnjax.init(3, banks=2)
_, PLAIN = bnjax.init(3)
VARIABLES = {"params": PARAMS, "batch_stats": STATS}
LAYER = bnjax.BatchNorm1d(3, banks=("source", "target"))
TOP = "\nIn BatchNorm1d at the top of the model."
NNX = "\nIn BatchNorm1d of 3 features."
NUMBER = (
    "`banks` must be the number of sets of statistics or their names, all different, as in "
    "banks=('clean', 'adversarial'), got {}."
)
KINDS = (
    "A scale and a bias are learned (True) or not (False), got {}. With `banks`, 'own' has one for "
    "each bank, and 'both' adds them."
)


def core(stats: Any = STATS, x: Any = NC, **told: Any):
    return lambda: bnjax.batch_norm(PARAMS, stats, x, mutable=True, **told)


def apply(layer: Any = LAYER, variables: Any = VARIABLES, **told: Any):
    return lambda: layer.apply(variables, NC, **told)


def of_nnx(bank: Any, banks: Any = ("source", "target")):
    return lambda: bnjax.nnx.BatchNorm1d(3, banks=banks, rngs=nnx.Rngs(0))(NC, bank=bank)


def within(which: Any, call: Any):
    def run():
        with bnjax.bank(which):
            call()

    return run


BANKS = (
    Mistake(
        "unknown name",
        apply(bank="tagret"),
        "There is no bank 'tagret'; the banks are ['source', 'target']." + TOP,
    ),
    Mistake(
        "unknown name in a context",
        within("tagret", apply()),
        "There is no bank 'tagret'; the banks are ['source', 'target']." + TOP,
    ),
    Mistake(
        "unknown name in nnx",
        of_nnx("tagret"),
        "There is no bank 'tagret'; the banks are ['source', 'target']." + NNX,
    ),
    Mistake(
        "a name where banks are numbers",
        of_nnx("source", 2),
        "There is no bank 'source'; the banks are ['0', '1']." + NNX,
    ),
    Mistake(
        "missing",
        apply(),
        "The layer has the banks ['source', 'target'], and the call must say which one: pass "
        '`bank`, or write `with bnjax.bank("source"):` around the call of the model.' + TOP,
    ),
    Mistake(
        "missing in the core",
        core(),
        "`batch_stats` keeps 2 banks, so the call must say which one: pass `bank`, a number, or "
        "one for each example.",
    ),
    Mistake(
        "without banks",
        apply(bnjax.BatchNorm1d(3), {"params": PARAMS, "batch_stats": PLAIN}, bank="source"),
        "The call has bank='source', but the layer has no banks. Make it with "
        "banks=('source', 'target'), or leave `bank` out." + TOP,
    ),
    Mistake(
        "without banks in the core",
        core(PLAIN, bank=1),
        "`bank` chooses among several sets of statistics, got 1, but `batch_stats` keeps one set, "
        "or none. Create it with bnjax.init(..., banks=2), or omit `bank`.",
    ),
    Mistake(
        "a float",
        core(bank=jnp.zeros(4)),
        "`bank` must be an integer or an array of integers, got float32. Convert it first, as in "
        "`bank.astype(jnp.int32)`.",
        TypeError,
    ),
    Mistake(
        "a float of python",
        apply(bank=0.0),
        "`bank` must be an integer or an array of integers, got float64. Convert it first, as in "
        "`bank.astype(jnp.int32)`." + TOP,
        TypeError,
    ),
    Mistake(
        "wrong length",
        core(bank=jnp.zeros(3, int)),
        "`bank` must be one number, or one for each of the 4 examples, got shape (3,).",
    ),
    Mistake(
        "a column",
        core(bank=jnp.zeros((4, 1), int)),
        "`bank` must be one number, or one for each of the 4 examples, got shape (4, 1).",
    ),
    Mistake(
        "out of range",
        core(bank=np.array([0, 2, -1, 1])),
        "`bank` must lie between 0 and 1, got [-1, 2].",
    ),
    Mistake("a number out of range", core(bank=2), "`bank` must lie between 0 and 1, got [2]."),
    Mistake(
        "a negative number in nnx", of_nnx(-1), "`bank` must lie between 0 and 1, got [-1]." + NNX
    ),
    Mistake(
        "out of range where the mask counts",
        core(bank=np.array([0, 5, -1, 1]), mask=np.array([[True], [False], [True], [True]])),
        "`bank` must lie between 0 and 1, got [-1].",
    ),
    Mistake("no banks", lambda: bnjax.BatchNorm1d(3, banks=()), NUMBER.format("()")),
    Mistake("one name", lambda: bnjax.BatchNorm1d(3, banks="ab"), NUMBER.format("'ab'")),
    Mistake(
        "same names", lambda: bnjax.BatchNorm1d(3, banks=["a", "a"]), NUMBER.format("['a', 'a']")
    ),
    Mistake("half a bank", lambda: bnjax.BatchNorm1d(3, banks=untyped(1.5)), NUMBER.format("1.5")),
    Mistake(
        "zero banks",
        lambda: bnjax.init(3, banks=0),
        "`banks` must be the number of sets of statistics, an integer and at least 1, got 0. None "
        "keeps one set without banks.",
    ),
    Mistake(
        "zero banks in a layer",
        lambda: bnjax.BatchNorm1d(3, banks=0),
        "`banks` must be the number of sets of statistics, an integer and at least 1, got 0. None "
        "keeps one set without banks.",
    ),
    Mistake("own without banks", lambda: bnjax.BatchNorm1d(3, affine="own"), KINDS.format("'own'")),
    Mistake(
        "unknown kind",
        lambda: bnjax.BatchNorm1d(3, banks=2, affine=untyped("shared")),
        KINDS.format("'shared'"),
    ),
    Mistake(
        "unknown kind in the core",
        lambda: bnjax.init(3, affine="both"),
        KINDS.format("'both'"),
    ),
    Mistake(
        "statistics of fewer banks",
        apply(bnjax.BatchNorm1d(3, banks=("a", "b", "c")), bank="c"),
        "`bank` must lie between 0 and 1, got [2]." + TOP,
    ),
)

EXPECTED = (
    "`{}` at the call must have an entry for each example and channel, of shape {}, or broadcast "
    "to it, got shape {}."
)
AFFINE = (
    Mistake(
        "scale of too few",
        core(PLAIN, scale=jnp.ones((3, 3))),
        EXPECTED.format("scale", "(4, 3)", "(3, 3)"),
    ),
    Mistake(
        "bias of one axis", core(PLAIN, bias=jnp.ones(4)), EXPECTED.format("bias", "(4, 3)", "(4,)")
    ),
    Mistake(
        "scale of all positions",
        core(PLAIN, jnp.ones((4, 2, 3)), scale=jnp.ones((4, 2, 3))),
        EXPECTED.format("scale", "(4, 3)", "(4, 2, 3)"),
    ),
    Mistake(
        "in a layer",
        apply(
            bnjax.BatchNorm1d(3), {"params": PARAMS, "batch_stats": PLAIN}, scale=jnp.ones((4, 2))
        ),
        EXPECTED.format("scale", "(4, 3)", "(4, 2)") + TOP,
    ),
)


@pytest.mark.parametrize("mistake", BANKS + AFFINE, ids=lambda mistake: mistake.name)
def test_each_mistake_raises_the_whole_message(mistake):
    with pytest.raises(mistake.error, match=rf"^{re.escape(mistake.message)}(\n-|$)"):
        mistake.call()


def test_banks_keep_running_statistics():
    message = "`banks` are sets of running statistics, but track_running_stats=False keeps none."
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        bnjax.BatchNorm1d(3, banks=2, track_running_stats=False)
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        bnjax.nnx.BatchNorm1d(3, banks=2, track_running_stats=False, rngs=nnx.Rngs(0))


def test_keys_of_banks_must_all_be_present():
    message = (
        "`params` must have the keys {scale, bias, bank_scale, bank_bias} or {scale, bias, "
        "bank_scale} or {scale, bias, bank_bias} or {scale, bias} or {scale, bank_scale} or {scale}"
        " or {bias, bank_bias} or {bias} or {}, got ['bank_scale']"
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        bnjax.batch_norm({"bank_scale": jnp.ones((2, 3))}, STATS, NC, bank=0, mutable=True)


@jax.jit
def lost(bank: jax.Array) -> Any:
    return bnjax.batch_norm(PARAMS, STATS, NC, bank=bank, mutable=True)


def test_under_jit_an_index_out_of_range_gives_nan_instead_of_an_error():
    y, moved = lost(jnp.array([0, 2, 0, 0]))
    assert np.isnan(y).any(1).tolist() == [False, True, False, False]
    assert (moved["mean"][1] == 0).all()
    y, moved = lost(jnp.int32(-1))
    assert np.isnan(y).all()
    assert (moved["mean"] == 0).all()
