"""Recount: what followed what, counted at once without fading, beside plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys import item_table
from recsys.item_table import RECOUNT_BACK, ItemTable

ITEMS, CHOICES, REACH, SLOTS = 30, 400, 6, 12


def counted(latest_NK: np.ndarray, item_N: np.ndarray, total_I: np.ndarray) -> np.ndarray:
    sums_II = np.zeros((ITEMS + 1, ITEMS + 1))
    for latest_K, item in zip(latest_NK, item_N, strict=True):
        for distance, before in enumerate(latest_K, 1):
            if before not in (0, item):
                sums_II[before, item] += 1 / distance
                sums_II[item, before] += RECOUNT_BACK / distance
    return 10 * sums_II / np.sqrt(total_I + 10)[:, None] / (total_I + 10) ** 0.25


def made_up() -> tuple[ItemTable, np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    table = ItemTable(4, 8)
    table.allocate([f"i{n}" for n in range(ITEMS)])
    table.column("total")[1:] = torch.from_numpy(random.integers(0, 50, ITEMS).astype(np.float32))
    latest_NK = random.integers(0, ITEMS, (CHOICES, REACH))
    # Row 30 neither follows nor is followed; a few pairs come often.
    item_N = np.where(random.random(CHOICES) < 0.5, latest_NK[:, 0] % 7 + 1, random.integers(1, ITEMS, CHOICES))
    return table, latest_NK, item_N


@pytest.mark.parametrize("room", [1 << 24, 500, 1])
def test_the_heaviest_of_all_that_followed_are_kept(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_table, "RECOUNT_SLOTS", SLOTS)
    table, latest_NK, item_N = made_up()
    # What was remembered before is gone.
    table.column("successor")[:] = 30
    table.column("successor_weight")[:] = 100.0
    table.recount(latest_NK, item_N, room)
    expected_II = counted(latest_NK, item_N, table.column("total").numpy())
    for row in range(1, ITEMS + 1):
        weights = table.column("successor_weight")[row].numpy()
        rows = table.column("successor")[row].numpy()
        heaviest = np.sort(expected_II[row])[::-1][:SLOTS]
        np.testing.assert_allclose(weights, heaviest, rtol=1e-5)
        np.testing.assert_allclose(weights, expected_II[row][rows], rtol=1e-5)
        assert len({*rows.tolist()} - {0}) == np.count_nonzero(heaviest)
