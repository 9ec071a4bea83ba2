"""The loop over users finds the ranks, losses and gradients that tensors find, whatever is hidden, tied or unknown."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from learning import CPU

from recsys.item_table import PADDING_ROW, ItemTable
from recsys.network import Histories, build_network
from recsys.settings import load
from trainer import full_ranking
from trainer.full_ranking import Ranked, rank

LENGTH, USERS = 6, 40
SETTINGS = load({"dimension": 8, "history_length": LENGTH, "context_buckets": 8, "successors": 4}, environment={})


def _world(items: int, seed: int) -> tuple[ItemTable, Histories, torch.Tensor]:
    """Make a table in which some items were never chosen and some are alike, and histories, one of them empty."""
    draw = torch.Generator().manual_seed(seed)
    table = ItemTable(8, 4, CPU, seed)
    table.allocate([f"i{n}" for n in range(items)])
    rows_BL = torch.randint(0, items + 1, (USERS, LENGTH), generator=draw)
    rows_BL, _ = rows_BL.sort(1)
    rows_BL[5] = PADDING_ROW
    for _ in range(3):
        item_B = torch.randint(1, max(2, items * 3 // 4), (USERS,), generator=draw)
        positive_B = torch.rand(USERS, generator=draw) < 0.8
        table.count(rows_BL.flip(1), item_B, positive_B, positive_B.long())
    table.columns["vector"][2] = table.columns["vector"][1]
    for name in ("trend", "total", "touched", "first"):
        table.columns[name][2] = table.columns[name][1]
    gaps_BL = torch.randint(0, 9, rows_BL.shape, generator=draw) * (rows_BL != 0)
    known = table.column("total").nonzero()[:, 0]
    item_B = known[torch.randint(0, len(known), (USERS,), generator=draw)]
    rows_BL[:4, -1] = item_B[:4]
    return table, Histories(rows_BL, (rows_BL != 0).long(), gaps_BL), item_B


@pytest.mark.parametrize("items", [3, 50, full_ranking.STRETCH + 77])
@pytest.mark.parametrize("seen", [False, True], ids=["history", "seen"])
def test_both_ways_find_the_same(items: int, seen: bool) -> None:
    table, histories, item_B = _world(items, items)
    network = build_network(SETTINGS)
    with torch.no_grad():
        network.mix.log_temperature.fill_(0.4)
    states_BD = 2 * torch.randn(USERS, 8, generator=torch.Generator().manual_seed(7))
    own = [np.unique(rows[rows != 0])[-1 - n % 4 :] for n, rows in enumerate(histories.rows_BL.numpy())]
    rows = own if seen else None

    def found(way: object) -> tuple[Ranked, list[torch.Tensor]]:
        assert callable(way)
        network.zero_grad()
        ranked = way(network, table, histories, states_BD, table.standing(), item_B, rows, keep=True)
        ((ranked.mixed_loss_B - 0.5 * ranked.loss_B) * torch.arange(USERS)).sum().backward()
        return ranked, [parameter.grad.clone() for parameter in network.mix.parameters()]

    (one, one_gradients), (other, other_gradients) = found(full_ranking._by_loop), found(full_ranking._by_tensors)
    assert one.rank_B.tolist() == other.rank_B.tolist()
    assert one.popularity_rank_B.tolist() == other.popularity_rank_B.tolist()
    for name in ("mixed_loss_B", "loss_B"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5)
    assert float((one.mixed_loss_B - one.loss_B).detach().abs().max()) > 0.01
    assert one.scores_BI is not None
    assert other.scores_BI is not None
    torch.testing.assert_close(one.scores_BI, other.scores_BI, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(one.led_B2, other.led_B2, rtol=1e-5)
    assert (one.led_B2[:, 0] > 0).any()
    for mine, theirs in zip(one_gradients, other_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)
        assert float(mine.abs().max()) > 0.01
    # Some were had already.
    assert 0 in one.rank_B
    assert len(set(one.rank_B.tolist())) > 2


def test_the_temperature_divides_what_is_read_as_a_probability_and_moves_no_rank() -> None:
    table, histories, item_B = _world(50, 9)
    network = build_network(SETTINGS)
    found = []
    for temperature in (1.0, 2.5):
        with torch.no_grad():
            network.mix.log_temperature.fill_(math.log(temperature))
            found.append(
                rank(network, table, histories, torch.ones(USERS, 8), table.standing(), item_B, None, keep=True)
            )
        scores_BI = found[-1].scores_BI
        assert scores_BI is not None
        expected_B = torch.nn.functional.cross_entropy(scores_BI / temperature, item_B, reduction="none")
        torch.testing.assert_close(found[-1].loss_B, expected_B, atol=1e-5, rtol=1e-5)
    cold, warm = found
    torch.testing.assert_close(cold.mixed_loss_B, cold.loss_B)
    assert torch.equal(cold.mixed_loss_B, warm.mixed_loss_B)
    assert not torch.allclose(warm.mixed_loss_B, warm.loss_B, atol=0.01)
    assert cold.rank_B.tolist() == warm.rank_B.tolist()


def test_a_score_that_is_no_number_gives_no_loss() -> None:
    table, histories, item_B = _world(50, 4)
    row = int(table.column("total").nonzero()[5])
    table.columns["vector"][row] = float("nan")
    network = build_network(SETTINGS)
    for way in (full_ranking._by_loop, full_ranking._by_tensors):
        found = way(network, table, histories, torch.ones(USERS, 8), table.standing(), item_B, None, keep=False)
        # Who has the item does not see it.
        shown_B = ~(histories.rows_BL == row).any(1) | (item_B == row)
        assert torch.isnan(found.mixed_loss_B)[shown_B].all()
        assert torch.isnan(found.loss_B)[shown_B].all()
        assert 0 < int(shown_B.sum()) < USERS
        assert not found.rank_B[(item_B == row).numpy()].any()


ORDER = """
import hashlib, sys
import numpy as np
from trainer import full_ranking as loops

def some(*shape):
    return draw.standard_normal(shape).astype(np.float32)

draw = np.random.default_rng(1)
if sys.argv[1:]:
    numbers = some(64)
    loops._powers(numbers, np.float32(4), numbers.copy(), np.zeros(64, np.int32))
    loops._expect(numbers, numbers.copy(), some(8, 64), np.zeros(12), 0)
    loops._score(numbers, some(8, 64), some(12), numbers.copy(), numbers.copy(), 0)
    loops._weigh(numbers, numbers.copy())
    draw = np.random.default_rng(1)
users, items = 16, 3000
found = loops._rank(
    some(users, items), some(8, items), some(users, 12), np.float32(0.8), np.zeros((users, 5), np.int32),
    some(3, users, 5),
    np.ones(items, np.float32), np.ones(items, np.float32),
    draw.integers(1, items, users), draw.integers(1, items, 4 * users),
    4 * np.arange(1, users + 1), np.empty((0, 0), np.float32),
)
print(hashlib.sha256(b"".join(each.tobytes() for each in found)).hexdigest())
"""


def test_what_a_process_has_compiled_or_loaded_before_changes_no_bit(tmp_path: Path) -> None:
    """Else who starts again, from what is kept on disk, would learn other weights than who went on."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # One that compiles, one that loads, and one that has met the parts by themselves.
    found = [
        subprocess.run([sys.executable, "-c", ORDER, *how], env=environment, check=True, capture_output=True).stdout
        for how in ([], [], ["parts"], ["parts"])
    ]
    assert len(set(found)) == 1
