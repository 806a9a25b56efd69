"""A ResNet of PyTorch in Flax: the same logits, the same training step, and back again."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnjax
from bnjax.training import init_state, train_step
from tests.support.torch_resnet import ResNet, torch, trained

pytestmark = pytest.mark.quick_compile

LEARNING_RATE = 0.1
STAGES = {10: (1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


@pytest.fixture
def networks(request, monkeypatch):
    """The same network in PyTorch and in Flax, with images for each."""
    monkeypatch.syspath_prepend(request.config.rootpath / "examples")
    import resnet

    def make(depth: int, size: int, **settings):
        torch.manual_seed(depth)
        x = torch.randn(4, 3, size, size)
        theirs = trained(ResNet(STAGES[depth], depth == 50, **settings), x)
        small = partial(resnet.ResNet, STAGES[10], resnet.BasicBlock)
        return theirs, getattr(resnet, f"ResNet{depth}", small)(**settings), x

    return make


def nhwc(x) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def converted(theirs, model, x):
    template = jax.eval_shape(model.init, jax.random.key(0), x)
    return bnjax.from_torch(theirs.state_dict(), model, template)


@pytest.mark.parametrize("depth", [18, 50])
def test_logits_are_those_of_pytorch(networks, depth):
    theirs, model, x = networks(depth, 64)
    variables = converted(theirs, model, nhwc(x))
    with torch.no_grad():
        expected = theirs(x).numpy()
    assert np.abs(expected).max() > 0.1
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(variables, nhwc(x)), expected, atol=1e-4)
    shifted = jax.tree.map(lambda value: value + 0.1, variables["batch_stats"])
    lost = apply({**variables, "batch_stats": shifted}, nhwc(x))
    assert np.abs(lost - expected).max() > 1e-2, "the statistics do not matter"


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_the_state_dict_comes_back_bit_for_bit(networks, depth):
    theirs, model, x = networks(depth, 32, width=8, classes=10)
    state_dict = theirs.state_dict()
    back = bnjax.to_torch(converted(theirs, model, nhwc(x)), state_dict)
    assert list(back) == list(state_dict)
    for name, tensor in state_dict.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_one_training_step_and_its_result_back_in_pytorch(networks):
    theirs, model, x = networks(10, 48, width=8, classes=10)
    variables = converted(theirs, model, nhwc(x))
    labels = np.arange(4)

    def loss_fn(logits, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]), {}

    state = init_state(model, optax.sgd(LEARNING_RATE), jax.random.key(0), nhwc(x))
    state = state.replace(**jax.tree.map(jnp.array, variables))
    state, _ = train_step(loss_fn)(state, {"x": nhwc(x), "y": labels})

    theirs.train()
    loss = torch.nn.functional.cross_entropy(theirs(x), torch.tensor(labels))
    loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    theirs.eval()

    tuned = bnjax.to_torch({"params": state.params, "batch_stats": state.batch_stats})
    for name, expected in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(tuned[name], expected, atol=2e-4, err_msg=name)
    again = ResNet(STAGES[10], width=8, classes=10).eval()
    again.load_state_dict(tuned, strict=True)
    ours = jax.jit(model.apply)({"params": state.params, "batch_stats": state.batch_stats}, nhwc(x))
    with torch.no_grad():
        np.testing.assert_allclose(ours, again(x).numpy(), atol=1e-4)
