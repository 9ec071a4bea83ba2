"""The class rates: compared with plain loops over the same counts."""

from __future__ import annotations

import math
import random

import pytest
import torch

from recsys.rates import DECAY, FADING, LEAST_VARIANCE, PRIOR, RESIDUAL_PRIOR, TILT, Rates

WORTH = {False: [0.0, 1.0, 5.0], True: [1.0, 2.0, 4.0]}
CONTEXTS = 8


def rates(tell: bool) -> Rates:
    made = Rates(3, CONTEXTS, WORTH[tell], tell)
    made.class_counts.copy_(torch.tensor([60.0, 25.0, 4.0]))
    made.context_counts.copy_(torch.arange(3.0 * CONTEXTS).view(CONTEXTS, 3))
    return made


def above(counts: list[float], among: list[float]) -> list[float]:
    return [math.log((n / rate + PRIOR) / (sum(counts) + PRIOR)) for n, rate in zip(counts, among, strict=True)]


def smooth(counts: list[float], among: list[float]) -> list[float]:
    return [(n + PRIOR * rate) / (sum(counts) + PRIOR) for n, rate in zip(counts, among, strict=True)]


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else [0.0] * 3


def worth_of(rates_C: list[float], worth: list[float]) -> float:
    return sum(rate * each for rate, each in zip(rates_C, worth, strict=True))


AMONG = [61 / 92, 26 / 92, 5 / 92]


def variance(worth: list[float]) -> float:
    return sum(rate * (each - worth_of(AMONG, worth)) ** 2 for rate, each in zip(AMONG, worth, strict=True))


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("given", [0, 1, 4, 6])
@pytest.mark.parametrize("pairs", [[], [3], [3, 7]])
def test_what_is_known_of_a_user(tell: bool, given: int, pairs: list[int]) -> None:
    draw = random.Random(given)
    length, reach, worth = 6, 3, WORTH[tell]
    classes = [0] * (length - given) + [draw.randint(1, 3) for _ in range(given)]
    counts = [[float(draw.randint(0, 9)) for _ in range(3)] for _ in range(length)]
    audience = [[float(draw.randint(0, 9)) for _ in range(3)] for _ in range(reach)]
    found = rates(tell).user(
        torch.tensor([classes]),
        torch.tensor([counts]),
        torch.tensor([audience]),
        torch.tensor([pairs + [-1] * (3 - len(pairs))]),
    )
    user, residual = [0.0] * 3, 0.0
    if tell:
        entries = [(FADING ** (length - 1 - n), n) for n in range(length) if classes[n]]
        size = sum(weight for weight, _ in entries)
        expected = [sum(w * smooth(counts[n], AMONG)[c] for w, n in entries) for c in range(3)]
        observed = [sum(w for w, n in entries if classes[n] == c + 1) for c in range(3)]
        if size:
            user = [math.log((o * size / e + PRIOR) / (size + PRIOR)) for o, e in zip(observed, expected, strict=True)]
            errors = [w * (worth[classes[n] - 1] - worth_of(smooth(counts[n], AMONG), worth)) for w, n in entries]
            residual = sum(errors) / (size + RESIDUAL_PRIOR) / variance(worth)
    else:
        user = mean([above(audience[n], AMONG) for n in range(reach) if classes[length - reach + n]])
    context = mean([above([3.0 * pair, 3.0 * pair + 1, 3.0 * pair + 2], AMONG) for pair in pairs])
    expected_R = [*map(math.log, AMONG), *user, *context, residual, math.log1p(given) / 4]
    assert found[0].tolist() == pytest.approx(expected_R, abs=1e-5)


@pytest.mark.parametrize("tell", [True, False])
def test_what_is_known_of_an_item(tell: bool) -> None:
    counts, worth = [[2.0, 0.0, 5.0], [0.0, 0.0, 0.0]], WORTH[tell]
    found = rates(tell).item(torch.tensor(counts))
    for row, own in zip(found.tolist(), counts, strict=True):
        deviation = (worth_of(smooth(own, AMONG), worth) - worth_of(AMONG, worth)) / variance(worth)
        assert row == pytest.approx([*above(own, AMONG), deviation, math.log1p(sum(own)) / 4], abs=1e-6)


@pytest.mark.parametrize("tell", [True, False])
def test_untrained_the_weights_say_what_counting_says(tell: bool) -> None:
    made = rates(tell)
    known = torch.randn(1, made.user_width + made.item_width)
    among, user, context, residual, _, item, deviation, _ = made.split(known)
    share = 0.5 if tell else 1.0
    expected = among + share * user + context + share * item
    if tell:
        place = torch.tensor(WORTH[True]) - sum(WORTH[True]) / 3
        expected = expected + TILT * place * (residual + deviation)
    torch.testing.assert_close(made.weigh(known), expected)


def test_counting_fades_and_takes_back() -> None:
    made = Rates(2, 4, [0.0, 1.0], False)
    made.count(torch.tensor([0, 1, 0]), torch.tensor([[2, -1], [2, 3], [-1, -1]]))
    made.count(torch.tensor([0]), torch.tensor([[3, -1]]))
    assert made.class_counts.tolist() == pytest.approx([2 * DECAY + 1, DECAY])
    assert made.context_counts.flatten().tolist() == pytest.approx([0, 0, 0, 0, DECAY, DECAY, 1, DECAY])
    # The first of the four feedback is taken back, at the age that it has.
    made.retract(0, torch.tensor([1]), torch.tensor([[2, -1]]))
    assert made.class_counts.tolist() == pytest.approx([DECAY + 1, DECAY])
    assert made.context_counts[2].tolist() == pytest.approx([0, DECAY], abs=1e-6)
    made.retract(0, torch.tensor([0, 0, 0]), torch.tensor([[2, 3]] * 3))
    assert made.class_counts[0] == 0
    assert not made.context_counts[:, 0].any()


def test_a_worth_that_never_differs_divides_by_no_zero() -> None:
    made = Rates(2, 4, [1.0, 1.0], True)
    assert torch.isfinite(made.item(torch.tensor([3.0, 4.0]))).all()
    assert LEAST_VARIANCE > 0
