"""README and guides: code blocks print what the page says; links and commands work."""

import re
import subprocess
from pathlib import Path

import pytest

import bnjax
from bnjax.core.checks import warn_once
from tests.support.pages import PAGES, ROOT, commands, rerun

pytestmark = pytest.mark.quick_compile

README, GUIDES = PAGES[0], PAGES[1:]
INDEX = ROOT / "examples" / "guides" / "README.md"
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
GUIDE = re.compile(r"Guides?: (.*)")
OPTION = re.compile(r"--([a-z][a-z-]+)")
SOURCES = {path: path.read_text() for path in sorted((ROOT / "bnjax").rglob("*.py"))}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.name == "README.md" else page.stem


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@each_page
def test_code_blocks_print_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warn_once.cache_clear()
    text = page.read_text()
    assert rerun(text, page.name) == text


def test_wrong_output_is_detected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = "```python\nprint(1)\n```\n```text\n2\n```\n"
    assert rerun(wrong, "page") == wrong.replace("2", "1")
    wrong = "```console\n$ bnjax --version\nno\n```\n"
    assert rerun(wrong, "page") == wrong.replace("no", f"bnjax {bnjax.__version__}")
    with pytest.raises(NameError):
        rerun("```python\nmissing\n```\n", "page")


@each_page
def test_a_page_is_short_and_narrow(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= (200 if page == README else 199)
    wide = {number: line for number, line in enumerate(lines, 1) if len(line) > 100}
    assert not wide


@each_page
def test_links_work(page):
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert not {link for link in targets if not (page.parent / link).exists()}


def test_the_index_has_every_guide():
    links = {link for link in LINK.findall(INDEX.read_text()) if link.endswith(".md")}
    assert {page.name for page in GUIDES if page != INDEX} <= links


def linked() -> dict[str, list[str]]:
    """The guides that docstrings mention, with the files that mention them."""
    found: dict[str, list[str]] = {}
    for path, source in SOURCES.items():
        for line in GUIDE.findall(source):
            for guide in re.findall(r"[\w/.]+\.md", line):
                found.setdefault(guide, []).append(path.name)
    return found


def test_docstrings_name_guides_that_exist():
    assert linked()
    assert not [guide for guide in linked() if not (ROOT / guide).exists()]


def test_docstrings_mention_every_guide():
    # Who develops bnjax starts from the README.
    exempt = {INDEX.name, "contributing.md"}
    named = {Path(guide).name for guide in linked()}
    assert {page.name for page in GUIDES} - exempt <= named


def run_by(words: list[str]) -> Path | None:
    """The source of a command of this repository."""
    program, *rest = (word for word in words if "=" not in word)
    program = Path(program).name
    if program in ("python", "python3", "srun") and rest and rest[0].endswith(".py"):
        return ROOT / rest[0]
    if program == "python" and rest[:1] == ["-m"]:
        module = ROOT / rest[1].replace(".", "/")
        if rest[1] == "bnjax":
            return ROOT / "bnjax" / "cli.py"
        if rest[1].startswith("tests"):
            return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    return ROOT / "bnjax" / "cli.py" if program == "bnjax" else None


@each_page
def test_commands_use_existing_files_and_options(page):
    for words in commands(page.read_text()):
        if source := run_by(words):
            assert source.exists(), f"{words} runs {source}"
            for option in OPTION.findall(" ".join(words)):
                wanted = (f"--{option}", f"{option.replace('-', '_')}:", f'"{option}"')
                assert any(each in source.read_text() for each in wanted), (words, option)


def test_commands_are_found_with_their_files():
    cli, train = ROOT / "bnjax" / "cli.py", ROOT / "examples" / "train_digits.py"
    assert run_by(["bnjax", "inspect", "file"]) == run_by(["python", "-m", "bnjax"]) == cli
    assert run_by([".venv/bin/python", "examples/train_digits.py"]) == train
    page = "```bash\npip install -q \\\n  '.[test]' && python x.py --a  # why\n```\n"
    assert [*commands(page)] == [["pip", "install", "-q", ".[test]"], ["python", "x.py", "--a"]]


@pytest.mark.parametrize(
    ("mark", "last"),
    [
        ("main", ".venv/bin/python examples/train_digits.py"),
        ("test", ".venv-test/bin/python -m pytest -q -n 2"),
    ],
)
def test_the_readme_has_self_contained_commands(mark, last):
    marked = README.read_text().partition(f"<!-- command: {mark} -->\n")[2]
    block, *more = commands(marked.partition("\n```\n")[0] + "\n```\n")
    environment = last.partition("/")[0]
    assert block == ["python3", "-m", "venv", environment]
    assert [words[0] for words in more] == [f"{environment}/bin/{p}" for p in ("pip", "python")]
    assert " ".join(more[-1]) == last


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    reading = script[script.index("readme_command()") : script.index("# A copy")]
    shell = f"{reading}readme_command test"
    run = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True
    )
    marked = README.read_text().partition("<!-- command: test -->\n```bash\n")[2]
    assert run.stdout == marked.partition("```")[0] != ""


MODULES = ("", "linen", "nnx", "diagnosis", "training", "masks")


@pytest.mark.parametrize("module", MODULES)
def test_the_readme_lists_every_public_name(module):
    api = README.read_text().partition("## API")[2].partition("\n## ")[0]
    words = set(re.findall(r"\w+", api)) | {"linen", "nnx", "diagnosis", "training", "masks"}
    names = getattr(bnjax, module).__all__ if module else bnjax.__all__
    assert {*names} <= words
