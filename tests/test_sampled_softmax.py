import math

import numpy as np
import pytest
import torch

from trainer import sampled_softmax as module
from trainer.sampled_softmax import LeftOut, sampled_softmax

EXAMPLES, NEGATIVES, DIMENSION = 7, 11, 5
SHIFT = math.log(40 / NEGATIVES)
# By example: none, some, all of them, one of them twice.
PLACES = [[], [3], list(range(NEGATIVES)), [0, 10, 10], [], [5], [1, 2]]


def parts(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int) -> torch.Tensor:
        return torch.randn(rows, DIMENSION, generator=generator, dtype=torch.float64).requires_grad_()

    return drawn(EXAMPLES), drawn(EXAMPLES), drawn(NEGATIVES)


def left_out(places: list[list[int]]) -> LeftOut:
    flat = [place for each in places for place in each]
    return LeftOut(np.array(flat, np.int64), np.cumsum([len(each) for each in places], dtype=np.int64))


def plainly(
    states_XD: torch.Tensor, items_XD: torch.Tensor, negatives_ND: torch.Tensor, places: list[list[int]]
) -> torch.Tensor:
    """Take the mean of each example's cross-entropy by itself."""
    losses = []
    for state_D, item_D, out in zip(states_XD, items_XD, places, strict=True):
        others = [negatives_ND[n] @ state_D + SHIFT for n in range(NEGATIVES) if n not in out]
        scores = torch.stack([item_D @ state_D, *others])
        losses.append(torch.nn.functional.cross_entropy(scores[None], torch.tensor([0])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("together", [1, 3, EXAMPLES, 100])
def test_loss_and_gradients_are_those_of_the_cross_entropy(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(module, "SCORES_IN_CACHE", together * NEGATIVES)
    given, expected = parts(), parts()
    loss, plain = sampled_softmax(*given, SHIFT, left_out(PLACES)), plainly(*expected, PLACES)
    torch.testing.assert_close(loss, plain)
    (3 * loss).backward()
    (3 * plain).backward()
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_scores_that_are_far_apart_stay_finite() -> None:
    states_XD, items_XD, negatives_ND = (1e4 * each.detach() for each in parts())
    states_XD.requires_grad_()
    loss = sampled_softmax(states_XD, items_XD, negatives_ND, SHIFT, left_out(PLACES))
    loss.backward()
    assert torch.isfinite(loss)
    assert states_XD.grad is not None
    assert torch.isfinite(states_XD.grad).all()


def test_what_is_not_finite_is_not_hidden() -> None:
    states_XD, items_XD, negatives_ND = parts()
    with torch.no_grad():
        states_XD[2, 1] = torch.nan
    loss = sampled_softmax(states_XD, items_XD, negatives_ND, SHIFT, left_out(PLACES))
    assert torch.isnan(loss)


def test_without_examples_there_is_no_loss_and_nothing_moves() -> None:
    states_XD, items_XD, negatives_ND = parts()
    none = torch.zeros(0, dtype=torch.int64)
    loss = sampled_softmax(states_XD[none], items_XD[none], negatives_ND, SHIFT, left_out([]))
    assert loss == 0
    loss.backward()
    for each in (states_XD, items_XD, negatives_ND):
        assert each.grad is not None
        assert not each.grad.any()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    states_XD, items_XD, negatives_ND = parts()
    loss = sampled_softmax(states_XD, items_XD.detach(), negatives_ND.detach(), SHIFT, left_out(PLACES))
    loss.backward()
    assert states_XD.grad is not None
    states_XD, items_XD, negatives_ND = (each.detach() for each in parts())
    assert not sampled_softmax(states_XD, items_XD, negatives_ND, SHIFT, left_out(PLACES)).requires_grad
