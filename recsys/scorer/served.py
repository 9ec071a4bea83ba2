"""Served: one version of the weights with what is computed from it once, and the answers that it gives.

Shapes as in recsys.network; K candidates kept for the final order.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.catalog import CatalogMirror, CategoryFilter
from recsys.encoding import encode_contexts, to_histories, to_tensor
from recsys.item_rows import ItemRows
from recsys.item_table import PADDING_ROW, TRANSITION_REACH, ItemTable
from recsys.network import WORTH_FLOOR, RecommendationNetwork
from recsys.scorer.encoder import Encoder
from recsys.scorer.items import Items
from recsys.scorer.lists import Lists, RankedItems
from recsys.scorer.parts import Floats, Longs, Parts, apart, contested, in_final_order, log_worth
from recsys.scorer.query import Query, Scores
from recsys.scorer.ranking import Ranking
from recsys.scorer.reading import read
from recsys.scorer.retrieval import Found, Hidden, Known, Own, Retrieval
from recsys.scorer.search import Search
from recsys.scorer.user_rates import UserRates
from recsys.settings import Settings
from recsys.store.v1.log_pb2 import History
from recsys.weights.replica import Replica

# Retrieved by score, then put in order by expected worth; more when more are asked for.
CANDIDATES = 100
# So many of them are put in order first, and at least twice as many as are asked for; the others only where they may
# still come among those.
FIRST_LOOK = 32
# What rounding may add to the largest worth there is, on the scale of scores.
WORTH_SLACK = 1e-3
# Filters whose masks are kept.
MASKS_KEPT = 64


@dataclass(frozen=True, slots=True)
class _Users:
    """Hold what the network and the transition memory say of a batch of users."""

    weights_BP: Tensor
    states_BD: Tensor
    context_BC: Tensor
    # What counting says of the class, whatever the item is.
    rates_BU: Tensor
    # The latest rows of their histories, latest first.
    latest_BK: Tensor
    # All rows of their histories.
    seen: Own

    def take(self, index_B: Longs, device: torch.device) -> _Users:
        """Return some of the users, as far as a judgement depends on them."""
        index = torch.from_numpy(index_B).to(device)
        return replace(
            self,
            states_BD=self.states_BD[index],
            context_BC=self.context_BC[index],
            rates_BU=self.rates_BU[index],
        )


class Layers:
    """Hold the network of one version as answers take it, with what is computed from it once."""

    def __init__(self, network: RecommendationNetwork) -> None:
        self.encoder, self.user_rates, self.ranking = Encoder(network), UserRates(network), Ranking(network)

    def install(self, table: ItemTable, items: Items) -> None:
        """Take the items of the version."""
        self.user_rates.install(table)
        self.ranking.install(table, items.standing_IS)


class Served:
    """Answer from one version; the replica must not change meanwhile, and `retrieval` is for one batch at a time."""

    def __init__(
        self,
        settings: Settings,
        mirror: CatalogMirror,
        replica: Replica,
        items: Items,
        retrieval: Retrieval | Search,
        layers: Layers | None = None,
    ) -> None:
        """Take a version; `layers` are those of the replica's network, where somebody made them before."""
        self._settings, self._mirror = settings, mirror
        self._classes = ItemRows()
        self._classes.extend([each.name for each in settings.classes])
        self._table, self._device = replica.table, replica.device
        self._vectors_ID, self._standing_IS = items.vectors_ID, items.standing_IS
        self._means = items.mean_vector_D.cpu().numpy(), items.mean_standing_S.cpu().numpy()
        self._layers = layers or Layers(replica.network)
        self._layers.install(replica.table, items)
        self._worth_C = np.array([c.worth for c in settings.classes], np.float32)
        self._most_worth = settings.worth_weight * float(np.log(self._worth_C.max() + WORTH_FLOOR)) + WORTH_SLACK
        self._hidden: dict[CategoryFilter | None, tuple[int, Hidden]] = {}
        self._retrieval = retrieval
        retrieval.install(items, replica.table)

    def recommend(self, queries: Sequence[Query], now_ms: int) -> list[RankedItems]:
        """Return the best items for each query that names no candidates."""
        users = self._users(queries, now_ms)
        keep = max(CANDIDATES, *(query.count for query in queries))
        hidden = [self._hidden_by(query.filter) for query in queries]
        found = self._retrieval.find(
            users.weights_BP, users.states_BD, users.latest_BK, hidden, self._own(queries, users.seen), keep
        )
        wanted_B = np.array([query.count for query in queries])
        final_BM, chosen_BM = self._order(users, found, wanted_B)
        parts = self._apart(users, torch.from_numpy(chosen_BM).to(self._device), found.known)
        lists = Lists.of(self._table.index, chosen_BM, final_BM, parts.sources_BK, parts.because_BK, wanted_B)
        return [RankedItems(lists, user) for user in range(len(queries))]

    def score(self, queries: Sequence[Query], now_ms: int) -> list[Scores]:
        """Return the scores of each query's candidates, in its order."""
        users = self._users(queries, now_ms)
        candidates = [query.candidates or () for query in queries]
        rows_BK = np.full((len(queries), max(map(len, candidates))), PADDING_ROW, np.int64)
        for rows_K, each in zip(rows_BK, candidates, strict=True):
            rows_K[: len(each)] = self._table.look_up(each)
        on_device_BK = torch.from_numpy(rows_BK).to(self._device)
        found = self._apart(users, on_device_BK, self._retrieval.look_up(users.latest_BK))
        worth_BK, logits_BKC = self._judge(users, on_device_BK)
        probabilities_BKC = logits_BKC.double().softmax(2).numpy()
        # Without feedback on an item its vector is what its categories gave.
        cold_BK = _host(self._table.column("classes")[on_device_BK].sum(2) == 0)
        parts = (found.network_BK, found.standing_BK, found.transitions_BK, worth_BK, found.network_BK * cold_BK)
        parts_BKP = np.stack(parts, 2).astype(np.float64)
        names = [each.name for each in self._settings.classes]
        columns = (candidates, rows_BK != PADDING_ROW, probabilities_BKC, parts_BKP)
        return [
            Scores(item_ids, known_K[: len(item_ids)], names, shares_KC[: len(item_ids)], parts_KP[: len(item_ids)])
            for item_ids, known_K, shares_KC, parts_KP in zip(*columns, strict=True)
        ]

    def _users(self, queries: Sequence[Query], now_ms: int) -> _Users:
        settings = self._settings
        stored = [_stored(query) for query in queries]
        found = read(stored, self._table.index, self._classes.index, now_ms, settings.history_length)
        histories = to_histories((found.rows_BL, found.classes_BL, found.gaps_BL), self._device)
        states_BD, weights_BP = self._layers.encoder(self._vectors_ID, histories)
        buckets_BP = to_tensor(encode_contexts([query.context for query in queries], settings), self._device)
        context_BC, rates_BU = self._layers.user_rates(histories, buckets_BP)
        latest_BK = histories.latest_first(TRANSITION_REACH)
        return _Users(weights_BP, states_BD, context_BC, rates_BU, latest_BK, Own(found.seen_H, found.ends_B))

    def _order(self, users: _Users, found: Found, wanted_B: Longs) -> tuple[Floats, Longs]:
        """Put the candidates in order by score and worth; return the best with their rows, as many as any user wants.

        The order is that of all candidates, though most of them are not judged where scores differ by more than worth.
        """
        # Synchronises with the GPU: what is chosen leaves it.
        scores_BK, own_B = _host(found.scores_BK), np.maximum(CANDIDATES, wanted_B)
        most = int(wanted_B.max())
        first = min(scores_BK.shape[1], max(FIRST_LOOK, 2 * most))
        worth_BK = np.full_like(scores_BK, -np.inf)
        worth_BK[:, :first], _ = self._judge(users, found.rows_BK[:, :first])
        still_B = contested(scores_BK, worth_BK[:, :first].copy(), own_B, wanted_B, self._most_worth)
        if len(still_B):
            rows_BK = found.rows_BK[torch.from_numpy(still_B).to(self._device)]
            worth_BK[still_B, first:], _ = self._judge(users.take(still_B, self._device), rows_BK[:, first:])
        ordered: tuple[Floats, Longs] = in_final_order(scores_BK, worth_BK, _host(found.rows_BK), own_B, most)
        return ordered

    def _judge(self, users: _Users, rows_BK: Tensor) -> tuple[Floats, Tensor]:
        """Return the weighted log of the expected worth of feedback on each pair (B, K), and the classes' logits."""
        logits_BKC = self._layers.ranking.logits(users.states_BD, users.context_BC, users.rates_BU, rows_BK).cpu()
        return log_worth(logits_BKC.numpy(), self._worth_C, self._settings.worth_weight), logits_BKC

    def _apart(self, users: _Users, rows_BK: Tensor, known: Known) -> Parts:
        lifts_BK3, because_BK = known.at(rows_BK)
        items, places_BK = (self._vectors_ID, self._standing_IS), rows_BK
        if self._device.type != "cpu":
            # The few rows that are looked at, rather than all, leave the GPU.
            flat = rows_BK.view(-1)
            items = self._vectors_ID[flat], self._standing_IS[flat]
            places_BK = torch.arange(len(flat)).view(rows_BK.shape)
        parts: Parts = apart(
            *map(_host, (users.weights_BP, users.states_BD, *items, places_BK, lifts_BK3, because_BK)), *self._means
        )
        return parts

    def _own(self, queries: Sequence[Query], seen: Own) -> Own:
        """Return the rows that must not come back to each user."""
        if not any(query.allow_seen or query.exclude for query in queries):
            return seen
        each = np.split(seen.rows_H, seen.ends_B[:-1])
        return Own.of(
            [
                self._table.look_up(query.exclude).tolist() + ([] if query.allow_seen else rows.tolist())
                for query, rows in zip(queries, each, strict=True)
            ]
        )

    def _hidden_by(self, categories: CategoryFilter | None) -> Hidden:
        """Return which rows a filter and the deletions hide, kept until the catalogue changes."""
        revision = self._mirror.revision
        found = self._hidden.get(categories)
        if found is not None and found[0] == revision:
            return found[1]
        table = self._table
        only: Set[str] | None = None
        never: Set[str] = self._mirror.deleted
        if categories is not None:
            only, banned = self._mirror.selection(categories)
            never = never | banned
        mask = np.full(table.rows, only is not None)
        if only is not None:
            mask[table.look_up(only)] = False
        mask[table.look_up(never)] = True
        mask[PADDING_ROW] = True
        mask[table.free_rows] = True
        mask_I = torch.from_numpy(mask).to(self._device)
        hidden = Hidden(mask_I, mask_I.nonzero()[:, 0])
        if len(self._hidden) >= MASKS_KEPT:
            self._hidden.clear()
        self._hidden[categories] = (revision, hidden)
        return hidden


def _stored(query: Query) -> bytes:
    history = query.history
    return history if isinstance(history, bytes) else History(history=history).SerializeToString()


def _host(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().numpy()
