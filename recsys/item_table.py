"""ItemTable: the growing table of item rows: each item's id, vector, popularity, and what follows it.

Shapes: R rows given, D dimension, S trend speeds, M successors, B batch, K history places looked at, I rows in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Per feedback; a count halves after 69, 693 and 6,931 positive feedback.
TREND_DECAYS = (0.99, 0.999, 0.9999)
# Below this decayed count all items trend alike.
TREND_FLOOR = 0.02
# How far back a choice counts as following another, with weight 1/distance.
TRANSITION_REACH = 20
# Added to counts that divide, so that an item seen once does not dominate.
TRANSITION_PRIOR = 10.0
MINIMUM_CAPACITY = 1024
VECTOR_SCALE = 0.02
PADDING_ROW = 0


@dataclass(frozen=True, slots=True)
class Transitions:
    """Hold what followed each user's latest items: M successors of each of K, N = K x M, of which row 0 is empty.

    Rows may repeat within a user; `history_BK` are the items followed, latest first.
    """

    history_BK: Tensor
    rows_BN: Tensor
    weight_BN: Tensor

    def lift(self, rows: int, floor: float) -> Tensor:
        """Sum the weights per row and put them on a log scale, log(1 + sum / floor): (B, rows)."""
        lift_BI = torch.zeros(self.rows_BN.shape[0], rows, device=self.weight_BN.device)
        lift_BI.scatter_add_(1, self.rows_BN, self.weight_BN)
        # The logarithm of the few sums, not of the whole table: rows that repeat write the same value again.
        sums_BN = lift_BI.gather(1, self.rows_BN)
        return lift_BI.scatter_(1, self.rows_BN, torch.log1p(sums_BN / floor))


class ItemTable:
    """Hold one row per item; row 0 is padding and never an item.

    Columns (first axis is the row):
        vector: float32 (D), what the network multiplies.
        trend: float32 (S), decayed counts of positive feedback as of `touched`.
        touched: int64, the clock at the item's last positive feedback.
        total: float32, positive feedback ever.
        successor: int32 (M), rows that followed this item; 0 is an empty slot.
        successor_weight: float32 (M), sum of 1/distance over those times.

    The clock counts positive feedback over all items.
    """

    def __init__(self, dimension: int, successors: int, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self.clock = 0
        self.item_ids: list[str] = [""]
        self._index: dict[str, int] = {}
        self._seed = seed
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "vector": ((dimension,), torch.float32),
            "trend": ((len(TREND_DECAYS),), torch.float32),
            "touched": ((), torch.int64),
            "total": ((), torch.float32),
            "successor": ((successors,), torch.int32),
            "successor_weight": ((successors,), torch.float32),
        }
        self.columns: dict[str, Tensor] = {
            name: torch.zeros((MINIMUM_CAPACITY, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in shapes.items()
        }
        decays = torch.tensor(TREND_DECAYS, dtype=torch.float64, device=self.device)
        self._log_decay_S = torch.log(decays)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.item_ids) - 1

    @property
    def rows(self) -> int:
        """Return the number of rows in use, padding included: row numbers lie below it."""
        return len(self.item_ids)

    def clear(self) -> None:
        """Forget all items; capacity stays."""
        self.clock = 0
        self.item_ids, self._index = [""], {}
        for column in self.columns.values():
            column.zero_()

    def truncate(self, rows: int) -> None:
        """Forget the items from row `rows` on; clock and capacity stay."""
        for item_id in self.item_ids[rows:]:
            del self._index[item_id]
        for column in self.columns.values():
            column[rows : self.rows] = 0
        del self.item_ids[rows:]

    def row(self, item_id: str) -> int:
        """Return the item's row, or 0 when the table does not hold it."""
        return self._index.get(item_id, PADDING_ROW)

    def allocate(self, item_ids: Iterable[str]) -> list[tuple[str, int]]:
        """Give a row to each item that has none, in the order given; return those with their rows.

        A new row's vector depends on the seed and the row alone.
        """
        new = []
        for item_id in item_ids:
            if item_id not in self._index:
                self._index[item_id] = row = len(self.item_ids)
                self.item_ids.append(item_id)
                new.append((item_id, row))
        if new:
            self._reserve(self.rows)
            first, last = new[0][1], new[-1][1]
            self.columns["vector"][first : last + 1] = self._initial_vectors(first, last + 1)
        return new

    def _initial_vectors(self, first: int, end: int) -> Tensor:
        dimension = self.columns["vector"].shape[1]
        # Philox is counter-based: a row's numbers do not depend on how many rows were asked for at once.
        vectors = np.empty((end - first, dimension), dtype=np.float32)
        for row in range(first, end):
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, row, 0, 0]))
            vectors[row - first] = generator.standard_normal(dimension, dtype=np.float32)
        return torch.from_numpy(vectors * VECTOR_SCALE).to(self.device)

    def _reserve(self, rows: int) -> None:
        capacity = self.columns["total"].shape[0]
        if rows <= capacity:
            return
        capacity = max(rows, capacity * 2)
        for name, old in self.columns.items():
            grown = torch.zeros((capacity, *old.shape[1:]), dtype=old.dtype, device=self.device)
            grown[: old.shape[0]] = old
            self.columns[name] = grown

    def column(self, name: str) -> Tensor:
        """Return the rows in use of one column, a view."""
        return self.columns[name][: self.rows]

    def write(self, rows_R: Tensor, columns: Mapping[str, Tensor], new_items: Sequence[tuple[str, int]]) -> None:
        """Overwrite rows with values from elsewhere; `new_items` must continue the rows in use without a gap.

        Raises:
            ValueError: when a new row is not the next one, an item already has a row, or a row is not in use.
        """
        if [row for _, row in new_items] != list(range(self.rows, self.rows + len(new_items))):
            raise ValueError(f"new rows {[r for _, r in new_items][:3]}... do not continue {self.rows} rows")
        ids = [item_id for item_id, _ in new_items]
        if len(set(ids)) != len(ids) or any(item_id in self._index for item_id in ids):
            raise ValueError("a new item already has a row")
        if len(rows_R) and int(rows_R.max()) >= self.rows + len(new_items):
            raise ValueError(f"row {int(rows_R.max())} is not in use")
        self._index.update(new_items)
        self.item_ids.extend(ids)
        self._reserve(self.rows)
        index = rows_R.to(self.device, torch.int64)
        for name, values in columns.items():
            self.columns[name].index_copy_(0, index, values.to(self.device))

    def log_trend(self) -> Tensor:
        """Return log(1 + decayed count) - log(1 + largest) at each speed as of the clock: (I, S), at most 0."""
        age_I = (self.clock - self.column("touched")).to(torch.float64)
        decay_IS = torch.exp(age_I[:, None] * self._log_decay_S).to(torch.float32)
        log_IS = torch.log(self.column("trend") * decay_IS + TREND_FLOOR)
        return log_IS - log_IS.amax(0, keepdim=True)

    def transitions(self, history_BK: Tensor) -> Transitions:
        """Look up what followed the latest history items; `history_BK` holds rows, latest first.

        Sequential co-occurrence: item j weighs the sum over k of
        (1/k) C[h_k, j] / (sqrt(n[h_k] + prior) (n[j] + prior)^0.25).
        """
        batch, reach = history_BK.shape
        distance_K = torch.arange(1, reach + 1, device=self.device, dtype=torch.float32)
        total = self.columns["total"]
        scale_BK = (history_BK != PADDING_ROW) / (distance_K * torch.sqrt(total[history_BK] + TRANSITION_PRIOR))
        rows_BKM = self.columns["successor"][history_BK].to(torch.int64)
        weight_BKM = self.columns["successor_weight"][history_BK] * scale_BK[:, :, None]
        rows_BN = rows_BKM.view(batch, -1)
        weight_BN = weight_BKM.view(batch, -1) / (total[rows_BN] + TRANSITION_PRIOR) ** 0.25
        return Transitions(history_BK, rows_BN, weight_BN)

    def count(self, history_BK: Tensor, item_B: Tensor) -> Tensor:
        """Count a batch of positive feedback, each with its history latest first; return the touched rows, ascending.

        Advances the clock by B. Within the batch the order matters for trend decay only, and is kept.
        """
        rows_T = self._count_transitions(history_BK, item_B)
        items_U, inverse_B = torch.unique(item_B, return_inverse=True)
        clock_B = self.clock + 1 + torch.arange(len(item_B), device=self.device)
        self.clock += len(item_B)
        decay_US = torch.exp((self.clock - self.columns["touched"][items_U])[:, None] * self._log_decay_S)
        add_BS = torch.exp((self.clock - clock_B)[:, None] * self._log_decay_S)
        trend_US = (self.columns["trend"][items_U] * decay_US).index_add_(0, inverse_B, add_BS)
        self.columns["trend"][items_U] = trend_US.to(torch.float32)
        self.columns["touched"][items_U] = self.clock
        ones_B = torch.ones_like(item_B, dtype=torch.float32)
        self.columns["total"].index_add_(0, item_B, ones_B)
        touched: Tensor = torch.unique(torch.cat([rows_T, items_U]))
        return touched

    def _count_transitions(self, history_BK: Tensor, item_B: Tensor) -> Tensor:
        reach = history_BK.shape[1]
        weight_BK = 1.0 / torch.arange(1, reach + 1, device=self.device, dtype=torch.float32).expand(len(item_B), -1)
        keep_BK = (history_BK != PADDING_ROW) & (history_BK != item_B[:, None])
        before_P, after_P = history_BK[keep_BK], item_B[:, None].expand_as(history_BK)[keep_BK]
        if not len(before_P):
            return before_P
        pairs_U, inverse_P = torch.unique(before_P * (1 << 32) + after_P, return_inverse=True)
        weight_U = torch.zeros(len(pairs_U), device=self.device).index_add_(0, inverse_P, weight_BK[keep_BK])
        before_U, after_U = pairs_U >> 32, pairs_U & ((1 << 32) - 1)
        successor, weights = self.columns["successor"], self.columns["successor_weight"]
        match_UM = successor[before_U] == after_U[:, None]
        known_U = match_UM.any(1)
        slot_U = match_UM.to(torch.int8).argmax(1)
        weights[before_U[known_U], slot_U[known_U]] += weight_U[known_U]
        # The weakest slots make room, so that new habits always get in; pairs_U is sorted, hence each item's new
        # successors are consecutive and take its 1st, 2nd, ... weakest slot.
        new_before, new_after, new_weight = before_U[~known_U], after_U[~known_U], weight_U[~known_U]
        if len(new_before):
            owners_A, owner_N, counts_A = torch.unique(new_before, return_inverse=True, return_counts=True)
            rank_N = torch.arange(len(new_before), device=self.device) - (counts_A.cumsum(0) - counts_A)[owner_N]
            order_AM = torch.argsort(weights[owners_A], dim=1, stable=True)
            fits_N = rank_N < order_AM.shape[1]
            slot_N = order_AM[owner_N[fits_N], rank_N[fits_N]]
            successor[new_before[fits_N], slot_N] = new_after[fits_N].to(torch.int32)
            weights[new_before[fits_N], slot_N] = new_weight[fits_N]
        touched: Tensor = torch.unique(before_P)
        return touched
