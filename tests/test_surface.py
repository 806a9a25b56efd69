"""What a user meets first: help, names, types of reports, and tables in a terminal or notebook."""

import io
import itertools
import pydoc
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console
from typer.testing import CliRunner

import bnjax
from bnjax._tables import Name, plain
from bnjax.cli import app
from bnjax.training import Average
from tests.support.command_line import run

pytestmark = pytest.mark.quick_compile

LONG = "encoder_stage_with_a_long_name"
PATHS = [
    "encoder/block_12/BatchNorm2d_0",
    f"{LONG}_0/{LONG}_1/BatchNorm1d_0",
    "FlaxResNetBottleNeckLayerCollection_0/bn",
    "bnjax.merge_batch_stats(variables['batch_stats'])",
    "It starts in 'encoder/block_12/BatchNorm2d_0': its means are 3 standard deviations away.",
    "x",
    "",
]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm1d()(nn.Dense(3)(x))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x = Block(name=f"{LONG}_{number}")(x)
        return x


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """A diagnosis with a finding, and a folded model."""
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    return {
        "diagnosis": bnjax.diagnose(Net(), variables, [x, x + 1]),
        "folded": bnjax.fold(Net(), variables, x),
    }


def test_help_has_a_table_of_all_public_names():
    text = pydoc.plain(pydoc.render_doc(bnjax))
    assert "recalibrate             recompute the running statistics exactly over a data" in text
    assert f"VERSION\n    {bnjax.__version__}\n" in text
    modules = {"linen", "nnx", "training", "masks", "diagnosis"}
    for name in set(bnjax.__all__) - modules:
        assert re.search(rf"\b{name}\b", bnjax.__doc__ or ""), f"{name} is not in the docstring"
    for module in modules - {"masks", "diagnosis"}:
        assert f"{module}." in (bnjax.__doc__ or "")


@pytest.mark.parametrize("name", ["bnjax", "linen", "nnx", "training", "masks", "diagnosis"])
def test_a_module_shows_its_public_names_alone(name):
    module: Any = bnjax if name == "bnjax" else getattr(bnjax, name)
    assert dir(module) == sorted(module.__all__)
    assert not hasattr(module, "__wrapped__")
    with pytest.raises(AttributeError, match=rf"^module '{module.__name__}' has no attribute '_x'"):
        _ = module._x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("width", [8, 14, 20, 40, 80])
def test_a_name_is_never_broken_inside_a_word(path, width):
    lines = plain(Name(path), width).splitlines()
    assert "".join(lines).replace(" ", "") == path.replace(" ", "")
    words = [word for word in re.split(r"[/ ._,(\[]|(?<=[a-z0-9])(?=[A-Z])", path) if word]
    if max(map(len, words), default=0) < width:
        assert all(len(line) <= width for line in lines)
        for word in words:
            assert any(word in line for line in lines), word


@pytest.mark.parametrize("which", ["diagnosis", "folded"])
def test_a_report_fits_a_terminal_of_80_columns_with_all_its_numbers(reports, which):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(reports[which])
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    assert "BatchNorm1d_0" in text


def test_reprs_are_a_line(reports):
    diagnosis, folded = reports["diagnosis"], reports["folded"]
    assert repr(diagnosis) == (
        f"Report(never updated ({LONG}_0/BatchNorm1d_0), "
        f"batches not alike ({LONG}_0/BatchNorm1d_0); over 2 batches)"
    )
    first = f"Finding('never updated', error, at '{LONG}_0/BatchNorm1d_0')"
    assert repr(diagnosis.findings[0]) == first
    params = {"kernel": jax.numpy.ones((3, 3))}
    average = Average(params, jax.numpy.int32(7), decay=None)
    assert repr(average) == "Average(count=7, decay=None)"
    assert re.fullmatch(
        r"Folded\(Report\(3 layers folded; largest output difference \S+, for outputs up to "
        r"\S+\)\)",
        repr(folded),
    )


@pytest.mark.parametrize("which", ["diagnosis", "folded"])
def test_a_notebook_gets_a_table_in_html_and_in_text(reports, which):
    bundle = reports[which]._repr_mimebundle_(include=None, exclude=None)
    assert bundle["text/html"].startswith("<pre style=")
    assert f"{LONG}_2/BatchNorm1d_0" in bundle["text/html"]
    assert "<html" not in bundle["text/html"]
    shown = reports[which] if which == "diagnosis" else reports[which].report
    assert bundle["text/plain"] == str(shown)


# The command line


@pytest.mark.parametrize("command", [(), ("inspect",), ("convert",), ("diagnose",)])
def test_help_is_in_sentences_that_wrap_well(command):
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--help"])
    told = done.output.partition("Usage:")[2].partition("╭")[0].splitlines()[2:]
    for paragraph in "\n".join(line.strip() for line in told).strip().split("\n\n"):
        assert paragraph.endswith(".")
        lines = paragraph.splitlines()
        for line, after in itertools.pairwise(lines):  # no line ends early
            assert len(f"{line} {after.split()[0]}") > 76


def test_a_shell_can_complete_the_commands():
    assert "--install-completion" in run("--help")[1]
