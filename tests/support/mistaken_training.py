"""Mistakes in training and evaluation, with the error that each raises."""

import dataclasses
from typing import Any

import jax
import optax
from flax.training import train_state

from tests.support.mistaken_models import (
    NET,
    Deep,
    Net,
    WithMode,
    bn,
    loss_fn,
    nnx_optimizer,
    spent,
    state,
    step,
    training,
    used,
)
from tests.support.mistakes import KEY, NC, PARAMS, VARIABLES, Mistake


@dataclasses.dataclass
class Mine:
    """A state of the user's own."""

    params: dict = dataclasses.field(default_factory=lambda: VARIABLES["params"])


def state_of_flax() -> Any:
    """A state without statistics."""
    tx, params = optax.sgd(0.1), VARIABLES["params"]
    return train_state.TrainState.create(apply_fn=NET.apply, params=params, tx=tx)


TRAINING = (
    Mistake(
        "a model's class",
        lambda: training.init_state(Net, optax.sgd(0.1), KEY, NC),
        "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got type. Create "
        "one: Net(...).",
        TypeError,
    ),
    Mistake(
        "an nnx model",
        lambda: training.init_state(Deep(3), optax.sgd(0.1), KEY, NC),
        "`model` is an nnx model, which holds its own parameters and statistics. Train it with "
        "optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param); step = "
        "bnjax.nnx.train_step(loss_fn); metrics = step(model, optimizer, batch).",
        TypeError,
    ),
    Mistake(
        "an optimizer that is not created",
        lambda: training.init_state(NET, optax.sgd, KEY, NC),
        "`tx` must be an optax optimizer, such as optax.adam(1e-3), got sgd.",
        TypeError,
    ),
    Mistake(
        "a number as a key",
        lambda: training.init_state(NET, optax.sgd(0.1), 0, NC),
        "`key` must be a JAX random key, such as jax.random.key(0), got int.",
        TypeError,
    ),
    Mistake(
        "a batch as the input",
        lambda: training.init_state(NET, optax.sgd(0.1), KEY, {"x": NC}),
        "`x` must be an input of the model, got a batch that contains `x`: write "
        'init_state(model, tx, key, batch["x"]), or init_state(model, tx, key, batch, '
        'inputs="x").',
        TypeError,
    ),
    Mistake(
        "a missing mode at init",
        lambda: training.init_state(WithMode(), optax.sgd(0.1), KEY, NC),
        "The model is called with its inputs and `apply_kwargs`, but WithMode.__call__() missing 1 "
        "required positional argument: 'train'. Pass its other arguments, as in init_state(model, "
        "tx, key, x, train=False).",
        TypeError,
    ),
    Mistake(
        "a string as the loss function",
        lambda: training.train_step("mse"),
        "`loss_fn` must be a function, loss_fn(outputs, batch), got str.",
        TypeError,
    ),
    Mistake(
        "a loss function of only the outputs",
        lambda: training.train_step(lambda outputs: outputs.mean()),
        "`loss_fn` must take the outputs of the model and the batch, got loss_fn(outputs): "
        "too many positional arguments. Write def loss_fn(outputs, batch): ...",
        TypeError,
    ),
    Mistake(
        "zero micro-batches",
        lambda: training.train_step(loss_fn, microbatches=0),
        "`microbatches` must be an int of 1 or more, got 0. Pass 1 to run the batch as a whole.",
        ValueError,
    ),
    Mistake(
        "half a micro-batch",
        lambda: training.train_step(loss_fn, microbatches=2.5),
        "`microbatches` must be an int of 1 or more, got 2.5. Pass 1 to run the batch as a whole.",
        ValueError,
    ),
    Mistake(
        "a batch of indivisible size",
        lambda: training.train_step(loss_fn, microbatches=3)(state(), {"x": NC}),
        "The size of a training batch must be divisible by 3 (micro-batches), got 4. Drop the "
        "last partial batch.",
        ValueError,
    ),
    Mistake(
        "a number as a mesh",
        lambda: training.train_step(loss_fn, mesh=4),
        "`mesh` must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('data',)), got int.",
        TypeError,
    ),
    Mistake(
        "devices as a mesh",
        lambda: training.eval_step(loss_fn, mesh=jax.devices()),
        "`mesh` must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('data',)), got list.",
        TypeError,
    ),
    Mistake(
        "mutable in apply_kwargs",
        lambda: training.train_step(loss_fn, apply_kwargs={"mutable": True}),
        "`apply_kwargs` must not contain `mutable`: a training step keeps the updates of all "
        "collections.",
        TypeError,
    ),
    Mistake(
        "a missing mode",
        lambda: training.train_step(loss_fn)(state(WithMode(), train=True), {"x": NC}),
        "The model is called with its inputs and `apply_kwargs`, but WithMode.__call__() missing 1 "
        "required positional argument: 'train'. Pass its training arguments, as in "
        "train_step(loss_fn, apply_kwargs={'train': True}).",
        TypeError,
    ),
    Mistake(
        "a missing mode in evaluation",
        lambda: training.eval_step(loss_fn)(state(WithMode(), train=True), {"x": NC}),
        "The model is called with its inputs and `apply_kwargs`, but WithMode.__call__() missing 1 "
        "required positional argument: 'train'. Pass its evaluation arguments, as in "
        "eval_step(loss_fn, apply_kwargs={'train': False}).",
        TypeError,
    ),
    Mistake(
        "a tuple as a batch",
        lambda: training.train_step(loss_fn)(state(), (NC, NC)),
        "A batch must be an array or a dict with the model's input as `x`, got tuple. Write "
        '{"x": images, "y": labels}.',
        TypeError,
    ),
    Mistake(
        "an input with another name",
        lambda: training.train_step(loss_fn)(state(), {"image": NC}),
        "A batch must hold the model's input as `x`, got ['image']. Rename it, as in {\"x\": "
        'images, "y": labels}, or name it: inputs="image", inputs=("obs", "action").',
        ValueError,
    ),
    Mistake(
        "variables as a state",
        lambda: training.train_step(loss_fn)(VARIABLES, {"x": NC}),
        "`state` must be a TrainState, got dict. Create it with state = "
        "bnjax.training.init_state(model, tx, key, x).",
        TypeError,
    ),
    Mistake(
        "a dataclass that is no pytree as a state",
        lambda: training.train_step(loss_fn)(Mine(), {"x": NC}),
        "`state` must be a TrainState, got Mine. Create it with state = "
        "bnjax.training.init_state(model, tx, key, x).",
        TypeError,
    ),
    Mistake(
        "a state of Flax",
        lambda: training.train_step(loss_fn)(state_of_flax(), {"x": NC}),
        "`state` must be a bnjax.training.TrainState, got another TrainState. Create it with state "
        "= bnjax.training.init_state(model, tx, key, x), and add fields of your own in a subclass "
        "of bnjax.training.TrainState.",
        TypeError,
    ),
    Mistake(
        "an nnx model as a state",
        lambda: training.train_step(loss_fn)(Deep(3), {"x": NC}),
        "`state` must be a TrainState, got an nnx model. Use bnjax.nnx.train_step and "
        "bnjax.nnx.eval_step for nnx models.",
        TypeError,
    ),
    Mistake(
        "a donated state",
        lambda: used(),
        "This state was passed to an earlier step, which reused its memory, so its arrays are "
        "deleted. Use the state that the step returned, state, metrics = step(state, batch); or "
        "keep this one with train_step(..., donate=False).",
        ValueError,
    ),
    Mistake(
        "a donated state in evaluation",
        lambda: training.eval_step(loss_fn)(spent(), {"x": NC}),
        "This state was passed to an earlier step, which reused its memory, so its arrays are "
        "deleted. Use the state that the step returned, state, metrics = step(state, batch); or "
        "keep this one with train_step(..., donate=False).",
        ValueError,
    ),
    Mistake(
        "the variables of a donated state",
        lambda: spent().variables,
        "This state was passed to an earlier step, which reused its memory, so its arrays are "
        "deleted. Use the state that the step returned, state, metrics = step(state, batch); or "
        "keep this one with train_step(..., donate=False).",
        ValueError,
    ),
    Mistake(
        "a tuple of three from the loss function",
        lambda: step(lambda outputs, batch: (outputs.mean(), {}, 1)),
        "`loss_fn` must return the loss or (loss, metrics), an array and a dict of arrays, "
        "got a tuple of 3. Write return loss, {'accuracy': accuracy}.",
        TypeError,
    ),
    Mistake(
        "None as the loss",
        lambda: step(lambda outputs, batch: None),
        "`loss_fn` must return arrays, but its `loss` is of type NoneType. Does it end with "
        "`return loss` or `return loss, metrics`?",
        TypeError,
    ),
    Mistake(
        "a string as the loss",
        lambda: step(lambda outputs, batch: "low"),
        "`loss_fn` must return arrays, but its `loss` is of type str. Does it end with "
        "`return loss` or `return loss, metrics`?",
        TypeError,
    ),
    Mistake(
        "metrics that are not a dict",
        lambda: step(lambda outputs, batch: (outputs.mean(), outputs)),
        "`loss_fn` must return the loss or (loss, metrics), an array and a dict of arrays, "
        "got a tuple of 2. Write return loss, {'accuracy': accuracy}.",
        TypeError,
    ),
    Mistake(
        "None as a metric",
        lambda: step(lambda outputs, batch: (outputs.mean(), {"accuracy": None})),
        "`loss_fn` must return arrays, but its `accuracy` is of type NoneType. Does it end "
        "with `return loss` or `return loss, metrics`?",
        TypeError,
    ),
    Mistake(
        "a loss per channel",
        lambda: step(lambda outputs, batch: outputs),
        "`loss_fn` must return `loss` as a mean, of shape (), or per example, of shape (4,), got "
        "shape (4, 3). Take the mean over the other axes.",
        ValueError,
    ),
    Mistake(
        "a mask of numbers",
        lambda: training.train_step(loss_fn)(state(), {"x": NC, "mask": NC[:, 0]}),
        "The `mask` of a batch of 4 examples must be a boolean array of shape (4,), got float32 of "
        "shape (4,). Convert it first, as in `mask != 0`.",
        ValueError,
    ),
    Mistake(
        "a glob that matches nothing",
        lambda: training.train_step(loss_fn, frozen="head/**")(state(), {"x": NC}),
        "The pattern 'head/**' matches no module: there are ['inner/bn', 'inner/dense']. `*` "
        "matches part of one name, `**` any number of names, as in 'encoder/**'.",
        ValueError,
    ),
    Mistake(
        "a module's path without its globs",
        lambda: bn.trainable_labels({"a": {"bn": PARAMS}}, frozen="a"),
        "The pattern 'a' matches no module with parameters: there are ['a/bn']. Did you mean "
        "'a/**'?",
        ValueError,
    ),
    Mistake(
        "a decay above one",
        lambda: training.Average.start(state(), decay=2),
        "`decay` must be between 0 and 1, such as 0.999, or None to weigh all steps equally, got "
        "2.",
        ValueError,
    ),
    Mistake(
        "a loss as a step",
        lambda: training.evaluate(loss_fn, state(), [{"x": NC}]),
        "`step` must come from eval_step, as in evaluate(eval_step(loss_fn), state, batches), got "
        "loss_fn.",
        TypeError,
    ),
    Mistake(
        "a training step for evaluate",
        lambda: training.evaluate(training.train_step(loss_fn), state(), [{"x": NC}]),
        "`step` must come from eval_step, as in evaluate(eval_step(loss_fn), state, batches), got "
        "a training step.",
        TypeError,
    ),
    Mistake(
        "a single batch for evaluate",
        lambda: training.evaluate(training.eval_step(loss_fn), state(), {"x": NC}),
        "`batches` must be a list or an iterator of batches, got a dict: write [batch].",
        TypeError,
    ),
    Mistake(
        "a single array for evaluate",
        lambda: training.evaluate(training.eval_step(loss_fn), state(), NC),
        "`batches` must be a list or an iterator of batches, got an array of shape (4, 3): "
        "write [batch].",
        TypeError,
    ),
    Mistake(
        "variables for evaluate",
        lambda: training.evaluate(training.eval_step(loss_fn), VARIABLES, [{"x": NC}]),
        "`state` must be a TrainState, got dict. Create it with state = "
        "bnjax.training.init_state(model, tx, key, x).",
        TypeError,
    ),
    Mistake(
        "no batches for evaluate",
        lambda: training.evaluate(training.eval_step(loss_fn), state(), []),
        "`batches` must hold at least one example that counts, got none. An iterator can be used "
        "only once: pass a list, or create it again.",
        ValueError,
    ),
    Mistake(
        "a linen state in nnx",
        lambda: bn.nnx.train_step(loss_fn)(state(), nnx_optimizer(), {"x": NC}),
        "`model` must be a flax.nnx.Module, got TrainState. For linen models, use "
        "bnjax.training.train_step and eval_step.",
        TypeError,
    ),
    Mistake(
        "an optax optimizer in nnx",
        lambda: bn.nnx.train_step(loss_fn)(Deep(3), optax.sgd(0.1), {"x": NC}),
        "`optimizer` must be an nnx.Optimizer, such as nnx.Optimizer(model, "
        "optax.adam(1e-3), wrt=nnx.Param), got GradientTransformationExtraArgs.",
        TypeError,
    ),
)

TABLES = {"training": TRAINING}
