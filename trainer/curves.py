"""Curves: draw numbers over a stream or over epochs as a picture, or for TensorBoard; both need an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys.errors import InputFileError, MissingExtra

INCHES = (10.0, 5.5)


def check_drawing() -> None:
    """Check that a picture could be drawn.

    Raises:
        MissingExtra: when matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("drawing needs matplotlib: pip install 'recsys[plot]'") from None


def draw_accuracy(result: Mapping[str, Any], path: Path) -> None:
    """Draw the moving hit rate of each method of an evaluation to a file, whose suffix says the format."""
    lines = {
        method["name"]: (method["moving"]["ends"], method["moving"]["hr_at_10"])
        for method in result["methods"]
        if method.get("moving", {}).get("ends")
    }
    window = next((m["moving"]["window"] for m in result["methods"] if "moving" in m), 0)
    draw(lines, f"HR@10 over the last {window:,} events", "events", path)


def draw(lines: Mapping[str, tuple[list[int], list[float]]], title: str, axis: str, path: Path) -> None:
    """Draw lines by their names.

    Raises:
        MissingExtra: when matplotlib is not installed.
        InputFileError: when the file cannot be written.
    """
    check_drawing()
    from matplotlib.figure import Figure

    # Without pyplot no window system is asked for and nothing is left behind.
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    for name, (places, heights) in lines.items():
        axes.plot(places, heights, label=name, linewidth=2.2 if name == "recsys" else 1.2)
    axes.set_title(title)
    axes.set_xlabel(axis)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path} cannot be written: {error}") from None


def write_events(rows: Sequence[Mapping[str, Any]], directory: Path) -> None:
    """Write numbers by epoch where TensorBoard reads them.

    Raises:
        MissingExtra: when tensorboard is not installed.
    """
    check_events()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for row in rows:
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, int(row["epoch"]))


def check_events() -> None:
    """Check that numbers could be written for TensorBoard.

    Raises:
        MissingExtra: when tensorboard is not installed.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise MissingExtra("TensorBoard's files need tensorboard: pip install 'recsys[plot]'") from None
