"""The network: the short way gives the long way's numbers, padding says nothing, and scores are what a loop gives."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recsys.item_table import AUDIENCE_REACH, ItemTable, Transitions
from recsys.network import (
    CONTEXT_WIDTH,
    GAP_BUCKETS,
    LIFTS,
    MIXING_CONTEXT,
    PARTS,
    TRANSITION_FLOOR,
    WORTH_FLOOR,
    Histories,
    RecommendationNetwork,
    build_network,
)
from recsys.settings import Settings, load
from recsys.standing import STANDINGS

LENGTH, DIMENSION, ITEMS = 7, 12, 20


def _settings(**values: Any) -> Settings:
    small = {"dimension": DIMENSION, "heads": 3, "history_length": LENGTH, "context_buckets": 16}
    return load({**small, **values}, environment={})


def _network(blocks: int = 1, seed: int = 3) -> RecommendationNetwork:
    network = build_network(_settings(blocks=blocks, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    # Far from their small initial values, so that every part of the input counts.
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def _histories(lengths: list[int], length: int = LENGTH, seed: int = 0) -> Histories:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), length)
    filled = torch.arange(length) >= length - torch.tensor(lengths)[:, None]
    rows = torch.randint(1, ITEMS, shape, generator=generator) * filled
    classes = torch.randint(1, 5, shape, generator=generator) * filled
    return Histories(rows, classes, torch.randint(0, GAP_BUCKETS, shape, generator=generator) * filled)


def _vectors(seed: int = 1) -> torch.Tensor:
    return torch.randn(ITEMS, DIMENSION, generator=torch.Generator().manual_seed(seed))


def _states(network: RecommendationNetwork, histories: Histories, table: torch.Tensor) -> torch.Tensor:
    return network.states(table, histories.rows_BL, histories)


def _attended(network: RecommendationNetwork, histories: Histories, table: torch.Tensor, user: int) -> np.ndarray:
    """One user's state in plain numpy: every block in full, place by place, over the filled places alone."""
    weights = {name: value.detach().double().numpy() for name, value in network.state_dict().items()}
    places = histories.rows_BL[user].nonzero().flatten().numpy()
    length = histories.rows_BL.shape[1]
    position = weights["position"][len(weights["position"]) - length :]
    x = table.double().numpy()[histories.rows_BL[user, places]] + position[places]
    x += weights["entry_class.weight"][histories.classes_BL[user, places]]
    x += weights["gap.weight"][histories.gaps_BL[user, places]]
    for b, block in enumerate(network.blocks):
        w = {k.removeprefix(f"blocks.{b}."): v for k, v in weights.items() if k.startswith(f"blocks.{b}.")}
        heads = block.heads
        width = DIMENSION // heads
        q = x @ w["query.weight"].T + w["query.bias"]
        k = x @ w["key.weight"].T
        v = x @ w["value.weight"].T + w["value.bias"]
        out = np.zeros_like(x)
        for i in range(len(x)):
            for h in range(heads):
                of = slice(h * width, (h + 1) * width)
                logits = k[: i + 1, of] @ q[i, of] / math.sqrt(width)
                attention = np.exp(logits - logits.max())
                out[i, of] = attention / attention.sum() @ v[: i + 1, of]
        x = _norm(x + out @ w["output.weight"].T + w["output.bias"], w, "attention_norm")
        hidden = x @ w["expand.weight"].T + w["expand.bias"]
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = _norm(x + hidden @ w["contract.weight"].T + w["contract.bias"], w, "feed_norm")
    return x[-1]


def _norm(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_states_are_those_of_full_attention_by_hand(blocks: int) -> None:
    network, table = _network(blocks), _vectors()
    histories = _histories([1, 2, 4, LENGTH])
    states = _states(network, histories, table).detach()
    for user in range(len(histories)):
        np.testing.assert_allclose(states[user], _attended(network, histories, table, user), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_last_place_alone_equals_every_place(blocks: int) -> None:
    network, table = _network(blocks), _vectors()
    histories = _histories([1, 3, LENGTH, LENGTH])
    filled = histories.rows_BL != 0
    x = table[histories.rows_BL] + network.position + network.entry_class(histories.classes_BL)
    x = x + network.gap(histories.gaps_BL)
    visible = (torch.ones(LENGTH, LENGTH).tril().bool() & filled[:, None, :]) | torch.eye(LENGTH).bool()
    for block in network.blocks:
        x = block(x, visible)
    torch.testing.assert_close(_states(network, histories, table), x[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_saved_trace_gives_the_same_states_of_other_histories(blocks: int) -> None:
    network, table = _network(blocks), _vectors()

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, rows: torch.Tensor, classes: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
            return self.network.states(table, rows, Histories(rows, classes, gaps))

    def given(histories: Histories) -> tuple[torch.Tensor, ...]:
        return histories.rows_BL, histories.classes_BL, histories.gaps_BL

    with torch.no_grad():
        saved = io.BytesIO()
        torch.jit.save(torch.jit.trace(Traced(), given(_histories([1, LENGTH]))), saved)
        traced = torch.jit.load(io.BytesIO(saved.getvalue()))
        others = _histories([2, 3, 4, LENGTH])
        torch.testing.assert_close(traced(*given(others)), _states(network, others, table), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_padding_has_no_influence(blocks: int) -> None:
    network, table = _network(blocks), _vectors()
    histories = _histories([1, 3, LENGTH - 1])
    clean = _states(network, histories, table)
    table[0] = 1e4
    assert torch.equal(_states(network, histories, table), clean)
    shorter = Histories(*(t[:, -4:] for t in (histories.rows_BL, histories.classes_BL, histories.gaps_BL)))
    torch.testing.assert_close(_states(network, shorter, table)[:2], clean[:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2])
def test_every_part_of_an_entry_counts(blocks: int) -> None:
    network, table = _network(blocks), _vectors()
    base = Histories(torch.tensor([[0] * 4 + [3, 4, 5]]), torch.tensor([[0] * 4 + [1, 2, 3]]), torch.zeros(1, 7).long())
    states = [_states(network, base, table)]
    for place in (4, 5, 6):
        for name in ("rows_BL", "classes_BL", "gaps_BL"):
            changed = {f: getattr(base, f).clone() for f in ("rows_BL", "classes_BL", "gaps_BL")}
            changed[name][0, place] += 1
            states.append(_states(network, Histories(**changed), table))
    order = Histories(*(t.clone() for t in (base.rows_BL, base.classes_BL, base.gaps_BL)))
    order.rows_BL[0, 4:] = torch.tensor([4, 3, 5])
    states.append(_states(network, order, table))
    found = torch.cat(states).detach()
    distances = torch.cdist(found, found) + torch.eye(len(states))
    assert float(distances.min()) > 1e-3


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_empty_history_is_finite(blocks: int) -> None:
    network = _network(blocks)
    table = _vectors()
    table[0] = 0.0
    assert torch.isfinite(_states(network, _histories([0, 2]), table)).all()


def test_mixing_weights() -> None:
    network = _network()
    histories = _histories([0, 1, LENGTH])
    weights = network.mixing_weights(histories).detach()
    assert weights.shape == (3, 1 + STANDINGS + LIFTS)
    # Without a history only the standing of the items has a say.
    assert (weights[0] != 0).tolist() == [False, *[True] * STANDINGS, *[False] * LIFTS]
    for user, length in enumerate((0, 1, LENGTH)):
        gap = float(histories.gaps_BL[user, -1]) if length else 0.0
        context = torch.tensor([1.0, math.log1p(length) / 4, float(length == 0), gap / GAP_BUCKETS])
        expected = (network.mix.weight @ context + network.mix.bias).detach()
        said = slice(None) if length else slice(1, -LIFTS)
        torch.testing.assert_close(weights[user, said], expected[said], atol=1e-5, rtol=1e-5)
    assert context.shape == (MIXING_CONTEXT,)
    # What speaks for an item may, in some context, speak against it.
    assert (weights < 0).any()


def test_mixing_weights_before_anything_is_learned() -> None:
    fresh = build_network(_settings()).mixing_weights(_histories([1, 0]))
    # Network; positive trends, trends of all feedback, total, age; all looks at what follows.
    trends, others = [0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(
        fresh, torch.tensor([[0.5, *trends, *others, 0.7, 0.0, 0.0], [0.0, *trends, *others, 0, 0, 0]])
    )


def test_scores_equal_a_loop() -> None:
    network, table = _network(), _vectors()
    random = np.random.default_rng(0)
    users = 4
    weights = torch.from_numpy(random.normal(size=(users, PARTS))).float()
    states = torch.from_numpy(random.normal(size=(users, DIMENSION))).float()
    standing = torch.from_numpy(random.normal(size=(ITEMS, STANDINGS))).float()
    lifts = tuple(torch.from_numpy(random.random((users, ITEMS))).float() for _ in range(LIFTS))
    found = network.scores(weights, states, table, standing, lifts)
    for u in range(users):
        for i in range(ITEMS):
            parts = [
                sum(float(states[u, d]) * float(table[i, d]) for d in range(DIMENSION)),
                *(float(standing[i, s]) for s in range(STANDINGS)),
                *(float(lift[u, i]) for lift in lifts),
            ]
            expected = sum(float(w) * part for w, part in zip(weights[u], parts, strict=True))
            assert float(found[u, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_lifts_are_relative_to_the_floor() -> None:
    rows = torch.tensor([[2, 2, 0]])
    looks = torch.tensor([[[0.01, 0.02, 0.0]], [[0.04, 0, 0]], [[0.002, 0.004, 0]]])
    transitions = Transitions(torch.tensor([[1]]), rows, *looks)
    for found, total in zip(_network().lifts(transitions, 4), (0.03, 0.04, 0.006), strict=True):
        assert found.tolist() == [[0.0, 0.0, pytest.approx(math.log(1 + total / TRANSITION_FLOOR), rel=1e-6), 0.0]]


def test_log_worth_by_hand() -> None:
    logits = torch.tensor([[math.log(1.0), math.log(3.0)], [0.0, -200.0]])
    found = _network().log_worth(logits, torch.tensor([0.0, 4.0]))
    assert found.tolist() == [pytest.approx(math.log(3 + WORTH_FLOOR)), pytest.approx(math.log(WORTH_FLOOR))]


def test_the_class_head_begins_with_what_counting_says() -> None:
    network = build_network(_settings())
    widths = (DIMENSION, DIMENSION, STANDINGS, CONTEXT_WIDTH, network.rates.width)
    others = [torch.randn(2, width) for width in widths]
    torch.testing.assert_close(network.class_logits(*others), network.rates.weigh(others[-1]))


def test_user_rates_are_of_the_entries_and_of_the_last_of_them_what_their_audiences_did() -> None:
    network = _network()
    table = ItemTable(DIMENSION, 4, classes=4)
    table.allocate(f"item-{n}" for n in range(14))
    for name in ("classes", "audience"):
        column = table.columns[name][1:15]
        column.copy_(torch.randint(0, 9, column.shape))
    rows, classes = torch.tensor([[0, 0, *range(1, 13)]]), torch.tensor([[0, 0, *[2] * 12]])
    context = torch.tensor([[3, -1]])
    histories = Histories(rows, classes, torch.zeros_like(rows))
    audience = table.columns["audience"][rows[:, -AUDIENCE_REACH:]]
    counts = table.columns["classes"][rows]
    expected = network.rates.user(classes, counts, audience, context)
    torch.testing.assert_close(network.user_rates(histories, table, context), expected)
    taken = torch.tensor([[1.0, 0, 0, 20]])
    expected = network.rates.user(classes, counts, (audience - taken).clamp_min(0), context)
    torch.testing.assert_close(network.user_rates(histories, table, context, taken), expected)


@pytest.mark.parametrize("leading", [(), (5,), (5, 6)])
def test_class_logits_for_any_leading_axes(leading: tuple[int, ...]) -> None:
    network = _network()
    generator = torch.Generator().manual_seed(0)
    widths = (DIMENSION, DIMENSION, STANDINGS, CONTEXT_WIDTH, network.rates.width)
    inputs = [torch.randn(*leading, width, generator=generator) for width in widths]
    found = network.class_logits(*inputs)
    assert found.shape == (*leading, 4)
    one = network.class_logits(*(x.reshape(-1, x.shape[-1])[-1] for x in inputs))
    torch.testing.assert_close(found.reshape(-1, 4)[-1], one, atol=1e-5, rtol=1e-5)


def test_context_vectors_sum_what_is_given() -> None:
    network = _network()
    found = network.context_vectors(torch.tensor([[3, -1, 5], [-1, -1, -1], [0, 3, 3]])).detach()
    weight = network.context.weight.detach()
    torch.testing.assert_close(found[0], weight[3] + weight[5])
    assert not found[1].any()
    torch.testing.assert_close(found[2], weight[0] + 2 * weight[3])


@pytest.mark.parametrize("blocks", [1, 2])
def test_gradients_are_finite_and_reach_everything(blocks: int) -> None:
    network = _network(blocks).train()
    table = _vectors().requires_grad_()
    # An empty history among them: its gradient must not spoil the others'.
    histories = _histories([0, 2, LENGTH])
    torch.manual_seed(0)
    states = _states(network, histories, table)
    standing, lifts = torch.randn(ITEMS, STANDINGS), tuple(torch.rand(3, ITEMS) for _ in range(LIFTS))
    scores = network.scores(network.mixing_weights(histories), states, table, standing, lifts)
    context = network.context_vectors(torch.tensor([[1, -1]] * 3))
    table_of_items = ItemTable(DIMENSION, 4, classes=4)
    user = network.user_rates(histories, table_of_items, torch.tensor([[1, -1]] * 3))
    rates = torch.cat([user, network.rates.item(torch.tensor([[0.0, 3, 1, 0]] * 3))], 1)
    logits = network.class_logits(states, table[[4, 5, 6]], standing[[4, 5, 6]], context, rates)
    loss = F.cross_entropy(scores, torch.tensor([4, 5, 6])) + F.cross_entropy(logits, torch.tensor([0, 1, 2]))
    torch.autograd.backward(loss)
    # The temperature is no part of the score.
    assert network.mix.log_temperature.grad is None
    parameters = {name: p for name, p in network.named_parameters() if name != "mix.log_temperature"}
    for name, parameter in {**parameters, "table": table}.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


def test_a_built_network_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = build_network(_settings(seed=7)).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = build_network(_settings(seed=7, batch_size=3)).state_dict()
    other = build_network(_settings(seed=8)).state_dict()
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["position"], other["position"])
    assert not torch.equal(one["blocks.0.query.weight"], other["blocks.0.query.weight"])


def test_latest_first() -> None:
    histories = Histories(torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 4).long(), torch.zeros(1, 4).long())
    assert histories.latest_first(3).tolist() == [[3, 2, 1]]
    assert histories.latest_first(9).tolist() == [[3, 2, 1, 0]]
