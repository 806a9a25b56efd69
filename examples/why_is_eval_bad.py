"""Break batch norm in evaluation in many ways, and diagnose each with `bnjax.diagnose`.

Each fault is injected into the digits network, most of them during training, then diagnosed and
fixed as the diagnosis suggests. Accuracies are measured in evaluation with batches of four.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from digits import Batch, Data, ResNet, Splits, batches, load, loss_fn
from rich.console import Console
from rich.table import Table

import bnjax
from bnjax._tables import Name
from bnjax.diagnosis import Report
from bnjax.training import TrainState, history, init_state, train_step

EVALUATED = 4
console = Console()


class Setup(NamedTuple):
    """A model and how to evaluate it: arguments of its call, preprocessing, and a context."""

    model: ResNet
    variables: Any
    settings: dict[str, Any] | None = None
    prepare: Callable[[Any], Any] = lambda x: x
    within: Callable[[], Any] = contextlib.nullcontext


class Case(NamedTuple):
    """A fault: the broken model, the fixed one, and extra arguments for the diagnosis."""

    fault: str
    broken: Setup
    fixed: Callable[[], Setup]
    size: int = 64
    known: dict[str, Any] | None = None


class Trainer:
    """Trains the network; `record` holds the statistics of the last run."""

    def __init__(self, splits: Splits, epochs: int, seed: int) -> None:
        self.splits, self.epochs, self.seed = splits, epochs, seed
        self.model = ResNet(splits.classes, (8, 16, 32))
        self.record: dict[str, Any] = {}
        self.every = 10
        self.step = train_step(loss_fn, donate=False)

    def __call__(
        self,
        model: ResNet | None = None,
        lr: float = 5e-3,
        size: int = 64,
        prepare: Callable[[Any], Any] = lambda x: x,
        kept: Callable[[Any], Any] = lambda batch_stats: batch_stats,
        each: Callable[[TrainState], Any] = lambda state: None,
    ) -> Any:
        """Train, and return the variables; `kept` changes the statistics before each step."""
        data, self.record = self.splits.train, {}
        count = len(data) // 64 * self.epochs
        tx = optax.adam(optax.cosine_decay_schedule(lr, count))
        state = init_state(model or self.model, tx, jax.random.key(self.seed), data.x[:2])
        step = history(self.step, self.record, every=self.every)
        shown = 0
        for epoch in range(self.epochs):
            for batch in batches(data, size, self.seed + epoch):
                if shown < count:  # the same number of steps, even with small batches
                    batch = {**batch, "x": prepare(batch["x"])}
                    state, _ = step(state.replace(batch_stats=kept(state.batch_stats)), batch)
                    shown += 1
            each(state)
        return state.variables

    def clean(self, size: int = 64, prepare: Callable[[Any], Any] = lambda x: x) -> list[Batch]:
        """Batches to compute statistics from, without random shifts, as in evaluation."""
        data = Data(self.splits.train.x[: 16 * size], self.splits.train.y[: 16 * size])
        return [{**batch, "x": prepare(batch["x"])} for batch in batches(data, size)]


def cases(train: Trainer) -> Iterator[Case]:
    """Yield all faults."""
    model = train.model
    good = train()
    right = Setup(model, good)
    fresh = model.init(jax.random.key(0), train.splits.train.x[:2])["batch_stats"]
    yield Case("none", right, lambda: right, known={"history": train.record})
    yield Case("updates not kept", Setup(model, {**good, "batch_stats": fresh}), lambda: right)

    def recalibrated(setup: Setup) -> Callable[[], Setup]:
        def fixed() -> Setup:
            data = train.clean(prepare=setup.prepare)
            new = bnjax.recalibrate(setup.model, setup.variables, data)
            return setup._replace(variables=new)

        return fixed

    for value in (0.001, 0.99):

        def within(value: float = value) -> Any:
            return bnjax.override("**", momentum=value)

        with within():
            setup = Setup(model, train(), within=within)
            yield Case(
                f"momentum={value}", setup, recalibrated(setup), known={"history": train.record}
            )

    yield Case("batches of two", Setup(model, train(size=2, lr=1e-3)), lambda: right, size=2)
    setup = Setup(model, good, prepare=lambda x: x / 4 + 1)
    yield Case("images not standardized", setup, lambda: right)

    untracked = ResNet(train.splits.classes, (8, 16, 32), track_running_stats=False)
    alone = train(untracked)
    tracked = Setup(model, {**alone, "batch_stats": fresh})
    yield Case("nothing tracked", Setup(untracked, alone), recalibrated(tracked))
    setup = Setup(model, good, {"mutable": ["batch_stats"]})
    yield Case("mutable in evaluation", setup, lambda: right)

    stats = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), good["batch_stats"])
    setup = Setup(model, {**good, "batch_stats": stats})
    yield Case("a NaN batch kept", setup, recalibrated(setup))

    data = train.splits.train
    parts = np.array_split(np.argsort(data.y, kind="stable"), 4)  # a few classes for each device
    own = [list(batches(Data(data.x[part], data.y[part]), 64)) for part in parts]
    stats = [bnjax.recalibrate(model, good, part)["batch_stats"] for part in own]
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *stats)
    merged = Setup(model, {**good, "batch_stats": bnjax.merge_batch_stats(stacked)})
    setup = Setup(model, {**good, "batch_stats": stacked})
    yield Case("devices without axis name", setup, recalibrated(merged))

    tiny = Setup(model, train(prepare=lambda x: x / 1e5), prepare=lambda x: x / 1e5)
    yield Case("images of size 1e-5", tiny, lambda: right)

    states: list[TrainState] = []
    last = train(lr=0.03, each=states.append)
    params = jax.tree.map(lambda *p: sum(p) / len(p), *(s.params for s in states[:-1]))
    setup = Setup(model, {"params": params, "batch_stats": last["batch_stats"]})
    yield Case("averaged weights", setup, recalibrated(setup), known={"history": train.record})

    def half(batch_stats: Any) -> Any:
        return jax.tree.map(jnp.bfloat16, batch_stats)

    def slow() -> Any:
        return bnjax.override("**", momentum=0.005)

    with slow():
        setup = Setup(model, train(kept=half), within=slow)
    yield Case("statistics in bfloat16", setup, recalibrated(setup))


def accuracy(setup: Setup, data: Data) -> float:
    """The accuracy in the user's evaluation, which keeps updated statistics."""
    variables, correct = setup.variables, 0
    stats = variables.get("batch_stats", {})
    if any(leaf.ndim > 1 for leaf in jax.tree.leaves(stats)):  # evaluate on the first device
        variables = {**variables, "batch_stats": jax.tree.map(lambda rows: rows[0], stats)}
    call = jax.jit(lambda variables, x: setup.model.apply(variables, x, **(setup.settings or {})))
    count = len(data) // EVALUATED * EVALUATED
    order = np.argsort(data.y[:count], kind="stable")  # sorted by class, as in a folder per class
    for index in order.reshape(-1, EVALUATED):
        logits: Any = call(variables, setup.prepare(data.x[index]))
        if isinstance(logits, tuple):
            logits, updates = logits
            variables = {**variables, **updates}
        correct += int((np.asarray(logits).argmax(-1) == data.y[index]).sum())
    return correct / count


def diagnosed(case: Case, train: Trainer) -> Report:
    """Diagnose the broken model."""
    setup = case.broken
    with setup.within():
        return bnjax.diagnose(
            setup.model,
            setup.variables,
            train.clean(case.size, setup.prepare),
            loss_fn=loss_fn,
            apply_kwargs=setup.settings,
            **(case.known or {}),
        )


def main(
    out: Annotated[Path, typer.Option(help="The folder for pictures of the reports.")] = Path(
        "runs/why_is_eval_bad"
    ),
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of each run.")] = 12,
    seed: int = 0,
    full: Annotated[bool, typer.Option(help="Also print each report.")] = False,
    first: Annotated[int | None, typer.Option(help="Stop after this many faults.")] = None,
) -> None:
    """Inject each fault, diagnose it, and fix it."""
    splits = load(seed=seed)
    train = Trainer(splits, epochs, seed)
    out.mkdir(parents=True, exist_ok=True)
    table = Table(title="Why is evaluation bad?", caption="accuracy with batches of four")
    for column in ("fault", "diagnosis", "at layer", "fix"):
        table.add_column(column)
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for case in itertools.islice(cases(train), first):
        report = diagnosed(case, train)
        console.print(report if full else f"{case.fault}: {report.verdict}", soft_wrap=True)
        report.plot(out / f"{case.fault.replace(' ', '_').replace('=', '_')}.png")
        before, after = (accuracy(s, splits.test) for s in (case.broken, case.fixed()))
        words = ["all is well", "", ""]
        if report.findings:
            worst = report.findings[0]
            words = [worst.kind, worst.layer, worst.repair.partition("  #")[0]]
        table.add_row(case.fault, *map(Name, words), f"{before:.3f}", f"{after:.3f}")
    console.print(table)
    console.print(f"pictures: {out}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
