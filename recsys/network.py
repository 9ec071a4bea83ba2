"""RecommendationNetwork: history -> user state -> scores over items; (state, item, context) -> feedback class.

Nothing but arithmetic. Shapes: B batch, L history length (oldest first, right-aligned), D dimension, H heads,
I items, S standings, C feedback classes, P context pairs, F mixing features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys import last_place
from recsys.additions import Adapter, Prompt
from recsys.item_table import AUDIENCE_REACH, PADDING_ROW, ItemTable, Transitions
from recsys.rates import Rates
from recsys.settings import Settings
from recsys.standing import STANDINGS, TREND_DECAYS

# Time between a history entry and now, in powers of two of a second: bucket 0 is under a second, 31 is over 34 years.
GAP_BUCKETS = 32
# What the mixing weights may depend on: a constant, log history length, no history, log time since the last entry.
MIXING_CONTEXT = 4
# Parts of the score: the network, the standing of the item, the three looks into the transition memory.
LIFTS = 3
PARTS = 1 + STANDINGS + LIFTS
# Weights of the parts before anything is learned: network, trends at each speed in equal shares, transitions.
INITIAL_NETWORK, INITIAL_TREND, INITIAL_LIFT = 0.5, 0.2, 0.7
# Transition weights are compared on a log scale from here up; below, an item counts as never following.
TRANSITION_FLOOR = 0.1
CONTEXT_WIDTH = 16
# Keeps the logarithm of an expected worth finite.
WORTH_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class Histories:
    """Hold a batch of histories; entries are oldest first and end at column L-1, empty places are row 0."""

    rows_BL: Tensor
    # 1 + index of the feedback class; 0 where empty.
    classes_BL: Tensor
    # Bucket of the time between the entry and now.
    gaps_BL: Tensor

    def __len__(self) -> int:
        return self.rows_BL.shape[0]

    def take(self, index: Tensor) -> Histories:
        """Return the histories at `index`, in its order."""
        return Histories(self.rows_BL[index], self.classes_BL[index], self.gaps_BL[index])

    def latest_first(self, reach: int) -> Tensor:
        """Return the rows of the last `reach` entries, latest first: (B, min(L, reach))."""
        return self.rows_BL[:, -reach:].flip(1)


class _Block(nn.Module):
    """One post-norm transformer block whose input stays a sum of parts that are never added up where avoidable."""

    def __init__(self, dimension: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dimension, dimension)
        self.key = nn.Linear(dimension, dimension, bias=False)
        self.value = nn.Linear(dimension, dimension)
        self.output = nn.Linear(dimension, dimension)
        self.attention_norm = nn.LayerNorm(dimension)
        self.expand = nn.Linear(dimension, 2 * dimension)
        self.contract = nn.Linear(2 * dimension, dimension)
        self.feed_norm = nn.LayerNorm(dimension)
        self.dropout = nn.Dropout(dropout)
        # What settings may add.
        self.adapter: Adapter | None = None
        self.prompt: Prompt | None = None

    def forward(self, x_BLD: Tensor, visible_BLL: Tensor) -> Tensor:
        """Attend from every place to the visible places."""
        batch, length, dimension = x_BLD.shape
        split = (batch, length, self.heads, dimension // self.heads)
        q, k, v = (f(x_BLD).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BLL[:, None])
        if self.prompt is not None:
            # Row by row as at the last place: the prompt is the same for all of them.
            q_RHW = q.transpose(1, 2).reshape(batch * length, *split[2:]) / math.sqrt(split[3])
            prompted_RHW = self._values(self.prompt.mixed(self._before_keys(q_RHW)))
            mixed = mixed + prompted_RHW.view(split).transpose(1, 2)
        return self._finish(x_BLD, mixed.transpose(1, 2).reshape(batch, length, dimension))

    def last(self, last_BD: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute `forward` at the last place alone: (B, D), the same numbers for a small part of the work.

        With a single query per head, q (W_k x) = (W_k^T q) x and the mixed values are W_v times the mixed inputs, so
        that no keys or values are formed. `mix` has the inputs: given the queries (B, H, D) it returns what they mix.
        """
        batch, dimension = last_BD.shape
        width = dimension // self.heads
        q_BHW = self.query(last_BD).view(batch, self.heads, width) / math.sqrt(width)
        q_BHD = self._before_keys(q_BHW)
        mixed_BHD = mix(q_BHD)
        if self.prompt is not None:
            mixed_BHD = mixed_BHD + self.prompt.mixed(q_BHD)
        v_BD = self._values(mixed_BHD).reshape(batch, dimension) + self.value.bias
        return self._finish(last_BD, v_BD)

    def _before_keys(self, q_BHW: Tensor) -> Tensor:
        """Return queries whose products with inputs are those of `q_BHW` with keys."""
        weight: Tensor = self.key.weight
        return torch.einsum("bhw,hwd->bhd", q_BHW, weight.view(self.heads, -1, weight.shape[1]))

    def _values(self, mixed_BHD: Tensor) -> Tensor:
        """Return the values, but for their bias, of mixed inputs."""
        weight: Tensor = self.value.weight
        return torch.einsum("bhd,hwd->bhw", mixed_BHD, weight.view(self.heads, -1, weight.shape[1]))

    def _finish(self, x: Tensor, v: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.output(v)))
        fed: Tensor = self.contract(F.gelu(self.expand(x)))
        if self.adapter is not None:
            fed = self.adapter(fed)
        finished: Tensor = self.feed_norm(x + self.dropout(fed))
        return finished


class _Mix(nn.Linear):
    """Map what is known of the history to the weight of each part of the score."""

    def __init__(self) -> None:
        super().__init__(MIXING_CONTEXT, PARTS)
        # Logarithm of what divides the score where it is read as a probability; the order of items is as it is.
        self.log_temperature = nn.Parameter(torch.zeros(1))


class _Dense:
    """A part of the input with its own vector at every place: (B, L, D)."""

    def __init__(self, x_BLD: Tensor) -> None:
        self.x_BLD = x_BLD

    def products(self, q_BHD: Tensor) -> Tensor:
        return torch.bmm(q_BHD, self.x_BLD.transpose(1, 2))

    def mixed(self, attention_BHL: Tensor) -> Tensor:
        return torch.bmm(attention_BHL, self.x_BLD)


class _Positions:
    """A part of the input that depends on the place alone: (L, D)."""

    def __init__(self, x_LD: Tensor) -> None:
        self.x_LD = x_LD

    def products(self, q_BHD: Tensor) -> Tensor:
        return q_BHD @ self.x_LD.T

    def mixed(self, attention_BHL: Tensor) -> Tensor:
        return attention_BHL @ self.x_LD


class _Looked:
    """A part of the input looked up in a small table (N, D) by an index (B, L)."""

    def __init__(self, table_ND: Tensor, index_BL: Tensor) -> None:
        self.table_ND, self.index_BL = table_ND, index_BL

    def products(self, q_BHD: Tensor) -> Tensor:
        heads = q_BHD.shape[1]
        return (q_BHD @ self.table_ND.T).gather(2, self.index_BL[:, None].expand(-1, heads, -1))

    def mixed(self, attention_BHL: Tensor) -> Tensor:
        batch, heads, _ = attention_BHL.shape
        index_BHL = self.index_BL[:, None].expand(-1, heads, -1)
        sums_BHN = attention_BHL.new_zeros(batch, heads, self.table_ND.shape[0])
        return sums_BHN.scatter_add(2, index_BHL, attention_BHL) @ self.table_ND


_Part = _Dense | _Positions | _Looked


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def _mix(q_BHD: Tensor, parts: list[_Part], filled_BL: Tensor) -> Tensor:
    """Mix inputs by the softmax of their products with the queries; as x is a sum of parts, so are both products."""
    logits_BHL = _total(part.products(q_BHD) for part in parts)
    attention_BHL = logits_BHL.masked_fill(~filled_BL[:, None], -1e9).softmax(-1)
    return _total(part.mixed(attention_BHL) for part in parts)


class RecommendationNetwork(nn.Module):
    """Turn histories into user states, mix the parts of the score, and classify feedback.

    SASRec (Kang and McAuley 2018) with the time since each entry as a second position.
    """

    def __init__(
        self,
        *,
        dimension: int,
        history_length: int,
        blocks: int,
        heads: int,
        classes: int,
        context_buckets: int,
        dropout: float,
        worth: Sequence[float],
        histories_tell: bool = True,
        adapter_width: int = 0,
        prompt_length: int = 0,
    ) -> None:
        """Make a network; `histories_tell` says whether histories hold feedback of every class; 0 adds no part."""
        super().__init__()
        self.position = nn.Parameter(torch.zeros(history_length, dimension))
        self.entry_class = nn.Embedding(classes + 1, dimension)
        self.gap = nn.Embedding(GAP_BUCKETS, dimension)
        self.entry_dropout = dropout
        self.blocks = nn.ModuleList(_Block(dimension, heads, dropout) for _ in range(blocks))
        self.mix = _Mix()
        self.context = nn.Embedding(context_buckets, CONTEXT_WIDTH)
        self.rates = Rates(classes, context_buckets, worth, histories_tell)
        self.rank = nn.Sequential(
            nn.Linear(3 * dimension + CONTEXT_WIDTH + STANDINGS + self.rates.width, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        )
        # What is known by counting comes first: until it has learned, the head says no more than that.
        last = cast("nn.Linear", self.rank[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        for embedding in (self.entry_class, self.gap, self.context):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        with torch.no_grad():
            self.mix.bias[0] = INITIAL_NETWORK
            self.mix.bias[1 : 1 + len(TREND_DECAYS)] = INITIAL_TREND
            self.mix.bias[-LIFTS] = INITIAL_LIFT
        # Last, so that all the rest begins as without them.
        for block in cast("list[_Block]", list(self.blocks)):
            block.adapter = Adapter(dimension, adapter_width) if adapter_width else None
            block.prompt = Prompt(dimension, heads, prompt_length) if prompt_length else None

    def train(self, mode: bool = True) -> RecommendationNetwork:
        """Say whether dropout is at work: nothing else depends on it, and asking every part takes a millisecond."""
        self.training = mode
        for block in cast("list[_Block]", list(self.blocks)):
            block.dropout.training = mode
        return self

    def states(self, vectors_UD: Tensor, index_BL: Tensor, histories: Histories) -> Tensor:
        """Compute user states (B, D) from histories, whose entries have the item vectors at `index_BL`."""
        filled_BL = histories.rows_BL != PADDING_ROW
        if self.training and self.entry_dropout:
            filled_BL = filled_BL & (torch.rand_like(filled_BL, dtype=torch.float32) >= self.entry_dropout)
        position_LD = self.position[-index_BL.shape[1] :]
        last_BD = (
            F.embedding(index_BL[:, -1], vectors_UD)
            + position_LD[-1]
            + self.entry_class(histories.classes_BL[:, -1])
            + self.gap(histories.gaps_BL[:, -1])
        )
        blocks = cast("list[_Block]", list(self.blocks))
        # A trace, which others run, can hold tensors alone.
        if len(blocks) == 1 and vectors_UD.device.type == "cpu" and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            tables = vectors_UD, position_LD, self.entry_class.weight, self.gap.weight
            places = index_BL, histories.classes_BL, histories.gaps_BL
            return blocks[0].last(last_BD, lambda q_BHD: last_place.mix(q_BHD, tables, places, filled_BL))
        vectors_BLD = F.embedding(index_BL, vectors_UD)
        parts: list[_Part] = [
            _Dense(vectors_BLD),
            _Positions(position_LD),
            _Looked(self.entry_class.weight, histories.classes_BL),
            _Looked(self.gap.weight, histories.gaps_BL),
        ]
        if len(blocks) > 1:
            x_BLD = vectors_BLD + position_LD + self.entry_class(histories.classes_BL) + self.gap(histories.gaps_BL)
            length = index_BL.shape[1]
            causal_LL = torch.ones(length, length, dtype=torch.bool, device=x_BLD.device).tril()
            own_LL = torch.eye(length, dtype=torch.bool, device=x_BLD.device)
            visible_BLL = (causal_LL & filled_BL[:, None, :]) | own_LL
            for block in blocks[:-1]:
                x_BLD = block(x_BLD, visible_BLL)
            last_BD, parts = x_BLD[:, -1], [_Dense(x_BLD)]
        return blocks[-1].last(last_BD, lambda q_BHD: _mix(q_BHD, parts, filled_BL))

    def mixing_weights(self, histories: Histories) -> Tensor:
        """Compute the weight of each part of the score from what is known of the history: (B, PARTS)."""
        lengths_B = (histories.rows_BL != PADDING_ROW).sum(1)
        empty_B = lengths_B == 0
        gap_B = histories.gaps_BL[:, -1].masked_fill(empty_B, 0) / GAP_BUCKETS
        context_BF = torch.stack(
            [torch.ones_like(gap_B), torch.log1p(lengths_B.to(gap_B.dtype)) / 4, empty_B.to(gap_B.dtype), gap_B], 1
        )
        weights_BP: Tensor = self.mix(context_BF)
        # Without a history the network and the transition memory have nothing to say.
        silent_BP = torch.zeros_like(weights_BP, dtype=torch.bool)
        silent_BP[:, 0] = empty_B
        silent_BP[:, -LIFTS:] = empty_B[:, None]
        return weights_BP.masked_fill(silent_BP, 0.0)

    def lifts(self, transitions: Transitions, rows: int) -> tuple[Tensor, ...]:
        """Put transition weights on a log scale, log(1 + weight / floor), for every row of the table: (B, I) each."""
        return transitions.lifts(rows, TRANSITION_FLOOR)

    def scores(
        self,
        weights_BP: Tensor,
        states_BD: Tensor,
        vectors_ID: Tensor,
        standing_IS: Tensor,
        lifts_BI: tuple[Tensor, ...],
    ) -> Tensor:
        """Score every item for every user: (B, I), log scale up to a constant per user.

        weights x (state . vector, standing of the item, lifts by the transition memory).
        """
        users_BN = torch.cat([weights_BP[:, :1] * states_BD, weights_BP[:, 1:-LIFTS]], 1)
        dense_BI = users_BN @ torch.cat([vectors_ID, standing_IS], 1).T
        for weight_B, lift_BI in zip(weights_BP[:, -LIFTS:].unbind(1), lifts_BI, strict=True):
            dense_BI = torch.addcmul(dense_BI, weight_B[:, None], lift_BI)
        return dense_BI

    def log_worth(self, class_logits: Tensor, worth_C: Tensor) -> Tensor:
        """Return the log of the expected worth of feedback whose classes have these logits: (...)."""
        return torch.log(class_logits.softmax(-1) @ worth_C + WORTH_FLOOR)

    def class_logits(self, states: Tensor, vectors: Tensor, standing: Tensor, context: Tensor, rates: Tensor) -> Tensor:
        """Compute logits over feedback classes (..., C) for pairs of a state and an item.

        Leading axes must be equal: states and vectors (..., D), standing (..., S), context (..., CONTEXT_WIDTH), rates
        are `user_rates` and `rates.item` side by side.
        """
        logits: Tensor = self.rank(torch.cat([states, vectors, states * vectors, standing, context, rates], -1))
        known: Tensor = self.rates.weigh(rates)
        return logits + known

    def user_rates(
        self, histories: Histories, table: ItemTable, context_BP: Tensor, taken_BC: Tensor | None = None
    ) -> Tensor:
        """Return what counting says of the class whatever the item is: (B, rates.user_width).

        `context_BP` are buckets of context pairs; `taken_BC` is left out of what the items' audiences did.
        """
        rows_BL = histories.rows_BL
        audience_BKC = table.columns["audience"][rows_BL[:, -AUDIENCE_REACH:]]
        if taken_BC is not None:
            audience_BKC = (audience_BKC - taken_BC[:, None]).clamp_min(0)
        counts_BLC = table.columns["classes"][rows_BL]
        return self.rates.user(histories.classes_BL * (rows_BL != PADDING_ROW), counts_BLC, audience_BKC, context_BP)

    def context_vectors(self, buckets_BP: Tensor) -> Tensor:
        """Sum the embeddings of context buckets; -1 is an empty place: (B, CONTEXT_WIDTH)."""
        given_BP = (buckets_BP >= 0).unsqueeze(-1)
        vectors_BC: Tensor = (self.context(buckets_BP.clamp_min(0)) * given_BP).sum(1)
        return vectors_BC


def build_network(settings: Settings) -> RecommendationNetwork:
    """Make the network that the settings describe; its initial weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return RecommendationNetwork(
            dimension=settings.dimension,
            history_length=settings.history_length,
            blocks=settings.blocks,
            heads=settings.heads,
            classes=len(settings.classes),
            context_buckets=settings.context_buckets,
            dropout=settings.dropout,
            worth=[c.worth for c in settings.classes],
            histories_tell=all(c.history for c in settings.classes),
            adapter_width=settings.adapter_width,
            prompt_length=settings.prompt_length,
        )
