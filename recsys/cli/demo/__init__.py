"""demo: the whole loop on this machine, by itself: everything that `up` starts, and clients that keep it busy."""

from __future__ import annotations

import asyncio
import fcntl
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recsys.cli.file_columns import ClassColumn, ItemColumn, TimeColumn, UserColumn, ValueColumn, columns
from recsys.cli.output import AsJson, console, print_json
from recsys.cli.settings_flags import Given

if TYPE_CHECKING:
    from recsys.cli.demo.streams import Stream
    from recsys.cli.system import System
    from recsys.feedback_file import Columns
    from recsys.settings import Settings

# Somewhat over a minute on two shared cores.
EVENTS = 12_000
DIRECTORY = "demo"


def demo(
    given: Given,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="play this feedback back instead of simulating users")
    ] = None,
    user: UserColumn = None,
    item: ItemColumn = None,
    time: TimeColumn = None,
    feedback_class: ClassColumn = None,
    value: ValueColumn = None,
    events: Annotated[int, typer.Option(min=1, help="how many; of a file all at most")] = EVENTS,
    json: AsJson = False,
) -> None:
    """Start everything, let users come, and measure how well they are served; Ctrl-C ends it early.

    Each event is predicted before it is logged and learned from, over gRPC, as any client would. It begins with an
    empty store each time, in the folder `demo` of data_dir, and takes free ports where none are given.
    """
    from recsys.cli.system import System

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = console(stderr=json)
    settings, stream = _prepared(given, data, columns(user, item, time, feedback_class, value), events)
    _empty(settings.data_dir)
    out.print(f"starting store, trainer and server for {stream.total:,} events")
    with System(settings) as system:
        numbers, examples = asyncio.run(_play(system, settings, stream, json=json))
        if json:
            print_json(numbers | {"users": examples})
        else:
            from recsys.cli.demo.view import summary

            summary(out, numbers, examples)


def _prepared(given: Given, data: Path | None, names: Columns | None, events: int) -> tuple[Settings, Stream]:
    """Choose the settings that fit the stream, where they are not given."""
    from recsys.cli.demo.streams import AudienceStream, FileStream, holds_audience_classes
    from recsys.cli.demo.trial import IN_FLIGHT
    from recsys.errors import SettingsError
    from recsys.feedback_file import open_feedback_file
    from recsys.settings import CLASS_PRESETS

    # The screen shows what the log would say.
    settings = given.otherwise(port=0, metrics_port=0, trainer_metrics_port=0, log_level="warning")
    settings = settings.model_copy(update={"data_dir": settings.data_dir / DIRECTORY})
    if data is not None:
        file = open_feedback_file(data, names)
        if "classes" not in given.origin:
            settings = settings.model_copy(update={"classes": file.classes})
        return settings, FileStream(data, file, settings, events)
    if "classes" not in given.origin:
        settings = settings.model_copy(update={"classes": CLASS_PRESETS["clicks"]})
    elif not holds_audience_classes(settings.classes):
        raise SettingsError("classes: simulated users need the classes impression and click, as in shop or clicks")
    return settings, AudienceStream(settings.seed, events, IN_FLIGHT)


def _empty(directory: Path) -> None:
    """Remove what an earlier demo left, and nothing else.

    Raises:
        DataDirectoryInUse: when that demo is still running.
        SettingsError: when the directory is not a demo's.
    """
    from recsys.errors import DataDirectoryInUse, SettingsError

    if not directory.exists():
        return
    # Every store leaves this file.
    if any(directory.iterdir()) and not (directory / "lock").is_file():
        raise SettingsError(f"data_dir: {directory} exists and is not a demo's; give another --data-dir")
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirectoryInUse(f"a demo is running in {directory}; stop it or give another --data-dir") from None
        for each in directory.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.name != "lock":
                each.unlink()


async def _play(
    system: System, settings: Settings, stream: Stream, *, json: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the trial beside its view; the first Ctrl-C ends the stream, a second one the wait for what is learned."""
    from recsys.cli.demo.trial import Trial
    from recsys.cli.demo.view import View
    from recsys.client import AsyncClient
    from recsys.errors import RecsysError

    ended, given_up = asyncio.Event(), asyncio.Event()

    def interrupted() -> None:
        (given_up if ended.is_set() else ended).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    async with AsyncClient(system.addresses["grpc"]) as client:
        trial = Trial(client, stream, [c.name for c in settings.classes if c.positive])
        with View(console(stderr=json), system.addresses) as view:

            def show() -> None:
                system.check()
                view.show(trial.numbers(), stream.done, stream.total)

            watching = asyncio.create_task(trial.watch(show))
            running = asyncio.create_task(trial.run(ended))
            try:
                await asyncio.wait({watching, running}, return_when=asyncio.FIRST_COMPLETED)
                if watching.done():
                    watching.result()
                await running
                await trial.settle(given_up)
            except RecsysError:
                # That a part has stopped explains more than what failed for it.
                system.check()
                raise
            finally:
                running.cancel()
                watching.cancel()
        return trial.numbers(), await trial.examples()
