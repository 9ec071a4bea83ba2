"""Epochs: the first as a trainer learns, further ones without counting, the best one kept; planted worlds to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recsys.feedback_file import open_feedback_file
from recsys.settings import Settings, load
from recsys.weights import encode
from trainer import mixing
from trainer.epochs import LEAST_STEPS, Encoded, Epoch, Epochs, summary
from trainer.evaluation.stream import Case, Stream
from trainer.examples import Examples
from trainer.examples import encode as encode_events
from trainer.learner import Learner
from trainer.mixing import fit_mixing
from trainer.quality import Rows

CPU = torch.device("cpu")
SMALL = {
    **{"dimension": 8, "history_length": 5, "successors": 4, "context_buckets": 8, "max_context": 2},
    **{"replay_size": 6, "replay_every": 6, "replay_capacity": 100, "negatives": 8, "batch_size": 4},
}


def made_up(folder: Path, count: int = 160, items: int = 12) -> Path:
    """Write clicks of users who go through the items one after the other, each from another place on."""
    random = np.random.default_rng(1)
    at: dict[int, int] = {}
    path = folder / "rounds.csv"
    with path.open("w") as file:
        file.write("user,item,time,event\n")
        for n in range(count):
            user = int(random.integers(0, 20))
            at[user] = (at.get(user, int(random.integers(0, items))) + 1) % items
            file.write(f"u{user},i{at[user]},{1000 + 60 * n},{'click' if random.random() < 0.9 else 'impression'}\n")
    return path


def learner_and_cases(path: Path, **changes: Any) -> tuple[Learner, list[Case]]:
    file = open_feedback_file(path)
    settings: Settings = load({**SMALL, **changes}, environment={}).model_copy(update={"classes": file.classes})
    learner = Learner(settings, CPU)
    return learner, list(Stream(file, settings, learner).cases())


def weights(learner: Learner) -> bytes:
    return b"".join(map(encode, learner.write_all()))


def counts(learner: Learner) -> dict[str, Any]:
    names = ("trend", "touched", "total", "successor", "successor_weight")
    return {name: learner.table.column(name).tolist() for name in names} | {"clock": learner.table.clock}


def test_learning_again_moves_the_network_and_counts_nothing(tmp_path: Path) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path))
    examples = encode_events([case.event for case in cases[:8]], learner.settings)
    assert learner.step(examples).learned
    before, moved, window = counts(learner), weights(learner), len(learner.window)
    network = learner.network
    kept = [*network.mix.parameters(), *network.rank.parameters(), *network.rates.parameters()]
    mixing = [p.detach().clone() for p in kept]
    report = learner.step(examples, again=True)
    assert report.learned
    assert counts(learner) == before
    assert len(learner.window) == window
    assert all(torch.equal(p, q) for p, q in zip(kept, mixing, strict=True))
    assert weights(learner) != moved
    assert not (report.rank_B > 0).any()


def test_learned_again_a_choice_is_told_from_all_items_where_they_are_few(tmp_path: Path) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path), dropout=0.0, negatives=2)
    examples = encode_events([case.event for case in cases[:80]], learner.settings)
    learner.step(examples)
    chosen = np.array([case.positive and len(case.event.history.rows) > 0 for case in cases[:80]])
    expected = told_from(learner, examples, [np.zeros(0, np.int64)] * 80)[chosen].mean()
    assert learner.step(examples, again=True).losses["item"] == pytest.approx(expected, rel=1e-5)


def told_from(learner: Learner, examples: Examples, own: list[Rows]) -> NDArray[np.float32]:
    """Return for each example minus the logarithm of its item's share among all that are not the user's own."""
    histories, vectors = examples.histories(CPU), learner.table.column("vector")
    with torch.no_grad():
        scores = (learner.network.eval().states(vectors, histories.rows_BL, histories) @ vectors.T).exp().numpy()
    scores[:, 0] = 0
    chosen = scores[np.arange(len(examples)), examples.item_B]
    for score, rows, item in zip(scores, own, examples.item_B, strict=True):
        score[rows[rows != item]] = 0
    return -np.log(chosen / scores.sum(1))


def test_learned_again_a_choice_is_told_from_nothing_that_the_user_has(tmp_path: Path) -> None:
    """What users have may hold the choice itself, items of their histories and others, or nothing."""
    learner, cases = learner_and_cases(made_up(tmp_path), dropout=0.0, negatives=2)
    examples = encode_events([case.event for case in cases[:80]], learner.settings)
    learner.step(examples)
    random = np.random.default_rng(3)
    own = [1 + random.permutation(12)[: random.integers(0, 9)] for _ in cases[:80]]
    chosen = np.array([case.positive and len(case.event.history.rows) > 0 for case in cases[:80]])
    expected = told_from(learner, examples, own)[chosen].mean()
    assert expected < told_from(learner, examples, [case.seen for case in cases[:80]])[chosen].mean()
    assert learner.step(examples, own, again=True).losses["item"] == pytest.approx(expected, rel=1e-5)


def test_learned_again_no_negative_comes_twice(tmp_path: Path) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path, 600, items=60), negatives=50)
    learner.step(encode_events([case.event for case in cases], learner.settings))
    assert len(learner.table) == 60
    random = np.random.default_rng(4)
    drawn = [learner._negatives(random, again=2).tolist() for _ in range(50)]
    assert all(len(set(rows)) == len(rows) == 50 for rows in drawn)
    assert set().union(*drawn) == set(range(1, 61))
    assert sorted(learner._negatives(random, again=20).tolist()) == list(range(1, 61))


@pytest.mark.parametrize("timeless", [False, True])
def test_where_time_tells_nothing_what_a_user_chose_later_is_no_negative(tmp_path: Path, timeless: bool) -> None:
    """Every user chose every item, so that there is nothing else to tell a choice from."""
    learner, cases = learner_and_cases(made_up(tmp_path, 600, items=4))
    epochs = Epochs(learner, cases, [], timeless=timeless)
    epochs.run(2, 2)
    assert (epochs.history[1].loss == 0) == timeless


def test_where_classes_alone_learn_learning_again_changes_nothing(tmp_path: Path) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path), trainable="head", bayesian_head=True)
    examples = encode_events([case.event for case in cases[:8]], learner.settings)
    learner.step(examples)
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    assert learner.step(examples, again=True).learned
    assert all(torch.equal(value, before[name]) for name, value in learner.network.state_dict().items())


def test_learning_the_mixing_moves_nothing_else(tmp_path: Path) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path))
    for start in range(0, 80, 4):
        learner.step(encode_events([case.event for case in cases[start : start + 4]], learner.settings))
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    vectors, counted = learner.table.column("vector").clone(), counts(learner)
    report = learner.learn_mixing(encode_events([case.event for case in cases[80:100]], learner.settings))
    assert report.learned
    changed = {n for n, value in learner.network.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    assert all(name.startswith("mix") for name in changed)
    assert torch.equal(learner.table.column("vector"), vectors)
    assert counts(learner) == counted


def test_the_mixing_fitted_is_the_same_whatever_it_was_and_foresees_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path, 300, items=6))
    for start in range(0, 200, 4):
        learner.step(encode_events([case.event for case in cases[start : start + 4]], learner.settings))
    apart = [
        (
            encode_events([case.event for case in cases[n : n + 20]], learner.settings),
            [case.seen for case in cases[n : n + 20]],
        )
        for n in range(200, 300, 20)
    ]
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    rest = learner.table.column("vector").clone(), counts(learner)
    first = fit_mixing(learner, apart)
    fitted = {name: value.clone() for name, value in learner.network.state_dict().items()}
    with torch.no_grad():
        learner.network.mix.weight.fill_(3.0)
    second = fit_mixing(learner, apart)
    assert all(torch.equal(value, fitted[name]) for name, value in learner.network.state_dict().items())
    assert summary(first) == summary(second)
    changed = {name for name, value in fitted.items() if not torch.equal(value, before[name])}
    assert changed == {"mix.weight", "mix.bias", "mix.log_temperature"}
    assert torch.equal(learner.table.column("vector"), rest[0])
    assert counts(learner) == rest[1]
    monkeypatch.setattr(mixing, "STEPS", 0)
    unfitted = fit_mixing(learner, apart)
    assert summary(first)["item_log_loss"] < summary(unfitted)["item_log_loss"]


@pytest.mark.parametrize("trainable", ["head", "bias", "lora", "adapter", "prompt"])
def test_only_what_may_move_is_fitted(tmp_path: Path, trainable: str) -> None:
    added = {"adapter_width": 4} if trainable == "adapter" else {"prompt_length": 2} if trainable == "prompt" else {}
    learner, cases = learner_and_cases(made_up(tmp_path, 40, items=6), trainable=trainable, **added)
    for start in range(0, 20, 4):
        learner.step(encode_events([case.event for case in cases[start : start + 4]], learner.settings))
    part = cases[20:]
    apart = [(encode_events([case.event for case in part], learner.settings), [case.seen for case in part])]
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    assert fit_mixing(learner, []) == []
    assert all(torch.equal(value, before[name]) for name, value in learner.network.state_dict().items())
    fit_mixing(learner, apart)
    may = {f"mix.{name}" for name, parameter in learner.network.mix.named_parameters() if parameter.requires_grad}
    after = learner.network.state_dict()
    assert {name for name, value in before.items() if not torch.equal(value, after[name])} == may
    assert "mix.bias" in may


def test_one_epoch_is_what_a_trainer_learns(tmp_path: Path) -> None:
    path = made_up(tmp_path)
    learner, cases = learner_and_cases(path)
    Epochs(learner, cases, []).run(1, 1)
    other, cases = learner_and_cases(path)
    for start in range(0, len(cases), 4):
        batch = cases[start : start + 4]
        other.step(encode_events([case.event for case in batch], other.settings), [case.seen for case in batch])
    assert weights(learner) == weights(other)


def test_epochs_learn_more_than_one(tmp_path: Path) -> None:
    path = made_up(tmp_path, 400, items=6)
    learner, cases = learner_and_cases(path, batch_size=16, replay_size=0, learning_rate=0.01, row_learning_rate=0.3)
    epochs = Epochs(learner, cases[:300], cases[300:])
    told: list[tuple[int, int]] = []
    epochs.run(5, 5, lambda epoch, done: told.append((epoch, done)))
    assert [each.epoch for each in epochs.history] == list(range(1, 6))
    assert told[-1] == (5, 300)
    first, last = epochs.history[0], epochs.history[epochs.best - 1]
    assert epochs.best > 1
    assert last.loss < first.loss
    assert last.validation_loss(timeless=False) < first.validation_loss(timeless=False)


def test_where_single_choices_are_left_out_places_decide_which_epoch_is_best() -> None:
    common = {"seconds": 1.0, "loss": 1.0, "hr_at_10": 0.1, "ndcg_at_10": 0.1}
    earlier = Epoch(epoch=1, ndcg=0.3, item_log_loss=6.0, class_log_loss=1.0, **common)
    later = Epoch(epoch=2, ndcg=0.2, item_log_loss=5.0, class_log_loss=1.0, **common)
    assert earlier.validation_loss(timeless=True) < later.validation_loss(timeless=True)
    assert earlier.validation_loss(timeless=False) > later.validation_loss(timeless=False)


@pytest.mark.parametrize("timeless", [False, True])
def test_further_epochs_go_through_the_choices_alone(tmp_path: Path, timeless: bool) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path, 500), batch_size=4, batch_growth=8, replay_size=0)
    choices = sum(case.positive and len(case.event.history.rows) > 0 for case in cases)
    assert choices < len(cases)
    steps = [learner.steps]
    epochs = Epochs(learner, cases, [], timeless=timeless)
    told: list[tuple[int, int]] = []

    def progress(epoch: int, done: int) -> None:
        told.append((epoch, done))
        if done == len(cases):
            steps.append(learner.steps)

    epochs.run(3, 3, progress)
    first, *further = np.diff(steps).tolist()
    assert first == -(-len(cases) // (32 if timeless else 4))
    # As many as there are to be at least, but for what the last step lacks.
    assert further == [-(-choices // (choices // LEAST_STEPS))] * 2
    assert [done for epoch, done in told if epoch == 2] == sorted(done for epoch, done in told if epoch == 2)


def test_it_stops_when_nothing_is_gained_and_keeps_the_best(tmp_path: Path) -> None:
    """What is kept apart is drawn from another world, so that every epoch makes it worse."""
    path = made_up(tmp_path, 200)
    fast = {"batch_size": 16, "learning_rate": 0.05, "row_learning_rate": 0.5}
    learner, cases = learner_and_cases(path, **fast)
    random = np.random.default_rng(0)
    strange = [cases[n] for n in random.permutation(len(cases))[:40]]
    for case in strange:
        case.event = case.event._replace(feedback_class=1 - case.event.feedback_class)
    rest = [case for case in cases if all(case is not other for other in strange)]
    kept: list[bytes] = []
    epochs = Epochs(learner, rest, strange)
    epochs.run(30, 2, lambda epoch, done: kept.append(weights(learner)) if done == len(rest) else None)
    assert len(epochs.history) < 30
    losses = [each.validation_loss(timeless=False) for each in epochs.history]
    assert epochs.best == int(np.argmin(losses)) + 1
    assert len(epochs.history) == epochs.best + 2
    # Beside the mixing, learned last, the weights are those of the end of the best epoch.
    found = learner.table.column("vector").clone()
    again, _ = learner_and_cases(path, **fast)
    assert not torch.equal(found, again.table.column("vector"))
    Epochs(again, rest, strange).run(epochs.best, 30)
    assert torch.equal(found, again.table.column("vector"))
    assert weights(learner) == weights(again)


def test_an_interruption_leaves_the_best_epoch(tmp_path: Path) -> None:
    path = made_up(tmp_path, 200)
    learner, cases = learner_and_cases(path, batch_size=16)
    epochs = Epochs(learner, cases[:160], cases[160:])

    def interrupt(epoch: int, done: int) -> None:
        if epoch == 2 and done > 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        epochs.run(5, 5, interrupt)
    assert [each.epoch for each in epochs.history] == [1]
    other, cases = learner_and_cases(path, batch_size=16)
    Epochs(other, cases[:160], cases[160:]).run(1, 1)
    assert weights(learner) == weights(other)


def test_what_is_encoded_is_what_was_given(tmp_path: Path) -> None:
    learner, cases = learner_and_cases(made_up(tmp_path))
    order = np.random.default_rng(3).permutation(len(cases))
    encoded = Encoded(cases, learner)
    assert len(encoded) == len(cases)
    place = 0
    for examples, seen in encoded.batches(7, order):
        wanted = [cases[n] for n in order[place : place + 7].tolist()]
        expected = encode_events([case.event for case in wanted], learner.settings)
        for name in ("rows_BL", "classes_BL", "gaps_BL", "item_B", "class_B", "context_BP"):
            np.testing.assert_array_equal(getattr(examples, name), getattr(expected, name))
        assert all(one is case.seen for one, case in zip(seen, wanted, strict=True))
        place += 7
    assert place >= len(cases)


def test_of_nothing_nothing_is_told() -> None:
    assert all(np.isnan(value) for value in summary([]).values())
