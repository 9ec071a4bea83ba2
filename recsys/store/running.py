"""running: where the store over a data directory listens, told without starting or locking anything."""

from __future__ import annotations

from pathlib import Path

PID_FILE, URL_FILE = "valkey.pid", "url"


def running_pid(directory: Path) -> int | None:
    """Return the process id of the store that writes to a directory; None where none does (known on Linux alone).

    Whoever started it may have been killed since.
    """
    try:
        pid = int((directory / PID_FILE).read_text())
        process = Path(f"/proc/{pid}")
        ours = (process / "cwd").readlink() == directory.resolve() and "valkey" in (process / "exe").readlink().name
    except (OSError, ValueError):
        return None
    return pid if ours else None


def running_url(directory: Path) -> str | None:
    """Return the URL of the store that runs over a directory; None where none is known to."""
    try:
        return (directory / URL_FILE).read_text() if running_pid(directory) else None
    except OSError:
        return None
