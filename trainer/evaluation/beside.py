"""Beside: run other methods over the same file in a second process, never ahead of the first, which leads.

The learner keeps one core busy; what it is compared with takes another, and both have seen the same feedback whenever
they stop.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from recsys.errors import RecsysError
from recsys.feedback_file import Columns, open_feedback_file
from recsys.settings import Settings
from trainer.evaluation.test_then_train import Evaluation

# How long a process that was told to stop may take to do so, before it is made to.
STOP_SECONDS = 5.0
# How long one whose end of the pipe is closed may take to end: torch is let go of meanwhile, on a busy machine slowly.
END_SECONDS = 60.0


class Beside:
    """Own the process; a context manager. `allow` lets it go on, `result` waits for it to get there."""

    def __init__(self, path: Path, columns: Columns | None, settings: Settings, methods: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Should this process die, the other one is told so by the pipe's end.
        self._process = context.Process(
            target=_follow, args=(theirs, path, columns, settings, list(methods)), name="evaluation", daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._process.close()

    def allow(self, feedback: int) -> None:
        """Let it go on until it has seen so much feedback."""
        # A process that is gone is told of by `result`.
        with suppress(OSError):
            self._pipe.send(feedback)

    def result(self, feedback: int) -> dict[str, Any]:
        """Return what was measured over the first `feedback`.

        Raises:
            RecsysError: when the process ended without a result.
        """
        try:
            # An interruption may have come before it was allowed to go on.
            self._pipe.send(feedback)
            self._pipe.send(None)
            found: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(END_SECONDS)
            raise RecsysError(f"the process of the other methods ended with {self._process.exitcode}") from None
        assert found["feedback"] == feedback
        return found


def _follow(pipe: Connection, path: Path, columns: Columns | None, settings: Settings, methods: Sequence[str]) -> None:
    """Be the other process."""
    # An interruption is the first process's to handle: it says then how far to go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    evaluation = Evaluation(open_feedback_file(path, columns), settings, torch.device("cpu"), methods)
    try:
        evaluation.follow(_allowed(pipe))
        pipe.send(evaluation.result())
    except (EOFError, OSError):
        # Nobody waits for it any more.
        return


def _allowed(pipe: Connection) -> Callable[[], int | None]:
    def receive() -> int | None:
        found: int | None = pipe.recv()
        return found

    return receive
