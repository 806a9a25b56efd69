"""The pictures in README and guides match their numbers and the code that draws them."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", *sorted((EXAMPLES / "guides").glob("*.md"))]


@pytest.fixture(scope="module")
def drawing():
    """The module that draws the pictures; the examples import each other by name."""
    before = list(sys.path)
    sys.path[:0] = [str(EXAMPLES / "pictures"), str(EXAMPLES)]
    import drawing

    yield drawing
    sys.path[:] = before


def test_no_picture_is_stale(drawing):
    again = "draw it again: python -m examples.pictures"
    for name in drawing.PICTURES:
        with Image.open(drawing.picture(name)) as picture:
            assert picture.info[drawing.KEY] == drawing.fingerprint(name), f"{name}: {again}"


def test_fingerprints_change_with_numbers_and_code(drawing, monkeypatch, tmp_path):
    before = drawing.fingerprint("statistics")
    data = json.loads(drawing.source("statistics").read_text())
    monkeypatch.setattr(drawing, "HERE", tmp_path)
    drawing.source("statistics").write_text(json.dumps({**data, "steps": data["steps"][::-1]}))
    assert drawing.fingerprint("statistics") != before
    drawing.source("statistics").write_text(json.dumps(data) + "\n")
    assert drawing.fingerprint("statistics") == before
    monkeypatch.setattr(drawing.inspect, "getsource", lambda code: "other")
    assert drawing.fingerprint("statistics") != before


def test_all_pictures_can_be_drawn_and_fit_a_page(drawing, monkeypatch, tmp_path):
    assert {path.stem for path in drawing.HERE.glob("*.png")} == {*drawing.PICTURES}
    monkeypatch.setattr(drawing, "picture", lambda name: tmp_path / f"{name}.png")
    for name in drawing.PICTURES:
        drawing.draw(name)
        with Image.open(tmp_path / f"{name}.png") as picture:
            width, height = picture.size
        assert 800 <= width <= 1300, name
        assert height <= width, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_on_pages_exist(page):
    for link in re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", page.read_text()):
        assert (page.parent / link).is_file(), link
