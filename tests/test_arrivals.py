"""Arrivals: a file that was read ahead is learned bit for bit as one that is read while it is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from test_epochs import SMALL, made_up, weights

from recsys.feedback_file import FeedbackFile, open_feedback_file
from recsys.settings import Settings, load
from trainer.arrivals import Arrivals
from trainer.epochs import Epochs
from trainer.evaluation.methods import LearnerMethod
from trainer.evaluation.stream import Case, Stream
from trainer.examples import batches
from trainer.learner import Learner
from trainer.quality import MISS

CPU = torch.device("cpu")


def opened(path: Path) -> tuple[FeedbackFile, Settings]:
    file = open_feedback_file(path)
    return file, load(SMALL, environment={}).model_copy(update={"classes": file.classes})


def ahead(path: Path, learner: Learner | None = None) -> tuple[LearnerMethod, list[Case]]:
    """Read a file ahead of a learner, by default one that knows nothing."""
    file, settings = opened(path)
    learner = learner or Learner(settings, CPU)
    arrivals = Arrivals(learner)
    return LearnerMethod(learner, arrivals), list(Stream(file, settings, arrivals).cases())


def of_its_own(folder: Path, count: int) -> Path:
    """Write choices of three users in turn, each of another item."""
    path = folder / "apart.csv"
    path.write_text("user,item,time\n" + "".join(f"u{n % 3},i{n},{1000 + n}\n" for n in range(count)))
    return path


def test_what_is_read_ahead_is_learned_as_what_is_read_on_the_way(tmp_path: Path) -> None:
    file, settings = opened(made_up(tmp_path, items=40))
    other = Learner(settings, CPU)
    for batch in batches(Stream(file, settings, other).cases(), settings.batch_size):
        LearnerMethod(other).learn(batch)
    method, cases = ahead(made_up(tmp_path, items=40))
    method.learn(cases)
    assert weights(method.learner) == weights(other)
    epochs, cases = ahead(made_up(tmp_path, items=40))
    Epochs(epochs.learner, cases, [], epochs.arrivals).run(1, 1)
    assert weights(epochs.learner) == weights(other)


def test_items_have_no_row_before_their_time(tmp_path: Path) -> None:
    method, cases = ahead(of_its_own(tmp_path, 20))
    table = method.learner.table
    method.learn(cases[:10])
    assert len(table) == 10
    found = method.run(cases[10:], learn=False)
    assert (found.rank_B == MISS).all()
    assert len(table) == 10
    method.learn(cases[10:])
    assert [table.row(f"i{n}") for n in range(20)] == [case.event.row for case in cases]


def test_frozen_weights_see_of_a_history_what_they_know(tmp_path: Path) -> None:
    method, cases = ahead(of_its_own(tmp_path, 20))
    method.learn(cases[:10])
    # The 19th chose items 0, 3, 6, 9, and 12, 15 that came later.
    case = cases[18]
    history = case.event.history
    known = history._replace(**{name: np.asarray(getattr(history, name))[:4] for name in history._fields})
    case.event = case.event._replace(history=known)
    expected = method.run([case], learn=False).probability_B
    case.event = case.event._replace(history=history)
    np.testing.assert_array_equal(method.run([case], learn=False).probability_B, expected)


def test_rows_that_items_have_left_go_to_the_first_to_arrive(tmp_path: Path) -> None:
    _, settings = opened(of_its_own(tmp_path, 9))
    learner = Learner(settings, CPU)
    learner.allocate(["x", "i1", "y", "z"])
    learner.free(np.array([1, 3]))
    method, cases = ahead(of_its_own(tmp_path, 9), learner)
    found = method.run(cases[2:], learn=False)
    assert (found.rank_B == MISS).all()
    method.learn(cases)
    assert [case.event.row for case in cases] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert [learner.table.row(f"i{n}") for n in range(9)] == [case.event.row for case in cases]
