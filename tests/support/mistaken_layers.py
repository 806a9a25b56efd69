"""Mistakes with layers and their inputs, with the error that each raises."""

import jax.numpy as jnp
from flax import linen as nn

import bnjax
from tests.support.mistakes import (
    AXIS,
    CHANNELS,
    COUNT,
    FLAX,
    IMMUTABLE,
    MADE,
    MASK,
    MISSES,
    NC,
    NEGATIVE,
    NHWC,
    NUM_FEATURES,
    ONES,
    PARAM_KEYS,
    PARAMS,
    RANGE,
    REAL,
    RESHAPE,
    SHAPES,
    SINGLE,
    STAT_KEYS,
    STATS,
    TEXT,
    TOP,
    ZERO,
    Mistake,
    apply,
    core,
    init,
    train,
    untyped,
)

RANK = (
    Mistake(
        "1d of 1",
        init(bnjax.BatchNorm1d(3), jnp.ones(3)),
        "BatchNorm1d expected 2D input (N, C) or 3D input (N, L, C), got 1D input of shape (3,). "
        + RESHAPE,
    ),
    Mistake(
        "1d of 4",
        init(bnjax.BatchNorm1d(3, axis=1)),
        "BatchNorm1d expected 2D input (N, C) or 3D input (N, C, L), got 4D input of shape "
        "(2, 5, 4, 3). Use BatchNorm2d, or reshape the input.",
    ),
    Mistake(
        "2d of 2",
        init(bnjax.BatchNorm2d(3), NC),
        "BatchNorm2d expected 4D input (N, H, W, C), got 2D input of shape (4, 3). "
        "Use BatchNorm1d, or reshape the input.",
    ),
    Mistake(
        "2d of 5",
        init(bnjax.BatchNorm2d(3, axis=1), NHWC[None]),
        "BatchNorm2d expected 4D input (N, C, H, W), got 5D input of shape (1, 2, 5, 4, 3). "
        "Use BatchNorm3d, or reshape the input.",
    ),
    Mistake(
        "3d of 6",
        init(bnjax.BatchNorm3d(3), NHWC[None, None]),
        "BatchNorm3d expected 5D input (N, D, H, W, C), got 6D input of shape (1, 1, 2, 5, 4, 3). "
        + RESHAPE,
    ),
)

CHANNEL_COUNT = (
    Mistake(
        "channels last",
        init(bnjax.BatchNorm2d(5)),
        CHANNELS.format(5, 3, "(2, 5, 4, 3)", 3) + "Axis 1 has that size: did you mean `axis=1`?",
    ),
    Mistake(
        "channels first",
        init(bnjax.BatchNorm2d(3, axis=1)),
        CHANNELS.format(3, 1, "(2, 5, 4, 3)", 5) + "Axis 3 has that size: did you mean `axis=3`?",
    ),
    Mistake(
        "nowhere",
        init(bnjax.BatchNorm2d(2)),
        CHANNELS.format(2, 3, "(2, 5, 4, 3)", 3) + "Make the layer for the channels it gets.",
    ),
    Mistake(
        "negative",
        lambda: bnjax.init(-2),
        NUM_FEATURES.format(-2),
    ),
    Mistake(
        "no whole number",
        lambda: bnjax.init(untyped(2.5)),
        NUM_FEATURES.format(2.5),
    ),
    Mistake(
        "in params",
        core(x=jnp.ones((2, 4))),
        SHAPES.format("params", "(4,)", "{'bias': (3,), 'scale': (3,)}"),
    ),
    Mistake(
        "in statistics",
        core({}, x=jnp.ones((2, 4))),
        SHAPES.format("batch_stats", "(4,)", "{'mean': (3,), 'var': (3,)}"),
    ),
    Mistake(
        "in the statistics of a layer",
        apply(bnjax.BatchNorm1d(affine=False), jnp.ones((2, 4)), {"batch_stats": STATS}),
        SHAPES.format("batch_stats", "(4,)", "{'mean': (3,), 'var': (3,)}")
        + TOP.format("BatchNorm1d"),
    ),
)

DTYPE = (
    *(
        Mistake(
            dtype, init(bnjax.BatchNorm2d(3), NHWC.astype(dtype)), REAL.format(dtype), TypeError
        )
        for dtype in ("int32", "uint8", "bool", "complex64")
    ),
)

NUMBERS = (
    Mistake("torch momentum", lambda: bnjax.BatchNorm1d(momentum=1.5), RANGE.format(1.5)),
    Mistake("torch negative", lambda: bnjax.BatchNorm3d(momentum=-0.1), RANGE.format(-0.1)),
    Mistake("flax momentum", lambda: FLAX(momentum=7), RANGE.format(7)),
    Mistake("core momentum", core(momentum=2), RANGE.format(2)),
    Mistake("nan momentum", core(momentum=float("nan")), RANGE.format("nan")),
    Mistake("core eps", core(eps=-1, mutable=False), NEGATIVE.format("eps", -1)),
    Mistake("torch eps", lambda: bnjax.BatchNorm2d(eps=-1e-5), NEGATIVE.format("eps", -1e-5)),
    Mistake("flax epsilon", lambda: FLAX(epsilon=-1.0), NEGATIVE.format("epsilon", -1.0)),
    Mistake("core eps 0", core(eps=0), ZERO.format(0)),
    Mistake(
        "core eps 0 without statistics",
        core(batch_stats={}, eps=0, mutable=False),
        ZERO.format(0),
    ),
    Mistake(
        "layer eps 0",
        train(bnjax.BatchNorm1d(3, eps=0.0)),
        ZERO.format(0.0) + TOP.format("BatchNorm1d"),
    ),
    Mistake("text momentum", core(momentum="0.1"), TEXT.format("'0.1'")),
    Mistake("nan eps", core(eps=float("nan")), NEGATIVE.format("eps", "nan")),
    Mistake(
        "text eps",
        lambda: bnjax.BatchNorm2d(eps=untyped("small")),
        NEGATIVE.format("eps", "'small'"),
    ),
    Mistake(
        "negative correction",
        core(correction=-1),
        "`correction` must not be negative, got -1. 1 gives PyTorch's unbiased running variance, "
        "0 Flax's biased one.",
    ),
    Mistake("no whole axis", core(axis=1.0), AXIS.format(2, 1, 1.0)),
    Mistake(
        "two axes of a torch layer",
        init(bnjax.BatchNorm2d(3, axis=untyped((1, 2)))),
        "`axis` of BatchNorm2d must be one integer, got (1, 2). bnjax.linen.BatchNorm takes "
        "several axes.",
    ),
    Mistake(
        "a number",
        core(x=jnp.ones(())),
        "`x` must have a channel axis, got a number, of shape ().",
    ),
    Mistake("axis too large", core(axis=2), AXIS.format(2, 1, 2)),
    Mistake("axis too small", core(axis=-3), AXIS.format(2, 1, -3)),
    Mistake("one of two axes", core(axis=(1, 4)), AXIS.format(2, 1, (1, 4))),
    Mistake("no axis", core(axis=()), AXIS.format(2, 1, ())),
    Mistake("layer axis", init(bnjax.BatchNorm2d(3, axis=7)), AXIS.format(4, 3, 7)),
    Mistake("flax axis", init(FLAX(axis=7, use_running_average=True)), AXIS.format(4, 3, 7)),
)

SINGLE_VALUE = (
    Mistake("core", core(x=NC[:1]), SINGLE.format("(1, 3)")),
    Mistake(
        "core without statistics",
        core(batch_stats={}, x=NC[:1], mutable=False),
        SINGLE.format("(1, 3)"),
    ),
    Mistake(
        "layer",
        train(bnjax.BatchNorm2d(3), NHWC[:1, :1, :1]),
        SINGLE.format("(1, 1, 1, 3)") + TOP.format("BatchNorm2d"),
    ),
)

MASKS = (
    Mistake(
        "rows",
        core(mask=jnp.ones(4, bool)),
        MASK.format("(4, 3)", "(4,)") + "It fits the leading axes: write `mask[:, None]`.",
    ),
    Mistake(
        "pixels",
        train(FLAX(use_running_average=False), NHWC, mask=jnp.ones((2, 5, 4))),
        MASK.format("(2, 5, 4, 3)", "(2, 5, 4)")
        + "It fits the leading axes: write `mask[:, :, :, None]`."
        + TOP.format("BatchNorm"),
    ),
    Mistake(
        "size",
        core(mask=jnp.ones((2, 1), bool)),
        MASK.format("(4, 3)", "(2, 1)") + ONES,
    ),
    Mistake(
        "rank",
        core(mask=jnp.ones((1, 4, 3), bool)),
        MASK.format("(4, 3)", "(1, 4, 3)") + ONES,
    ),
    Mistake(
        "dtype",
        core(mask=jnp.ones((4, 1))),
        "`mask` must be boolean, got float32. Convert it first, as in `mask != 0`.",
        TypeError,
    ),
)

KEYS = (
    Mistake(
        "misspelt params",
        core({"weight": STATS["var"], "bias": STATS["mean"]}),
        PARAM_KEYS.format("['bias', 'weight']: missing ['scale'] and unknown ['weight']")
        + "PyTorch's `weight` is `scale` here; bnjax.from_torch converts a state dict.",
    ),
    Mistake(
        "swapped trees",
        core(STATS, PARAMS),
        PARAM_KEYS.format("['mean', 'var']: missing ['bias', 'scale'] and unknown ['mean', 'var']")
        + MADE,
    ),
    Mistake(
        "torch statistics",
        core(batch_stats={"running_mean": STATS["mean"], "var": STATS["var"]}),
        STAT_KEYS.format("['running_mean', 'var']: missing ['mean'] and unknown ['running_mean']")
        + "PyTorch's `running_mean` is `mean` here; bnjax.from_torch converts a state dict.",
    ),
    Mistake(
        "half the statistics",
        core(batch_stats={"mean": STATS["mean"]}),
        STAT_KEYS.format("['mean']: missing ['var']") + MADE,
    ),
    Mistake(
        "no count",
        core(momentum=None),
        "`batch_stats` must have the keys {mean, var, count}, got ['mean', 'var']: missing "
        "['count']. " + COUNT,
    ),
    Mistake(
        "params of another kind",
        core([1.0]),
        "`params` must be a dict of arrays, got list. bnjax.init makes it.",
        TypeError,
    ),
    Mistake(
        "no params",
        core(None),
        "`params` must be a dict of arrays, got NoneType. bnjax.init makes it.",
        TypeError,
    ),
    Mistake(
        "layer without statistics",
        apply(bnjax.BatchNorm1d(3), variables={"params": PARAMS}),
        MISSES.format("the top of the model", "['mean', 'var']", "batch_stats", "none"),
    ),
    Mistake(
        "layer with misspelt statistics",
        apply(
            nn.Sequential([bnjax.BatchNorm1d(3)]),
            variables={
                "params": {"layers_0": PARAMS},
                "batch_stats": {"layers_0": {"mean": STATS["mean"], "variance": STATS["var"]}},
            },
        ),
        MISSES.format("'layers_0'", "['var']", "batch_stats", "['mean', 'variance']"),
    ),
    Mistake(
        "layer with half the statistics",
        train(
            bnjax.BatchNorm1d(3), variables={"params": PARAMS, "batch_stats": {"var": STATS["var"]}}
        ),
        MISSES.format("the top of the model", "['mean']", "batch_stats", "['var']"),
    ),
    Mistake(
        "layer with misspelt params",
        apply(
            FLAX(use_running_average=True),
            variables={
                "params": {"weight": STATS["var"], "bias": STATS["mean"]},
                "batch_stats": STATS,
            },
        ),
        MISSES.format("the top of the model", "['scale']", "params", "['bias', 'weight']"),
    ),
    Mistake(
        "layer without params",
        apply(bnjax.BatchNorm1d(3), variables={"batch_stats": STATS}),
        MISSES.format("the top of the model", "['bias', 'scale']", "params", "none"),
    ),
)

MODES = (
    Mistake(
        "immutable",
        apply(bnjax.BatchNorm1d(3, use_running_average=False)),
        IMMUTABLE.format("the top of the model"),
    ),
    Mistake(
        "immutable at call",
        apply(FLAX(), use_running_average=False),
        IMMUTABLE.format("the top of the model"),
    ),
    Mistake(
        "given twice",
        apply(FLAX(use_running_average=True), use_running_average=True),
        "`use_running_average` was given to the constructor and to the call. Give it to one.",
    ),
    Mistake(
        "never given",
        apply(FLAX()),
        "`use_running_average` was given neither to the constructor nor to the call. Pass "
        "use_running_average=False to train, True to evaluate; bnjax.BatchNorm2d needs neither.",
    ),
)

TABLES = {
    "rank": RANK,
    "channels": CHANNEL_COUNT,
    "dtype": DTYPE,
    "number": NUMBERS,
    "single value": SINGLE_VALUE,
    "mask": MASKS,
    "keys": KEYS,
    "mode": MODES,
}
