"""Batch norms of nnx that others wrote: what each tool does with them."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

import bnjax
from tests.support import strangers
from tests.support.registered import close, each_case_nnx
from tests.support.strangers import (
    BATCHES,
    Case,
    NetNnx,
    measured,
)

pytestmark = pytest.mark.quick_compile


def switch(model: NetNnx, train: bool) -> None:
    model.norm.training = train


@each_case_nnx
def test_a_frozen_registered_nnx_layer_is_unchanged(case):
    model = NetNnx(case)
    switch(model, False)
    wanted = model(BATCHES[0]["x"])
    bnjax.nnx.freeze(model)
    switch(model, True)
    close([model(BATCHES[0]["x"], train=True)], [wanted])
    np.testing.assert_array_equal(model.norm.mean[...], 0)
    bnjax.nnx.unfreeze(model)
    model(BATCHES[0]["x"], train=True)
    assert np.abs(model.norm.mean[...]).max() > 0.01


def params_of(model: Any) -> Any:
    return {"dense": {"kernel": model.dense.kernel[...], "bias": model.dense.bias[...]}}


@each_case_nnx
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_registered_nnx_layer_is_recalibrated(case, sequential, training):
    model = NetNnx(case)
    switch(model, training)
    inputs: Any = (lambda each: {"x": each["x"], "train": training}) if sequential else "x"
    found = bnjax.recalibrate(model, None, BATCHES, sequential=sequential, inputs=inputs)
    stats = (found["norm"][name][...] for name in ("mean", "var"))
    close(stats, measured(params_of(model), BATCHES, False))
    np.testing.assert_array_equal(model.norm.mean[...], 0)
    assert model.norm.training is training


@each_case_nnx
def test_a_diagnosis_of_registered_nnx_layers_distinguishes_stale_from_fresh_statistics(case):
    model = NetNnx(case)
    switch(model, False)
    nnx.update(model, bnjax.recalibrate(model, None, BATCHES))
    assert list(bnjax.diagnose(model, None, BATCHES).findings) == []
    model.norm.mean[...] += 10
    report = bnjax.diagnose(model, None, BATCHES)
    assert (report.healthy, report.findings[0].layer) == (False, "norm")


@each_case_nnx
def test_a_registered_nnx_layer_is_folded(case):
    model = NetNnx(case)
    switch(model, False)
    nnx.update(model, bnjax.recalibrate(model, None, BATCHES))
    found = bnjax.fold(model, None, BATCHES[0]["x"])
    assert [tuple(row) for row in found.report.rows if row.batch_norm] == [("dense", "norm", None)]
    x = BATCHES[1]["x"]
    close([found.apply(found.variables, x)], [model(x)])


@pytest.mark.parametrize("tool", ["recalibrate", "diagnose", "fold"])
def test_every_tool_names_an_unregistered_nnx_class(tool):
    model = NetNnx(Case(strangers.Unknown, {}, lambda norm, x, train: norm(x)))
    x = BATCHES[0]["x"]
    call: Any = {
        "recalibrate": lambda: bnjax.recalibrate(model, None, [x]),
        "diagnose": lambda: bnjax.diagnose(model, None, [x]),
        "fold": lambda: bnjax.fold(model, None, x),
    }[tool]
    with pytest.raises(ValueError, match=r"'norm' \(Unknown\) keep.* bnjax\.register\(Unknown, "):
        call()
