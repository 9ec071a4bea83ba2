"""Curves: pictures and TensorBoard files are written; what cannot be written is told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from recsys.errors import InputFileError
from trainer.curves import draw, draw_accuracy, write_events

RESULT: dict[str, Any] = {
    "methods": [
        {"name": "recsys", "moving": {"window": 20, "ends": [10, 20, 30], "hr_at_10": [0.1, 0.3, 0.4]}},
        {"name": "popularity", "moving": {"window": 20, "ends": [10, 20, 30], "hr_at_10": [0.1, 0.1, 0.1]}},
        # Too short for a window, and a method that does not rank.
        {"name": "item_knn", "moving": {"window": 20, "ends": [], "hr_at_10": []}},
        {"name": "biased_mf"},
    ]
}


def test_accuracy_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.png"
    draw_accuracy(RESULT, path)
    picture = image.imread(path)
    # Two lines, text and a grid on white.
    assert picture.shape[:2] == (550, 1000)
    assert len({tuple(pixel) for row in picture[::5].tolist() for pixel in row}) > 20


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    draw_accuracy({"methods": []}, tmp_path / "empty.svg")
    assert "<svg" in (tmp_path / "empty.svg").read_text()


@pytest.mark.parametrize("name", ["no/such/folder.png", "what.unknown"])
def test_what_cannot_be_written_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputFileError, match="cannot be written"):
        draw({"line": ([1, 2], [0.5, 0.6])}, "title", "axis", tmp_path / name)


def test_events_can_be_read_again(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_events([{"epoch": 1, "loss": 3.5}, {"epoch": 2, "loss": 2.5}], tmp_path)
    found = reader.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 3.5), (2, 2.5)]
