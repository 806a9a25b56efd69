"""The repairs that a diagnosis suggests are valid code, and fix the fault."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from tests.support.diagnosed import FlaxNet, Net, NnxNet, batches

pytestmark = pytest.mark.quick_compile

DATA = [batch["x"] for batch in batches(4, seed=7)]


class User:
    """The names in a user's session, in which a line of code runs."""

    def __init__(self, kind: str) -> None:
        self.names: dict[str, Any] = dict(
            bnjax=bnjax, nnx=nnx, jax=jax, jnp=jnp, batches=DATA, batch=DATA[0], x=DATA[0]
        )
        if kind == "nnx":
            self.model = self.names["model"] = NnxNet(nnx.Rngs(0))
            self.model.eval()
            nnx.update(self.model, bnjax.recalibrate(self.model, None, DATA))
        else:
            self.model = self.names["model"] = Net()
            fresh = self.model.init(jax.random.key(0), DATA[0])
            self.names["variables"] = bnjax.recalibrate(self.model, fresh, DATA)

    @property
    def variables(self) -> Any:
        return self.names.get("variables", nnx.state(self.model) if self.is_nnx else None)

    @property
    def is_nnx(self) -> bool:
        return isinstance(self.model, nnx.Module)

    def change(self, function: Callable[[Any], Any]) -> None:
        """Apply a function to each array of the statistics."""
        if self.is_nnx:
            nnx.update(self.model, jax.tree.map(function, nnx.state(self.model, nnx.BatchStat)))
        else:
            stats = jax.tree.map(function, self.names["variables"]["batch_stats"])
            self.names["variables"] = {**self.names["variables"], "batch_stats": stats}

    def statistics(self) -> list[Any]:
        stats = nnx.state(self.model, nnx.BatchStat) if self.is_nnx else self.variables
        return jax.tree.leaves(stats if self.is_nnx else stats["batch_stats"])

    def diagnose(self, variables: Any = None) -> Any:
        return bnjax.diagnose(self.model, self.variables if variables is None else variables, DATA)

    def write(self, kind: str, variables: Any = None) -> None:
        """Run the repair of the finding of this kind."""
        (repair,) = (f.repair for f in self.diagnose(variables).findings if f.kind == kind)
        exec(repair, self.names)


@pytest.fixture(params=["linen", "nnx"])
def user(request) -> User:
    return User(request.param)


def test_statistics_of_other_weights_are_recalibrated(user):
    user.change(lambda leaf: leaf * 3 + 1)
    user.write("statistics belong to other weights")
    assert user.diagnose().healthy


def test_poisoned_statistics_are_recalibrated(user):
    user.change(lambda leaf: leaf.at[0].set(np.nan))
    user.write("statistics poisoned")
    assert user.diagnose().healthy


def test_updates_that_were_thrown_away_are_kept(user):
    user.change(lambda leaf: jnp.full_like(leaf, float(jnp.all(leaf > 0))))
    before = user.statistics()
    user.write("never updated")
    assert not any(bool((a == b).any()) for a, b in zip(before, user.statistics(), strict=True))


def test_half_precision_statistics_become_float32(user):
    user.change(lambda leaf: leaf.astype(jnp.bfloat16))
    user.write("half-precision statistics")
    assert {leaf.dtype for leaf in user.statistics()} == {jnp.dtype("float32")}


def test_statistics_of_devices_are_merged(user):
    def apart(leaf: Any) -> Any:
        return jnp.stack([0.5 * leaf, 1.5 * leaf])

    if user.is_nnx:
        state = jax.tree.map(apart, nnx.state(user.model, nnx.BatchStat))
        others = nnx.state(user.model, nnx.Not(nnx.BatchStat))
        user.names["state"] = state
        user.write("devices disagree", nnx.merge_state(others, state))
    else:
        user.change(apart)
        user.write("devices disagree")
    assert {leaf.ndim for leaf in user.statistics()} == {1}
    assert "devices disagree" not in [finding.kind for finding in user.diagnose().findings]


def test_the_repair_shows_where_values_are_not_finite(user):
    wild = [DATA[0], np.where(DATA[1] > 2, np.inf, DATA[1])]
    report = bnjax.diagnose(user.model, user.variables, wild)
    (finding,) = report.findings
    assert finding.kind == "values not finite"
    assert all(jax.tree.leaves(eval(finding.repair, user.names)))  # the first batch is fine


def test_the_repair_flips_the_mode_argument_for_training():
    model = FlaxNet()
    variables = model.init(jax.random.key(0), DATA[0], train=False)
    report = bnjax.diagnose(model, variables, DATA, apply_kwargs={"train": False})
    (finding,) = report.findings
    assert "model.apply(variables, x, train=True, mutable=['batch_stats'])" in finding.repair
    names = {"model": model, "variables": variables, "x": DATA[0]}
    exec(finding.repair, names)
    moved = jax.tree.map(jnp.any, names["variables"]["batch_stats"])
    assert all(jax.tree.leaves(moved))
