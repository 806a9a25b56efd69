"""Build the reference of all public names, with the guides: `python -m examples.reference`.

Needs the extra `docs`. The pages have the layout of the repository, so that links between README,
guides, pictures and scripts work; the reference has its own folder.
"""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
MODULES = {
    "bnjax": "Layers and tools",
    "bnjax.linen": "bnjax.linen",
    "bnjax.nnx": "bnjax.nnx",
    "bnjax.training": "bnjax.training",
    "bnjax.diagnosis": "bnjax.diagnosis",
    "bnjax.masks": "bnjax.masks",
    "bnjax.policies": "bnjax.policies",
}
COMMANDS = ((), ("inspect",), ("convert",), ("diagnose",))
THEME = {
    "name": "material",
    "font": False,  # load nothing from other servers
    "features": ["navigation.indexes", "toc.follow", "content.code.copy", "search.highlight"],
    "palette": [
        {
            "media": f"(prefers-color-scheme: {scheme})",
            "scheme": colours,
            "primary": "indigo",
            "toggle": {"icon": icon, "name": f"Use {other} colours"},
        }
        for scheme, colours, icon, other in (
            ("light", "default", "material/weather-night", "dark"),
            ("dark", "slate", "material/weather-sunny", "light"),
        )
    ],
}
HANDLER = {
    "docstring_style": "google",
    "docstring_section_style": "list",
    "show_root_heading": False,
    "show_root_toc_entry": False,
    "show_bases": False,
    "show_source": False,
    "heading_level": 3,
    "filters": ["!^_", "^__call__$"],
    "separate_signature": True,
    "show_signature_annotations": False,
    "members_order": "source",
}
CALLED = "    options:\n      inherited_members: ['__call__']"  # for layers
STYLE = """\
.md-typeset table:not([class]) { font-size: 0.7rem; }
.md-typeset h2 { overflow-wrap: anywhere; }
"""


def public(name: str) -> list[str]:
    """The public names of a module, except submodules, which have their own pages."""
    module = importlib.import_module(name)
    shown = (each for each in module.__all__ if not isinstance(getattr(module, each), ModuleType))
    return [f"{name}.{each}" for each in shown]


def write(folder: Path) -> list[Any]:
    """Write all pages as Markdown with directives, and return the menu."""
    pages = folder / "pages"
    for path in (ROOT / "README.md", ROOT / "LICENSE", *sorted((ROOT / "examples").rglob("*"))):
        if path.suffix in (".md", ".png", ".py", "") and path.is_file():
            target = pages / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    reference = pages / "reference"
    reference.mkdir()
    (pages / "style.css").write_text(STYLE)
    _copy_package(folder / "source" / "bnjax")
    menu = []
    for module, title in MODULES.items():
        text = importlib.import_module(module).__doc__ or ""
        parts = "\n".join(map(_entry, public(module)))
        (reference / f"{module}.md").write_text(f"# {title}\n\n{_as_list(text)}\n{parts}")
        menu.append({title: f"reference/{module}.md"})
    (reference / "command_line.md").write_text(command_line())
    menu.append({"Command line": "reference/command_line.md"})
    guides = sorted((pages / "examples" / "guides").glob("*.md"))
    guides.sort(key=lambda path: path.stem != "README")  # the index comes first
    shown = [str(path.relative_to(pages)) for path in guides]
    return [{"bnjax": "README.md"}, {"Guides": shown}, {"Reference": menu}]


def _entry(name: str) -> str:
    """A heading, the signature, and the directive that inserts the docstring."""
    module, _, own = name.rpartition(".")
    value = getattr(importlib.import_module(module), own)
    lines = [f"## {name} {{#{name}}}", ""]
    if callable(value) and not isinstance(value, types.GenericAlias):
        made = value.__init__ if isinstance(value, type) else value
        parameters = inspect.signature(made).parameters.values()
        lines += ["```python", _call(own, parameters), "```", ""]
    lines.append(f"::: {name}")
    if own in ("BatchNorm", "BatchNorm2d"):
        lines.append(CALLED)
    return "\n".join([*lines, "", ""])


def _call(name: str, parameters: Iterable[inspect.Parameter]) -> str:
    """A call with all arguments and their defaults, wrapped to the width of a page."""
    hidden = ("parent", "name", "self")
    shown, starred = [], False
    for each in parameters:
        if each.name in hidden:
            continue
        if each.kind is each.KEYWORD_ONLY and not starred:
            shown.append("*")
        starred |= each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        default = each.default
        text = getattr(default, "__name__", repr(default)).replace("mappingproxy({})", "{}")
        value = "" if default is each.empty else f"={text if ' at 0x' not in text else '...'}"
        bare = each.replace(annotation=each.empty, default=each.empty)
        shown.append(f"{bare}{value}")
    line = f"{name}({', '.join(shown)})"
    return textwrap.fill(line, 76, subsequent_indent=" " * (len(name) + 1), break_on_hyphens=False)


def _as_list(text: str) -> str:
    """The docstring of a module, with its table of names as lists of links."""
    pages = {name: module for module in MODULES for name in public(module)}

    def linked(name: str) -> str:
        full = f"bnjax.{name}"
        return f"[`{name}`]({pages[full]}.md#{full})" if full in pages else f"`{name}`"

    lines = []
    for line in text.strip().splitlines():
        names, _, words = line.strip().partition("  ")
        if line.startswith("    ") and words:
            lines.append(f"- {', '.join(map(linked, names.split(', ')))}: {words.strip()}")
        else:
            lines.append(line if line.endswith(".") or not line else f"**{line}**\n")
    return "\n".join(lines) + "\n"


def _copy_package(folder: Path) -> None:
    """Copy the package, with fences around the examples in docstrings."""
    example = re.compile(r"(?m)^( *)>>> .*\n(?:\1.+\n)*?(?=\s*\n|\1\"\"\")")
    for path in (ROOT / "bnjax").rglob("*.py"):
        target = folder / path.relative_to(ROOT / "bnjax")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(example.sub(r"\1```pycon\n\g<0>\1```\n", path.read_text()))


def command_line() -> str:
    """A page with the help of each command."""
    page = ["# Command line\n"]
    for command in COMMANDS:
        line = [sys.executable, "-m", "bnjax", *command, "--help"]
        env = os.environ | {"COLUMNS": "88", "NO_COLOR": "1", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
        text = "\n".join(each.rstrip() for each in done.stdout.strip().splitlines())
        page.append(f"## {' '.join(('bnjax', *command))}\n\n```text\n{text}\n```\n")
    return "\n".join(page)


def settings(folder: Path, out: Path, menu: list[Any]) -> dict[str, Any]:
    """The configuration of mkdocs."""
    handler = {"paths": [str(folder / "source")], "options": HANDLER}
    return {
        "site_name": "bnjax",
        "docs_dir": str(folder / "pages"),
        "site_dir": str(out.resolve()),
        "use_directory_urls": False,  # so that pages work without a server
        "theme": THEME,
        "extra_css": ["style.css"],
        "nav": menu,
        "plugins": ["search", {"mkdocstrings": {"handlers": {"python": handler}}}],
        "markdown_extensions": [
            "tables",
            "attr_list",
            "admonition",
            {"toc": {"permalink": True}},
            "pymdownx.highlight",
            "pymdownx.superfences",
        ],
    }


def main(
    out: Annotated[Path, typer.Option(help="Where to write the pages; open index.html.")] = (
        ROOT / "build" / "reference"
    ),
) -> None:
    """Build the reference and the guides; warnings are errors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(folder, out, write(folder))
        (folder / "mkdocs.yml").write_text(json.dumps(config))  # JSON is YAML
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean"]
        env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement
        done = subprocess.run([*command, "--config-file", folder / "mkdocs.yml"], env=env)
    if done.returncode:
        raise typer.Exit(done.returncode)
    print(out / "index.html")


if __name__ == "__main__":
    typer.run(main)
