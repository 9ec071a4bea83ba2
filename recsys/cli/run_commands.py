"""serve, train and up: the parts alone against a store, or all of them with one of their own; and what they compile."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from recsys.cli.output import AsJson, console, facts, print_json
from recsys.cli.settings_flags import Given
from recsys.logs import configure


def serve(given: Given) -> None:
    """Serve recommendations and take feedback, against the store at redis_url."""
    if given.settings.server_processes > 1:
        from recsys.cli.server_processes import ServerProcesses

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with ServerProcesses(given.settings) as processes:
                print(f"serving on {processes.address}, metrics on {processes.metrics_address}/metrics", flush=True)
                processes.wait()
        except KeyboardInterrupt:
            return
    from recsys.server import run

    configure(given.settings)
    run(given.settings)


def serve_shared(given: Given, descriptors: Annotated[list[int], typer.Argument()]) -> None:
    """Run one of several server processes; for `serve`, which gives it the memory that they share."""
    from recsys.server import run

    configure(given.settings)
    run(given.settings, descriptors)


def train(given: Given) -> None:
    """Learn from the feedback in the store at redis_url and publish versions of the weights."""
    from trainer.daemon import run

    configure(given.settings)
    run(given.settings)


def store(given: Given) -> None:
    """Run the embedded store over data_dir; for `up`, which reads its address from stdout."""
    from recsys.store.embedded import EmbeddedStore

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with EmbeddedStore.of(given.settings) as embedded:
            print(f"storing in {given.settings.data_dir} at {embedded.url}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


def up(given: Given, json: AsJson = False) -> None:
    """Run store, trainer and server on this machine, until Ctrl-C; what they hold is kept in data_dir."""
    from recsys.cli.system import System

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with System(given.settings) as system:
            if json:
                print_json(system.addresses | {"pids": system.pids})
            else:
                console().print(facts(system.addresses, "recsys is up; Ctrl-C stops it"))
            system.wait()
    except KeyboardInterrupt:
        console(stderr=True).print("stopped")


def compile_(given: Given) -> None:
    """Compile the loops that server and trainer run on this kind of processor, so that no start waits for it.

    They are kept beside the package or in the folder that NUMBA_CACHE_DIR names. Images do it when they are built.
    """
    with console(stderr=True).status("compiling, for about a minute"):
        from recsys.cli.compiling import compile_loops

        compile_loops(given.settings)
    print("compiled")
