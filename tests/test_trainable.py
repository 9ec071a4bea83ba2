"""What learns: the chosen parts move and nothing else; what is added begins without effect and is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from learning import CPU
from strategic import copied, draw, go_on, learned, payloads, small_settings, weights_of
from torch import Tensor

from recsys.additions import additions
from recsys.errors import CorruptWeights, SettingsError
from recsys.network import build_network
from recsys.settings import load
from recsys.weights.replica import Replica
from trainer.learner import Learner

BESIDE = ("mix.", "rank.", "rates.", "context.")


def words(name: str) -> set[str]:
    """Split a parameter's name."""
    return set(name.replace("_", ".").split("."))


@pytest.mark.parametrize(
    ("trainable", "moves", "rows"),
    [
        ("all", lambda name: True, True),
        ("head", lambda name: name.startswith(("rank.", "rates.", "mix.")), False),
        ("adapter", lambda name: name.startswith(BESIDE) or ".adapter." in name or "_norm." in name, True),
        ("prompt", lambda name: name.startswith(BESIDE) or ".prompt." in name, True),
        ("bias", lambda name: name.endswith(("bias", "log_temperature")), True),
        (
            "lora",
            lambda name: (
                name.startswith(BESIDE)
                or (name.startswith("blocks.") and name.endswith(".weight") and not {"norm", "adapter"} & words(name))
            ),
            True,
        ),
    ],
)
def test_what_is_chosen_moves_and_nothing_else(trainable: str, moves: Callable[[str], bool], rows: bool) -> None:
    learner = learned(small_settings(trainable=trainable, blocks=2, adapter_width=3, prompt_length=2))
    draw(learner, 0)
    before = weights_of(learner)
    vectors = learner.table.column("vector").clone()
    go_on(learner, 0, 3)
    moved = {name for name, old in before.items() if not torch.equal(old, weights_of(learner)[name])}
    assert moved == {name for name in before if moves(name)}
    assert torch.equal(vectors, learner.table.column("vector")) is not rows
    # Counts go on whatever is frozen.
    assert learner.table.clock == 24


def test_low_rank_pairs_are_merged_and_their_gradients_are_those_of_the_product() -> None:
    learner = learned(small_settings(trainable="lora", lora_rank=2))
    initial = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    go_on(learner, 0, 20)
    low: Any = learner.strategies._trainable
    for name, weight in low._maps.items():
        moved = weight.detach() - initial[name]
        assert moved.abs().max() > 1e-4
        assert torch.linalg.matrix_rank(moved, atol=1e-5) <= 2
        down, up = (
            low.moving[f"{low.name}.{name}.{kind}"].detach().clone().requires_grad_() for kind in ("down", "up")
        )
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        ((up @ down) * weight.grad).sum().backward()
        low.gather()
        for kind, expected in (("down", down), ("up", up)):
            torch.testing.assert_close(low.moving[f"{low.name}.{name}.{kind}"].grad, expected.grad)
    # A server with any settings of learning reads it.
    Replica(small_settings(), CPU).apply(learner.write_all()[0])


def test_low_rank_pairs_begin_without_effect() -> None:
    through = learned(small_settings(), 5)
    other = copied(through, small_settings(trainable="lora"))
    assert payloads(other)[0] == payloads(through)[0]
    low = other.strategies._trainable
    low.merge()
    assert payloads(other)[0] == payloads(through)[0]


# What settings add to the network


ADDED = {"adapter_width": 3, "prompt_length": 2}


def test_what_is_added_changes_no_other_initial_weight_and_no_number() -> None:
    plain, added = (build_network(small_settings(blocks=2, **changes)).eval() for changes in ({}, ADDED))
    assert all(torch.equal(tensor, added.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert set(added.state_dict()) - set(plain.state_dict()) == set(additions(added.state_dict()))
    learner = learned(small_settings(blocks=2), 5)
    histories = draw(learner, 9).histories(CPU)
    vectors = learner.table.column("vector")
    said = [network.states(vectors, histories.rows_BL, histories) for network in (plain, added)]
    assert torch.equal(*said)


@pytest.mark.parametrize("changes", [{"adapter_width": 3}, {"prompt_length": 2}, ADDED], ids=str)
def test_a_version_from_before_goes_on_with_what_is_added_and_says_the_same(changes: dict[str, int]) -> None:
    before = learned(small_settings(), 5)
    settings = small_settings(**changes)
    after = copied(before, settings)
    scores = []
    for learner in (before, after):
        with torch.no_grad():
            report, _ = learner.prequential.test(draw(learner, 50), None, learner.table.standing())
        scores.append((report.item_loss_B, report.class_probability_BC))
    for earlier, later in zip(*scores, strict=True):
        np.testing.assert_array_equal(earlier, later)
    initial = additions(build_network(settings).state_dict())
    assert initial
    assert all(torch.equal(tensor, initial[name]) for name, tensor in additions(_state(after)).items())
    go_on(after, 5, 12)
    moved = {name for name, tensor in additions(_state(after)).items() if not torch.equal(tensor, initial[name])}
    assert moved == set(initial)
    # A server reads both; after a rollback to the older one nothing is left of what was learned since.
    server = Replica(settings, CPU)
    for learner in (after, before):
        server.apply(learner.write_all()[0])
    assert all(torch.equal(tensor, server.network.state_dict()[name]) for name, tensor in _state(before).items())
    assert all(torch.equal(tensor, initial[name]) for name, tensor in additions(server.network.state_dict()).items())


def test_what_was_added_is_not_left_out_again() -> None:
    added = learned(small_settings(**ADDED), 2)
    for changes in ({}, {"adapter_width": 3}, {"adapter_width": 4, "prompt_length": 2}):
        with pytest.raises(CorruptWeights, match=r"adapter|prompt"):
            copied(added, small_settings(**changes))


def test_weights_remembered_by_name_begin_anew_where_something_is_added() -> None:
    """An average and an anchor of the smaller network do not fit the larger one; they are others."""
    before = learned(small_settings(average_decay=0.9, ewc_weight=1.0), 3)
    after = copied(before, small_settings(average_decay=0.9, ewc_weight=1.0, **ADDED))
    go_on(after, 3, 5)


def test_what_is_to_learn_must_be_there() -> None:
    for trainable, needed in (("adapter", "adapter_width"), ("prompt", "prompt_length")):
        with pytest.raises(SettingsError, match=needed):
            load({"trainable": trainable}, environment={})
        assert load({"trainable": trainable, needed: 1}, environment={}).trainable == trainable


def _state(learner: Learner) -> dict[str, Tensor]:
    return dict(learner.network.state_dict())
