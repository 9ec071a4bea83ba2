"""evaluate: measure the learner on a file of feedback beside known methods, by one of several protocols."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.evaluation_tables import print_evaluation
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
from recsys.cli.output import AsJson, print_json, progress
from recsys.cli.settings_flags import Given

if TYPE_CHECKING:
    from recsys.feedback_file import Columns, FeedbackFile
    from recsys.settings import Settings

OFFLINE = "All protocols but test-then-train"
FILE_HELP = "feedback: .csv, .tsv, .parquet, .dat or .data"


class Protocol(StrEnum):
    """Name the protocols; trainer.evaluation says what each does."""

    ONLINE = "test-then-train"
    LEAVE_ONE_OUT = "leave-one-out"
    TEMPORAL = "temporal"
    PERIODS = "periods"


def evaluate(
    given: Given,
    path: Annotated[Path | None, typer.Argument(metavar="FILE", help=FILE_HELP)] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="the same, as an option")] = None,
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    feedback_class: ClassColumn = None,
    value: ValueColumn = None,
    items: ItemsFile = None,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="which to compare; all that suit the file unless given")
    ] = None,
    events: Annotated[int | None, typer.Option(min=1, help="how much of the file's feedback; all unless given")] = None,
    protocol: Annotated[Protocol, typer.Option(help="what is learned from and what is tested on")] = Protocol.ONLINE,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="draw accuracy over the stream: .png, .svg or .pdf")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, rich_help_panel=OFFLINE, help="over what is learned, at most")] = 30,
    patience: Annotated[
        int, typer.Option(min=1, rich_help_panel=OFFLINE, help="stop when so many epochs in a row gained nothing")
    ] = 3,
    split: Annotated[
        float, typer.Option(min=0.01, max=0.99, rich_help_panel=OFFLINE, help="temporal: share that is learned first")
    ] = 0.8,
    periods: Annotated[
        int, typer.Option(min=2, rich_help_panel=OFFLINE, help="periods: spans of time of equal length")
    ] = 16,
    json: AsJson = False,
) -> None:
    """Learn from a file as fast as this machine goes and say how good that is; no server, no store.

    test-then-train tests each feedback before learning it; leave-one-out tests on each user's last event; temporal
    learns from the first part of the file and tests on the rest, once frozen and once learning on; periods learns from
    each span of time and tests on the next.

    The file's classes are the setting `classes`, unless that is given. Ctrl-C ends test-then-train early, with what was
    measured; in a further epoch of the other protocols it ends the teaching, and the best epoch is tested.
    """
    from recsys.feedback_file import open_feedback_file
    from trainer.curves import check_drawing, draw_accuracy

    path = one_file(path, data)
    if plot is not None:
        check_drawing()
    named = columns(user, item, time, feedback_class, value)
    file = open_feedback_file(path, named)
    settings = given.otherwise(classes=file.classes)
    names, told = _chosen(methods, settings), contents(items)
    if protocol is Protocol.ONLINE:
        result = _test_then_train(path, named, file, settings, names, events, told)
    else:
        result = _offline(protocol, file, settings, names, events, (epochs, patience), split, periods, told)
    if plot is not None:
        draw_accuracy(result, plot)
    if json:
        print_json(result)
    else:
        print_evaluation(result)


def one_file(path: Path | None, data: Path | None) -> Path:
    """Return the file, however it was named.

    Raises:
        UsageError: when it was named twice or not at all.
    """
    if (path is None) == (data is None):
        raise typer.BadParameter("name one file of feedback", param_hint="FILE")
    found = path or data
    assert found is not None
    return found


def _chosen(methods: str | None, settings: Settings) -> list[str]:
    from trainer.evaluation import suitable

    fit = suitable(settings)
    if methods is None:
        return fit
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if unknown := [name for name in names if name not in fit]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: on this file there are {', '.join(fit)}", param_hint="--methods"
        )
    return list(dict.fromkeys(names)) or fit


def _offline(
    protocol: Protocol,
    file: FeedbackFile,
    settings: Settings,
    names: Sequence[str],
    events: int | None,
    limits: tuple[int, int],
    split: float,
    periods: int,
    told: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    import torch

    from recsys.device import choose
    from trainer import evaluation

    torch.set_num_threads(settings.torch_threads)
    teaching = evaluation.Teaching(*limits)
    with progress() as bar:
        task = bar.add_task(protocol.value, total=None)

        def tell(what: str, done: int, of: int) -> None:
            bar.update(task, description=what, completed=done, total=of)

        contest = evaluation.Contest(file, settings, choose(settings.device), names, tell, told)
        if protocol is Protocol.LEAVE_ONE_OUT:
            return evaluation.leave_one_out(contest, teaching, events)
        if protocol is Protocol.TEMPORAL:
            return evaluation.temporal(contest, teaching, split, events)
        return evaluation.periods(contest, teaching, periods, events)


def _test_then_train(
    path: Path,
    named: Columns | None,
    file: FeedbackFile,
    settings: Settings,
    names: Sequence[str],
    events: int | None,
    told: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Run the learner in this process and, where there is a core for them, the other methods in another."""
    import torch

    from recsys.device import choose
    from trainer.evaluation import RECSYS, Beside, Evaluation

    torch.set_num_threads(settings.torch_threads)
    others = [name for name in names if name != RECSYS]
    apart = RECSYS in names and bool(others) and (os.cpu_count() or 1) > 1
    with ExitStack() as stack:
        beside = stack.enter_context(Beside(path, named, settings, others)) if apart else None
        evaluation = Evaluation(file, settings, choose(settings.device), [RECSYS] if apart else names, told)
        with progress() as bar:
            task = bar.add_task(path.name, total=min(events or file.rows, file.rows))

            def done(feedback: int) -> None:
                bar.update(task, completed=feedback)
                if beside is not None:
                    beside.allow(feedback)

            try:
                evaluation.run(events, done)
            except KeyboardInterrupt:
                bar.console.print("interrupted; this is what was measured until then")
            result = evaluation.result()
            if beside is not None:
                result["methods"] += beside.result(evaluation.feedback)["methods"]
    result["methods"].sort(key=lambda method: names.index(method["name"]))
    return result
