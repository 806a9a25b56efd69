"""Unknown names and arguments, with the error that each raises."""

from flax import nnx

from tests.support.mistaken_models import InModel, Momentum, bn, like_flax
from tests.support.mistakes import Mistake, init, untyped

NAMES = (
    Mistake(
        "no convention",
        lambda: bn.BatchNorm,
        "module 'bnjax' has no attribute 'BatchNorm'. Use bnjax.linen.BatchNorm or "
        "bnjax.nnx.BatchNorm (Flax's arguments), or bnjax.BatchNorm2d or "
        "bnjax.nnx.BatchNorm2d (PyTorch's).",
        AttributeError,
    ),
    Mistake(
        "PyTorch's class over devices",
        lambda: bn.SyncBatchNorm,
        "module 'bnjax' has no attribute 'SyncBatchNorm'. Every layer synchronizes: pass "
        "`axis_name` to bnjax.BatchNorm2d, or train over a mesh.",
        AttributeError,
    ),
    Mistake(
        "case of a class",
        lambda: bn.Batchnorm2d,
        "module 'bnjax' has no attribute 'Batchnorm2d'. Did you mean bnjax.BatchNorm2d?",
        AttributeError,
    ),
    Mistake(
        "a letter left out",
        lambda: bn.recalibrte,
        "module 'bnjax' has no attribute 'recalibrte'. Did you mean bnjax.recalibrate?",
        AttributeError,
    ),
    Mistake(
        "a step at the top",
        lambda: bn.train_step,
        "module 'bnjax' has no attribute 'train_step'. Did you mean bnjax.nnx.train_step or "
        "bnjax.training.train_step?",
        AttributeError,
    ),
    Mistake(
        "a class of another module",
        lambda: bn.TrainState,
        "module 'bnjax' has no attribute 'TrainState'. Did you mean bnjax.training.TrainState?",
        AttributeError,
    ),
    Mistake(
        "no such rank",
        lambda: bn.nnx.BatchNorm4d,
        "module 'bnjax.nnx' has no attribute 'BatchNorm4d'. Did you mean bnjax.nnx.BatchNorm3d?",
        AttributeError,
    ),
    Mistake(
        "a method's name",
        lambda: bn.unfreeze,
        "module 'bnjax' has no attribute 'unfreeze'. Did you mean bnjax.nnx.unfreeze?",
        AttributeError,
    ),
    Mistake(
        "joined words",
        lambda: bn.training.trainstep,
        "module 'bnjax.training' has no attribute 'trainstep'. Did you mean "
        "bnjax.training.train_step?",
        AttributeError,
    ),
    Mistake(
        "a linen module's freeze",
        lambda: bn.linen.freeze,
        "module 'bnjax.linen' has no attribute 'freeze'. Did you mean bnjax.freeze or "
        "bnjax.nnx.freeze?",
        AttributeError,
    ),
    Mistake(
        "lower case",
        lambda: bn.diagnosis.report,
        "module 'bnjax.diagnosis' has no attribute 'report'. Did you mean bnjax.diagnosis.Report?",
        AttributeError,
    ),
    Mistake(
        "joined words of a mask",
        lambda: bn.masks.decaymask,
        "module 'bnjax.masks' has no attribute 'decaymask'. Did you mean bnjax.masks.decay_mask?",
        AttributeError,
    ),
    Mistake(
        "nothing like it",
        lambda: bn.xyzzy,
        "module 'bnjax' has no attribute 'xyzzy'. help(bnjax) lists its names.",
        AttributeError,
    ),
)

ARGUMENTS = (
    Mistake(
        "Flax's epsilon",
        lambda: bn.BatchNorm2d(epsilon=1e-3),
        "bnjax.linen.BatchNorm2d takes no argument `epsilon`. Did you mean `eps`?",
        TypeError,
    ),
    Mistake(
        "PyTorch's eps",
        lambda: like_flax(eps=1e-3),
        "bnjax.linen.BatchNorm takes no argument `eps`. Did you mean `epsilon`?",
        TypeError,
    ),
    Mistake(
        "PyTorch's affine",
        lambda: like_flax(affine=False),
        "bnjax.linen.BatchNorm takes no argument `affine`. Did you mean `use_scale` and "
        "`use_bias`?",
        TypeError,
    ),
    Mistake(
        "Flax's use_scale",
        lambda: bn.BatchNorm1d(use_scale=False),
        "bnjax.linen.BatchNorm1d takes no argument `use_scale`. Did you mean `affine`?",
        TypeError,
    ),
    Mistake(
        "Haiku's decay",
        lambda: like_flax(decay_rate=0.9),
        "bnjax.linen.BatchNorm takes no argument `decay_rate`. Did you mean `momentum`?",
        TypeError,
    ),
    Mistake(
        "Keras' center",
        lambda: bn.BatchNorm2d(center=False),
        "bnjax.linen.BatchNorm2d takes no argument `center`. Did you mean `affine`?",
        TypeError,
    ),
    Mistake(
        "Haiku's axis",
        lambda: bn.BatchNorm2d(cross_replica_axis="i"),
        "bnjax.linen.BatchNorm2d takes no argument `cross_replica_axis`. Did you mean `axis_name`?",
        TypeError,
    ),
    Mistake(
        "features",
        lambda: bn.BatchNorm3d(features=3),
        "bnjax.linen.BatchNorm3d takes no argument `features`. Did you mean `num_features`?",
        TypeError,
    ),
    Mistake(
        "a letter wrong",
        lambda: bn.BatchNorm2d(momentom=0.1),
        "bnjax.linen.BatchNorm2d takes no argument `momentom`. Did you mean `momentum`?",
        TypeError,
    ),
    Mistake(
        "training at the constructor",
        lambda: bn.BatchNorm2d(training=True),
        "bnjax.linen.BatchNorm2d takes no argument `training`. Did you mean "
        "use_running_average=not training?",
        TypeError,
    ),
    Mistake(
        "rngs of a linen layer",
        lambda: bn.BatchNorm2d(3, rngs=nnx.Rngs(0)),
        "bnjax.linen.BatchNorm2d takes no argument `rngs`. It is a linen layer; in nnx, use "
        "bnjax.nnx.BatchNorm2d.",
        TypeError,
    ),
    Mistake(
        "nothing like it",
        lambda: bn.BatchNorm2d(colour=3),
        "bnjax.linen.BatchNorm2d takes no argument `colour`. It takes num_features, eps, "
        "momentum, affine, track_running_stats, axis, use_running_average, axis_name, "
        "axis_index_groups, virtual_batch_size, using, banks, dtype, param_dtype, scale_init, "
        "bias_init.",
        TypeError,
    ),
    Mistake(
        "Flax's epsilon in nnx",
        lambda: bn.nnx.BatchNorm2d(3, epsilon=1e-3, rngs=nnx.Rngs(0)),
        "bnjax.nnx.BatchNorm2d takes no argument `epsilon`. Did you mean `eps`?",
        TypeError,
    ),
    Mistake(
        "PyTorch's eps in nnx",
        lambda: bn.nnx.BatchNorm(3, eps=1e-3, rngs=nnx.Rngs(0)),
        "bnjax.nnx.BatchNorm takes no argument `eps`. Did you mean `epsilon`?",
        TypeError,
    ),
    Mistake(
        "no rngs",
        lambda: bn.nnx.BatchNorm2d(3),
        "bnjax.nnx.BatchNorm2d needs `rngs`, as in BatchNorm2d(64, rngs=nnx.Rngs(0)).",
        TypeError,
    ),
    Mistake(
        "no number of channels",
        lambda: bn.nnx.BatchNorm(rngs=nnx.Rngs(0)),
        "bnjax.nnx.BatchNorm needs `num_features`, as in BatchNorm(64, rngs=nnx.Rngs(0)).",
        TypeError,
    ),
    Mistake(
        "channels in a string",
        lambda: bn.BatchNorm2d("3"),
        "`num_features` must be an integer and not negative, got '3'. It is the number of "
        "channels, such as 64.",
        ValueError,
    ),
    Mistake(
        "channels that are a flag",
        lambda: bn.BatchNorm2d(True),
        "`num_features` must be an integer and not negative, got True. It is the number of "
        "channels, such as 64.",
        ValueError,
    ),
    Mistake(
        "channels that are no whole number",
        lambda: bn.BatchNorm2d(3.0),
        "`num_features` must be an integer and not negative, got 3.0. It is the number of "
        "channels, such as 64.",
        ValueError,
    ),
    Mistake(
        "channels in a string, in a model",
        lambda: init(InModel(untyped("3")))(),
        "`num_features` must be an integer and not negative, got '3'. It is the number of "
        "channels, such as 64.\n"
        "In BatchNorm2d at 'bn'.",
        ValueError,
    ),
    Mistake(
        "momentum of 10, in a model",
        lambda: init(Momentum())(),
        "`momentum` must lie between 0 and 1, got 10. In PyTorch's convention it is the "
        "weight of the new batch (0.1), in Flax's the weight of the old statistics (0.9).\n"
        "In BatchNorm2d at 'bn'.",
        ValueError,
    ),
)

TABLES = {"names": NAMES, "arguments": ARGUMENTS}
