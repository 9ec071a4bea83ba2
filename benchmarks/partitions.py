"""Partitions: how many of the best 100 are found, and how long it takes, beside a look at every row and FAISS.

The learner learns the beginning of a file of feedback; its items are then copied, with noise, until there are enough,
each copy with the standing of an item drawn at random. Users are those of the file as they last were. With --random
vectors and users have nothing in common, which is the worst that can be. Prints one JSON object; times are processor
time, microseconds a user, on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_up import changed
from threadpoolctl import threadpool_limits

from recsys.encoding import to_histories
from recsys.feedback_file import open_feedback_file
from recsys.item_table import PADDING_ROW, TRANSITION_REACH
from recsys.network import LIFTS
from recsys.scorer.encoder import Encoder
from recsys.scorer.items import Ahead, Items
from recsys.scorer.retrieval import Hidden, Own
from recsys.scorer.search import Search
from recsys.settings import Settings, load
from trainer.evaluation import RECSYS, Evaluation
from trainer.evaluation.stream import Stream
from trainer.examples import encode
from trainer.learner import Learner

KEEP = 100
TOGETHER = 32
COPIED = ("trend", "touched", "first", "total")
CPU = torch.device("cpu")
FAISS_LISTS, FAISS_PROBES, FAISS_SAMPLED = 1024, (8, 32, 128), 40


def learned(data: Path, events: int) -> tuple[Settings, Learner, Any]:
    """Learn the first feedback of a file; return the learner and the users' last histories."""
    file = open_feedback_file(data)
    settings = load({"classes": file.classes, "device": "cpu", "batch_size": 256}, environment={})
    evaluation = Evaluation(file, settings, CPU, [RECSYS])
    evaluation.run(events)
    assert evaluation.learner is not None
    last = {case.user: case.event for case in Stream(file, settings, evaluation.learner).cases(events)}
    examples = encode(list(last.values())[-TOGETHER:], settings)
    return settings, evaluation.learner, to_histories([examples.rows_BL, examples.classes_BL, examples.gaps_BL], CPU)


def copied(learner: Learner, settings: Settings, items: int, noise: float) -> Learner:
    """Return a learner of so many items, like those that were learned."""
    table, draw = learner.table, np.random.default_rng(2)
    known = table.rows
    of = np.concatenate([np.arange(1, known), draw.integers(1, known, max(0, items + 1 - known))])
    standing = np.concatenate([np.arange(1, known), draw.integers(1, known, max(0, items + 1 - known))])
    columns = {name: table.column(name)[of] for name in table.columns}
    columns |= {name: table.column(name)[standing] for name in COPIED}
    spread = table.column("vector")[1:].std(0)
    columns["vector"][known - 1 :] += noise * spread * torch.randn(len(of) - known + 1, settings.dimension)
    found = Learner(settings, CPU)
    found.network.load_state_dict(learner.network.state_dict())
    found.table.clock = table.clock
    found.table.write(torch.arange(1, len(of) + 1), columns, [(f"item-{row}", row) for row in range(1, len(of) + 1)])
    return found


def measure(learner: Learner, histories: Any, rounds: int, *, random: bool) -> dict[str, Any]:
    """Measure every way of retrieval, and what a version of 1,000 changed rows costs."""
    table = learner.table
    with torch.inference_mode():
        if random:
            generator = torch.Generator().manual_seed(1)
            table.columns["vector"][1 : table.rows] = torch.randn(table.rows - 1, 64, generator=generator)
        states, weights = Encoder(learner.network)(table.column("vector"), histories)
        if random:
            states = torch.randn(states.shape, generator=generator)
        started = time.thread_time()
        exact = Items.of(table)
        packed = time.thread_time()
        parted = Items.of(table, parted=True)
        build = time.thread_time() - packed, packed - started
        mask = torch.zeros(table.rows, dtype=torch.bool)
        mask[PADDING_ROW] = True
        hidden = Hidden(mask, mask.nonzero()[:, 0])
        own = [[int(row) for row in rows if row] for rows in histories.rows_BL]
        ways: dict[str, Callable[[], Any]] = {}
        for name, items in (("exact", exact), ("partitioned", parted)):
            way = Search()
            way.install(items, table)
            latest = histories.latest_first(TRANSITION_REACH)
            ways[name] = partial(way.find, weights, states, latest, [hidden] * len(own), Own.of(own), KEEP)
        rows = {name: way().rows_BK.numpy() for name, way in ways.items()}
        asked = torch.cat([weights[:, :1] * states, weights[:, 1:-LIFTS]], 1).numpy()
        faiss_ways, faiss_rows = with_faiss(np.concatenate([exact.vectors_ID, exact.standing_IS], 1), asked)
        times = timed(ways | faiss_ways, rounds, len(own))
        version, _ = changed(learner, 1000, 5)
        started = time.thread_time()
        ahead = Ahead.of(parted, table, version)
        computed = time.thread_time()
        assert ahead is not None
        ahead.land(table)
        landed = time.thread_time() - computed
    assert parted.partitions is not None
    return {
        "items": table.rows - 1,
        "partitions": len(parted.partitions.mean_LV),
        "recall": {
            "partitioned": recall(rows["exact"], rows["partitioned"]),
            **{name: recall(faiss_rows["faiss_flat"], found) for name, found in faiss_rows.items()},
        },
        "microseconds": times,
        "build_seconds": {"partitioned": round(build[0], 2), "exact": round(build[1], 2)},
        "version_milliseconds": {"ahead": round(1000 * (computed - started), 1), "in_place": round(1000 * landed, 2)},
    }


def recall(truth_BK: np.ndarray, found_BK: np.ndarray) -> float:
    """Return the share of the true rows that were found."""
    return round(
        float(np.mean([len(set(a) & set(b)) / len(set(a)) for a, b in zip(truth_BK, found_BK, strict=True)])), 4
    )


def timed(ways: dict[str, Callable[[], Any]], rounds: int, users: int) -> dict[str, float]:
    """Return the median time of each way, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.thread_time()
            way()
            times[name].append(time.thread_time() - started)
    return {name: round(statistics.median(each) / users * 1e6, 1) for name, each in times.items()}


def with_faiss(rows: np.ndarray, asked: np.ndarray) -> tuple[dict[str, Callable[[], Any]], dict[str, np.ndarray]]:
    """Return FAISS's ways with the same products, without transitions or hidden rows; nothing where it is not."""
    try:
        import faiss
    except ImportError:
        return {}, {}
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    lists = faiss.IndexIVFFlat(quantizer, rows.shape[1], FAISS_LISTS, faiss.METRIC_INNER_PRODUCT)
    lists.train(
        rows[np.random.default_rng(1).choice(len(rows), min(len(rows), FAISS_SAMPLED * FAISS_LISTS), replace=False)]
    )
    lists.add(rows)

    def probed(probes: int) -> Any:
        lists.nprobe = probes
        return lists.search(asked, KEEP)

    ways: dict[str, Callable[[], Any]] = {"faiss_flat": lambda: flat.search(asked, KEEP)}
    ways |= {f"faiss_ivf_{probes}": partial(probed, probes) for probes in FAISS_PROBES}
    return ways, {name: way()[1] for name, way in ways.items()}


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of feedback")
    parser.add_argument("--events", type=int, default=20_000, help="feedback to learn")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--noise", type=float, default=0.5, help="of copies, in standard deviations of the vectors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", action="store_true", help="vectors and users that have nothing in common")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    with threadpool_limits(1):
        settings, learner, histories = learned(arguments.data, arguments.events)
        many = copied(learner, settings, arguments.items, arguments.noise)
        print(json.dumps(measure(many, histories, arguments.rounds, random=arguments.random)))


if __name__ == "__main__":
    main()
