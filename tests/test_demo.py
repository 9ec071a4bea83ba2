"""demo: what it measures, worked by hand, and the whole of it with real processes."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serve

from recsys import AsyncClient
from recsys.cli import main
from recsys.cli.demo.freshness import Freshness
from recsys.cli.demo.streams import SHELF, AudienceStream, FileStream
from recsys.cli.demo.trial import PopularityTest, Trial
from recsys.client import Recommendation, Recommendations
from recsys.feedback_file import open_feedback_file
from recsys.feedback_log import FeedbackLog
from recsys.settings import CLASS_PRESETS, Settings

SECONDS = 100
SMALL = ("--dimension=8", "--history-length=5", "--device=cpu", "--json")


def test_freshness_is_counted_to_the_first_answer_that_surely_knows() -> None:
    freshness = Freshness()
    assert freshness.quantiles(0.5) == [None]
    freshness.sent = 3
    freshness.accepted(2, begun=10.0)
    freshness.accepted(1, begun=11.0)
    freshness.sent = 4
    freshness.accepted(1, begun=12.0)
    assert freshness.quantiles(0.5) == [None]
    # Version 2 has learned two: not surely those of the first call, since a third was sent when that returned.
    for version, learned in ((1, 0), (2, 2), (3, 3), (4, 4)):
        freshness.learned(version, learned)
    freshness.answered(2, now=12.5)
    freshness.answered(3, now=13.0)
    freshness.answered(3, now=19.0)
    # Ages 2 (version 3, from 11), 3 and 3 (from 10), and one that no answer knows of yet.
    assert freshness.quantiles(0.25, 0.5, 0.75, 1.0) == [2.0, 3.0, 3.0, None]
    freshness.answered(4, now=14.0)
    assert freshness.quantiles(0.5, 1.0) == [2.0, 3.0]
    # The answer of the later version came first: what version 3 has learned version 4 has too.
    late = Freshness(sent=1)
    late.accepted(1, begun=0.0)
    late.learned(3, 1)
    late.learned(4, 1)
    late.answered(4, now=1.0)
    late.answered(3, now=2.0)
    assert late.quantiles(1.0) == [1.0]


def test_popularity_ranks_known_items_that_the_user_does_not_have() -> None:
    popularity = PopularityTest()
    assert popularity.test("ann", "a") == 0
    for user, item in (("ann", "a"), ("bob", "a"), ("ann", "b"), ("bob", "c")):
        popularity.add(user, item)
    assert popularity.test("eve", "a") == 1
    assert [popularity.test("eve", item) for item in ("b", "c")] == [2, 3]
    assert popularity.test("ann", "c") == 1
    assert popularity.test("ann", "a") == popularity.test("eve", "new") == 0


def test_the_audience_is_tested_on_own_choices_and_shown_a_shelf_now_and_then() -> None:
    stream = AudienceStream(seed=1, events=200, in_flight=4)
    answer = Recommendations("r1", 1, [Recommendation(item.item_id, 0.0, "", "") for item in stream.items()[:10]])
    acts = [visit.act(answer) for visit in stream]
    assert stream.done >= stream.total == 200
    shelves = [act for act in acts if act.chosen is None]
    assert len(shelves) == len(acts) // 5
    assert {len(act.feedback) for act in shelves} == {SHELF}
    assert {each.feedback_class for act in shelves for each in act.feedback} == {"impression", "click"}
    assert {each.recommendation_id for act in shelves for each in act.feedback} == {"r1"}
    assert all(0 < (act.best_clicks or 0) < SHELF for act in shelves)
    chosen = [act for act in acts if act.chosen is not None]
    assert all([each.item_id for each in act.feedback] == [act.chosen] for act in chosen)
    assert all(0 < (act.best_hit or 0) <= 1 for act in chosen)
    ids = [item.item_id for act in acts for item in act.arrived]
    assert len(ids) == len(set(ids)) > 0
    assert not {*ids} & {item.item_id for item in AudienceStream(1, 200, 4).items()}


def test_a_trial_predicts_before_it_logs_and_keeps_each_users_order(settings: Settings, tmp_path: Path) -> None:
    # The server recommends item-0, item-1, ... without what the user has: ranks are 1, 1, 1, ..., then 11, then a miss.
    path = tmp_path / "log.csv"
    rows = [(f"u{n % 3}", f"item-{n // 3}", "click") for n in range(60)]
    rows += [("u0", "item-30", "click"), ("u1", "item-1", "click"), ("u2", "item-99", "impression")]
    path.write_text("user,item,class\n" + "".join(f"{','.join(row)}\n" for row in rows) + ",item-1,click\n")
    file = open_feedback_file(path)
    settings = settings.model_copy(update={"classes": CLASS_PRESETS["clicks"]})

    async def play(target: str) -> Trial:
        async with AsyncClient(target) as client:
            trial = Trial(client, FileStream(path, file, settings, None), ["click"])
            await trial.run(asyncio.Event())
            given_up = asyncio.Event()
            given_up.set()
            await trial.settle(given_up)
            assert {example["user_id"] for example in await trial.examples()} == {"u0", "u1", "u2"}
            return trial

    with serve(settings) as running:
        numbers = asyncio.run(play(running.target)).numbers()
        entries = FeedbackLog(running.store, settings).read_after("0-0", 100)
    assert numbers["events"] == 62
    assert numbers["hr_at_1"] == numbers["hr_at_10"] == 60 / 62
    assert (numbers["feedback_accepted"], numbers["bad_rows"]) == (63, 1)
    assert numbers["best_hr_at_10"] is None
    for user in ("u0", "u1", "u2"):
        logged = [e.record.item_id for e in entries if e.record and e.record.user_id == user]
        assert logged == [item for who, item, _ in rows if who == user]


def test_a_demo_empties_only_what_is_a_demos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "demo"
    directory.mkdir()
    (directory / "thesis.txt").touch()
    assert main(["demo", "--data-dir", str(tmp_path)]) == 2
    assert "is not a demo's" in capsys.readouterr().err
    with (directory / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["demo", "--data-dir", str(tmp_path)]) == 1
    assert "a demo is running" in capsys.readouterr().err
    assert (directory / "thesis.txt").exists()
    assert main(["demo", "--data-dir", str(tmp_path), "--classes", "ratings"]) == 2
    assert "impression and click" in capsys.readouterr().err


@pytest.mark.slow
def test_a_demo_of_the_audience_learns_all_that_was_accepted(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "recsys", "demo", "--events=150", f"--data-dir={tmp_path}", *SMALL]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["feedback_lost"] == 0
    assert numbers["feedback_accepted"] == numbers["feedback_learned"] >= 150
    assert 0 <= numbers["hr_at_10"] <= numbers["best_hr_at_10"] <= 1
    assert 0 < numbers["freshness_p50_seconds"] <= numbers["freshness_p99_seconds"]
    assert numbers["versions_published"] > 1
    assert 0 <= numbers["popularity_hr_at_10"] <= 1
    assert [len(user["recommendations"]) for user in numbers["users"]] == [5, 5, 5]
    assert all(item["title"] and item["reason"] for user in numbers["users"] for item in user["recommendations"])
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.slow
def test_ctrl_c_ends_a_demo_of_a_file_with_the_summary_so_far(tmp_path: Path) -> None:
    path = tmp_path / "ratings.csv"
    rows = (f"{n % 50},{n % 70},{n % 5 + 1}.0,{1_000_000_000 + n}\n" for n in range(50_000))
    path.write_text("userId,movieId,rating,timestamp\n" + "".join(rows))
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,Tea (1999),Drama\n")
    arguments = [sys.executable, "-m", "recsys", "demo", "--events=50000", f"--data={path}", f"--data-dir={tmp_path}"]
    with subprocess.Popen([*arguments, *SMALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert any("of 50,000 events" in line for line in process.stderr)
        os.kill(process.pid, signal.SIGINT)
        numbers = json.loads(process.stdout.read())
        assert process.wait(SECONDS) == 0
    assert 0 < numbers["feedback_accepted"] < 50_000
    assert numbers["feedback_lost"] == 0
    assert numbers["stream"] == "ratings.csv (movielens)"
