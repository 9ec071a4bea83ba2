"""Scorer: recommend and score against one whole version of the weights.

Shapes as in recsys.network; K candidates kept for the final order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.catalog import CatalogMirror, CategoryFilter
from recsys.encoding import encode_contexts, encode_histories, row_history, to_histories, to_tensor
from recsys.errors import NotReady
from recsys.item_table import PADDING_ROW, TRANSITION_REACH, Transitions
from recsys.network import RecommendationNetwork
from recsys.scorer.query import Answer, Query, ScoredItem, Status
from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.v1.recommender_pb2 import SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING
from recsys.weights.payload import WeightPayload
from recsys.weights.replica import Replica

# Retrieved by score, then put in order by expected worth; more when more are asked for.
CANDIDATES = 100
# Below any real score; marks items that must not come back.
HIDDEN = -1e9
# Batch sizes scored once before the first request is let in.
WARM_UP_SIZES = (1, 8, 32)
# Filters whose masks are kept.
MASKS_KEPT = 64


@dataclass(frozen=True, slots=True)
class _Scores:
    """A batch's scores with what explains them."""

    scores_BI: Tensor
    weights_BP: Tensor
    states_BD: Tensor
    context_BC: Tensor
    transitions: Transitions
    lift_BI: Tensor


class Scorer:
    """Answer queries from the newest version given; safe to call from any threads.

    Versions are put in place between batches, under the same lock that a batch holds.
    """

    def __init__(self, settings: Settings, mirror: CatalogMirror, device: torch.device) -> None:
        self._settings = settings
        self._mirror = mirror
        self.device = device
        self._lock = threading.Lock()
        self._replica: Replica | None = None
        self._status = Status()
        self._worth_C = torch.tensor([c.worth for c in settings.classes], device=device)
        self._masks: dict[CategoryFilter | None, tuple[tuple[int, int], Tensor]] = {}
        # Called with a version after the first answer that it gave.
        self.on_first_answer: Callable[[int], None] = lambda version: None
        self._unanswered = False

    @property
    def status(self) -> Status:
        """Return what is being served."""
        return self._status

    @property
    def version(self) -> int:
        """Return the version being served; 0 before the first."""
        return self._status.version

    def load(self, record: VersionRecord, payload: WeightPayload, applied_ms: int) -> None:
        """Take a whole version in place of whatever is held; the one before answers until then.

        Raises:
            CorruptWeights: when the payload does not fit the settings; nothing was changed then.
        """
        self.take(record, self.replica_of(payload), applied_ms)

    def replica_of(self, payload: WeightPayload) -> Replica:
        """Make a replica of a whole version, to be moved further by its caller and then taken.

        Raises:
            CorruptWeights: when the payload does not fit the settings.
        """
        replica = Replica(self._settings, self.device)
        replica.apply(payload)
        replica.network.eval()
        return replica

    def take(self, record: VersionRecord, replica: Replica, applied_ms: int) -> None:
        """Take a replica of `record`'s version in place of whatever is held; the one before answers until then."""
        with self._lock:
            self._replica = replica
            self._install(record, applied_ms)

    def apply(self, record: VersionRecord, payload: WeightPayload, applied_ms: int) -> None:
        """Move from the version held to the next one.

        Raises:
            CorruptWeights: when the payload does not fit; nothing was changed then.
        """
        with self._lock:
            assert self._replica is not None
            self._replica.apply(payload)
            self._install(record, applied_ms)

    def _install(self, record: VersionRecord, applied_ms: int) -> None:
        assert self._replica is not None
        self._trend_IS = self._replica.table.log_trend()
        self._masks.clear()
        self._unanswered = True
        self._status = Status(
            record.version, record.committed_ms, applied_ms, len(self._replica.table), record.feedback_learned
        )

    def warm_up(self) -> None:
        """Score made-up batches, so that the first real request does not pay for lazy initialisation."""
        for size in WARM_UP_SIZES:
            self._answer([Query(history=())] * size, _now_ms())

    def answer(self, queries: Sequence[Query], now_ms: int | None = None) -> list[Answer]:
        """Answer a batch; queries for recommendations and for candidates may be mixed.

        `now_ms` is the time of the requests, milliseconds since 1970; default the clock.

        Raises:
            NotReady: before the first version.
        """
        answers = self._answer(queries, _now_ms() if now_ms is None else now_ms)
        if answers:
            version = answers[0].version
            with self._lock:
                first, self._unanswered = self._unanswered, False
            if first:
                self.on_first_answer(version)
        return answers

    @torch.inference_mode()
    def _answer(self, queries: Sequence[Query], now_ms: int) -> list[Answer]:
        with self._lock:
            if self._replica is None:
                raise NotReady("no weights are loaded yet; the trainer has to publish a first version")
            answers: list[Answer | None] = [None] * len(queries)
            scored = self._score(self._replica, queries, now_ms)
            asked = [i for i, query in enumerate(queries) if query.candidates is None]
            if asked:
                for i, items in zip(asked, self._recommend(self._replica, queries, asked, scored), strict=True):
                    answers[i] = Answer(self.version, items)
            for i, query in enumerate(queries):
                if query.candidates is not None:
                    items = self._score_candidates(self._replica, query.candidates, i, scored)
                    answers[i] = Answer(self.version, items)
        return [answer for answer in answers if answer is not None]

    def _score(self, replica: Replica, queries: Sequence[Query], now_ms: int) -> _Scores:
        table, network, settings = replica.table, replica.network, self._settings
        recent = [query.history[-settings.history_length :] for query in queries]
        rows = [row_history(history, table, settings.class_index) for history in recent]
        histories = to_histories(encode_histories(rows, [now_ms] * len(rows), settings.history_length), self.device)
        vectors_ID = table.column("vector")
        rows_BL = histories.rows_BL
        states_BD = network.states(vectors_ID[rows_BL], vectors_ID[rows_BL[:, -1]], histories)
        weights_BP = network.mixing_weights(histories)
        transitions = table.transitions(histories.latest_first(TRANSITION_REACH))
        lift_BI = network.lift(transitions, table.rows)
        scores_BI = network.scores(weights_BP, states_BD, vectors_ID, self._trend_IS, lift_BI)
        buckets_BP = to_tensor(encode_contexts([query.context for query in queries], settings), self.device)
        return _Scores(scores_BI, weights_BP, states_BD, network.context_vectors(buckets_BP), transitions, lift_BI)

    def _recommend(
        self, replica: Replica, queries: Sequence[Query], asked: Sequence[int], scored: _Scores
    ) -> list[list[ScoredItem]]:
        table = replica.table
        index_B = torch.tensor(asked, device=self.device)
        scores_BI = scored.scores_BI[index_B]
        for place, i in enumerate(asked):
            scores_BI[place].masked_fill_(self._hidden(replica, queries[i]), HIDDEN)
        keep = min(max(CANDIDATES, *(queries[i].count for i in asked)), table.rows)
        top_BK, rows_BK = scores_BI.topk(keep, dim=1)
        final_BK = top_BK + self._log_worth(replica.network, rows_BK, index_B, scored, table.column("vector"))
        # Whoever else asks, a query's candidates are its own: more are kept only for those that want more.
        own_B1 = torch.tensor([[max(CANDIDATES, queries[i].count)] for i in asked], device=self.device)
        beyond_BK = torch.arange(keep, device=self.device) >= own_B1
        final_BK = final_BK.masked_fill(beyond_BK | (top_BK <= HIDDEN / 2), HIDDEN)
        final_BK, order_BK = final_BK.sort(dim=1, descending=True, stable=True)
        most = max(queries[i].count for i in asked)
        final_BK, rows_BK = final_BK[:, :most], rows_BK.gather(1, order_BK)[:, :most]
        sources_BK, because_BK = self._explain(replica, rows_BK, index_B, scored)
        # Synchronises with the GPU: the answer leaves it.
        columns = zip(rows_BK.tolist(), final_BK.tolist(), sources_BK.tolist(), because_BK.tolist(), strict=True)
        answers = []
        for i, (rows, final, sources, because) in zip(asked, columns, strict=True):
            answers.append(
                [
                    ScoredItem(table.item_ids[row], score, source, table.item_ids[why] if why else None)
                    for row, score, source, why in zip(rows, final, sources, because, strict=True)
                    if score > HIDDEN / 2
                ][: queries[i].count]
            )
        return answers

    def _log_worth(
        self, network: RecommendationNetwork, rows_BK: Tensor, index_B: Tensor, scored: _Scores, vectors_ID: Tensor
    ) -> Tensor:
        """Return the weighted log of the expected worth of feedback on each pair: (B, K)."""
        logits_BKC = self._class_logits(network, rows_BK, index_B, scored, vectors_ID)
        return self._settings.worth_weight * network.log_worth(logits_BKC, self._worth_C)

    def _class_logits(
        self, network: RecommendationNetwork, rows_BK: Tensor, index_B: Tensor, scored: _Scores, vectors_ID: Tensor
    ) -> Tensor:
        shape = (-1, rows_BK.shape[1], -1)
        return network.class_logits(
            scored.states_BD[index_B][:, None].expand(shape),
            vectors_ID[rows_BK],
            self._trend_IS[rows_BK],
            scored.context_BC[index_B][:, None].expand(shape),
        )

    def _explain(self, replica: Replica, rows_BK: Tensor, index_B: Tensor, scored: _Scores) -> tuple[Tensor, Tensor]:
        """Return each item's source and, for transitions, the row of the history item that it follows most."""
        table = replica.table
        vectors_ID, trend_IS = table.column("vector"), self._trend_IS
        weights_BP, states_BD = scored.weights_BP[index_B], scored.states_BD[index_B]
        lift_BI = scored.lift_BI[index_B]
        network_BK = torch.einsum("bd,bkd->bk", states_BD, vectors_ID[rows_BK] - vectors_ID[1:].mean(0))
        trend_BK = ((trend_IS[rows_BK] - trend_IS[1:].mean(0)) * weights_BP[:, None, 1:-1]).sum(2)
        transition_BK = lift_BI.gather(1, rows_BK) - lift_BI.mean(1, keepdim=True)
        parts_BK3 = torch.stack([network_BK * weights_BP[:, :1], transition_BK * weights_BP[:, -1:], trend_BK], 2)
        # A part that says nothing is no reason, even where the others are below average: the network without a
        # history, the transition memory for an item that never followed.
        parts_BK3[:, :, 0].masked_fill_(weights_BP[:, :1] == 0, HIDDEN)
        parts_BK3[:, :, 1].masked_fill_(lift_BI.gather(1, rows_BK) == 0, HIDDEN)
        sources = torch.tensor([SOURCE_NETWORK, SOURCE_TRANSITION, SOURCE_TRENDING], device=self.device)
        sources_BK = sources[parts_BK3.argmax(2)]
        rows_BN, weight_BN = scored.transitions.rows_BN[index_B], scored.transitions.weight_BN[index_B]
        matching_BKN = (rows_BN[:, None] == rows_BK[:, :, None]) * weight_BN[:, None]
        slot_BK = matching_BKN.argmax(2)
        because_BK = scored.transitions.history_BK[index_B].gather(
            1, slot_BK // (rows_BN.shape[1] // scored.transitions.history_BK.shape[1])
        )
        return sources_BK, because_BK.masked_fill(sources_BK != SOURCE_TRANSITION, PADDING_ROW)

    def _score_candidates(
        self, replica: Replica, candidates: Sequence[str], index: int, scored: _Scores
    ) -> list[ScoredItem]:
        table = replica.table
        rows = [table.row(item_id) for item_id in candidates]
        rows_1K = torch.tensor([rows], device=self.device)
        index_1 = torch.tensor([index], device=self.device)
        logits_1KC = self._class_logits(replica.network, rows_1K, index_1, scored, table.column("vector"))
        worth_1K = self._settings.worth_weight * replica.network.log_worth(logits_1KC, self._worth_C)
        final_1K = scored.scores_BI[index_1].gather(1, rows_1K) + worth_1K
        sources_1K, because_1K = self._explain(replica, rows_1K, index_1, scored)
        names = [c.name for c in self._settings.classes]
        # Synchronises with the GPU: the answer leaves it.
        columns = zip(
            *(candidates, rows, final_1K[0].tolist(), sources_1K[0].tolist(), because_1K[0].tolist()),
            logits_1KC[0].softmax(1).tolist(),
            strict=True,
        )
        return [
            ScoredItem(
                item_id,
                score,
                source,
                table.item_ids[why] if why else None,
                row != PADDING_ROW,
                dict(zip(names, probabilities, strict=True)),
            )
            for item_id, row, score, source, why, probabilities in columns
        ]

    def _hidden(self, replica: Replica, query: Query) -> Tensor:
        """Return which rows must not come back for this query: (I)."""
        table = replica.table
        hidden_I = self._filter_mask(replica, query.filter)
        own: list[int] = [table.row(item_id) for item_id in query.exclude]
        if not query.allow_seen:
            own.extend(table.row(entry.item_id) for entry in query.history)
        if own:
            hidden_I = hidden_I.clone()
            hidden_I[torch.tensor(own, device=self.device)] = True
        return hidden_I

    def _filter_mask(self, replica: Replica, categories: CategoryFilter | None) -> Tensor:
        """Return which rows a filter and the deletions hide, kept until the version or the catalogue changes."""
        key = (self.version, self._mirror.revision)
        found = self._masks.get(categories)
        if found is not None and found[0] == key:
            return found[1]
        table = replica.table
        only: Set[str] | None = None
        never: Set[str] = self._mirror.deleted
        if categories is not None:
            only, banned = self._mirror.selection(categories)
            never = never | banned
        hidden = np.full(table.rows, only is not None)
        if only is not None:
            hidden[[table.row(item_id) for item_id in only]] = False
        hidden[[table.row(item_id) for item_id in never]] = True
        hidden[PADDING_ROW] = True
        mask = torch.from_numpy(hidden).to(self.device)
        if len(self._masks) >= MASKS_KEPT:
            self._masks.clear()
        self._masks[categories] = (key, mask)
        return mask


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
