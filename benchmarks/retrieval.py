"""Retrieval: the best 100 of all items for 32 users at a time, both of ours and FAISS, in one process and in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from made_up import made_up_learner
from threadpoolctl import threadpool_limits

from recsys.item_table import PADDING_ROW, TRANSITION_REACH
from recsys.network import LIFTS, PARTS
from recsys.scorer.items import Items
from recsys.scorer.retrieval import Hidden, Own, Retrieval
from recsys.scorer.search import Search
from recsys.settings import Settings

KEEP = 100
OWN = 50


def compare(settings: Settings, items: int, rounds: int) -> dict[str, Any]:
    """Return the median microseconds a user that each takes on one core, processor time, and how many rows agree."""
    torch.set_num_threads(1)
    table = made_up_learner(settings, items).table
    found = Items.of(table)
    draw = np.random.default_rng(3)
    mask = torch.zeros(table.rows, dtype=torch.bool)
    mask[PADDING_ROW] = True
    hidden = Hidden(mask, mask.nonzero()[:, 0])
    medians: dict[str, Any] = {}
    with threadpool_limits(1), torch.inference_mode():
        for users in (1, 32):
            weights = torch.full((users, PARTS), 0.2)
            states = torch.from_numpy(draw.standard_normal((users, settings.dimension)).astype(np.float32))
            history = torch.from_numpy(draw.integers(1, table.rows, (users, TRANSITION_REACH)))
            own = draw.integers(1, table.rows, (users, OWN)).tolist()
            ways: dict[str, Callable[[], Any]] = {}
            searches: dict[str, Search | Retrieval] = {"search": Search(), "retrieval": Retrieval(torch.device("cpu"))}
            for name, search in searches.items():
                search.install(found, table)
                ways[name] = partial(search.find, weights, states, history, [hidden] * users, Own.of(own), KEEP)
            ways |= faiss_ways(found, weights[:, :1] * states, weights[:, 1:-LIFTS])
            agree = (ways["search"]()[1] == ways["retrieval"]()[1]).float().mean().item()
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(10 * rounds):
                for name, way in ways.items():
                    started = time.thread_time()
                    way()
                    times[name].append(time.thread_time() - started)
            medians[f"users_{users}"] = {
                **{f"{name}_microseconds": round(statistics.median(t) / users * 1e6, 1) for name, t in times.items()},
                "rows_alike": round(agree, 4),
            }
    rough = found.rough
    return {
        "items": items,
        **medians,
        "bytes_per_item": rough and sum(each.blocks_GP.nbytes for each in rough) // table.rows,
    }


def faiss_ways(items: Items, users_BD: torch.Tensor, weights_BS: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return FAISS's exact search by the same products, without transitions or hidden rows; nothing where it is not."""
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(1)
    rows = torch.cat([items.vectors_ID, items.standing_IS], 1).numpy()
    asked = torch.cat([users_BD, weights_BS], 1).numpy()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return {"faiss_flat": lambda: index.search(asked, KEEP)}
