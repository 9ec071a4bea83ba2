"""Replica: the network and the item table of one version, written to payloads and read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.additions import additions
from recsys.errors import CorruptWeights
from recsys.item_table import ItemTable
from recsys.network import RecommendationNetwork, build_network
from recsys.settings import Settings
from recsys.store.v1.weights_pb2 import PayloadHeader
from recsys.weights.payload import NewItems, WeightPayload

# The item table's clock travels among the dense tensors.
CLOCK = "item_table.clock"
SERVED_COLUMNS = (
    *("vector", "trend", "touched", "first", "total", "classes", "audience"),
    *("successor", "successor_weight"),
)


@dataclass(frozen=True, slots=True)
class Ready:
    """Hold what a version's payload says where a replica takes it from."""

    rows_R: Tensor
    columns: Mapping[str, Tensor]
    network: RecommendationNetwork
    # Its tensors by name.
    dense: Mapping[str, Tensor]


class Replica:
    """Hold a network and an item table and move both between versions."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self.network: RecommendationNetwork = build_network(settings).to(device)
        self._dense = _learned(self.network)
        # Another of the kind, for the version after the one that is held.
        self._spare: tuple[RecommendationNetwork, Mapping[str, Tensor]] | None = None
        # A version from before the settings added them lacks them: they begin with it, the same for one seed.
        self._added = {name: tensor.detach().clone() for name, tensor in additions(self._dense).items()}
        self.table = ItemTable(settings.dimension, settings.successors, device, settings.seed, len(settings.classes))
        # What a user is like is told by the history or, where it leaves classes out, by whom its items drew as well.
        self.table.audiences = not all(c.history for c in settings.classes)
        self.table.dated = settings.bounded_items
        self._placed: Mapping[str, NDArray[Any]] = {}

    def write(self, rows: Tensor, new_items: Sequence[tuple[str, int]]) -> WeightPayload:
        """Write all dense tensors and the given rows (ascending) with the items that got one."""
        dense = {name: to_array(tensor) for name, tensor in self._dense.items()}
        dense[CLOCK] = np.array([self.table.clock], np.int64)
        columns = {name: to_array(self.table.columns[name][rows]) for name in SERVED_COLUMNS}
        return WeightPayload(dense, rows.cpu().numpy().astype(np.int32), columns, NewItems.of(new_items))

    def write_all(self) -> WeightPayload:
        """Write everything."""
        table = self.table
        return replace(self.write(torch.arange(table.rows, device=self.device), items_of(table)), whole=True)

    def place(self, header: PayloadHeader) -> Mapping[str, NDArray[Any]]:
        """Give the memory that the columns of a whole payload are read to: this replica's own, which must be new.

        Apply the payload next, or throw the replica away.

        Raises:
            CorruptWeights: when the columns do not fit.
        """
        found = {column.name: ((*column.shape,), f"torch.{column.dtype}") for column in header.columns}
        table = self.table
        expected = {
            name: ((header.rows, *table.columns[name].shape[1:]), str(table.columns[name].dtype))
            for name in SERVED_COLUMNS
        }
        if found != expected:
            raise CorruptWeights(f"columns {sorted(found)} of {header.rows} rows do not fit")
        if header.whole and self.device.type == "cpu":
            # With room to spare: memory that nothing is written to costs nothing, moving a full table does.
            table.reserve(header.rows + header.rows // 8)
            self._placed = {name: table.columns[name][: header.rows].numpy() for name in SERVED_COLUMNS}
        return self._placed

    def check(self, payload: WeightPayload) -> None:
        """Refuse a payload that does not fit this network and table; nothing is changed.

        Raises:
            CorruptWeights: naming the first part that does not fit.
        """
        expected = self._dense
        wrong = set(payload.dense) ^ {*expected, CLOCK}
        if wrong - (set(self._added) - set(payload.dense)):
            raise CorruptWeights(f"dense tensors {sorted(wrong)} do not fit")
        fits(CLOCK, payload.dense[CLOCK], (1,), torch.int64)
        for name, tensor in expected.items():
            if name in payload.dense:
                fits(name, payload.dense[name], tuple(tensor.shape), tensor.dtype)
        if set(payload.columns) != set(SERVED_COLUMNS):
            raise CorruptWeights(f"columns {sorted(set(payload.columns) ^ set(SERVED_COLUMNS))} do not fit")
        for name in SERVED_COLUMNS:
            column = self.table.columns[name]
            fits(name, payload.columns[name], (len(payload.rows), *column.shape[1:]), column.dtype)
        rows = 1 if payload.whole else payload.kept_rows or self.table.rows
        if rows > self.table.rows:
            raise CorruptWeights(f"{rows} rows are to stay of the {self.table.rows} in use")
        in_use = self._check_items(NewItems.of(payload.new_items), rows, payload.rows)
        if len(payload.rows) and payload.rows[-1] >= in_use:
            raise CorruptWeights(f"row {payload.rows[-1]} is not in use")
        if self._placed and not np.array_equal(payload.rows, np.arange(in_use, dtype=np.int32)):
            raise CorruptWeights("a whole version lacks rows")

    def _check_items(self, items: NewItems, rows: int, changed: NDArray[np.int32]) -> int:
        """Refuse items that do not fit the first `rows` rows, which stay; return how many rows there are then."""
        known, new = items.split(rows)
        if (len(known) and known.rows[0] < 1) or not new.continue_from(rows):
            raise CorruptWeights(f"new items do not continue the {rows} rows in use")
        if not np.isin(known.rows, changed).all():
            raise CorruptWeights("a row has another item, and nothing of it is told")
        if rows > 1:
            held_N = self.table.look_up(items.ids)
            if np.any((held_N > 0) & (held_N < rows) & ~np.isin(held_N, known.rows)):
                raise CorruptWeights("a new item already has a row")
        return rows + len(new)

    def apply(self, payload: WeightPayload) -> None:
        """Move to the version that the payload leads to, whole or not at all.

        Raises:
            CorruptWeights: when the payload does not fit; nothing was changed then.
        """
        self.check(payload)
        self.put(payload)

    @torch.no_grad()
    def ready(self, payload: WeightPayload) -> Ready:
        """Copy what a payload says that was checked and is not whole, beside whoever reads this replica meanwhile.

        `put` it before the next one is made.
        """
        if self._spare is None:
            network = deepcopy(self.network)
            self._spare = network, _learned(network)
        network, dense = self._spare
        self._fill(dense, payload)
        columns = {name: to_tensor(array, self.device) for name, array in payload.columns.items()}
        return Ready(to_tensor(payload.rows, self.device).to(torch.int64), columns, network, dense)

    @torch.no_grad()
    def put(self, payload: WeightPayload, ready: Ready | None = None) -> None:
        """Move to the version that a payload leads to which was checked, and nothing moved since.

        With what was made `ready` of it there is little left to do, and `network` is another than before.
        """
        placed, self._placed = self._placed, {}
        if payload.whole and not placed:
            self.table.clear()
        elif payload.kept_rows:
            self.table.truncate(payload.kept_rows)
        items = NewItems.of(payload.new_items)
        self.table.assign(items.rows, items.ids)
        self.table.clock = int(payload.dense[CLOCK][0])
        if ready is not None:
            self.table.write(ready.rows_R, ready.columns, ())
            self._spare = self.network, self._dense
            self.network, self._dense = ready.network, ready.dense
            return
        rows = to_tensor(payload.rows, self.device).to(torch.int64)
        for name, array in payload.columns.items():
            # One after the other: a copy of all of them at once would double what a start takes.
            if placed.get(name) is not array:
                self.table.write(rows, {name: to_tensor(array, self.device)}, ())
        self._fill(self._dense, payload)

    def _fill(self, dense: Mapping[str, Tensor], payload: WeightPayload) -> None:
        for name, tensor in dense.items():
            given = payload.dense.get(name)
            tensor.copy_(self._added[name] if given is None else to_tensor(given, self.device))


def _learned(network: RecommendationNetwork) -> Mapping[str, Tensor]:
    """Return the tensors of network.state_dict() themselves, which other memory may be put under."""
    learned = network.state_dict().keys()
    return {name: each for name, each in chain(network.named_parameters(), network.named_buffers()) if name in learned}


def items_of(table: ItemTable, first: int = 1) -> NewItems:
    """List the items with their rows, from row `first` on, free ones included."""
    rows = np.arange(first, table.rows)
    return NewItems(table.item_ids.take(rows), rows)


def to_array(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to an array."""
    # Synchronises with the GPU: what is published leaves it.
    return tensor.detach().cpu().numpy().copy()


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array, which may be read-only, to a tensor."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True)).to(device)


def fits(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise CorruptWeights unless an array has this shape and type."""
    if array.shape != shape or _torch_name(array.dtype) != str(dtype):
        raise CorruptWeights(f"{name} is {array.dtype.name}{array.shape}, not {str(dtype)[6:]}{shape}")


@cache
def _torch_name(dtype: np.dtype[Any]) -> str:
    """Name a type as torch does: numpy takes long to tell a type's name."""
    return f"torch.{dtype.name}"
