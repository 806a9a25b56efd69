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

# Each command imports what it needs: JAX and torch take a second each, and help needs neither.
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
        help="A checkpoint of safetensors, PyTorch or Flax, whatever its suffix, or a folder of "
        "orbax or Hugging Face."
    ),
]
Key = Annotated[
    str | None, typer.Option(help="The part to take, such as state_dict_ema or model/ema.")
]


Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def failing(code: int) -> Iterator[None]:
    """Turn an error for the user into a message and an exit code, a crash into one of its own."""
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
    """Where tables go: in a file or a pipe they are as wide as paths in one piece make them."""
    return console if console.is_terminal else Console(highlight=False, width=_UNBROKEN)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
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

    Exit codes: 0, all is well; 1, problems were found; 2, a file could not be read or the model
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
    values that are NaN or infinite, negative variances, and shapes that do not fit together.
    """
    from bnjax.checkpoints import files, inspection
    from bnjax.checkpoints.formats.shards import shard

    with failing(FAILED):
        layers = inspection.inspect(files.load(file, only=inspection.relevant, key=key))
    problems, notes = inspection.problems(layers), inspection.notes(layers)
    if part := shard(file):
        notes.append(
            f"this is shard {part[0]} of {part[1]}: give the folder, or its index, for all"
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
        caption="updates: batches counted. dead: channels of constant output, weak: nearly so.",
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
            f"{quiet} channels are dead or weak: their output has a standard deviation of 0 "
            f"or below {NEARLY_DEAD}, so they could be pruned",
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
        typer.Argument(help="Where to write. The suffix chooses the format; none is orbax."),
    ],
    key: Key = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint of the same model in the other framework, whose names, layouts "
            "and dtypes the arrays take."
        ),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            help="PYTORCH=FLAX: match a module path or an array whose names differ. Repeatable; "
            "needs --like."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Leave out arrays whose name fits this glob. Repeatable; needs --like."),
    ] = None,
    flatten: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER=C,H,W: this linear layer (Flax path) follows a flatten of feature maps of "
            "that shape. Repeatable; needs --like."
        ),
    ] = None,
    transposed: Annotated[
        list[str] | None,
        typer.Option(
            help="Treat layers whose Flax path fits this glob as transposed convolutions. "
            "Repeatable; needs --like."
        ),
    ] = None,
) -> None:
    """Write a checkpoint in another format, or for the other framework.

    Without --like, names and values stay the same, bit for bit. To convert between PyTorch and
    Flax, pass --like FILE, a checkpoint of the same model in the other framework, of any values.
    It is needed because a weight alone does not say which kind of layer it belongs to. What is no
    array, such as a name or a vocabulary, is left out.
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
        if template is not None:
            tree = renamed(picked(tree, source), picked(template, like), options)
        elif any(options.values()):
            raise ValueError("These options are for a change of names: add --like FILE.")
        left: list[str] = []
        if template is None:
            tree, left = parts.arrays_in(tree)
        files.save(target, tree)
    if left:
        text = f"left out, as they are no arrays: {parts.named(left)}"
        console.print(escape(text), soft_wrap=True)
    console.print(f"wrote {escape(str(target))}", soft_wrap=True)


@app.command()
def diagnose(
    model: Annotated[
        str, typer.Argument(help="package.module:make_model, a function without arguments.")
    ],
    variables: Annotated[Path, typer.Option(help="The checkpoint of the model.")],
    data: Annotated[
        Path,
        typer.Option(
            help="The inputs: an .npy file, or an .npz file with one array or one named `x`."
        ),
    ],
    key: Key = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="The batch size that the model was trained with.")
    ] = 64,
    apply: Annotated[
        str,
        typer.Option(
            help='The arguments of the model in evaluation, as JSON, such as {"train": false}.'
        ),
    ] = "{}",
    steps: Annotated[
        int | None, typer.Option(min=0, help="For how many steps the model was trained.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the report to this picture.")] = None,
    as_json: Json = False,
) -> None:
    """Explain why a model is worse in evaluation than in training.

    For each problem it names the layer, the evidence, the cause and a line of code that fixes it.
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
    """The model that the function at `package.module:function` makes."""
    module, colon, name = target.partition(":")
    if not colon or "/" in module or module.endswith(".py"):
        raise ValueError(
            f"Expected package.module:make_model, with dots as in an import, got {target!r}."
        )
    sys.path.insert(0, "")  # as `python -m` does for modules in the current folder
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and imports what is not
        raise ValueError(
            f"There is no module {error.name!r} in {Path.cwd()} or among the installed packages. "
            "Run the command in the folder that the module is in, or set PYTHONPATH to it."
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
            f"{target} must make the model without arguments, but {error}. Write a function that "
            "calls it with them."
        ) from error
    return make()


def arguments(text: str) -> dict[str, Any]:
    """Named arguments, from JSON."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--apply must be JSON, got {text!r}: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f'--apply must name arguments, as in {{"train": false}}, got {text!r}.')
    return found


def inputs(path: Path) -> "np.ndarray":
    """The array of an .npy file, the array `x` of an .npz file, or its only one."""
    import numpy as np

    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        return file
    with file:
        names = ["x"] if "x" in file else list(file)
        if len(names) != 1:
            raise ValueError(f"{path} must hold the inputs as `x`, or alone, got {names}.")
        return file[names[0]]


def check_apart(target: Path, *sources: Path | None) -> None:
    """What is read is not written over."""
    for source in sources:
        if source is None or not (source.exists() and target.exists()):
            continue
        if source.resolve() in (target.resolve(), *target.resolve().parents):
            raise ValueError(
                f"To write {target} would destroy {source}, which is read. Give it another name."
            )


def picked(tree: dict[str, Any], path: Path | None) -> Any:
    """The only model in a checkpoint; where it is a part, it is said which."""
    from bnjax.checkpoints.contents import ContentError
    from bnjax.checkpoints.parts import model_in

    try:
        part, model = model_in(tree)
    except ContentError as error:
        raise ValueError(f"Of {path}, {error} Choose one by --key.") from error
    if part:
        console.print(escape(f"took {part} of {path}"), soft_wrap=True)
    return model


def renamed(tree: dict[str, Any], template: dict[str, Any], options: dict[str, Any]) -> Any:
    """The tree with names and layouts of the template, which is in the other naming."""
    from bnjax.checkpoints.conversion import from_torch, to_torch

    flax, other = map(is_flax, (tree, template))
    if flax == other:
        naming = "Flax's (such as `kernel` and `scale`)" if flax else "PyTorch's"
        raise ValueError(
            f"Both files have {naming} naming, so --like changes nothing: leave it out. Of a "
            "nested checkpoint, save the state dict or the variables alone."
        )
    if other:
        return from_torch(tree, None, as_variables(template), **options)
    return to_torch(as_variables(tree), template, **options, numpy=True)


def is_flax(tree: dict[str, Any]) -> bool:
    """Whether names are those of linen variables or an nnx state."""
    from flax.traverse_util import flatten_dict

    from bnjax.models.variables import of_variable

    last = {of_variable(tuple(map(str, names)))[-1] for names in flatten_dict(tree)}
    known = {"kernel", "scale", "embedding", "mean", "var"} & last
    return bool(known or ({"params", "batch_stats"} & {*tree} and not "".join(last).count(".")))


def as_variables(tree: dict[str, Any]) -> Any:
    """What was saved of linen variables as it is, of an nnx state as a state."""
    if {"params", "batch_stats"} & {*tree}:
        return tree
    from flax import nnx
    from flax.traverse_util import flatten_dict

    from bnjax.models.variables import of_variable

    flat = {of_variable(keys): x for keys, x in flatten_dict(tree).items()}
    streams = {keys[:-1] for keys in flat if keys[-1] == "key"}
    kinds = {"mean": nnx.BatchStat, "var": nnx.BatchStat, "count": nnx.BatchStat}

    def kind(keys: tuple[Any, ...]) -> Any:
        return nnx.RngState if keys[:-1] in streams else kinds.get(keys[-1], nnx.Param)

    return nnx.from_flat_state((keys, kind(keys)(x)) for keys, x in flat.items())


def pair(text: str) -> tuple[str, str]:
    """Both sides of NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"Expected NAME=VALUE, got {text!r}.")
    return name, value


def shape(text: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"Expected a shape such as 512,7,7, got {text!r}.")
    return tuple(map(int, text.split(",")))
