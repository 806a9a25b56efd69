"""The command line: parse, call one tool, print. Needs typer, from the extra `tools`."""

import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bnjax
from bnjax._names import nearest
from bnjax._tables import Name
from bnjax._words import number_of

# Commands import what they need: JAX and torch take a second each, and --help needs neither.
if TYPE_CHECKING:
    import numpy as np

    from bnjax.checkpoints.inspection import Layer

PROBLEMS, FAILED = 1, 2
_UNBROKEN = 1000  # columns

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console, errors = Console(highlight=False), Console(stderr=True, highlight=False, style="red")

File = Annotated[
    Path,
    typer.Argument(
        help="A safetensors, PyTorch or Flax checkpoint with any suffix, or an orbax or "
        "Hugging Face folder."
    ),
]
Key = Annotated[
    str | None, typer.Option(help="The part to use, such as state_dict_ema or model/ema.")
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def failing(code: int) -> Iterator[None]:
    """Exit with a message and this code on expected errors, and with FAILED on crashes."""
    try:
        yield
    except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
        places = (note for note in getattr(error, "__notes__", ()) if note.startswith("In "))
        errors.print(escape("\n".join((str(error), *places))), soft_wrap=True)
        raise typer.Exit(code) from error
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: this is a crash, not a problem found in the model."
        errors.print(text, soft_wrap=True)
        raise typer.Exit(FAILED) from error


def output() -> Console:
    """The console for tables; wide enough not to break paths in a file or a pipe."""
    return console if console.is_terminal else Console(highlight=False, width=_UNBROKEN)


def show_version(wanted: bool) -> None:
    """Print the version and exit."""
    if wanted:
        print(f"bnjax {bnjax.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Inspect and convert checkpoints of models with batch norm, and diagnose the models.

    Exit codes: 0, no problems; 1, problems were found; 2, a file could not be read or the model
    failed.
    """


@app.command()
def inspect(
    file: File,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List the batch norms in a checkpoint and report what is wrong with them.

    The table has one row for each batch norm. Problems are statistics that were never updated,
    values that are NaN or infinite, negative variances, and mismatched shapes.
    """
    from bnjax.checkpoints import files, inspection
    from bnjax.checkpoints.formats.shards import shard

    with failing(FAILED):
        layers = inspection.inspect(files.load(file, only=inspection.relevant, key=key))
    problems, notes = inspection.problems(layers), inspection.notes(layers)
    if part := shard(file):
        notes.append(
            f"this is shard {part[0]} of {part[1]}; pass the folder or the index to inspect all"
        )
    if as_json:
        rows = [layer._asdict() for layer in layers]
        found = {"file": str(file), "layers": rows, "problems": problems, "notes": notes}
        print(json.dumps(found, indent=2))
    else:
        show(layers, problems, notes, file.name)
    if problems:
        raise typer.Exit(PROBLEMS)


def show(layers: "list[Layer]", problems: list[str], notes: list[str], title: str) -> None:
    """Print the table and the verdict."""
    from bnjax.checkpoints.inspection import NEARLY_DEAD

    table = Table(
        title=f"batch norms in {escape(title)}",
        caption="updates: batches counted. dead: constant output, weak: almost constant.",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer")
    for column in ("size", "scale", "mean", "variance", "updates", "dead", "weak", "NaN"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in layers:
        numbers = (layer.updates, layer.dead, layer.nearly_dead, layer.not_finite)
        cells = ("-" if n is None else str(n) for n in numbers)
        ranges = (
            "-" if limits is None else f"{limits[0]:.2g}..{limits[1]:.2g}"
            for limits in (layer.scale, layer.mean, layer.var)
        )
        style = "red" if layer.problems else None
        table.add_row(Name(layer.name or "top"), str(layer.channels), *ranges, *cells, style=style)
    if layers:
        output().print(table)
    for problem in problems:
        console.print(f"[red]problem[/]  {escape(problem)}", soft_wrap=True)
    if quiet := sum(layer.dead + layer.nearly_dead for layer in layers):
        notes = [
            *notes,
            f"{number_of(quiet, 'dead or weak channel')}, with an output standard deviation below "
            f"{NEARLY_DEAD}, could be pruned",
        ]
    for note in notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    verdict = "fine" if not problems else f"{number_of(len(problems), 'problem')} found"
    console.print(f"verdict: {verdict} ({number_of(len(layers), 'batch norm')})")


@app.command()
def convert(
    source: File,
    target: Annotated[
        Path,
        typer.Argument(help="Where to write. The suffix sets the format; no suffix is orbax."),
    ],
    key: Key = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint of the same model in the other framework: convert to its names, "
            "layouts and dtypes."
        ),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="PYTORCH=FLAX: match modules or arrays whose names differ. Repeatable; "
            "needs --like."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Skip arrays whose name matches this glob. Repeatable; needs --like."),
    ] = None,
    flatten: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER=C,H,W: the linear layer at this Flax path follows a flatten of feature "
            "maps of this shape. Repeatable; needs --like."
        ),
    ] = None,
    transposed: Annotated[
        list[str] | None,
        typer.Option(
            help="Treat layers whose Flax path matches this glob as transposed convolutions. "
            "Repeatable; needs --like."
        ),
    ] = None,
) -> None:
    """Write a checkpoint in another format, or for the other framework.

    Without --like, names and values stay the same, bit for bit. To convert between PyTorch and
    Flax, pass --like FILE, a checkpoint of the same model in the other framework, with any values:
    an array does not say what kind of layer it belongs to. Anything that is not an array, such as
    a name or a vocabulary, is skipped.
    """
    from bnjax.checkpoints import files, parts

    with failing(PROBLEMS):
        check_apart(target, source, like)
    with failing(FAILED):
        tree = files.load(source, key=key)
        template = None if like is None else files.load(like)
    with failing(PROBLEMS):
        options = {
            "rename": dict(pair(text) for text in rename) if rename else None,
            "ignore": ignore or (),
            "flatten": {layer: shape(text) for layer, text in map(pair, flatten or ())} or None,
            "transposed": transposed,
        }
        left: list[str] = []
        if template is not None:
            from bnjax.checkpoints.frameworks import converted_like

            tree = converted_like(picked(tree, source), picked(template, like), options)
        elif any(options.values()):
            raise ValueError("These options convert names, so they need --like FILE.")
        else:
            tree, left = parts.arrays_in(tree)
        files.save(target, tree)
    if left:
        text = f"skipped, not arrays: {parts.named(left)}"
        console.print(escape(text), soft_wrap=True)
    console.print(f"wrote {escape(str(target))}", soft_wrap=True)


@app.command()
def diagnose(
    model: Annotated[
        str, typer.Argument(help="package.module:make_model, a function that takes no arguments.")
    ],
    variables: Annotated[Path, typer.Option(help="The checkpoint of the model.")],
    data: Annotated[
        Path,
        typer.Option(
            help="The inputs: an .npy file, or an .npz file with a single array or one named `x`."
        ),
    ],
    key: Key = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The batch size used in training.")] = 64,
    apply: Annotated[
        str,
        typer.Option(
            help='Arguments of the model in evaluation, as JSON, such as {"train": false}.'
        ),
    ] = "{}",
    steps: Annotated[
        int | None, typer.Option(min=0, help="How many steps the model was trained for.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the report to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Explain why a model is worse in evaluation than in training.

    For each problem, print the layer, the evidence, the cause and a line of code that fixes it.
    """
    from flax import nnx

    from bnjax.checkpoints import files
    from bnjax.models.diagnosis import diagnose as diagnosed

    with failing(FAILED):
        made, tree, x = made_by(model), files.load(variables, key=key), inputs(data)
        if isinstance(made, nnx.Module):
            made.eval()
        batches = [x[start : start + batch_size] for start in range(0, len(x), batch_size)]
        report = diagnosed(made, tree, batches, steps=steps, apply_kwargs=arguments(apply))
        if plot is not None:
            report.plot(plot)
    if as_json:
        print(report.to_json())
    else:
        output().print(report)
    if not report.healthy:
        raise typer.Exit(PROBLEMS)


def made_by(target: str) -> Any:
    """Call the function at `package.module:function` to make the model."""
    module, colon, name = target.partition(":")
    if not colon or "/" in module or module.endswith(".py"):
        raise ValueError(
            f"Expected package.module:make_model, with dots as in an import, got {target!r}."
        )
    sys.path.insert(0, "")  # the current folder, as in `python -m`
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its imports does not
        raise ValueError(
            f"There is no module {error.name!r} in {Path.cwd()} or among the installed packages. "
            "Run the command in the folder of the module, or set PYTHONPATH to it."
        ) from error
    make = getattr(found, name, None)
    if make is None:
        close = nearest(name, vars(found))
        hint = f" Did you mean {module}:{close}?" if close else ""
        raise ValueError(f"The module {module} has no {name!r}.{hint}")
    try:
        signature(make).bind()
    except TypeError as error:
        raise ValueError(
            f"{target} must make the model without arguments, but {error}. Wrap it in a function "
            "that passes them."
        ) from error
    return make()


def arguments(text: str) -> dict[str, Any]:
    """Keyword arguments, from JSON."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--apply must be JSON, got {text!r}: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f'--apply must name arguments, as in {{"train": false}}, got {text!r}.')
    return found


def inputs(path: Path) -> "np.ndarray":
    """The array in an .npy file; in an .npz file, the one named `x` or the only one."""
    import numpy as np

    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        return file
    with file:
        names = ["x"] if "x" in file else list(file)
        if len(names) != 1:
            raise ValueError(f"{path} must hold a single array or one named `x`, got {names}.")
        return file[names[0]]


def check_apart(target: Path, *sources: Path | None) -> None:
    """Check that the target overwrites none of the sources."""
    for source in sources:
        if source is None or not (source.exists() and target.exists()):
            continue
        if source.resolve() in (target.resolve(), *target.resolve().parents):
            raise ValueError(
                f"Writing {target} would overwrite the input {source}. Choose another name."
            )


def picked(tree: dict[str, Any], path: Path | None) -> Any:
    """The only model in a checkpoint; print its name, unless it is the whole checkpoint."""
    from bnjax.checkpoints.contents import ContentError
    from bnjax.checkpoints.parts import model_in

    try:
        part, model = model_in(tree)
    except ContentError as error:
        raise ValueError(f"In {path}, {error} Choose one with --key.") from error
    if part:
        console.print(escape(f"using {part} from {path}"), soft_wrap=True)
    return model


def pair(text: str) -> tuple[str, str]:
    """Both sides of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"Expected NAME=VALUE, got {text!r}.")
    return name, value


def shape(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"Expected a shape such as 512,7,7, got {text!r}.")
    return tuple(map(int, text.split(",")))
