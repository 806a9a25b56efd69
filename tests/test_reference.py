"""The reference pages list all public names; `.ci/run` builds them."""

import re

import pytest

import bnjax
from examples import reference


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages before they are built."""
    folder = tmp_path_factory.mktemp("reference")
    menu = reference.write(folder)
    return folder, menu


def test_each_public_name_is_documented(pages):
    folder, _ = pages
    for module in reference.MODULES:
        text = (folder / "pages" / "reference" / f"{module}.md").read_text()
        found = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
        assert found == reference.public(module)
    assert "bnjax.nnx.train_step" in reference.public("bnjax.nnx")


def test_each_public_module_has_a_page():
    shown = {name.rpartition(".")[2] for name in reference.MODULES} - {"bnjax"}
    assert shown == {name for name in bnjax.__all__ if name not in _names("bnjax")}


def _names(module: str) -> set[str]:
    return {name.rpartition(".")[2] for name in reference.public(module)}


def test_only_examples_in_docstrings_are_fenced(pages):
    folder, _ = pages
    source = (folder / "source" / "bnjax" / "training" / "averaging.py").read_text()
    assert "    ```pycon\n    >>> import bnjax\n" in source
    assert "    ([2.0], [2.0])\n    ```\n" in source
    compile(source, "averaging.py", "exec")


def test_the_menu_lists_all_guides_and_only_existing_pages(pages):
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


def test_signatures_show_defaults():
    text = (reference._entry("bnjax.masks.trainable_labels"), reference._entry("bnjax.BatchNorm1d"))
    assert "trainable_labels(params, frozen)" in text[0]
    assert "BatchNorm1d(num_features=None, eps=1e-05, momentum=0.1, affine=True," in text[1]
    assert "parent" not in text[1]
