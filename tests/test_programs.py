"""What XLA makes of bnjax for a GPU and a TPU stays within bounds; no device is needed.

The compilers come with the extra `programs`; without it the counting itself is tested here.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.cases import BACKWARD, PASSES
from tests.benchmarks.contenders import OURS
from tests.benchmarks.environment import Options
from tests.benchmarks.programs import counts, page, scale, targets, topologies, traffic
from tests.benchmarks.programs.layers import JIT, NAMED
from tests.benchmarks.programs.topologies import Platform
from tests.support.hlo import Collective, parse

TEXT = """HloModule jit_f, is_scheduled=true

%inner (p: f32[8,4], i: f32[4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %i = f32[4]{0} parameter(1)
  %s = f32[1,4]{1,0} slice(%p), slice={[0:1], [0:4]}
  %b = f32[4]{0} bitcast(%s)
  ROOT %sum = f32[4]{0} add(%b, %i)
}

%update (p: bf16[8,4], n: bf16[1,4], z: s32[]) -> bf16[8,4] {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  %n = bf16[1,4]{1,0} parameter(1)
  %z = s32[] parameter(2)
  ROOT %u = bf16[8,4]{1,0} dynamic-update-slice(%p.1, %n, %z, %z)
}

%then (t: f32[8,4]) -> f32[8,4] {
  %t = f32[8,4]{1,0} parameter(0)
  ROOT %e = f32[8,4]{1,0} exponential(%t)
}

%else (o: f32[8,4]) -> f32[8,4] {
  ROOT %o = f32[8,4]{1,0} parameter(0)
}

ENTRY %main (a: f32[8,4], c: f32[4], h: bf16[8,4], r: bf16[1,4], k: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %c = f32[4]{0} parameter(1)
  %h = bf16[8,4]{1,0} parameter(2)
  %r = bf16[1,4]{1,0} parameter(3)
  %k = s32[] parameter(4)
  %f = f32[4]{0} fusion(%a, %c), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"7"}
  %g = bf16[8,4]{1,0} fusion(%h, %r, %k), kind=kLoop, calls=%update
  %m = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) copy-start(%a)
  %m.1 = f32[8,4]{1,0} copy-done(%m)
  %t.1 = f32[4]{0} all-reduce(%f), to_apply=%else
  %v = (f32[8,4]{1,0}, s8[99]{0}) custom-call(%m.1, %t.1), custom_call_target="__conv"
  %w = f32[8,4]{1,0} get-tuple-element(%v), index=0
  ROOT %d = f32[8,4]{1,0} conditional(%k, %w, %w), branch_computations={%then, %else}
}
"""
# Where a target is not met: the number of today, and the target.
TODAY: dict[str, dict[str, tuple[float, float]]] = {
    # Of few rows XLA makes one kernel of a few blocks, ours are two of many.
    "gpu layer forward float32 NHWC 64x7x7x512": {"kernels": (5, 3)},
    "gpu layer forward bfloat16 1d 4096x512": {"kernels": (5, 3)},
    "gpu layer forward+backward float32 NHWC 64x7x7x512": {"kernels": (9, 8)},
    "gpu layer forward+backward bfloat16 1d 4096x512": {"kernels": (9, 8)},
    "gpu net bfloat16 NHWC 128x56x56x64": {"temp to Flax's": (0.923, 0.9)},
    "tpu net bfloat16 NHWC 128x56x56x64": {"cycles to Flax's": (1.046, 1.02)},
}


def key(platform: Platform, row: counts.Row) -> str:
    words = (platform, row["kind"], row["pass"], row["dtype"], row["case"], row["way"])
    return " ".join(filter(None, words))


@pytest.mark.parametrize("platform", Platform)
def test_programs_stay_within_their_bounds(platform):
    if platform.missing:
        pytest.skip(platform.missing)
    found = counts.measure(Options(quick=True, platforms=(platform,)))[platform]
    pairs = list(counts.pairs(found["rows"]))
    assert {ours["kind"] for ours, _ in pairs} == set(targets.QUICK)
    beyond = []
    for ours, theirs in pairs:
        known = TODAY.get(key(platform, ours), {})
        for target in targets.targets(platform, ours, theirs):
            bound = target._replace(limit=max(target.limit, *known.get(target.name, (0, 0))))
            if not bound.met:
                beyond.append(f"{key(platform, ours)}: {bound}")
    assert beyond == []


@pytest.mark.parametrize("platform", Platform)
def test_what_devices_say_does_not_grow_with_their_number(platform):
    if platform.missing:
        pytest.skip(platform.missing)
    rows = scale.measure(Options(quick=True, platforms=(platform,)))[platform]["rows"]
    found = {(row["devices"], row["contender"], row["way"]): row for row in rows}
    for way in (JIT, NAMED):
        few, many = (found[devices, OURS, way] for devices in (8, 64))
        for row in (few, many):
            forward, both = (row[which]["collectives"] / scale.LAYERS for which in PASSES[1:])
            # One gather among few, and two sums among many that do not know their statistics.
            assert forward <= (2 if row is many and way == NAMED else 1)
            assert both - forward <= 1
        assert many[BACKWARD]["bytes"] < 1.4e6  # Flax's is 1.05e6
        assert few[BACKWARD]["bytes"] < 4e6


def test_kernels_are_what_is_launched_with_what_each_reads_and_writes():
    found = {kernel.name: kernel for kernel in traffic.kernels(parse(TEXT))}
    assert list(found) == ["%f", "%g", "%v", "%e"]
    slice_, update, library, branch = found.values()
    assert (sorted(slice_.reads), slice_.writes, slice_.cycles) == ([16, 16], (16,), 7)
    assert (sorted(update.reads), update.writes) == ([4, 8, 64], (8,))
    assert (library.reads, library.writes, library.in_branch) == ((128, 16), (128,), False)
    assert (branch.reads, branch.writes, branch.in_branch) == ((128,), (128,), True)
    always = [kernel for kernel in found.values() if not kernel.in_branch]
    assert traffic.summary(always, 128) == {
        "kernels": 3,
        "reads": 1.5,
        "writes": 1.0,
        "bytes": 48 + 84 + 272,
        "cycles": 7,
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("all-gather", 700), ("all-reduce", 175), ("reduce-scatter", 87.5), ("send", 100)],
)
def test_bytes_on_a_ring_follow_from_the_kind_of_a_collective(kind, expected):
    assert scale.sent(Collective(kind, 25, 100, False), 8) == expected


def test_a_page_gets_the_numbers_of_a_run():
    said = {"collectives": 53, "in a branch": 0, "bytes": 2_500_000, "kinds": ["all-gather"]}
    both = {**said, "collectives": 106, "bytes": 5_000_000}
    row = {"chip": "H100", "devices": 8, "contender": "bnjax", "way": "jit", "link": "NVLink"}
    row |= {"forward": said, "forward+backward": both, "milliseconds": 1.5}
    more = {**row, "devices": 64, "forward+backward": {**both, "bytes": 7_500_000}}
    data = {"gpu": {"versions": {"jax": "1.2"}, "rows": [row, more]}, "tpu": {"skipped": "none"}}
    text = page.rewritten(f"a\n{page.BEGIN}old\n{page.END}b\n", data)
    assert text.startswith(f"a\n{page.BEGIN}\ngpu: compiled without a device by jax 1.2\n")
    assert text.endswith(f"\n{page.END}b\n")
    assert "old" not in text
    numbers = "| 64 | bnjax jit | 1 all-gather | 1 | 0 | 2.50 | 7.50 | 1.5x | NVLink | 1.500 |"
    assert numbers in text
    assert page.rewritten(text, data) == text


def test_a_resnet_50_has_53_batch_norms():
    assert (scale.LAYERS, sum(scale.CHANNELS)) == (53, 26560)


@pytest.mark.parametrize("platform", Platform)
def test_a_compiler_that_is_not_installed_or_does_not_fit_is_named(platform, monkeypatch):
    def versions(name, found=importlib.metadata.version):
        if name != platform.package:
            return found(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError
        return installed

    monkeypatch.setattr(importlib.metadata, "version", versions)
    wanted, installed = platform.wanted, None
    expected = f"{platform}: {platform.package} is not installed: pip install 'bnjax[programs]'"
    assert platform.missing == expected
    (found,) = scale.measure(Options(platforms=(platform,))).values()
    assert found == {"skipped": expected}
    installed = "0.0.1"
    assert f"does not fit this jaxlib: pip install '{platform.package}=={wanted}" in (
        platform.missing
    )
    installed = wanted + (".3" if platform is Platform.tpu else "")
    assert platform.missing == ""


def test_a_room_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(topologies.Platform, "missing", "")
    with pytest.raises(RuntimeError, match=r"away nothing gpu failed:[\s\S]*No module named"):
        scale.away.measure("nothing", Options(platforms=("gpu",)))


def command(*options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "tests.benchmarks", *options]
    return subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True)


def test_a_platform_goes_with_compiled_programs_alone():
    run = command("--platform", "gpu", "--only", "op")
    assert run.returncode == 2
    assert "--only programs" in run.stderr


@pytest.mark.parametrize("kind", ["programs", "scale"])
@pytest.mark.skipif(not all(each.missing for each in Platform), reason="a compiler is installed")
def test_a_run_without_compilers_says_what_to_install(kind):
    run = command("--only", kind)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:2] == [f"skipped: {each.missing}" for each in Platform]
