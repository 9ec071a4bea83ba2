"""evaluate: measure the learner on a file of feedback, test-then-train, beside counting methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from recsys.cli.file_columns import ClassColumn, ItemColumn, TimeColumn, UserColumn, ValueColumn, columns
from recsys.cli.output import AsJson, console, print_json, progress
from recsys.cli.settings_flags import Given

NAMES = {"hr_at_1": "HR@1", "hr_at_5": "HR@5", "hr_at_10": "HR@10", "hr_at_20": "HR@20"}
NAMES |= {"ndcg_at_10": "NDCG@10", "mrr_at_10": "MRR@10"}


def evaluate(
    given: Given,
    data: Annotated[Path, typer.Option(metavar="FILE", help="feedback: .csv, .tsv, .parquet, .dat or .data")],
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    feedback_class: ClassColumn = None,
    value: ValueColumn = None,
    events: Annotated[int | None, typer.Option(min=1, help="how much of the file's feedback; all unless given")] = None,
    json: AsJson = False,
) -> None:
    """Learn from a file as fast as this machine goes, testing before learning; no server, no store.

    The file's classes are the setting `classes`, unless that is given. Ctrl-C ends it early, with what was measured.
    """
    import torch

    from recsys.device import choose
    from recsys.feedback_file import open_feedback_file
    from trainer.evaluation import Evaluation

    file = open_feedback_file(data, columns(user, item, time, feedback_class, value))
    settings = given.otherwise(classes=file.classes)
    torch.set_num_threads(settings.torch_threads)
    evaluation = Evaluation(file, settings, choose(settings.device))
    with progress() as bar:
        task = bar.add_task(data.name, total=min(events or file.rows, file.rows))
        try:
            evaluation.run(events, lambda done: bar.update(task, completed=done))
        except KeyboardInterrupt:
            bar.console.print("interrupted; this is what was measured until then")
    result = evaluation.result()
    if json:
        print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    out = console()
    table = Table("method", *NAMES.values(), "seconds", box=None, pad_edge=False)
    for method in result["methods"]:
        numbers = [f"{method[name]:.4f}" if name in method else "-" for name in NAMES]
        table.add_row(method["name"], *numbers, f"{method['seconds']:.1f}")
    out.print(table)
    out.print(
        f"{result['stream']}, {result['protocol']}: {result['events']:,} events in {result['feedback']:,} feedback, "
        f"{result['bad_rows']:,} bad rows left out"
    )
