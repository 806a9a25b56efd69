"""Register other people's batch norms, when this is imported."""

from typing import Any

import numpy as np
import pytest

import bnjax
from bnjax.models.conventions import registered_class
from tests.support.strangers import CASES, CASES_NNX

for each in {case.kind: case for case in (CASES | CASES_NNX).values()}.values():
    if not registered_class(each.kind.__new__(each.kind)):
        bnjax.register(each.kind, each.facts)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_case_nnx = pytest.mark.parametrize("case", CASES_NNX.values(), ids=CASES_NNX)


def close(found: Any, wanted: Any, rtol: float = 1e-4) -> None:
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=1e-5)
