"""Write dashboards/*.json: `python deploy/grafana/write.py`, after every change in boards/.

With --check nothing is written, and the exit code is 1 when a file is not what would be.
"""

from __future__ import annotations

import sys
from pathlib import Path

from boards import drift_and_data, learning, overview, serving, store

FOLDER = Path(__file__).parent / "dashboards"
BOARDS = (overview.BOARD, learning.BOARD, serving.BOARD, drift_and_data.BOARD, store.BOARD)


def main(arguments: list[str]) -> int:
    """Write or check every file, and name those that stand in the folder for no dashboard."""
    wanted = {FOLDER / f"{board.name}.json": board.text() for board in BOARDS}
    stale = [path for path in FOLDER.glob("*.json") if path not in wanted]
    if "--check" not in arguments:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
    stale += [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path} is not what boards/ say", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
