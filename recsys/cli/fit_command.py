"""fit: learn a file of feedback offline, in epochs, and hand the weights to the store as a new version."""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from recsys.cli.evaluation_tables import number, print_comparison
from recsys.cli.file_columns import (
    ClassColumn,
    ItemColumn,
    ItemsFile,
    TimeColumn,
    UserColumn,
    ValueColumn,
    columns,
    contents,
)
from recsys.cli.output import AsJson, console, print_json, progress
from recsys.cli.settings_flags import Given

if TYPE_CHECKING:
    from recsys.feedback_file import FeedbackFile
    from recsys.settings import Settings
    from recsys.weights import WeightStore
    from trainer.fit import Fit

FILE_HELP = "feedback: .csv, .tsv, .parquet, .dat or .data"
NOTHING, LAST = "nothing", "last"
EPOCH_COLUMNS = {
    **{"epoch": "epoch", "seconds": "seconds", "loss": "loss while learning"},
    **{"item_log_loss": "log loss over items", "class_log_loss": "over classes"},
    **{"hr_at_10": "HR@10", "ndcg_at_10": "NDCG@10"},
}
# A part of the file that is kept apart may take so much of it.
LARGEST_SHARE = 0.4


def fit(
    given: Given,
    path: Annotated[Path, typer.Argument(metavar="FILE", help=FILE_HELP)],
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    feedback_class: ClassColumn = None,
    value: ValueColumn = None,
    items: ItemsFile = None,
    epochs: Annotated[int, typer.Option(min=1, help="go through the file at most so often")] = 30,
    patience: Annotated[int, typer.Option(min=1, help="stop when so many epochs in a row gained nothing")] = 3,
    validation: Annotated[
        float, typer.Option(min=0.0, max=LARGEST_SHARE, help="share of the file that says when to stop")
    ] = 0.1,
    test: Annotated[
        float, typer.Option(min=0.0, max=LARGEST_SHARE, help="share, the latest, that accuracy is measured on")
    ] = 0.1,
    start: Annotated[
        str,
        typer.Option(
            "--from", metavar="nothing|last|VERSION", help="what to start from: new weights, or what is in the store"
        ),
    ] = NOTHING,
    publish: Annotated[
        bool, typer.Option("--publish", help="hand the weights to the store at redis_url, as a new version")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="publish also what is worse than the version served")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw the curves: .png, .svg or .pdf")] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR", help="write the curves for TensorBoard")] = None,
    json: AsJson = False,
) -> None:
    """Learn a file of feedback in epochs, and say what that was worth, before and after.

    The latest feedback of the file is kept apart for measuring, some before it to know when to stop. With --publish
    the weights then become the store's next version, unless they are worse than the version being served.
    """
    from recsys.feedback_file import open_feedback_file
    from recsys.store.connection import connect
    from recsys.weights import WeightStore

    version = _version(start)
    _check_extras(plot, tensorboard)
    file = open_feedback_file(path, columns(user, item, time, feedback_class, value))
    settings = given.otherwise(classes=file.classes)
    with ExitStack() as stack:
        store = None
        if publish or version:
            store = WeightStore(stack.enter_context(connect(settings)), settings)
        done = _fitted(file, settings, store, version, (validation, test), (epochs, patience), contents(items))
        result = done.result() | {"file": str(path), "version": None}
        refused = result["objection"] is not None and not force
        if publish and store is not None and not refused:
            result["version"] = done.hand_over(store, clock.time_ns() // 1_000_000).version
    _draw(result["epochs"], plot, tensorboard)
    if json:
        print_json(result)
    else:
        _print(result)
    if publish and refused:
        raise typer.Exit(1)


def _version(start: str) -> int:
    if start == LAST:
        return -1
    if start == NOTHING:
        return 0
    if start.isdecimal() and int(start) > 0:
        return int(start)
    raise typer.BadParameter(f"{start!r} is neither {NOTHING} nor {LAST} nor a version", param_hint="--from")


def _check_extras(plot: Path | None, tensorboard: Path | None) -> None:
    """Find out before the work what would fail behind it."""
    from trainer.curves import check_drawing, check_events

    if plot is not None:
        check_drawing()
    if tensorboard is not None:
        check_events()


def _fitted(
    file: FeedbackFile,
    settings: Settings,
    store: WeightStore | None,
    version: int,
    shares: tuple[float, float],
    limits: tuple[int, int],
    contents: Mapping[str, Sequence[str]],
) -> Fit:
    import torch

    from recsys.device import choose
    from trainer.fit import Fit, start_from

    torch.set_num_threads(settings.torch_threads)
    start = start_from(store, version)
    validation, test = shares
    device = choose(settings.device)
    fit = Fit(file, settings, device, start, validation_share=validation, test_share=test, contents=contents)
    epochs, patience = limits
    with progress() as bar:
        task = bar.add_task("epoch 1", total=fit.train_size)
        try:
            fit.run(
                epochs,
                patience,
                lambda epoch, done: bar.update(task, description=f"epoch {epoch}", completed=done),
            )
        except KeyboardInterrupt:
            bar.console.print("interrupted; this is the best epoch until then")
    return fit


def _draw(epochs: Sequence[Mapping[str, Any]], plot: Path | None, tensorboard: Path | None) -> None:
    from trainer.curves import draw, write_events

    if plot is not None:
        places = [int(row["epoch"]) for row in epochs]
        names = ("loss", "item_log_loss", "class_log_loss", "ndcg_at_10")
        known = {name: [row[name] for row in epochs] for name in names}
        drawn = {name: (places, heights) for name, heights in known.items() if None not in heights}
        draw(drawn, "fit", "epochs", plot)
    if tensorboard is not None:
        write_events(epochs, tensorboard)


def _print(result: Mapping[str, Any]) -> None:
    out = console()
    table = Table(*EPOCH_COLUMNS.values(), box=None, pad_edge=False)
    for row in result["epochs"]:
        numbers = [str(row["epoch"]), f"{row['seconds']:.1f}", *(number(row[name]) for name in list(EPOCH_COLUMNS)[2:])]
        table.add_row(*numbers, style="bold" if row["epoch"] == result["best_epoch"] else "")
    out.print(table)
    print_comparison({"before": result["before"], "after": result["after"]})
    counts = result["feedback"]
    out.print(
        f"learned {counts['train']:,} feedback and kept the best of {len(result['epochs'])} epochs by the next "
        f"{counts['validation']:,}; before and after are measured on the last {counts['test']:,}, learned since"
    )
    if result["version"] is not None:
        out.print(f"version {result['version']} has these weights")
    elif result["objection"] is not None:
        out.print(f"not published: it {result['objection']}; --force publishes all the same")
