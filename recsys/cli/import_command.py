"""import: send a file of feedback to a server, in order, each line counted once however often it is sent."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from recsys.cli.client_commands import TIMEOUT_SECONDS, Server, connected
from recsys.cli.file_columns import ClassColumn, ItemColumn, TimeColumn, UserColumn, ValueColumn, columns
from recsys.cli.output import AsJson, console, facts, print_json, progress
from recsys.cli.settings_flags import class_text

if TYPE_CHECKING:
    from recsys.client import Client
    from recsys.feedback import Feedback
    from recsys.feedback_file import FeedbackFile

Result = TypeVar("Result")

BATCH = 500
# A server that cannot take feedback now, such as one whose log is full, is asked again for so long; one that has not
# answered yet, whose name may be wrong, less long: one that was started with the import answers after some ten seconds.
PATIENCE_SECONDS = 120.0
FIRST_PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 1.0
# Of bad and of refused rows this many are listed for people, and in the JSON object; all are counted.
LISTED = 20
REPORTED = 100_000


@dataclass(frozen=True, slots=True)
class Row:
    """Tell what was wrong with one line of the file."""

    line: int
    reason: str


@dataclass(slots=True)
class Summary:
    """Count what became of a file's rows; the first of those left out are listed."""

    file: str
    items: int = 0
    imported: int = 0
    duplicates: int = 0
    refused: int = 0
    bad: int = 0
    refused_rows: list[Row] = field(default_factory=list)
    bad_rows: list[Row] = field(default_factory=list)

    def left_out(self, line: int, reason: str, *, refused: bool) -> None:
        """Count a row that is no feedback, or that the server refused."""
        rows = self.refused_rows if refused else self.bad_rows
        if refused:
            self.refused += 1
        else:
            self.bad += 1
        if len(rows) < REPORTED:
            rows.append(Row(line, reason))


def import_(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="feedback: .csv, .tsv, .parquet, .dat or .data")],
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    feedback_class: ClassColumn = None,
    value: ValueColumn = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="read the whole file, send nothing")] = False,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Log a file of feedback, and the titles that MovieLens and KuaiRand publish beside it.

    Rows that are no feedback are listed and left out. The same import may be repeated, after an interruption too: for
    a day (the setting deduplication_seconds) the server knows each line that it has counted.
    """
    from recsys.feedback_file import open_feedback_file

    file = open_feedback_file(path, columns(user, item, time, feedback_class, value))
    summary = Summary(str(path))
    with progress() as bar:
        task = bar.add_task(path.name, total=file.rows)
        feedback = _feedback(path, file, summary)
        if dry_run:
            for _ in feedback:
                summary.imported += 1
                bar.advance(task)
        else:
            with connected(ctx, server) as client:
                patiently = _Patience(bar.console)
                _check_classes(client, path, file, patiently)
                summary.items = _send_titles(client, file, patiently)
                for sent in _send(client, feedback, summary, patiently):
                    bar.advance(task, sent)
    if json:
        print_json(asdict(summary) | {"dry_run": dry_run})
    else:
        _print(summary, dry_run=dry_run)


def _feedback(path: Path, file: FeedbackFile, summary: Summary) -> Iterator[tuple[int, Feedback]]:
    """Go through the file's feedback with its lines; bad rows go to the summary."""
    from recsys.feedback import Feedback

    for chunk in file.chunks():
        for bad in chunk.bad:
            summary.left_out(bad.line, bad.reason, refused=False)
        values = [None] * len(chunk) if chunk.values is None else chunk.values.tolist()
        columns = (chunk.lines, chunk.user_ids, chunk.item_ids, chunk.classes, chunk.times_ms)
        rows = zip(*(column.tolist() for column in columns), values, file.contexts(chunk), strict=False)
        for line, user_id, item_id, index, time_ms, value, context in rows:
            # NaN is the only number that is not itself.
            number = value if value == value else None
            feedback = Feedback(user_id, item_id, file.classes[index].name, time_ms, number, context=context)
            yield line, replace(feedback, feedback_id=_id(path, line, feedback))


def _id(path: Path, line: int, feedback: Feedback) -> str:
    """Name a line by its place and by what it says, so that another file of the same name is another."""
    said = (path.name, line, feedback.user_id, feedback.item_id, feedback.feedback_class, feedback.time_ms)
    return blake2b(repr((*said, feedback.value)).encode(), digest_size=16).hexdigest()


def _check_classes(client: Client, path: Path, file: FeedbackFile, patiently: _Patience) -> None:
    from recsys.errors import InputFileError

    names = [c.name for c in file.classes]
    status = patiently(lambda: client.status(timeout=TIMEOUT_SECONDS), FIRST_PATIENCE_SECONDS)
    known = list(status.feedback_classes)
    if not {*names} <= {*known}:
        text = class_text(file.classes)
        raise InputFileError(
            f"{path} holds feedback of the classes {', '.join(names)}, but the server knows {', '.join(known)}; "
            f"nothing was sent. Run server and trainer with --classes '{text}' (or RECSYS_CLASSES='{text}')"
        )


def _send_titles(client: Client, file: FeedbackFile, patiently: _Patience) -> int:
    from recsys.catalog import Item

    titles = (Item(i.item_id, i.title, tuple(i.categories)) for i in file.titles())
    sent = 0
    while batch := list(islice(titles, BATCH)):
        sent += patiently(lambda items=batch: client.upsert_items(items, timeout=TIMEOUT_SECONDS))  # type: ignore[misc]
    return sent


def _send(
    client: Client, feedback: Iterator[tuple[int, Feedback]], summary: Summary, patiently: _Patience
) -> Iterator[int]:
    """Send batches one after the other, which keeps each user's order; yield how many rows each had."""
    while batch := list(islice(feedback, BATCH)):
        results = patiently(
            lambda given=[each for _, each in batch]: client.log_feedback(given, timeout=TIMEOUT_SECONDS)  # type: ignore[misc]
        )
        for (line, _), result in zip(batch, results, strict=True):
            if not result.accepted:
                summary.left_out(line, f"{result.field} {result.refusal}", refused=True)
            elif result.duplicate:
                summary.duplicates += 1
            else:
                summary.imported += 1
        yield len(batch)


@dataclass(frozen=True, slots=True)
class _Patience:
    """Make calls that may be repeated until the server can take them; tells people while it cannot."""

    console: Console

    def __call__(self, call: Callable[[], Result], seconds: float = PATIENCE_SECONDS) -> Result:
        """Make a call, again and again for `seconds` at most."""
        from recsys import errors
        from recsys.client import CallFailed

        until, told = clock.monotonic() + seconds, False
        while True:
            try:
                return call()
            except (errors.Overloaded, errors.StoreFull, errors.StoreUnavailable, errors.NotReady, CallFailed) as error:
                passing = not isinstance(error, CallFailed) or error.code in {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
                if not passing or clock.monotonic() >= until:
                    raise
                if not told:
                    self.console.print(f"{error}\ntrying again for {seconds:.0f} seconds", markup=False)
                    told = True
            clock.sleep(PAUSE_SECONDS)


def _print(summary: Summary, *, dry_run: bool) -> None:
    out = console()
    for title, count, rows in (
        ("bad", summary.bad, summary.bad_rows),
        ("refused by the server", summary.refused, summary.refused_rows),
    ):
        if rows:
            shown: dict[str, Any] = {f"line {row.line}": row.reason for row in rows[:LISTED]}
            more = {"...": f"and {count - LISTED:,} more; --json lists them"} if count > LISTED else {}
            out.print(facts(shown | more, title))
    counts = {name: getattr(summary, name) for name in ("imported", "duplicates", "refused", "bad", "items")}
    if dry_run:
        counts = {"would be sent": summary.imported, "bad": summary.bad}
    out.print(facts(counts))
