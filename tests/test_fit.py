"""Fit: cut by time, measured on what it never saw, handed to a real store where trainers and servers go on from it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import append, held, learn_all, make_feedback, small, tick, trainer, versions

from recsys.cli import main
from recsys.errors import InputFileError
from recsys.feedback import Feedback
from recsys.feedback_file import open_feedback_file
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightStore, encode
from recsys.weights.earlier import FITTED
from trainer.fit import Fit, start_from
from trainer.rebuild import Rebuild

CPU = torch.device("cpu")
CLASSES = [*["click"] * 9, "impression", "like", "purchase"]


def write_file(folder: Path, feedback: list[Feedback]) -> Path:
    path = folder / "feedback.csv"
    rows = (f"{f.user_id},{f.item_id},{f.time_ms},{f.feedback_class}\n" for f in feedback)
    path.write_text("user,item,time,event\n" + "".join(rows))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Mostly clicks, which is soon learned."""
    feedback = make_feedback(120, seed=3)
    return write_file(tmp_path, [replace(f, feedback_class=CLASSES[n % 12]) for n, f in enumerate(feedback)])


def fit(settings: Settings, path: Path, version: int = 0, *, epochs: int = 2, store: bool = True) -> Fit:
    """Fit to the file, from a version of the store or from nothing."""
    with connect(settings) as client:
        start = start_from(WeightStore(client, settings) if store else None, version)
    file = open_feedback_file(path)
    done = Fit(file, settings, CPU, start, validation_share=0.1, test_share=0.3)
    done.run(epochs, 2, lambda epoch, count: None)
    return done


def publish(settings: Settings, done: Fit) -> int:
    with connect(settings) as client:
        return done.hand_over(WeightStore(client, settings), 1_700_000_000_000).version


@pytest.fixture
def here(settings: Settings, path: Path) -> Settings:
    """Small settings with the file's classes: all that a shop has, in the order of the alphabet."""
    return small(settings, classes=open_feedback_file(path).classes)


def test_the_file_is_cut_by_time_and_all_of_it_learned(here: Settings, path: Path) -> None:
    done = fit(here, path, store=False)
    result = done.result()
    assert result["feedback"] == {"train": 72, "validation": 12, "test": 36}
    # Each feedback is counted once, however many epochs there were.
    once = fit(here, path, store=False, epochs=1).learner.table
    for name in ("total", "trend", "successor", "successor_weight"):
        assert torch.equal(done.learner.table.column(name), once.column(name))
    assert once.clock == done.learner.table.clock > 60
    assert len(result["epochs"]) == 2
    assert result["objection"] is None
    assert sum(row["count"] for row in result["after"]["class_report"]) == 36
    assert result["after"]["hr_at_10"] > result["before"]["hr_at_10"] == 0


def test_a_file_too_small_to_cut_is_refused(here: Settings, tmp_path: Path) -> None:
    short = write_file(tmp_path, make_feedback(2, seed=3))
    with pytest.raises(InputFileError, match="too little"):
        Fit(open_feedback_file(short), here, CPU, start_from(None, 0), validation_share=0.4, test_share=0.4)


def test_a_fitted_version_stands_in_an_empty_store(here: Settings, path: Path) -> None:
    done = fit(here, path)
    assert publish(here, done) == 1
    assert held(here) == encode(done.learner.replica.write_all())
    with connect(here) as client:
        record = WeightStore(client, here).head()
    assert record is not None
    assert (record.kind, record.feedback_learned, record.position) == (FITTED, 0, "0-0")
    assert "120 feedback" in record.reason


def test_a_trainer_goes_on_from_it_and_can_be_rebuilt(here: Settings, path: Path) -> None:
    publish(here, fit(here, path))
    append(here, make_feedback(30, seed=8))
    tick(here)
    learned = learn_all(here)
    assert held(here) == learned
    last = versions(here)[-1][0]
    assert last > 2
    with connect(here) as client:
        made = Rebuild(client, here, CPU).run(last)
    assert made.equal
    assert made.from_version == 1


def test_a_trainer_at_work_notices_and_learns_on_top_what_came_meanwhile(here: Settings, path: Path) -> None:
    append(here, make_feedback(24, seed=8))
    with trainer(here) as daemon:
        daemon.start()
        while daemon.step():
            pass
        done = fit(here, path, version=-1)
        # While the fit was at work, this came in and was learned.
        append(here, make_feedback(16, seed=9, first=24))
        while daemon.step():
            pass
        before = daemon.log.appended()
        version = publish(here, done)
        append(here, make_feedback(8, seed=10, first=40))
        while daemon.step():
            pass
        record = daemon.store.head()
    assert record is not None
    assert record.version > version
    # All of the log was learned: 24 before the fit began, 24 on top of it.
    assert record.feedback_learned == before + 8 == 48
    with connect(here) as client:
        assert Rebuild(client, here, CPU).run(record.version).equal


def test_it_goes_on_from_a_version(here: Settings, path: Path) -> None:
    append(here, make_feedback(24, seed=8))
    learn_all(here)
    done = fit(here, path, version=-1, epochs=1)
    assert done.result()["from_version"] == versions(here)[-1][0]
    # What the version had counted counts still.
    assert done.learner.table.clock > fit(here, path, store=False, epochs=1).learner.table.clock
    assert fit(here, path, version=0, epochs=1).result()["from_version"] == 0


def test_weights_worse_than_those_served_are_objected_to(here: Settings, path: Path) -> None:
    publish(here, fit(here, path, epochs=4))
    worse = here.model_copy(update={"learning_rate": 1e-9, "row_learning_rate": 1e-9, "gate_confidence": 0.5})
    objection = fit(worse, path, version=0, epochs=1).objection()
    assert objection is not None
    assert "worse than the version served" in objection


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], here: Settings) -> Any:
    """Run the command against the store, with the same small settings."""
    names: tuple[str, ...] = (
        "dimension",
        "history_length",
        "heads",
        "successors",
        "context_buckets",
        "max_context",
        "batch_size",
    )
    names += ("replay_size", "replay_every", "replay_capacity", "negatives", "redis_url", "device")
    flags = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(here, name)))]

    def run(*arguments: str, code: int = 0) -> Any:
        assert main(["fit", *arguments, *flags]) == code
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in arguments else out

    return run


def test_the_command_fits_publishes_and_draws(run: Any, here: Settings, path: Path, tmp_path: Path) -> None:
    picture, events = tmp_path / "fit.png", tmp_path / "events"
    # Without validation there is no number to write, and no best epoch but the last.
    nothing = run(str(path), "--epochs", "1", "--validation", "0", "--test", "0", "--json")
    assert nothing["epochs"][0]["ndcg_at_10"] is None
    found = run(
        *(str(path), "--epochs", "2", "--publish", "--json"), *("--plot", str(picture), "--tensorboard", str(events))
    )
    assert found["version"] == 1
    assert found["feedback"] == {"train": 96, "validation": 12, "test": 12}
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert any(file.stat().st_size > 100 for file in events.iterdir())
    again = run(str(path), "--epochs", "1", "--from", "last", "--json")
    assert (again["from_version"], again["version"]) == (1, None)
    shown = run(str(path), "--epochs", "1")
    assert "before" in shown
    assert "NDCG@10" in shown


def test_the_command_does_not_publish_what_is_worse(run: Any, here: Settings, path: Path) -> None:
    run(str(path), "--epochs", "4", "--publish")
    bad = [
        "--learning-rate",
        "1e-9",
        "--row-learning-rate",
        "1e-9",
        "--gate-confidence",
        "0.5",
        "--epochs",
        "1",
        "--test",
        "0.3",
    ]
    refused = run(str(path), "--publish", "--json", *bad, code=1)
    assert refused["version"] is None
    assert refused["objection"]
    assert run(str(path), "--publish", "--force", "--json", *bad)["version"] == 2


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [(["--plot", "x.png"], "matplotlib", "needs matplotlib"), (["--tensorboard", "x"], "tensorboard", "recsys[plot]")],
)
def test_a_missing_library_is_told_of_before_the_work(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    missing: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["fit", str(path), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_what_to_start_from_must_be_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(path), "--from", "yesterday"]) == 2
    assert "yesterday" in capsys.readouterr().err
