"""What the catalogue says of items: in the log once, known to every trainer, and where items without feedback begin."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from learning import (
    CPU,
    START_MS,
    append,
    fork,
    head,
    learn_all,
    make_feedback,
    replica,
    small,
    tick,
    trainer,
    versions,
)
from test_loop import serving

from recsys.catalog import Item
from recsys.cli.app import main
from recsys.errors import StoreFull
from recsys.feedback import Feedback
from recsys.feedback_log import BEGINNING, FeedbackLog, LogEntry
from recsys.quarantine import Quarantine
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightStore
from recsys.weights.earlier import roll_back
from trainer import contents as contents_module
from trainer.contents import CATEGORIES, COLD
from trainer.learner import Learner
from trainer.rebuild import Rebuild

GENRES = ("drama", "comedy", "horror")


def told(settings: Settings, **categories: Sequence[str]) -> int:
    """Tell the log what the catalogue says of items."""
    with connect(settings) as client:
        return FeedbackLog(client, settings).append_items({n.replace("_", "-"): c for n, c in categories.items()})


def entries(settings: Settings) -> list[LogEntry]:
    with connect(settings) as client:
        return FeedbackLog(client, settings).read_after(BEGINNING, 100_000)


def said(settings: Settings) -> list[tuple[str, list[str]]]:
    return [(e.item.item_id, list(e.item.categories)) for e in entries(settings) if e.item is not None]


def known(learner: Learner) -> dict[str, tuple[list[int], int]]:
    """Return the digests and the coldness of every item."""
    table = learner.table
    columns = (table.column(CATEGORIES).tolist(), table.column(COLD).tolist())
    return {item_id: (c, cold) for item_id, c, cold in zip(table.item_ids, *columns, strict=True) if item_id}


# The log


def test_the_log_holds_what_changed_of_items_once(settings: Settings) -> None:
    assert told(settings, a=["x", "y"], b=["y"]) == 2
    assert told(settings, a=["x", "y"], b=["z"]) == 1
    # Nothing was ever said of c, and nothing is.
    assert told(settings, b=[], c=[]) == 1
    assert told(settings, b=[]) == 0
    assert told(settings, b=["z"]) == 1
    assert said(settings) == [("a", ["x", "y"]), ("b", ["y"]), ("b", ["z"]), ("b", []), ("b", ["z"])]
    assert all(entry.record is None and not entry.tick for entry in entries(settings))


def test_items_count_as_bytes_of_the_log_and_not_as_feedback(settings: Settings, store: redis.Redis) -> None:
    append(settings, make_feedback(3))
    told(settings, a=["x"], b=["y"])
    last = append(settings, make_feedback(1))[0]
    log = FeedbackLog(store, settings)
    sizes = [(e.record or e.item).ByteSize() for e in entries(settings) if e.record or e.item]  # type: ignore[union-attr]
    assert (log.usage().records, log.usage().bytes) == (4, sum(sizes))
    assert log.appended() == 4
    assert log.trim(last) == 5
    assert (log.usage().records, log.usage().bytes) == (1, sizes[-1])
    full = FeedbackLog(store, settings.model_copy(update={"log_max_bytes": 1}))
    with pytest.raises(StoreFull, match="log_max_bytes"):
        full.append_items({"a": ["other"]})
    assert said(settings) == []


# Learning


def test_a_cold_item_stands_at_the_mean_of_its_categories(settings: Settings) -> None:
    learner = Learner(small(settings), CPU)
    learner.allocate(["a", "b", "c", "d"])
    learner.catalogue({"a": ["x"], "b": ["x", "y"], "c": ["y"], "d": ["x"]})
    vectors, row = learner.table.columns["vector"], learner.table.row
    # Nobody chose d: it says nothing of its category.
    learner.table.columns["total"][[row("a"), row("b"), row("c")]] = 1.0
    for place, item_id in enumerate("abcd"):
        vectors[row(item_id)] = float(10**place)
    learner.catalogue({"both": ["x", "y"], "one": ["x", "unheard"], "none": ["unheard"], "plain": []})
    mean = {"x": 5.5, "y": 55.0}
    assert vectors[row("both")].tolist() == [(mean["x"] + mean["y"]) / 2] * 8
    assert vectors[row("one")].tolist() == [mean["x"]] * 8
    assert 0 < float(vectors[row("none")].abs().max()) < 0.2
    assert row("plain") == 0
    assert learner.contents.cold_rows.tolist() == sorted(map(row, ("both", "one", "none")))
    # What is catalogued anew is made anew, and what is not cold stays.
    learner.catalogue({"one": ["y"], "a": ["y"]})
    assert vectors[row("one")].tolist() == [(1.0 + 10.0 + 100.0) / 3] * 8
    assert vectors[row("a")].tolist() == [1.0] * 8


def test_what_categories_hold_is_known_however_it_came_about(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items get, change and lose categories, are chosen, and leave; vectors are means of plain loops over all of it."""
    # Few digests, so that several categories share the upper half of theirs.
    monkeypatch.setattr("trainer.contents._digest", lambda name: int(name) % 3 - 1 << 32 | int(name) + 1)
    looked_at: list[int] = []
    paired = contents_module._paired
    monkeypatch.setattr(
        "trainer.contents._paired", lambda rows, digests: (looked_at.append(len(rows)), paired(rows, digests))[1]
    )
    learner, draw = Learner(small(settings), CPU), random.Random(4)
    table, said = learner.table, dict[str, list[str]]()
    learner.allocate(f"item-{n}" for n in range(60))
    for turn in range(60):
        changed = {f"item-{draw.randrange(150)}": draw.sample("012345678", draw.randrange(4)) for _ in range(5)}
        learner.catalogue(changed)
        said |= {item_id: names for item_id, names in changed.items() if table.row(item_id)}
        learner.contents.end(np.array(sorted({draw.choice(learner.contents.cold_rows) for _ in range(turn % 2)}), int))
        warm = np.setdiff1d(table.used_rows(np.arange(1, len(table) + 1)), learner.contents.cold_rows)
        table.columns["total"][draw.choice(warm)] += 1
        table.columns["vector"][warm] = torch.randn(len(warm), 8, generator=torch.Generator().manual_seed(turn))
        if turn % 20 == 19:
            gone = np.sort(draw.sample(warm.tolist(), 5))
            for row in gone:
                said.pop(table.item_ids[row], None)
            learner.free(gone)
        if turn == 30:
            restored = Learner(small(settings), CPU)
            restored.restore(*learner.write_all())
            learner, table = restored, restored.table
        looked_at.clear()
        cold = learner.contents.cold_rows
        learner.contents.follow(cold)
        # But for where rows were freed or restored, all that is looked at is what was asked for.
        assert (not looked_at) == (turn != 30 and turn % 20 != 19)
        chosen = {item_id: names for item_id, names in said.items() if table.columns["total"][table.row(item_id)] > 0}
        for row in cold.tolist():
            members = [
                [table.row(each) for each in chosen if name in chosen[each]] for name in said[table.item_ids[row]]
            ]
            if any(members):
                means = [table.columns["vector"][rows].mean(0) for rows in members if rows]
                torch.testing.assert_close(table.columns["vector"][row], torch.stack(means).mean(0))
    assert len(cold) > 20


def test_negatives_are_never_cold() -> None:
    from recsys.item_rows import ItemRows

    rows = ItemRows()
    rows.allocate("abcdefgh")
    rows.remove(np.array([2, 5]))
    cold = np.array([1, 4, 8])
    assert rows.used(np.arange(1, 4), cold).tolist() == [3, 6, 7]
    assert rows.used(np.arange(1, 7), None).tolist() == [1, 3, 4, 6, 7, 8]


def test_rows_are_given_while_there_is_room(settings: Settings) -> None:
    learner = Learner(small(settings, max_items=3), CPU)
    learner.table.clock = 7
    learner.allocate(["a"])
    learner.catalogue({name: ["x"] for name in "bcde"})
    assert [learner.table.row(name) > 0 for name in "abcde"] == [True, True, True, False, False]
    # Not the first to lose their rows.
    assert learner.table.column("touched").tolist() == [0, 0, 7, 7]


def catalogued(settings: Settings, turns: int) -> None:
    """Append feedback with changes of the catalogue in between, on items old and new."""
    draw = random.Random(5)
    for turn in range(turns):
        append(settings, make_feedback(7, turn, first=7 * turn))
        names = [f"item_{draw.randrange(25)}", f"fresh_{turn}"]
        told(settings, **{name: draw.sample(GENRES, draw.randint(0, 2)) for name in names})
        if turn % 3 == 2:
            tick(settings)
    tick(settings)


@pytest.mark.parametrize("changes", [{}, {"item_admission": 2, "max_items": 12}], ids=["all", "bounded"])
def test_one_log_gives_one_chain_wherever_the_trainer_starts_again(settings: Settings, changes: dict[str, Any]) -> None:
    base = small(settings, **changes)
    catalogued(base, 12)
    other = fork(base, "stopped")
    weights = learn_all(base)
    chain = versions(base)
    assert len(chain) > 8
    for stop in range(1, 100, 17):
        with trainer(other) as daemon:
            daemon.start()
            for entry in daemon.log.read_after(daemon._learning.read_position, stop):
                daemon._take(entry)
    assert learn_all(other) == weights
    assert versions(other) == chain
    with connect(base) as client:
        rebuilt = Rebuild(client, base, CPU).run(chain[-1][0])
    assert rebuilt.equal
    assert rebuilt.versions > 0


def test_what_is_known_of_items_outlives_the_log(settings: Settings) -> None:
    base = small(settings)
    catalogued(base, 6)
    with trainer(base) as daemon:
        daemon.start()
        while daemon.step():
            pass
        before = known(daemon.learner)
        assert any(cold for _, cold in before.values())
        assert any(any(digests) and not cold for digests, cold in before.values())
    with connect(base) as client:
        FeedbackLog(client, base).trim("9999999999999-0")
    assert entries(base) == []
    with trainer(base) as daemon:
        daemon.start()
        assert known(daemon.learner) == before


def test_a_change_of_the_catalogue_alone_makes_a_version(settings: Settings) -> None:
    base = small(settings)
    append(base, make_feedback(8))
    with trainer(base) as daemon:
        daemon.start()
        while daemon.step():
            pass
        version = daemon.version
        told(base, fresh=["x"])
        daemon.step()
        assert daemon.version == version
        daemon.finish()
        assert daemon.version == version + 1
        # Once: a further tick finds nothing.
        tick(base)
        assert daemon.step()
        assert daemon.version == version + 1
    assert replica(base).table.row("fresh") > 0


def test_more_items_are_catalogued_at_once_than_there_is_room_for(settings: Settings) -> None:
    """As by an import: the gate's copy of the version served has no rows for them yet."""
    base = small(settings)
    append(base, make_feedback(8))
    with trainer(base) as daemon:
        daemon.start()
        while daemon.step():
            pass
        daemon.finish()
        before, version = daemon.learner.table.columns["vector"].shape[0], daemon.version
        told(base, **{f"fresh-{n}": ["x"] for n in range(before)})
        while daemon.step():
            pass
        daemon.finish()
        assert daemon.version == version + 1
        assert daemon.learner.table.columns["vector"].shape[0] > before
    assert replica(base).table.row(f"fresh-{before - 1}") > 0


def test_a_rollback_takes_back_nothing_of_the_catalogue(settings: Settings) -> None:
    base = small(settings)
    append(base, make_feedback(8))
    with trainer(base) as daemon, connect(base) as client:
        daemon.start()
        while daemon.step():
            pass
        good = daemon.version
        told(base, fresh=["x"], item_1=["y"])
        append(base, make_feedback(8, 2, first=8))
        while daemon.step():
            pass
        assert daemon.learner.table.row("fresh") > 0
        store = WeightStore(client, base)
        record = roll_back(store, Quarantine(client, base), good, "a test", START_MS)
        append(base, make_feedback(8, 3, first=16))
        while daemon.step():
            pass
        after = known(daemon.learner)
        assert daemon.version == record.version + 1
        assert after["fresh"][1] == 1
        assert any(after["fresh"][0])
        assert any(after["item-1"][0])
        assert Rebuild(client, base, CPU).run(daemon.version).equal
    with trainer(base) as daemon:
        daemon.start()
        assert known(daemon.learner) == after


# The loop


def test_an_item_is_recommended_to_those_who_like_its_category_before_any_feedback_on_it(settings: Settings) -> None:
    """Users choose items of one of two categories alone, in no order; then an item of each is catalogued."""
    base = small(settings, drain_seconds=0.05, replay_size=24, negatives=24, dimension=16, gate=False)
    draw = random.Random(1)
    items = {kind: [f"{kind}-{number}" for number in range(12)] for kind in "ab"}
    with serving(base) as running:
        running.client.upsert_items([Item(name, categories=(kind,)) for kind in "ab" for name in items[kind]])
        for user in range(80):
            kind = "ab"[user % 2]
            running.click(f"user-{user}", *draw.sample(items[kind], 8))
        running.learn()
        running.client.upsert_items([Item(f"new-{kind}", categories=(kind,)) for kind in "ab"])
        running.learn()
        for kind, other in ("ab", "ba"):
            late = f"late-{kind}"
            running.click(late, *draw.sample(items[kind], 8))
            places = {name: place for place, name in enumerate(running.recommended(late))}
            # Before its twin, and before all that the user has no liking for.
            assert places[f"new-{kind}"] < places[f"new-{other}"]
            assert places[f"new-{kind}"] < min(places[name] for name in items[other])
            # All that the network finds in the item is what its category gave, until there is feedback on it.
            found, older = (running.client.explain(late, name).parts for name in (f"new-{kind}", items[kind][0]))
            assert found.content == found.network > 0
            assert older.content == 0 < older.network
        running.click("late-a", "new-a")
        running.learn()
        assert running.client.explain("late-a", "new-a").parts.content == 0
        assert running.daemon.learner.table.row("new-a") not in running.daemon.learner.contents.cold_rows
        running.client.delete_items(["new-a"])
        running.learn()
        running.parts.mirror.refresh()
        assert "new-a" not in running.recommended("other-a")
        assert running.daemon.learner.table.column(CATEGORIES)[running.daemon.learner.table.row("new-a")].eq(0).all()


@pytest.mark.parametrize("protocol", ["test-then-train", "temporal"])
def test_a_file_is_evaluated_with_what_is_said_of_its_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    draw = random.Random(3)
    lines = [f"u{draw.randrange(20)},i{draw.randrange(30)},click,{1_700_000_000 + n}" for n in range(600)]
    (tmp_path / "log.csv").write_text("user_id,item_id,class,time\n" + "\n".join(lines) + "\n")
    (tmp_path / "items.csv").write_text(
        "item_id,title,categories\n" + "".join(f"i{n},,{'even' if n % 2 == 0 else 'odd'}|all\n" for n in range(30))
    )
    (tmp_path / "nothing.csv").write_text("item_id,categories\n")
    found = {}
    for name in ("", "nothing.csv", "items.csv"):
        flags = ["--items", str(tmp_path / name)] if name else []
        command = ["evaluate", str(tmp_path / "log.csv"), "--methods", "recsys", "--protocol", protocol]
        assert main([*command, "--epochs", "1", "--json", "--device", "cpu", *flags]) == 0
        found[name] = json.loads(capsys.readouterr().out)["methods"]
        for method in found[name]:
            del method["seconds"], method["bytes"]
    assert found[""] == found["nothing.csv"] != found["items.csv"]


def test_an_item_follows_its_category_until_there_is_feedback_on_it(settings: Settings) -> None:
    learner = Learner(small(settings), CPU)
    learner.catalogue({"a": ["x"], "cold": ["x"]})
    vectors, row = learner.table.columns["vector"], learner.table.row
    learner.table.columns["total"][row("a")] = 1.0
    learner.contents.end(np.array([row("a")]))
    for clock, follows in ((1, True), (2, True), (2, False), (3, True), (4, False), (5, True)):
        learner.table.clock = clock
        vectors[row("a")] += 1.0
        learner.follow_contents()
        assert torch.equal(vectors[row("a")], vectors[row("cold")]) == follows


def test_the_service_tells_the_log(settings: Settings) -> None:
    with serving(small(settings, drain_seconds=0.05)) as running:
        items = [Item("a", "A", ("x",)), Item("b", "B"), Item("c", "C", ("y",))]
        assert running.client.upsert_items(items) == 3
        # Titles are for people.
        assert running.client.upsert_items([Item("a", "another", ("x",))]) == 1
        assert running.client.delete_items(["b", "c"]) == 2
    assert said(settings) == [("a", ["x"]), ("c", ["y"]), ("c", [])]


def test_where_the_catalogue_alone_knows_items_feedback_on_others_is_learned(settings: Settings) -> None:
    base = small(settings, item_admission=2)
    # With the padding row as many as fill the table before it grows: there is no row past the last.
    told(base, **{f"item_{number}": GENRES[:1] for number in range(1023)})
    append(base, [Feedback(f"user-{number}", f"other-{number}", "click") for number in range(base.batch_size)])
    tick(base)
    learn_all(base)
    assert head(base)[3] == base.batch_size
