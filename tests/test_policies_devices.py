"""Policies over devices use the pooled moments, and send no more messages than batch norm."""

from typing import Any

import numpy as np
import pytest

import bnjax
from bnjax.policies import Blend, Renorm, Running
from tests.support.hlo import collectives
from tests.support.oracle import assert_close
from tests.support.policies import ROWS, normalized
from tests.support.ways import (
    JIT_WAYS,
    ONE_AXIS_WAYS,
    WAYS,
    core,
    differentiated,
    each_of,
    expected,
    forward,
    make,
    of_layer,
    spread,
)

pytestmark = pytest.mark.quick_compile

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# Under vmap there are no devices, and a program says nothing.
TALKING = tuple(way for way in WAYS if way.name != "vmap")


@each_of(WAYS)
@each_row
def test_all_devices_match_one_device_with_the_whole_batch(way, row):
    data = make(rates=None if row.per_example else (0, 0.3, 1, 1, 0.6, 1, 0.1, 1))
    step = differentiated(core(way.axis_name, using=row.policy, correction=0))
    found = spread(way, way.compile(step), data)
    size = 1 if row.per_example else None
    wanted = normalized(*data[:3], data.cotangent, row.train, mask=data.mask, size=size)
    after = expected(data, correction=0).batch_stats
    assert_close(found, wanted._replace(batch_stats=after), rtol=1e-5)


@each_of(ONE_AXIS_WAYS + JIT_WAYS)
@pytest.mark.parametrize("using", [Blend(prior=20), Running(updated=True)], ids=repr)
def test_sharded_test_data_are_pooled_in_evaluation_too(way, using):
    data = make(rates=None)
    settings = {"using": using, "mutable": False}
    found = spread(way, way.compile(forward(core(way.axis_name, **settings))), data)
    wanted, _ = bnjax.batch_norm(*data[:3], **settings)
    assert_close((found.y, found.batch_stats), (wanted, data.batch_stats), rtol=1e-5)


@each_of(ONE_AXIS_WAYS)
@each_row
def test_virtual_batches_stay_on_their_device(way, row):
    data = make(rates=None)
    settings = {"using": row.policy, "virtual_batch_size": 2, "correction": 0}
    found = spread(way, way.compile(differentiated(core(way.axis_name, **settings))), data)
    size = 1 if row.per_example else 2
    wanted = normalized(*data[:3], data.cotangent, row.train, size=size)
    assert_close(found._replace(batch_stats={}), wanted._replace(batch_stats={}), rtol=1e-5)


@each_of(ONE_AXIS_WAYS[:1] + ONE_AXIS_WAYS[3:])
def test_groups_of_devices_each_have_their_limits(way):
    data, groups = make(rates=None), [[0, 1, 2, 3], [4, 5, 6, 7]]
    using = Renorm(1.5, 0.25)
    settings = {"using": using, "axis_index_groups": groups}
    step = forward(core(way.axis_name, **settings))
    found = spread(way, way.compile(step, alike=False), data)
    halves = [
        bnjax.batch_norm(*data[:2], x, mutable=True, using=using)
        for x in (data.x[:16], data.x[16:])
    ]
    assert_close(found.y, np.concatenate([y for y, _ in halves]), rtol=1e-5)


@each_of(ONE_AXIS_WAYS + JIT_WAYS)
@pytest.mark.parametrize("kind", ["torch", "drop_in"])
def test_layers_of_both_conventions(way, kind):
    data, using = make(rates=None), Renorm(1.5, 0.25)
    layer: Any = bnjax.BatchNorm1d(axis_name=way.axis_name, using=using)
    if kind == "drop_in":
        layer = bnjax.linen.BatchNorm(False, momentum=0.9, axis_name=way.axis_name, using=using)
    found = spread(way, way.compile(differentiated(of_layer(layer))), data)
    row = next(row for row in ROWS if row.name == "Renorm")
    wanted = normalized(*data[:3], data.cotangent, row.train)
    after = expected(data, correction=int(kind == "torch")).batch_stats
    assert_close(found, wanted._replace(batch_stats=after), rtol=1e-5)


@each_of(TALKING)
@pytest.mark.parametrize("using", [Renorm(), Renorm.paper()], ids=repr)
@pytest.mark.parametrize("masked", [False, True])
def test_renorm_sends_the_same_messages_as_batch_norm(way, using, masked):
    data = make() if masked else make(rates=None)
    if using.counts:
        data = data._replace(batch_stats={**data.batch_stats, "count": np.int32(0)})
    for kind in (forward, differentiated):
        for conditional in (False, True):
            found, plain = (
                collectives(
                    way.compile(kind(core(way.axis_name, using=policy))),
                    way.place(data),
                    conditional=conditional,
                )
                for policy in (using, None)
            )
            assert found == plain
