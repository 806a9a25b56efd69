"""The peak memory of loading a checkpoint, in a separate process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnjax
from tests.support.checkpoints import NEEDS

pytestmark = pytest.mark.quick_compile

LOAD = """
import re, sys
from pathlib import Path
import bnjax

def peak():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

bnjax.load(sys.argv[1])  # so that imports do not count
before = peak()
tree = bnjax.load(sys.argv[2])
print(peak() - before, sum(array.nbytes for array in tree.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("suffix", NEEDS)
def test_loading_takes_at_most_three_times_the_size_of_a_checkpoint(tmp_path, suffix):
    pytest.importorskip(NEEDS[suffix])
    paths = [tmp_path / f"{name}{suffix}" for name in ("small", "large")]
    for path, size in zip(paths, (10, 1_000_000), strict=True):
        bnjax.save(path, {str(i): np.full(size, i, np.float32) for i in range(16)})
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)], capture_output=True, text=True, check=True
    )
    grown, size = map(int, run.stdout.split())
    assert size == 64_000_000
    assert size < grown < 3 * size
