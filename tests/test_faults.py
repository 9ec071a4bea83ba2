"""Short runs of the two benchmarks that count what faults lose: benchmarks/faults.py and benchmarks/whole.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SECONDS = 110
KILLS, ANSWERS = 12, 2000


def run(name: str, *arguments: object) -> dict[str, Any]:
    """Run a benchmark; its last line is one JSON object."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_kills_lose_repeat_and_change_nothing() -> None:
    found = run("faults.py", "--kills", KILLS)
    assert found["kills"] == sum(found["kinds"].values()) == KILLS
    assert found["bitwise_equal"]
    assert not found["ended_by_themselves"]
    assert found["runs_compared"] > 1
    assert found["feedback"] > 0
    assert found["answers"] > 0
    wrong = ("lost", "duplicated", "wrong_histories", "wrong_acknowledgements", "torn", "backwards")
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0)


@pytest.mark.slow
def test_answers_are_whole_while_versions_change() -> None:
    found = run("whole.py", "--answers", ANSWERS)
    assert found["answers"] >= ANSWERS
    assert found["over_grpc"] > 0
    assert found["versions_answered_from"] > 10
    assert found["unseen_tensors"] == []
    assert (found["torn"], found["backwards"]) == (0, 0)
