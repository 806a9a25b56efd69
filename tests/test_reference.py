"""The pages of the reference have all public names; that they build is for `.ci/run`."""

import re

import pytest

import bnjax
from examples import reference


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages as they are written, before they are built."""
    folder = tmp_path_factory.mktemp("reference")
    menu = reference.write(folder)
    return folder, menu


def test_each_public_name_has_a_place(pages):
    folder, _ = pages
    for module in reference.MODULES:
        text = (folder / "pages" / "reference" / f"{module}.md").read_text()
        found = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
        assert found == reference.public(module)
    assert "bnjax.nnx.train_step" in reference.public("bnjax.nnx")


def test_each_module_that_is_public_has_a_page():
    shown = {name.rpartition(".")[2] for name in reference.MODULES} - {"bnjax"}
    assert shown == {name for name in bnjax.__all__ if name not in _names("bnjax")}


def _names(module: str) -> set[str]:
    return {name.rpartition(".")[2] for name in reference.public(module)}


def test_examples_in_docstrings_are_fenced_and_nothing_else_changes(pages):
    folder, _ = pages
    source = (folder / "source" / "bnjax" / "training" / "averaging.py").read_text()
    assert "    ```pycon\n    >>> import bnjax\n" in source
    assert "    ([2.0], [2.0])\n    ```\n" in source
    compile(source, "averaging.py", "exec")


def test_the_menu_has_each_guide_and_each_page_that_it_names_is_there(pages):
    folder, menu = pages
    first, guides, parts = menu
    guides = guides["Guides"]
    assert len(guides) == len([*(reference.ROOT / "examples" / "guides").glob("*.md")])
    listed = [
        *first.values(),
        *guides,
        *(page for each in parts["Reference"] for page in each.values()),
    ]
    assert all((folder / "pages" / page).is_file() for page in listed)


def test_a_call_is_shown_with_its_defaults():
    text = (reference._entry("bnjax.masks.trainable_labels"), reference._entry("bnjax.BatchNorm1d"))
    assert "trainable_labels(params, frozen)" in text[0]
    assert "BatchNorm1d(num_features=None, eps=1e-05, momentum=0.1, affine=True," in text[1]
    assert "parent" not in text[1]
