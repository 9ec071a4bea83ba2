"""Served: one version of the weights with what is computed from it once, and the answers that it gives.

Shapes as in recsys.network; K candidates kept for the final order.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.catalog import CatalogMirror, CategoryFilter
from recsys.encoding import RowHistory, encode_contexts, encode_histories, row_history, to_histories, to_tensor
from recsys.item_table import PADDING_ROW, TRANSITION_REACH
from recsys.network import LIFTS
from recsys.scorer.encoder import Encoder
from recsys.scorer.items import Items
from recsys.scorer.query import Query, ScoredItem, ScoreParts
from recsys.scorer.ranking import Ranking
from recsys.scorer.retrieval import HIDDEN, Hidden, Known, Retrieval
from recsys.scorer.search import Search
from recsys.settings import Settings
from recsys.v1.recommender_pb2 import SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING
from recsys.weights.replica import Replica

# Retrieved by score, then put in order by expected worth; more when more are asked for.
CANDIDATES = 100
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
    # Their latest entries, as far as items and classes are known.
    recent: Sequence[RowHistory]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Hold of users and K items each the parts of the score and the largest of them."""

    network_BK: Tensor
    standing_BK: Tensor
    transitions_BK: Tensor
    # Values of recsys.v1.Source, and the row of the history item that explains it; 0 where none does.
    sources_BK: Tensor
    because_BK: Tensor


class Served:
    """Answer from one version; the replica must not change meanwhile, and `retrieval` is for one batch at a time."""

    def __init__(
        self, settings: Settings, mirror: CatalogMirror, replica: Replica, items: Items, retrieval: Retrieval | Search
    ) -> None:
        self._settings, self._mirror = settings, mirror
        self._network, self._table, self._items = replica.network, replica.table, items
        self._device = replica.device
        self._vectors_ID, self._standing_IS = items.vectors_ID, items.standing_IS
        self._encoder, self._ranking = Encoder(replica.network), Ranking(replica.network)
        self._worth_C = torch.tensor([c.worth for c in settings.classes], device=self._device)
        self._sources = torch.tensor([SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING], device=self._device)
        self._hidden: dict[CategoryFilter | None, tuple[int, Hidden]] = {}
        self._retrieval = retrieval
        retrieval.install(items, replica.table)

    def recommend(self, queries: Sequence[Query], now_ms: int) -> list[list[ScoredItem]]:
        """Return the best items for each query that names no candidates."""
        users = self._users(queries, now_ms)
        keep = max(CANDIDATES, *(query.count for query in queries))
        hidden = [self._hidden_by(query.filter) for query in queries]
        top_BK, rows_BK, known = self._retrieval.find(
            users.weights_BP, users.states_BD, users.latest_BK, hidden, self._own(queries, users), keep
        )
        keep = rows_BK.shape[1]
        final_BK = top_BK + self._log_worth(self._logits(users, rows_BK))
        # Whoever else asks, a query's candidates are its own: more are kept only for those that want more.
        own_B1 = torch.tensor([[max(CANDIDATES, query.count)] for query in queries], device=self._device)
        beyond_BK = torch.arange(keep, device=self._device) >= own_B1
        final_BK = final_BK.masked_fill(beyond_BK | (top_BK <= HIDDEN / 2), HIDDEN)
        final_BK, order_BK = final_BK.sort(dim=1, descending=True, stable=True)
        most = max(query.count for query in queries)
        final_BK, rows_BK = final_BK[:, :most], rows_BK.gather(1, order_BK)[:, :most]
        pairs = self._pairs(users, rows_BK, known)
        # Synchronises with the GPU: the answer leaves it.
        columns = [tensor.tolist() for tensor in (rows_BK, final_BK, pairs.sources_BK, pairs.because_BK)]
        item_ids = self._table.item_ids
        return [
            [
                ScoredItem(item_ids[row], score, source, item_ids[why] if why else None)
                for row, score, source, why in zip(*each, strict=True)
                if score > HIDDEN / 2
            ][: query.count]
            for query, *each in zip(queries, *columns, strict=True)
        ]

    def score(self, queries: Sequence[Query], now_ms: int) -> list[list[ScoredItem]]:
        """Return the scores of each query's candidates, in its order."""
        users = self._users(queries, now_ms)
        rows = [self._table.look_up(query.candidates or ()) for query in queries]
        most = max(map(len, rows))
        rows_BK = torch.tensor([[*each, *[PADDING_ROW] * (most - len(each))] for each in rows], device=self._device)
        pairs = self._pairs(users, rows_BK, self._retrieval.look_up(users.latest_BK))
        logits_BKC = self._logits(users, rows_BK)
        worth_BK = self._log_worth(logits_BKC)
        parts_BK4 = torch.stack([pairs.network_BK, pairs.standing_BK, pairs.transitions_BK, worth_BK], 2)
        cold_BK = self._table.columns["classes"][rows_BK].sum(2) == 0
        found = (pairs.sources_BK, pairs.because_BK, parts_BK4, cold_BK, logits_BKC.softmax(2))
        # Synchronises with the GPU: the answer leaves it.
        columns = [tensor.tolist() for tensor in found]
        names, item_ids = [c.name for c in self._settings.classes], self._table.item_ids
        return [
            [
                ScoredItem(
                    item_id,
                    sum(parts),
                    source,
                    item_ids[why] if why else None,
                    row != PADDING_ROW,
                    dict(zip(names, probabilities, strict=True)),
                    ScoreParts(*(*parts, parts[0] if cold else 0.0)) if query.parts else None,
                )
                for item_id, row, source, why, parts, cold, probabilities in zip(
                    query.candidates or (), own, *each, strict=False
                )
            ]
            for query, own, *each in zip(queries, rows, *columns, strict=True)
        ]

    def _users(self, queries: Sequence[Query], now_ms: int) -> _Users:
        table, network, settings = self._table, self._network, self._settings
        length = settings.history_length
        rows = [row_history(query.history[-length:], table, settings.class_index) for query in queries]
        histories = to_histories(encode_histories(rows, [now_ms] * len(rows), length), self._device)
        states_BD, weights_BP = self._encoder(self._vectors_ID, histories)
        buckets_BP = to_tensor(encode_contexts([query.context for query in queries], settings), self._device)
        return _Users(
            weights_BP,
            states_BD,
            network.context_vectors(buckets_BP),
            network.user_rates(histories, table, buckets_BP),
            histories.latest_first(TRANSITION_REACH),
            rows,
        )

    def _logits(self, users: _Users, rows_BK: Tensor) -> Tensor:
        items = (self._vectors_ID[rows_BK], self._standing_IS[rows_BK], self._table.column("classes")[rows_BK])
        return self._ranking.logits(users.states_BD, users.context_BC, users.rates_BU, *items)

    def _log_worth(self, logits_BKC: Tensor) -> Tensor:
        """Return the weighted log of the expected worth of feedback on each pair: (B, K)."""
        return self._settings.worth_weight * self._network.log_worth(logits_BKC, self._worth_C)

    def _pairs(self, users: _Users, rows_BK: Tensor, known: Known) -> _Pairs:
        weights_BP, states_BD = users.weights_BP, users.states_BD
        network_B1, standing_BS, lifts_B2 = weights_BP[:, :1], weights_BP[:, 1:-LIFTS], weights_BP[:, -LIFTS:]
        lifts_BK2, because_BK = known.at(rows_BK)
        network_BK = network_B1 * torch.einsum("bd,bkd->bk", states_BD, self._vectors_ID[rows_BK])
        standing_BK = torch.einsum("bs,bks->bk", standing_BS, self._standing_IS[rows_BK])
        transitions_BK = torch.einsum("bt,bkt->bk", lifts_B2, lifts_BK2)
        reasons_BK3 = torch.stack(
            [
                network_BK - network_B1 * (states_BD @ self._items.mean_vector_D)[:, None],
                transitions_BK,
                standing_BK - (standing_BS @ self._items.mean_standing_S)[:, None],
            ],
            2,
        )
        # A part that says nothing is no reason, even where the others are below average: the network without a
        # history, the transition memory for an item that never followed.
        reasons_BK3[:, :, 0].masked_fill_(network_B1 == 0, HIDDEN)
        reasons_BK3[:, :, 1].masked_fill_(lifts_BK2[:, :, 0] == 0, HIDDEN)
        sources_BK = self._sources[reasons_BK3.argmax(2)]
        because_BK = because_BK.masked_fill(sources_BK != SOURCE_TRANSITION, PADDING_ROW)
        return _Pairs(network_BK, standing_BK, transitions_BK, sources_BK, because_BK)

    def _own(self, queries: Sequence[Query], users: _Users) -> list[list[int]]:
        """Return the rows that must not come back to each user."""
        look_up = self._table.look_up
        own: list[list[int]] = []
        for query, recent in zip(queries, users.recent, strict=True):
            own.append(look_up(query.exclude))
            if not query.allow_seen:
                # Most often all of the history has been looked up.
                whole = len(recent.rows) == len(query.history)
                own[-1] += recent.rows if whole else look_up([entry.item_id for entry in query.history])
        return own

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
