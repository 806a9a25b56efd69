"""Mistakes in calls of layers and tools, with the error that each raises."""

import jax
from flax import linen as nn
from flax import nnx

from tests.support.mistaken_models import (
    LAYER,
    NET,
    Called,
    Deep,
    Net,
    bn,
    frozen,
    like_flax,
    nnx_layer,
    state,
)
from tests.support.mistakes import (
    COUNT,
    KEY,
    NC,
    NHWC,
    PARAMS,
    STATS,
    VARIABLES,
    Mistake,
    apply,
    core,
    init,
    untyped,
)

CALLS = (
    Mistake(
        "train=",
        lambda: init(Called("train"))(),
        "A call of BatchNorm2d takes no argument `train`. It trains in model.apply(..., "
        "mutable=['batch_stats']); or pass use_running_average=not train.\n"
        "In BatchNorm2d at 'bn'.",
        TypeError,
    ),
    Mistake(
        "training= of Flax's convention",
        lambda: like_flax().init(KEY, NC, training=True),
        "A call of BatchNorm takes no argument `training`. Pass use_running_average=not "
        "training.\n"
        "In BatchNorm at the top of the model.",
        TypeError,
    ),
    Mistake(
        "deterministic=",
        lambda: bn.BatchNorm1d().init(KEY, NC, deterministic=True),
        "A call of BatchNorm1d takes no argument `deterministic`. It trains in "
        "model.apply(..., mutable=['batch_stats']); or pass "
        "use_running_average=deterministic.\n"
        "In BatchNorm1d at the top of the model.",
        TypeError,
    ),
    Mistake(
        "a mask misspelt",
        lambda: bn.BatchNorm1d().init(KEY, NC, msk=None),
        "A call of BatchNorm1d takes no argument `msk`. Did you mean `mask`?\n"
        "In BatchNorm1d at the top of the model.",
        TypeError,
    ),
    Mistake(
        "nothing like it",
        lambda: bn.BatchNorm1d().init(KEY, NC, colour=1),
        "A call of BatchNorm1d takes no argument `colour`. It takes x, use_running_average, "
        "mask, bank, scale, bias.\n"
        "In BatchNorm1d at the top of the model.",
        TypeError,
    ),
    Mistake(
        "train= in nnx",
        lambda: nnx_layer()(NHWC, train=True),
        "A call of BatchNorm2d takes no argument `train`. Call model.train() or model.eval(), "
        "or pass use_running_average=not train.\n"
        "In BatchNorm2d of 3 features.",
        TypeError,
    ),
    Mistake(
        "inference= in nnx",
        lambda: nnx_layer(bn.nnx.BatchNorm)(NHWC, inference=True),
        "A call of BatchNorm takes no argument `inference`. Call model.train() or "
        "model.eval(), or pass use_running_average=inference.\n"
        "In BatchNorm of 3 features.",
        TypeError,
    ),
    Mistake(
        "a linen layer in an nnx model",
        lambda: nnx.Sequential(bn.BatchNorm2d(3))(NHWC),
        "BatchNorm2d is a linen layer and has no variables of its own: call it in a linen "
        "model, or as layer.apply(variables, x). In an nnx model, use "
        "bnjax.nnx.BatchNorm2d(num_features, rngs=rngs).",
        TypeError,
    ),
    Mistake(
        "a layer without variables",
        lambda: bn.BatchNorm1d()(NC),
        "BatchNorm1d is a linen layer and has no variables of its own: call it in a linen "
        "model, or as layer.apply(variables, x). In an nnx model, use "
        "bnjax.nnx.BatchNorm1d(num_features, rngs=rngs).",
        TypeError,
    ),
    Mistake(
        "the other drop-in in nnx",
        lambda: nnx.Sequential(like_flax())(NC),
        "BatchNorm is a linen layer and has no variables of its own: call it in a linen "
        "model, or as layer.apply(variables, x). In an nnx model, use "
        "bnjax.nnx.BatchNorm(num_features, rngs=rngs).",
        TypeError,
    ),
    Mistake(
        "channels deep in an nnx model",
        lambda: Deep(7)(NHWC),
        "`num_features` is 7, but axis 3 of the input of shape (2, 5, 4, 3) has 3 channels. "
        "Make the layer for the channels it gets.\n"
        "In BatchNorm2d at 'norms/0'.",
        ValueError,
    ),
    Mistake(
        "rank deep in an nnx model",
        lambda: Deep(3)(NC),
        "BatchNorm2d expected 4D input (N, H, W, C), got 2D input of shape (4, 3). Use "
        "BatchNorm1d, or reshape the input.\n"
        "In BatchNorm2d at 'norms/0'.",
        ValueError,
    ),
    Mistake(
        "a traced mode",
        lambda: jax.jit(lambda mode: like_flax().apply(VARIABLES, NC, use_running_average=mode))(
            True
        ),
        "`use_running_average` must be a Python bool, got a traced value: it decides which "
        "program is compiled. Make it static, as in jax.jit(f, "
        "static_argnames='use_running_average').\n"
        "In BatchNorm at the top of the model.",
        TypeError,
    ),
    Mistake(
        "a traced mode of the core",
        lambda: jax.jit(lambda mode: bn.batch_norm(PARAMS, STATS, NC, mutable=mode))(True),
        "`mutable` must be a Python bool, got a traced value: it decides which program is "
        "compiled. Make it static, as in jax.jit(f, static_argnames='mutable').",
        TypeError,
    ),
    Mistake(
        "a traced mode in nnx",
        lambda: jax.jit(lambda mode: nnx_layer()(NHWC, use_running_average=mode))(True),
        "`use_running_average` must be a Python bool, got a traced value: it decides which "
        "program is compiled. Make it static, as in jax.jit(f, "
        "static_argnames='use_running_average').\n"
        "In BatchNorm2d of 3 features.",
        TypeError,
    ),
    Mistake(
        "a policy that is not called",
        lambda: jax.grad(
            jax.checkpoint(
                lambda x: untyped(LAYER.apply(VARIABLES, x)).sum(), policy=bn.remat_policy
            )
        )(NC),
        "`policy` must be what bnjax.remat_policy() returns, got the function itself. Call "
        "it, as in nn.remat(Block, policy=bnjax.remat_policy()).",
        TypeError,
    ),
    Mistake(
        "all variables as parameters",
        lambda: core(VARIABLES)(),
        "`params` must have the keys {scale, bias} or {scale} or {bias} or {}, got "
        "['batch_stats', 'params']: missing ['bias', 'scale'] and unknown ['batch_stats', "
        "'params']. These are all variables: pass variables['params'].",
        ValueError,
    ),
    Mistake(
        "all variables as statistics",
        lambda: core(batch_stats=VARIABLES)(),
        "`batch_stats` must have the keys {mean, var} or {mean, var, count} or {}, got "
        "['batch_stats', 'params']: missing ['mean', 'var'] and unknown ['batch_stats', "
        "'params']. These are all variables: pass variables['batch_stats'].",
        ValueError,
    ),
    Mistake(
        "a state dict's names",
        lambda: core({"weight": STATS["var"], "bias": STATS["mean"]})(),
        "`params` must have the keys {scale, bias} or {scale} or {bias} or {}, got ['bias', "
        "'weight']: missing ['scale'] and unknown ['weight']. PyTorch's `weight` is `scale` "
        "here; bnjax.from_torch converts a state dict.",
        ValueError,
    ),
    Mistake(
        "an old checkpoint for the cumulative average",
        lambda: apply(bn.BatchNorm1d(momentum=None))(),
        "The batch norm at the top of the model misses ['count'] in `batch_stats`: it has "
        "['mean', 'var']. " + COUNT + "\n"
        "In BatchNorm1d at the top of the model.",
        ValueError,
    ),
)

TOOLS = (
    Mistake(
        "a class",
        lambda: bn.recalibrate(Net, VARIABLES, [NC]),
        "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got type. Create "
        "one: Net(...).",
        TypeError,
    ),
    Mistake(
        "one batch",
        lambda: bn.recalibrate(NET, state().variables, NC),
        "`batches` must be a list or an iterator of batches, got an array of shape (4, 3): "
        "write [batch].",
        TypeError,
    ),
    Mistake(
        "no batch",
        lambda: bn.recalibrate(NET, state().variables, []),
        "`batches` must hold at least one batch, got none. An iterator can be used only once: pass "
        "a list, or create it again.",
        ValueError,
    ),
    Mistake(
        "parameters alone",
        lambda: bn.recalibrate(NET, state().params, [NC]),
        "`variables` must be a dict with the collection `batch_stats`, like those of any model "
        "with batch norms, got ['inner']. Pass {'params': params, 'batch_stats': batch_stats}.",
        ValueError,
    ),
    Mistake(
        "a number as a mesh of recalibrate",
        lambda: bn.recalibrate(NET, state().variables, [NC], mesh=4),
        "`mesh` must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('data',)), got int.",
        TypeError,
    ),
    Mistake(
        "an iterator that is read often",
        lambda: bn.recalibrate(NET, state().variables, iter([NC]), sequential=True),
        "`batches` must be iterable once per layer, got a list_iterator, which can be used only "
        "once. Pass a list, or use sequential=False.",
        ValueError,
    ),
    Mistake(
        "a glob that fits no batch norm",
        lambda: bn.recalibrate(NET, state().variables, [NC], paths="head/**"),
        "The pattern 'head/**' matches no batch norm: there are ['inner/bn']. `*` matches part of "
        "one name, `**` any number of names, as in 'encoder/**'.",
        ValueError,
    ),
    Mistake(
        "a class for diagnose",
        lambda: bn.diagnose(Net, VARIABLES, [NC]),
        "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got type. Create "
        "one: Net(...).",
        TypeError,
    ),
    Mistake(
        "one array for diagnose",
        lambda: bn.diagnose(NET, state().variables, NC),
        "`batches` must be a list or an iterator of batches, got an array of shape (4, 3): "
        "write [batch].",
        TypeError,
    ),
    Mistake(
        "no batch norm",
        lambda: bn.fold(nn.Dense(3), nn.Dense(3).init(KEY, NC), NC),
        "`model` must call a batch norm of bnjax or Flax, but calls none. If it has one of another "
        "class, register that with bnjax.register.",
        ValueError,
    ),
    Mistake(
        "parameters alone for fold",
        lambda: bn.fold(NET, state().params, NC),
        "`variables` must be a dict with the collection `batch_stats`, like those of any model "
        "with batch norms, got ['inner']. Pass {'params': params, 'batch_stats': batch_stats}.",
        ValueError,
    ),
    Mistake(
        "one set of statistics",
        lambda: bn.merge_batch_stats({"bn": STATS}),
        "`batch_stats` must be stacked along axis 0, but the mean at 'bn' has shape (3,). A single "
        "set needs no merging.",
        ValueError,
    ),
    Mistake(
        "a model to register",
        lambda: bn.register(NET),
        "`kind` must be a class of linen or nnx modules, got Net(). Pass its class, Net.",
        TypeError,
    ),
    Mistake(
        "a class that is known",
        lambda: bn.register(bn.BatchNorm2d),
        "`kind` must be an unknown class, but BatchNorm2d inherits from a known one. It needs no "
        "registration.",
        ValueError,
    ),
    Mistake(
        "no setting",
        lambda: bn.override("**"),
        "`override` needs at least one setting, got none. Write, for example, "
        "override('encoder/**', momentum=0.01).",
        TypeError,
    ),
    Mistake(
        "a setting misspelt",
        lambda: bn.override("**", momentom=0.1),
        "`override` takes settings of batch norm layers, got `momentom`. Did you mean `momentum`?",
        TypeError,
    ),
    Mistake(
        "a setting of nobody's",
        lambda: bn.override("**", colour=3),
        "`override` takes settings of batch norm layers, got `colour`. It takes their fields, such "
        "as momentum, eps, axis_name or use_running_average.",
        TypeError,
    ),
    Mistake(
        "a number as a glob",
        lambda: bn.freeze(3),
        "Paths must be a glob or several, such as 'encoder/**', got 3.",
        TypeError,
    ),
    Mistake(
        "a glob that fits nothing met",
        lambda: frozen("head"),
        "The pattern 'head' matches no batch norm: there are ['inner/bn']. `*` matches part of one "
        "name, `**` any number of names, as in 'encoder/**'.",
        ValueError,
    ),
    Mistake(
        "a path without its globs",
        lambda: frozen("inner"),
        "The pattern 'inner' matches no batch norm: there are ['inner/bn']. Did you mean "
        "'inner/**'?",
        ValueError,
    ),
    Mistake(
        "a suffix of no format",
        lambda: bn.save("model.xyz", VARIABLES),
        "Cannot save to model.xyz: '.xyz' is not a supported suffix. Formats "
        "are .safetensors, .pth "
        "and .pt (PyTorch), .msgpack (Flax), and a folder without a suffix (orbax).",
        ValueError,
    ),
    Mistake(
        "a file that is not there",
        lambda: bn.load("nowhere.msgpack"),
        "There is no checkpoint at nowhere.msgpack.",
        FileNotFoundError,
    ),
)

TABLES = {"calls": CALLS, "tools": TOOLS}
