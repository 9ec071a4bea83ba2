"""Offline protocols: what is taught and what is tested, worked by hand; planted worlds that have to be found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_epochs import SMALL, made_up

from recsys.cli import main
from recsys.errors import InputFileError
from recsys.feedback_file import open_feedback_file
from recsys.settings import load
from trainer.evaluation import Contest, Teaching, leave_one_out, periods, temporal

CPU = torch.device("cpu")
TEACHING = Teaching(epochs=2, patience=2)
HEADER = "user,item,time\n"


def contest(path: Path, *names: str, **changes: Any) -> Contest:
    file = open_feedback_file(path)
    settings = load({**SMALL, **changes}, environment={}).model_copy(update={"classes": file.classes})
    return Contest(file, settings, CPU, names, lambda what, done, of: None)


def write(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "rows.csv"
    path.write_text(HEADER + "".join(f"{user},{item},{1000 + n}\n" for n, (user, item) in enumerate(rows)))
    return path


def test_leave_one_out_by_hand(tmp_path: Path) -> None:
    rows = [
        *[("u", "a"), ("v", "a"), ("w", "b"), ("u", "b"), ("v", "c"), ("u", "c")],
        # Too few to be tested; learned.
        *[("x", "c"), ("x", "c")],
        *[("v", "b"), ("w", "a"), ("w", "c")],
    ]
    found = leave_one_out(contest(write(tmp_path, rows), "popularity"), TEACHING)
    # Learned: a twice, b once, c twice. Tested: u on c and v on b, each the only one that they do not have; w, who has
    # a and b, on c.
    assert found["events"] == 3
    assert found["methods"][0]["hr_at_1"] == 1
    more = leave_one_out(contest(write(tmp_path, [*rows, ("y", "d"), ("y", "a"), ("y", "b")]), "popularity"), TEACHING)
    # Now y, who has d and a, on b, which was learned once, c twice.
    assert more["events"] == 4
    assert more["methods"][0]["hr_at_1"] == pytest.approx(3 / 4)
    assert more["methods"][0]["mrr_at_10"] == pytest.approx(3.5 / 4)


def test_temporal_by_hand(tmp_path: Path) -> None:
    rows = [("u", "a"), ("v", "a"), ("w", "b"), ("x", "b"), ("x", "a"), ("y", "c"), ("z", "c"), ("y", "b"), ("s", "c")]
    found = temporal(contest(write(tmp_path, rows), "popularity"), TEACHING, 5 / 9)
    frozen, learning = found["methods"]
    assert (frozen["name"], learning["name"]) == ("popularity, frozen", "popularity, learning on")
    # Learned first: a three times, b twice. Frozen, c stays unknown; y has c alone, so b is second to a.
    assert (frozen["hr_at_1"], frozen["mrr_at_10"]) == (0, pytest.approx(1 / 2 / 4))
    # Learning on, c is third at z, and at s third again: three choices of b before two of c.
    assert learning["mrr_at_10"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 4)
    assert found["learned_first"] == 5


def test_periods_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "spans.csv"
    spans = [(1000, "a"), (1001, "a"), (1002, "b"), (2000, "b"), (2001, "b"), (2002, "c"), (3000, "a"), (3002, "c")]
    path.write_text(HEADER + "".join(f"u{n},{item},{time}\n" for n, (time, item) in enumerate(spans)))
    found = periods(contest(path, "popularity"), TEACHING, 3)
    # After the first a leads b; both are found in the second, c is unknown. Then b leads a, and c is third.
    first = {"hr_at_20": pytest.approx(2 / 3), "mrr_at_20": pytest.approx((1 / 2 + 1 / 2) / 3)}
    second = {"hr_at_20": 1, "mrr_at_20": pytest.approx((1 / 2 + 1 / 3) / 2)}
    method = found["methods"][0]
    assert method["by_period"] == [first, second]
    assert method["hr_at_20"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["periods"] == 3


def test_nothing_is_learned_from_what_is_tested_when_frozen(tmp_path: Path) -> None:
    """The learner's frozen figures are the same whichever part of the later events is looked at first."""
    path = made_up(tmp_path, 200)
    one, other = (contest(path, "recsys", batch_size=10) for _ in range(2))
    for each in (one, other):
        cases = each.cases(None)
        each.learn(cases[:150])
    later = cases[150:]
    forward = one.test(later).ranks("recsys")
    backward = np.concatenate([other.test([case]).ranks("recsys") for case in reversed(later) if case.positive])
    np.testing.assert_array_equal(forward, backward[::-1])


def test_the_learner_finds_a_planted_order(tmp_path: Path) -> None:
    path = made_up(tmp_path, 1000, items=100)
    found = leave_one_out(contest(path, "recsys", "popularity", batch_size=40), Teaching(epochs=2, patience=2))
    recsys, popularity = found["methods"]
    # Of 20 users; 0.75 to 0.9 with other seeds.
    assert recsys["hr_at_5"] > 0.7
    assert recsys["hr_at_5"] > 2 * popularity["hr_at_5"]


def test_what_followed_long_ago_is_found_when_one_is_left_out(tmp_path: Path) -> None:
    """Users of the first half go through a round of items by ones, those of the second by sevens."""
    items, users, length = 40, 120, 8
    rows = [
        (f"u{user}", f"i{(user * 5 + n * (1 if user < users / 2 else 7)) % items}")
        for first in range(0, users, users // 2)
        for n in range(length)
        for user in range(first, first + users // 2)
    ]
    learner = {"batch_size": 20, "successors": 8, "replay_size": 20, "replay_every": 20}
    found = leave_one_out(contest(write(tmp_path, rows), "recsys", **learner), TEACHING)
    assert found["events"] == users
    # Both ways lead on from every item; by counts that fade half as many are found.
    assert found["methods"][0]["hr_at_1"] > 0.9


def test_an_interruption_leaves_the_best_epoch_to_be_tested(tmp_path: Path) -> None:
    path = made_up(tmp_path, 300)
    told: list[tuple[str, int, int]] = []

    def interrupt(what: str, done: int, of: int) -> None:
        told.append((what, done, of))
        if what == "recsys: epoch 2 of at most 5, best 1":
            raise KeyboardInterrupt

    file = open_feedback_file(path)
    settings = load(SMALL, environment={}).model_copy(update={"classes": file.classes})
    found = leave_one_out(Contest(file, settings, CPU, ["recsys"], interrupt), Teaching(epochs=5, patience=5))
    once = leave_one_out(contest(path, "recsys"), Teaching(epochs=1, patience=1))
    assert found["methods"][0]["ndcg_at_10"] == once["methods"][0]["ndcg_at_10"]
    assert told[-1] == ("test", found["events"], found["events"])


def test_learning_on_wins_where_the_world_changes(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    half = 300
    rows = [(f"u{n}", f"i{random.integers(0, 10) + 10 * (n >= half)}") for n in range(2 * half)]
    found = temporal(contest(write(tmp_path, rows), "recsys", batch_size=20), TEACHING, 0.5)
    frozen, learning = found["methods"]
    assert frozen["hr_at_10"] == 0
    # Half of what trends, at first all of it, is of the old world.
    assert learning["hr_at_10"] > 0.3


@pytest.mark.parametrize("protocol", [leave_one_out, temporal, periods])
def test_a_file_too_small_is_refused(tmp_path: Path, protocol: Any) -> None:
    more = {temporal: (0.5,), periods: (4,)}.get(protocol, ())
    with pytest.raises(InputFileError):
        protocol(contest(write(tmp_path, [("u", "a")]), "popularity"), TEACHING, *more)


@pytest.mark.parametrize("protocol", ["leave-one-out", "temporal", "periods"])
def test_the_command_takes_each_protocol(tmp_path: Path, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["evaluate", str(made_up(tmp_path)), "--protocol", protocol, "--epochs", "1", "--periods", "3", *flags]
    arguments += ["--batch-size", "20", "--methods", "recsys,popularity"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"] == protocol
    assert found["feedback"] == 160
    assert main(arguments) == 0
    assert "HR@10" in capsys.readouterr().out
