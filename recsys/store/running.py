"""running: where the store over a data directory listens, told without starting or locking anything.

Known on Linux alone, and to the user alone whose store it is.
"""

from __future__ import annotations

import os
from pathlib import Path

PID_FILE, PORT_FILE = "valkey.pid", "port"


def loopback_url(port: int) -> str:
    """Return the URL of an embedded store."""
    return f"redis://127.0.0.1:{port}/0"


def running_pid(directory: Path) -> int | None:
    """Return the process id of the store that writes to a directory; None where none is known to.

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
    """Return the URL of the store that runs over a directory and has answered; None where none is known to."""
    try:
        return loopback_url(int((directory / PORT_FILE).read_text())) if running_pid(directory) else None
    except (OSError, ValueError):
        return None


def tell_port(directory: Path, port: int) -> None:
    """Write where the store over a directory listens, at once as a whole."""
    written = directory / f"{PORT_FILE}.new"
    written.write_text(str(port))
    os.replace(written, directory / PORT_FILE)


def forget_port(directory: Path) -> None:
    """Have nobody go by what was written of an earlier store: the port may be another's by now."""
    (directory / PORT_FILE).unlink(missing_ok=True)
