"""ItemTable: the growing table of item rows: each item's id, vector, popularity, and what follows it.

Shapes: R rows given, D dimension, S trend speeds, M successors, C feedback classes, B batch, K history places
looked at, I rows in use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.following import follow, forget, recount
from recsys.item_rows import PADDING_ROW as PADDING_ROW
from recsys.item_rows import Index, ItemRows
from recsys.packed_ids import PackedIds
from recsys.standing import COLUMNS, TREND_DECAYS, Standing, by_tensors

# Rows of which all is known that is computed at once: what it takes stays in the processor's cache.
STRETCH = 16_384
# How far back a choice counts as following another, with weight 1/sqrt(distance) where it is counted and again where it
# is looked up. On two real streams this is up to a quarter better than 1/distance divided by how often each was chosen.
TRANSITION_REACH = 20
# So many of a user's latest items learn what the user does next.
AUDIENCE_REACH = 10
# What followed an item fades by this much each time that something follows it: habits change.
TRANSITION_DECAY = 0.995
# What followed leads back as well, for so much of the weight.
TRANSITION_BACK = 0.4
# A second look at the same counts falls off faster with distance, by this further power of it: what comes next.
NEXT_POWER = 2.0
# A third look tells what follows more than chance has it: the first one's sums times this / (this + how often the item
# was chosen). The prior is such that an item chosen once does not dominate.
CHOSEN_PRIOR = 10.0
# Where nothing fades, what followed is divided by how often either item was chosen, to these powers: see `recount`.
RECOUNT_BEFORE, RECOUNT_AFTER = 0.5, 0.25
# It leads back for so much of the weight. Less than where it fades costs nothing on one real stream, and where choices
# follow an order it finds a tenth more.
RECOUNT_BACK = 0.2
# Brings the quotients to the scale of the counts.
RECOUNT_SCALE = 10.0
# Successors that are then kept of an item at least: on one real stream 128 find a twentieth more than 64.
RECOUNT_SLOTS = 128
# 8 bytes each.
PAIRS_AT_ONCE = 1 << 24
MINIMUM_CAPACITY = 1024
# Of columns in main memory, in bytes.
ALIGNMENT = 64
VECTOR_SCALE = 0.02


@dataclass(frozen=True, slots=True)
class Transitions:
    """Hold what followed each user's latest items: M successors of each of K, N = K x M, of which row 0 is empty.

    Rows may repeat within a user; `history_BK` are the items followed, latest first.
    """

    history_BK: Tensor
    rows_BN: Tensor
    # Looked up over the whole reach, over what comes next alone, and over the whole reach by how often what follows was
    # chosen.
    weight_BN: Tensor
    next_BN: Tensor
    rare_BN: Tensor

    @property
    def looks(self) -> tuple[Tensor, ...]:
        """Return the weights of each look into the memory."""
        return self.weight_BN, self.next_BN, self.rare_BN

    def lifts(self, rows: int, floor: float) -> tuple[Tensor, ...]:
        """Sum each look's weights per row and put them on a log scale, log(1 + sum / floor): (B, rows) each."""
        return tuple(self._lift(each_BN, rows, floor) for each_BN in self.looks)

    def towards(self, item_B: Tensor) -> Tensor:
        """Sum, over the whole reach, what leads to one item for each user: (B)."""
        return (self.weight_BN * (self.rows_BN == item_B[:, None])).sum(1)

    def _lift(self, weight_BN: Tensor, rows: int, floor: float) -> Tensor:
        lift_BI = torch.zeros(self.rows_BN.shape[0], rows, device=weight_BN.device)
        lift_BI.scatter_add_(1, self.rows_BN, weight_BN)
        # The logarithm of the few sums, not of the whole table: rows that repeat write the same value again.
        sums_BN = lift_BI.gather(1, self.rows_BN)
        return lift_BI.scatter_(1, self.rows_BN, torch.log1p(sums_BN / floor))


@cache
def nearness(reach: int) -> NDArray[np.float32]:
    """Return what the latest, second latest and so on item counts for where it is looked at by distance: (2, K).

    Over the whole reach, and in what comes next alone.
    """
    distance_K = np.arange(1, reach + 1, dtype=np.float32)
    return np.stack([1 / np.sqrt(distance_K), 1 / np.sqrt(distance_K) / distance_K**NEXT_POWER]).astype(np.float32)


class ItemTable:
    """Hold one row per item; row 0 is padding and never an item, and rows that items have left wait for new ones.

    Columns (first axis is the row):
        vector: float32 (D), what the network multiplies.
        trend: float32 (2 S), decayed counts of positive feedback, then of all feedback, as of `touched`.
        touched: int64, the clock at the item's last feedback, before it that at which it was catalogued.
        first: int64, the clock at the item's first feedback, 0 before it; where `dated`, when it got its row.
        total: float32, positive feedback ever.
        classes: float32 (C), feedback ever of each class.
        audience: float32 (C), where `audiences`: feedback ever of each class by users who had the item among their
            last AUDIENCE_REACH.
        successor: int32 (M), rows that followed this item; 0 is an empty slot.
        successor_weight: float32 (M), decayed sum of 1/sqrt(distance) over those times.

    The clock counts feedback over all items.
    """

    def __init__(
        self, dimension: int, successors: int, device: torch.device | str = "cpu", seed: int = 0, classes: int = 2
    ) -> None:
        self.device = torch.device(device)
        self.clock = 0
        self._rows = ItemRows()
        self.audiences = False
        # Whether `first` says when an item got its row: where rows are passed on, it tells whose feedback was whose.
        self.dated = False
        self._seed = seed
        # Called with a column's name, the column and a number of rows; returns a column of so many that begins with it.
        self.enlarge: Callable[[str, Tensor, int], Tensor] = _enlarged
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "vector": ((dimension,), torch.float32),
            "trend": ((2 * len(TREND_DECAYS),), torch.float32),
            "touched": ((), torch.int64),
            "first": ((), torch.int64),
            "total": ((), torch.float32),
            "classes": ((classes,), torch.float32),
            "audience": ((classes,), torch.float32),
            "successor": ((successors,), torch.int32),
            "successor_weight": ((successors,), torch.float32),
        }
        self.columns: dict[str, Tensor] = {
            name: torch.zeros((MINIMUM_CAPACITY, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in shapes.items()
        }
        decays = torch.tensor(TREND_DECAYS, dtype=torch.float64, device=self.device)
        self._log_decay_S = torch.log(decays).repeat(2)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._rows)

    @property
    def index(self) -> Index:
        """Return what compiled code finds rows by; good until the next change."""
        return self._rows.index

    @property
    def rows(self) -> int:
        """Return the number of rows in use, padding and free ones included: row numbers lie below it."""
        return self._rows.end

    @property
    def item_ids(self) -> PackedIds:
        """Return the item of each row, "" where there is none; good until the next change."""
        return self._rows.item_ids

    @property
    def free_rows(self) -> NDArray[np.int64]:
        """Return the rows that items have left, ascending."""
        return self._rows.free_rows

    def clear(self) -> None:
        """Forget all items; capacity stays."""
        self.clock = 0
        self._rows.clear()
        for column in self.columns.values():
            column.zero_()

    def truncate(self, rows: int) -> None:
        """Forget the items from row `rows` on; clock and capacity stay."""
        for column in self.columns.values():
            column[rows : self.rows] = 0
        self._rows.truncate(rows)

    def row(self, item_id: str) -> int:
        """Return the item's row, or 0 when the table does not hold it."""
        return self._rows.row(item_id)

    def look_up(self, item_ids: Iterable[str]) -> NDArray[np.int64]:
        """Return each item's row, 0 where the table does not hold it: (N)."""
        return self._rows.look_up(item_ids)

    def allocate(self, item_ids: Iterable[str]) -> list[tuple[str, int]]:
        """Give a row to each item that has none, in the order given, free ones first; return those with their rows.

        A new row's vector depends on the seed and the row alone.
        """
        new = self._rows.allocate(item_ids)
        if new:
            self.reserve(self.rows)
            self.begin([row for _, row in new])
        return new

    def begin(self, rows: Sequence[int]) -> None:
        """Set what new items have, in rows that hold nothing yet."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.columns["vector"][index] = self._initial_vectors(rows)
        if self.dated:
            self.columns["first"][index] = self.clock

    def _initial_vectors(self, rows: Sequence[int]) -> Tensor:
        dimension = self.columns["vector"].shape[1]
        # Philox is counter-based: a row's numbers do not depend on how many rows were asked for at once.
        vectors = np.empty((len(rows), dimension), dtype=np.float32)
        for place, row in enumerate(rows):
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, row, 0, 0]))
            vectors[place] = generator.standard_normal(dimension, dtype=np.float32)
        return torch.from_numpy(vectors * VECTOR_SCALE).to(self.device)

    def remove(self, rows_R: NDArray[np.int64]) -> Tensor:
        """Forget the items of these rows, and that they followed others; return the rows that changed, ascending.

        The rows, ascending, become free.
        """
        self._rows.remove(rows_R)
        gone = torch.from_numpy(rows_R).to(self.device)
        for column in self.columns.values():
            column[gone] = 0
        gone_I = torch.zeros(self.rows, dtype=torch.bool, device=self.device).index_fill_(0, gone, True)
        successors = self.column("successor"), self.column("successor_weight")
        if self.device.type == "cpu":
            lost_I = torch.from_numpy(forget(*(each.numpy() for each in successors), gone_I.numpy()))
        else:
            lost_I = _forget_in_tensors(*successors, gone_I)
        return (lost_I | gone_I).nonzero()[:, 0]

    def used_rows(self, number_N: NDArray[np.int64], without: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the rows of the items with these numbers, counted from 1 in the order of rows.

        Items whose rows, ascending, are given in `without` are not counted.
        """
        return self._rows.used(number_N, without)

    def left_out(self, without: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, ascending, the free rows and those of some items, whose rows, ascending, are given."""
        return self._rows.left_out(without)

    def assign(self, rows: Sequence[int] | NDArray[np.integer], item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Give rows, ascending, to items, whoever had them, "" to leave one free; return those that changed hands.

        The rows' columns are left as they are. Rows that are not in use yet must continue those that are.

        Raises:
            ValueError: when they do not, or an item has another row already or is named twice; nothing is changed then.
        """
        changed = self._rows.assign(rows, item_ids)
        self.reserve(self.rows)
        return changed

    def extend(self, item_ids: Sequence[str]) -> None:
        """Give the next rows to these items, "" to leave one free; the rows' columns are left as they are.

        Raises:
            ValueError: when an item has a row already or is named twice; nothing is changed then.
        """
        self._rows.extend(item_ids)
        self.reserve(self.rows)

    def reserve(self, rows: int) -> None:
        """Make room for so many rows, those in use included."""
        capacity = self.columns["total"].shape[0]
        if rows <= capacity:
            return
        capacity = max(rows, capacity * 2)
        for name, column in self.columns.items():
            self.columns[name] = self.enlarge(name, column, capacity)

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
        if len(rows_R) and int(rows_R.max()) >= self.rows + len(new_items):
            raise ValueError(f"row {int(rows_R.max())} is not in use")
        self.extend([item_id for item_id, _ in new_items])
        index = rows_R.to(self.device, torch.int64)
        for name, values in columns.items():
            self.columns[name].index_copy_(0, index, values.to(self.device))

    def standing(self) -> Tensor:
        """Return what is known of every item whoever asks, as of the clock: (I, STANDINGS)."""
        if self.device.type == "cpu":
            columns = {name: self.columns[name].numpy() for name in COLUMNS}
            return torch.from_numpy(Standing.of(columns, self.rows, self.clock).rows_IS)
        return by_tensors(self.columns, self.rows, self.clock)

    def transitions(self, history_BK: Tensor) -> Transitions:
        """Look up what followed the latest history items; `history_BK` holds rows, latest first.

        Item j weighs the sum over k of C[h_k, j] / sqrt(k), C the decayed counts of what followed.
        """
        batch, reach = history_BK.shape
        scale_2K = torch.from_numpy(nearness(reach)).to(self.device)
        counts_BKM = self.columns["successor_weight"][history_BK] * (history_BK != PADDING_ROW)[:, :, None]
        weight_BN, next_BN = ((counts_BKM * scale_K[:, None]).view(batch, -1) for scale_K in scale_2K)
        rows_BN = self.columns["successor"][history_BK].to(torch.int64).view(batch, -1)
        rare_BN = weight_BN * (CHOSEN_PRIOR / (self.columns["total"][rows_BN] + CHOSEN_PRIOR))
        return Transitions(history_BK, rows_BN, weight_BN, next_BN, rare_BN)

    def fade_transitions(self, by: float, history_BK: Tensor, item_B: Tensor) -> Tensor:
        """Multiply all that followed items by a factor, then count some choices anew; return changed rows, ascending.

        Each choice comes with its history, latest first; none may be of an item without a row.
        """
        weights_IM = self.column("successor_weight")
        weights_IM *= by
        self._count_transitions(history_BK, item_B)
        return weights_IM.any(1).nonzero()[:, 0]

    def count(self, history_BK: Tensor, item_B: Tensor, positive_B: Tensor, class_B: Tensor) -> Tensor:
        """Count a batch of feedback, each with its history latest first; return the touched rows, ascending.

        Transitions and totals count what is positive alone. Advances the clock by B, also for items without a row,
        of which nothing else is counted. Within the batch the order matters for trend decay only, and is kept.
        """
        clock_B = self.clock + 1 + torch.arange(len(item_B), device=self.device)
        self.clock += len(item_B)
        known_B = item_B != PADDING_ROW
        if not bool(known_B.all()):
            history_BK, item_B, positive_B, class_B, clock_B = (
                each[known_B] for each in (history_BK, item_B, positive_B, class_B, clock_B)
            )
        rows_T = self._count_transitions(history_BK[positive_B], item_B[positive_B])
        items_U, inverse_B = torch.unique(item_B, return_inverse=True)
        decay_US = torch.exp((self.clock - self.columns["touched"][items_U])[:, None] * self._log_decay_S)
        add_BS = torch.exp((self.clock - clock_B)[:, None] * self._log_decay_S)
        add_BS[:, : len(TREND_DECAYS)] *= positive_B[:, None]
        trend_US = (self.columns["trend"][items_U] * decay_US).index_add_(0, inverse_B, add_BS)
        self.columns["trend"][items_U] = trend_US.to(torch.float32)
        self.columns["touched"][items_U] = self.clock
        if not self.dated:
            first_U = self.columns["first"][items_U]
            self.columns["first"][items_U] = first_U.masked_fill(first_U == 0, self.clock)
        self.columns["total"].index_add_(0, item_B, positive_B.to(torch.float32))
        one_BC = torch.nn.functional.one_hot(class_B, self.columns["classes"].shape[1]).to(torch.float32)
        self.columns["classes"].index_add_(0, item_B, one_BC)
        rows_A = self._count_audience(history_BK, one_BC)
        touched: Tensor = torch.unique(torch.cat([rows_T, items_U, rows_A]))
        return touched

    def recount(self, latest_NK: NDArray[np.integer], item_N: NDArray[np.integer], room: int = PAIRS_AT_ONCE) -> None:
        """Put in place of the transition memory what followed in N choices, each with its history latest first.

        For predictions of choices that lie anywhere in the time of these: nothing fades, and all are counted before the
        slots are given to the heaviest. A choice counts 1/distance; each item's sums are divided by powers of how
        often both items were chosen. The memory has RECOUNT_SLOTS from then on if it had fewer. At most `room` pairs,
        or one item's, are held at once.
        """
        chosen_I = self.column("total").cpu().numpy() + np.float32(CHOSEN_PRIOR)
        names = ("successor", "successor_weight")
        for name in names:
            column = self.columns[name]
            if column.shape[1] < RECOUNT_SLOTS:
                self.columns[name] = column.new_zeros(len(column), RECOUNT_SLOTS)
        columns = [self.column(name).cpu() for name in names]
        recount(
            *(column.numpy() for column in columns),
            np.ascontiguousarray(latest_NK, np.int32),
            np.ascontiguousarray(item_N, np.int32),
            1 / np.arange(1, latest_NK.shape[1] + 1, dtype=np.float32),
            RECOUNT_BACK,
            (RECOUNT_SCALE * chosen_I**-RECOUNT_BEFORE).astype(np.float32),
            (chosen_I**-RECOUNT_AFTER).astype(np.float32),
            room,
        )
        for name, column in zip(names, columns, strict=True):
            self.column(name).copy_(column)

    def _count_audience(self, history_BK: Tensor, counts_BC: Tensor) -> Tensor:
        """Count for each user's latest items what the user did; return their rows."""
        if not self.audiences:
            return history_BK.new_empty(0)
        latest_BK = history_BK[:, :AUDIENCE_REACH]
        user_A, place_A = latest_BK.nonzero(as_tuple=True)
        rows_A: Tensor = latest_BK[user_A, place_A]
        self.columns["audience"].index_add_(0, rows_A, counts_BC[user_A])
        return rows_A

    def retract(self, history_MK: Tensor, item_M: Tensor, feedback_class: int) -> Tensor:
        """Take back the counting of M feedback of a class, each with its history; return the touched rows.

        Of items without a row nothing was counted.
        """
        known_M = item_M != PADDING_ROW
        history_MK, item_M = history_MK[known_M], item_M[known_M]
        one_C = torch.zeros_like(self.columns["classes"][0]).index_fill_(0, item_M.new_tensor(feedback_class), -1.0)
        rows_A = self._count_audience(history_MK, one_C.expand(len(item_M), -1))
        self.columns["audience"][rows_A] = self.columns["audience"][rows_A].clamp_min(0)
        counts_I = self.columns["classes"][:, feedback_class]
        counts_I.index_add_(0, item_M, counts_I.new_full((len(item_M),), -1.0))
        # An item that was forgotten meanwhile had begun anew.
        counts_I[item_M] = counts_I[item_M].clamp_min(0)
        return torch.cat([item_M, rows_A])

    def _count_transitions(self, history_BK: Tensor, item_B: Tensor) -> Tensor:
        distance_K = torch.arange(1, history_BK.shape[1] + 1, device=self.device, dtype=torch.float32)
        if self.device.type == "cpu":
            columns = self.columns["successor"].numpy(), self.columns["successor_weight"].numpy()
            histories = history_BK.contiguous().numpy(), item_B.contiguous().numpy()
            kept_T = TRANSITION_DECAY ** torch.arange(history_BK.numel() + 1)
            return torch.from_numpy(
                follow(*columns, *histories, torch.rsqrt(distance_K).numpy(), kept_T.numpy(), TRANSITION_BACK)
            )
        return self._follow_in_tensors(history_BK, item_B, torch.rsqrt(distance_K))

    def _follow_in_tensors(self, history_BK: Tensor, item_B: Tensor, nearness_K: Tensor) -> Tensor:
        """Do what recsys.following does, on any device."""
        weight_BK = nearness_K.expand(len(item_B), -1)
        keep_BK = (history_BK != PADDING_ROW) & (history_BK != item_B[:, None])
        before_P, after_P = history_BK[keep_BK], item_B[:, None].expand_as(history_BK)[keep_BK]
        if not len(before_P):
            return before_P
        fading_A, times_A = torch.unique(before_P, return_counts=True)
        self.columns["successor_weight"][fading_A] *= TRANSITION_DECAY ** times_A[:, None]
        weight_P = torch.cat([weight_BK[keep_BK], TRANSITION_BACK * weight_BK[keep_BK]])
        before_P, after_P = torch.cat([before_P, after_P]), torch.cat([after_P, before_P])
        pairs_U, inverse_P = torch.unique(before_P * (1 << 32) + after_P, return_inverse=True)
        weight_U = torch.zeros(len(pairs_U), device=self.device).index_add_(0, inverse_P, weight_P)
        before_U, after_U = pairs_U >> 32, pairs_U & ((1 << 32) - 1)
        successor, weights = self.columns["successor"], self.columns["successor_weight"]
        match_UM = successor[before_U] == after_U[:, None]
        known_U = match_UM.any(1)
        slot_U = match_UM.to(torch.int8).argmax(1)
        weights[before_U[known_U], slot_U[known_U]] += weight_U[known_U]
        # The weakest slots make room for what is no lighter; pairs_U is sorted, hence each item's new successors are
        # consecutive and take its 1st, 2nd, ... weakest slot.
        new_before, new_after, new_weight = before_U[~known_U], after_U[~known_U], weight_U[~known_U]
        if len(new_before):
            owners_A, owner_N, counts_A = torch.unique(new_before, return_inverse=True, return_counts=True)
            # Where not all get in the heaviest of each item do, of equal ones the lower rows.
            order_N = torch.argsort(new_weight, descending=True, stable=True)
            order_N = order_N[torch.argsort(owner_N[order_N], stable=True)]
            new_before, new_after, new_weight = new_before[order_N], new_after[order_N], new_weight[order_N]
            rank_N = torch.arange(len(new_before), device=self.device) - (counts_A.cumsum(0) - counts_A)[owner_N]
            order_AM = torch.argsort(weights[owners_A], dim=1, stable=True)
            fits_N = rank_N < order_AM.shape[1]
            slot_N = order_AM[owner_N[fits_N], rank_N[fits_N]]
            row_N, new_after, new_weight = new_before[fits_N], new_after[fits_N], new_weight[fits_N]
            gets_N = new_weight >= weights[row_N, slot_N]
            row_N, slot_N = row_N[gets_N], slot_N[gets_N]
            successor[row_N, slot_N] = new_after[gets_N].to(torch.int32)
            weights[row_N, slot_N] = new_weight[gets_N]
        touched: Tensor = torch.unique(before_P)
        return touched


def _forget_in_tensors(successor_IM: Tensor, weight_IM: Tensor, gone_I: Tensor) -> Tensor:
    """Do what recsys.following's `forget` does, on any device."""
    lost_I = torch.zeros_like(gone_I)
    for first in range(0, len(gone_I), STRETCH):
        here = slice(first, first + STRETCH)
        lost_IM = gone_I[successor_IM[here].to(torch.int64)]
        for column_IM in (successor_IM, weight_IM):
            column_IM[here].masked_fill_(lost_IM, 0)
        lost_I[here] = lost_IM.any(1)
    return lost_I


def _enlarged(name: str, column: Tensor, rows: int) -> Tensor:
    grown = _zeros((rows, *column.shape[1:]), column.dtype, column.device)
    grown[: len(column)] = column
    return grown


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that take no memory before they are written to: torch's own, on a CPU, are written at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    # Aligned as torch's are: sums may depend on it.
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)
