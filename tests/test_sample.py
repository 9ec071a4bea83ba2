"""A sample of a large table stands for all: exactly where all rows are in it, in the mean where some are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learning import CPU, append, fork, head, learn_all, make_feedback, small, tick, trainer, versions
from test_full_ranking import SETTINGS, USERS, _world
from test_gate import _learner, _walk

from recsys.encoding import RowHistory
from recsys.feedback_log import FeedbackLog
from recsys.item_rows import PADDING_ROW
from recsys.item_table import ItemTable
from recsys.network import Histories, build_network
from recsys.settings import Settings
from recsys.store.connection import connect
from trainer.examples import Event, Examples, encode
from trainer.full_ranking import Ranked, rank
from trainer.gate import Gate
from trainer.learner import Learner
from trainer.prequential import Prequential
from trainer.rebuild import Rebuild
from trainer.sample import Drawn, Sample

ITEMS = 600
NONE = np.empty(0, np.int64)


def _sample(table: ItemTable, certain: np.ndarray, drawn: np.ndarray) -> Sample:
    """Sample a table all of whose rows may be drawn."""
    return Sample(table, certain, Drawn(np.sort(drawn), table.rows - 1, NONE))


def _ranked(
    table: ItemTable, histories: Histories, item_B: torch.Tensor, standing: torch.Tensor | Sample
) -> tuple[Ranked, list[torch.Tensor]]:
    network = build_network(SETTINGS)
    with torch.no_grad():
        network.mix.log_temperature.fill_(0.4)
    states_BD = 2 * torch.randn(USERS, 8, generator=torch.Generator().manual_seed(7))
    found = rank(network, table, histories, states_BD, standing, item_B, None)
    ((found.mixed_loss_B - 0.5 * found.loss_B) * torch.arange(USERS)).sum().backward()
    return found, [parameter.grad.clone() for parameter in network.mix.parameters()]


@pytest.mark.parametrize("certain", [0, 40, ITEMS])
def test_a_sample_of_all_rows_finds_what_all_rows_do(certain: int) -> None:
    table, histories, item_B = _world(ITEMS, 3)
    sample = _sample(table, np.arange(certain), np.arange(1, table.rows))
    assert sample.among(np.array([5, 5, 9])).weight_U.tolist() == [1.0] * table.rows
    torch.testing.assert_close(sample[item_B], table.standing()[item_B])
    (one, one_gradients), (other, other_gradients) = (
        _ranked(table, histories, item_B, standing) for standing in (sample, table.standing())
    )
    assert one.rank_B.tolist() == other.rank_B.tolist()
    assert one.popularity_rank_B.tolist() == other.popularity_rank_B.tolist()
    assert one.led_B2.tolist() == other.led_B2.tolist()
    torch.testing.assert_close(one.loss_B, other.loss_B)
    torch.testing.assert_close(one.mixed_loss_B, other.mixed_loss_B)
    for mine, theirs in zip(one_gradients, other_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)
    shares_B = table.standing()[:, 2].log_softmax(0)[item_B]
    torch.testing.assert_close(sample.log_share(item_B), shares_B, atol=1e-5, rtol=1e-5)


def test_what_is_drawn_stands_for_all_in_the_mean() -> None:
    table, histories, item_B = _world(ITEMS, 3)
    lately, draw = np.array([3, 4, 4, 70]), np.random.default_rng(1)
    exact, _ = _ranked(table, histories, item_B, table.standing())
    shown_B = exact.rank_B > 0
    ranks, sums = [], []
    for _ in range(60):
        sample = _sample(table, lately, draw.choice(np.arange(1, table.rows), 60, replace=False))
        rows_U, weight_U, _ = sample.among(item_B.numpy())
        # Each row of the table is stood for once.
        assert weight_U.sum() == pytest.approx(table.rows)
        assert (np.diff(rows_U) > 0).all()
        assert rows_U[0] == PADDING_ROW
        assert set(weight_U[np.isin(rows_U, [0, 3, 4, 70, *item_B.tolist()])]) == {1.0}
        found, _ = _ranked(table, histories, item_B, sample)
        ranks.append(found.rank_B[shown_B])
        # One over the share of the user's item: a sum over all rows, of which an estimate is right in the mean.
        sums.append(found.mixed_loss_B.detach().exp()[shown_B].numpy())
    for estimates, true in ((ranks, exact.rank_B[shown_B]), (sums, exact.mixed_loss_B.detach().exp()[shown_B].numpy())):
        mean, error = np.mean(estimates, 0), np.std(estimates, 0) / np.sqrt(len(estimates))
        assert np.std(estimates, 0).max() > 0
        assert (abs(mean - true) < 4 * error + 0.51).mean() > 0.95
        assert mean.mean() == pytest.approx(true.mean(), rel=0.05)


def test_free_and_cold_rows_are_never_drawn_and_the_rest_is_stood_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.sample.DRAWN", 60)
    table, _, _ = _world(ITEMS, 3)
    gone, cold = np.arange(470, 520), np.arange(1, 600, 4)
    cold = cold[~np.isin(cold, gone)]
    table.remove(gone)
    for name in ("trend", "total"):
        table.columns[name][cold] = 0
    left_out = np.union1d(gone, cold)
    population = np.setdiff1d(np.arange(1, table.rows), left_out)
    # Some of what is looked at for certain is no part of the population.
    lately, led = np.array([3, 4, 4, 70, int(cold[7])]), np.array([8, 11, int(gone[3])])
    certain = np.unique([*lately, *led, PADDING_ROW])
    rest = np.setdiff1d(population, certain)
    value_I = np.random.default_rng(5).exponential(size=table.rows)
    exact = value_I[rest].sum()
    draw, estimates, variances = np.random.default_rng(1), [], []
    for _ in range(400):
        sample = Sample.draw(table, lately, cold, draw)
        rows_U, weight_U, _ = sample.among(led)
        drawn_N = np.setdiff1d(rows_U, certain)
        assert np.isin(drawn_N, population).all()
        assert weight_U.sum() == pytest.approx(len(population) + np.isin(certain, [0, *left_out]).sum(), rel=1e-5)
        estimates.append((weight_U * value_I[rows_U])[np.isin(rows_U, drawn_N)].sum())
        # Of rows that are drawn without putting any back.
        share = len(drawn_N) / len(rest)
        variances.append(len(rest) ** 2 * value_I[rest].var(ddof=1) / len(drawn_N) * (1 - share))
    error = np.sqrt(np.mean(variances) / len(estimates))
    assert abs(np.mean(estimates) - exact) < 4 * error
    # As little scatter as there can be: four standard errors of a variance of so many.
    assert np.var(estimates) == pytest.approx(np.mean(variances), rel=4 * np.sqrt(2 / len(estimates)) + 0.1)


def test_what_is_left_out_has_its_part_in_all_that_trends() -> None:
    table, _, item_B = _world(ITEMS, 3)
    table.remove(np.arange(500, 520))
    trends = table.column("trend").any(1).numpy()
    cold = np.setdiff1d(np.flatnonzero(~trends)[1::2], table.free_rows)
    sample = Sample.draw(table, np.flatnonzero(trends), cold, np.random.default_rng(1))
    shares_B = table.standing()[:, 2].log_softmax(0)[item_B]
    torch.testing.assert_close(sample.log_share(item_B), shares_B, atol=1e-5, rtol=1e-5)


def test_where_nothing_may_be_drawn_the_certain_rows_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    table, _, _ = _world(20, 3)
    sample = Sample.draw(table, np.array([0, 0]), np.arange(1, 21), np.random.default_rng(1))
    assert [each.tolist() for each in sample.among(NONE)] == [[PADDING_ROW], [1.0], [PADDING_ROW]]


def _sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests' small tables be large ones."""
    for name, value in {"trainer.learner.MANY_ROWS": 5, "trainer.learner.LATELY": 9, "trainer.sample.DRAWN": 4}.items():
        monkeypatch.setattr(name, value)


def test_a_step_on_a_large_table_looks_at_no_more_than_a_sample(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sampled(monkeypatch)
    learner = Learner(small(settings), CPU)
    learner.allocate(f"item-{n}" for n in range(4))
    assert isinstance(learner._look(), torch.Tensor)
    learner.allocate(f"item-{n}" for n in range(4, 300))
    monkeypatch.setattr(learner.table, "standing", lambda: pytest.fail("all rows were looked at"))
    looked_at: list[int] = []
    among = Sample.among
    monkeypatch.setattr(Sample, "among", lambda *given: (found := among(*given), looked_at.append(len(found[0])))[0])
    for number in range(20):
        learner.step(encode(_walk(learner.settings, number), learner.settings))
    assert learner.sample is not None
    assert 5 < max(looked_at) < 60


def test_what_was_chosen_is_certain_however_much_was_only_shown_since(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sampled(monkeypatch)
    learner = Learner(small(settings), CPU)
    learner.allocate(f"item-{n}" for n in range(300))
    nothing = RowHistory((), (), ())
    for first, feedback_class in ((1, 1), (21, 0), (41, 0)):
        events = [Event(row, feedback_class, 1000, nothing, {}) for row in range(first, first + 20)]
        learner.step(encode(events, learner.settings))
    learner._look()
    assert learner.sample is not None
    # Of each kind nine, the newest.
    assert set(learner.sample.among(NONE).certain_C) == {PADDING_ROW, *range(12, 21), *range(52, 61)}


def test_versions_are_the_same_wherever_the_trainer_restarts_and_when_rebuilt(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small(settings)
    append(base, make_feedback(90))
    restarted, whole = fork(base, "restarted"), fork(base, "whole")
    unsampled = learn_all(whole)
    _sampled(monkeypatch)
    weights = learn_all(base)
    assert weights != unsampled
    monkeypatch.setattr("trainer.daemon.READ_COUNT", 23)
    for _ in range(4):
        with trainer(restarted) as daemon:
            daemon.start()
            daemon.step()
            assert daemon.learner.sample is not None
    assert learn_all(restarted) == weights
    assert versions(restarted) == versions(base)
    with connect(base) as client:
        assert Rebuild(client, base, CPU).run(head(base)[0]).equal


def test_the_gate_looks_at_the_same_rows_of_both_versions(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    _sampled(monkeypatch)
    world = small(settings)
    learner, gate = _learner(world, 10)
    learner.allocate(f"more-{n}" for n in range(300))
    learner.step(encode(_walk(world, 1), world))
    gate.accept(learner.take_changed())
    own = Prequential(world, learner.network, learner.table)
    examples = encode(_walk(world, 2), world)
    found, served = gate._test(own, examples, learner.replica), gate._test(gate._prequential, examples, gate._served)
    assert found.item_loss_B.tolist() == served.item_loss_B.tolist()
    # By another sample the same version differs from itself.
    learner.sample = Sample.draw(learner.table, np.array([1, 2]), NONE, np.random.default_rng(1))
    other = gate._test(gate._prequential, examples, gate._served)
    assert other.item_loss_B.tolist() != found.item_loss_B.tolist()


def _wander(settings: Settings, seed: int, count: int) -> Examples:
    """Have users who chose one of 300 items choose, or only see, one of the next few."""
    random = np.random.default_rng(seed)
    starts, steps, classes = random.integers(1, 301, count), random.integers(1, 9, count), random.integers(0, 2, count)
    events = zip(starts.tolist(), steps.tolist(), classes.tolist(), strict=True)
    return encode(
        [Event((s + step) % 300 + 1, c, 1000, RowHistory((s,), (1,), (0,)), {}) for s, step, c in events], settings
    )


@pytest.mark.parametrize("size", [64, 200], ids=["together", "in parts"])
def test_the_gate_ranks_some_of_a_batch_among_the_rows_that_the_learner_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    _sampled(monkeypatch)
    world = small(settings, gate_events=16)
    learner, gate = _learner(world, 0)
    learner.allocate(f"more-{n}" for n in range(300))
    for number in range(30):
        learner.step(_wander(world, number, 64))
    gate.accept(learner.take_changed())
    own = Prequential(world, learner.network, learner.table)
    examples = _wander(world, 100, size)
    found = gate._test(own, examples, learner.replica)
    assert found.look is not None
    chosen = np.flatnonzero(np.isfinite(found.item_loss_B))
    assert found.look.examples == (size if len(chosen) <= 64 else chosen[64])
    some = np.linspace(0, found.look.examples - 1, 16).astype(np.int64)
    alike, apart = (
        gate._test(gate._prequential, examples.take(some), gate._served, look).item_loss_B - found.item_loss_B[some]
        for look in (found.look, None)
    )
    # Nothing was learned in between: what differs is what was looked at.
    assert np.nanmax(abs(alike)) < 1e-5 < 1e-2 < np.nanmax(abs(apart))
    # So it is asked when a batch is learned.
    looked_at: list[set[int]] = []
    among = Sample.among
    monkeypatch.setattr(Sample, "among", lambda *given: (found := among(*given), looked_at.append(set(found[0])))[0])
    gate.observe(examples, learner.step(examples))
    report = learner.step(examples)
    assert report.look is not None
    looked_at.clear()
    gate.observe(examples, report)
    # The served version's own memory may lead to what the learner's has no room for any more.
    assert looked_at[-1] >= set(report.look.certain_C)
    some = np.linspace(0, report.look.examples - 1, 16).astype(np.int64)
    assert len(gate.ranking.differences) == np.isfinite(found.item_loss_B[some]).sum() > 0


def test_of_the_past_the_gate_compares_what_was_ranked_among_the_same_rows(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sampled(monkeypatch)
    monkeypatch.setattr("trainer.gate.WINDOW_VERSIONS", 1)
    world = small(settings, gate_events=64, batches_per_version=4)
    learner, gate = _learner(world, 0)
    learner.allocate(f"more-{n}" for n in range(300))
    for number in range(30):
        report = learner.step(_wander(world, number, 64))
        gate.observe(_wander(world, number, 64), report)
    gate.accept(learner.take_changed())
    gate._batches = 1
    past = gate._past()
    assert past is not None
    # Nothing was learned in between.
    assert max(abs(difference) for difference in past.differences) < 1e-5
    assert len(past.differences) > 16


def test_a_version_of_the_catalogue_alone_is_judged_alike_after_a_restart(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sampled(monkeypatch)
    monkeypatch.setattr("trainer.gate.WINDOW_VERSIONS", 1)
    base = small(settings)
    append(base, make_feedback(90))
    tick(base)
    asked: list[int] = []
    test = Gate._test
    monkeypatch.setattr(Gate, "_test", lambda gate, *given: (asked.append(gate._batches), test(gate, *given))[1])
    learn_all(base)
    assert asked
    for name in "ab":
        asked.clear()
        with trainer(base) as daemon:
            daemon.start()
            version = daemon.version
            with connect(base) as client:
                FeedbackLog(client, base).append_items({f"fresh-{name}": ["x"]})
            tick(base)
            monkeypatch.setattr(daemon.learner.table, "standing", lambda: pytest.fail("all rows were looked at"))
            while daemon.step():
                pass
            assert daemon.version == version + 1
            assert not asked
            # What is learned next is asked again.
            append(base, make_feedback(8, ord(name), first=ord(name) * 8))
            tick(base)
            while daemon.step():
                pass
            assert asked
