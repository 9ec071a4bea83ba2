"""Request parts: where the processor's time of a recommendation goes, part by part, in one process.

The parts are the server's own, called as the server calls them: made-up weights (100,000 items of length 64), users
with 30 to 50 entries in a real store, ten items asked for, in batches of several sizes. Times are this thread's
processor time, so that what the store and other processes do meanwhile is not in them; each part is timed around its
calls, so the parts of a whole are a little less than it. What the transport costs is told by serving.py's no-op.
What a request counts takes no longer than a look at the clock does: `metrics` is the mean of many times the same calls,
made apart. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_up import made_up_learner
from prometheus_client import CollectorRegistry
from serving import COUNT, HISTORY, USERS, settings_for
from threadpoolctl import threadpool_limits

from recsys.batcher import Batcher
from recsys.catalog import Catalog, CatalogMirror
from recsys.feedback import Feedback
from recsys.feedback_log import FeedbackLog
from recsys.histories import Histories
from recsys.metrics import ServerMetrics
from recsys.scorer import Answer, Scorer, scan, served, shortlist
from recsys.scorer.encoder import Encoder
from recsys.scorer.marks import Marks
from recsys.scorer.ranking import Ranking
from recsys.scorer.search import Search
from recsys.scorer.served import Served
from recsys.scorer.user_rates import UserRates
from recsys.service.auth import Guard
from recsys.service.edge import Edge, methods_of
from recsys.service.recommender import Question, Recommender, Scoring
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.v1 import recommender_pb2

PATH = "/recsys.v1.RecommenderService/Recommend"
# What is timed, by the part that it is of: parts that are inside another are named below it.
TIMED: tuple[tuple[str, Any, str], ...] = (
    ("store: read histories", Histories, "read_serialized"),
    ("scorer", Served, "recommend"),
    ("scorer / histories to arrays", served, "read"),
    ("scorer / encoder", Encoder, "__call__"),
    ("scorer / rates of the user", UserRates, "__call__"),
    ("scorer / retrieval", Search, "find"),
    ("scorer / retrieval / scan and shortlist", scan, "best"),
    ("scorer / retrieval / what follows, own rows", Marks, "of"),
    ("scorer / retrieval / selection", shortlist, "in_order"),
    ("scorer / ranking", Ranking, "logits"),
    ("scorer / last order", served, "in_final_order"),
    ("scorer / reasons", Served, "_apart"),
    ("response: message, id, metrics", Recommender, "_recommended"),
)


def timed(spent: dict[str, float]) -> None:
    """Time the parts from here on."""

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] += time.thread_time() - started

        return call

    for name, owner, attribute in TIMED:
        inside = vars(owner)[attribute]
        if isinstance(inside, classmethod):
            setattr(owner, attribute, classmethod(around(name, inside.__func__)))
        else:
            setattr(owner, attribute, around(name, inside))


class Held(Batcher[Question, Answer]):
    """Hold what is submitted until it is taken: the batches are made here, so that all is one thread's time."""

    def __init__(self) -> None:
        super().__init__("held", lambda questions: [], max_batch=1 << 30, queue_limit=1 << 30)
        self.close()
        self._closed = False

    def take(self) -> tuple[list[Question], list[Future[Answer]]]:
        """Return what waits."""
        batch = [(waiting.item, future) for future, waiting in self._queue.items()]
        self._queue.clear()
        self._waiting_size = 0
        return [question for question, _ in batch], [future for _, future in batch]


def measure(store_url: str, items: int, sizes: list[int], requests: int) -> dict[str, dict[str, float]]:
    """Return microseconds a request by part, for each size of batch."""
    settings, draw = settings_for(store_url), np.random.default_rng(2)
    found: dict[str, dict[str, float]] = {}
    with connect(settings) as client:
        log = FeedbackLog(client, settings)
        for user in range(USERS):
            chosen = draw.integers(1, items + 1, int(draw.integers(HISTORY[0], HISTORY[1] + 1)))
            log.append([Feedback(f"user-{user}", f"item-{item}", "click") for item in chosen])
        mirror = CatalogMirror(Catalog(client, settings))
        mirror.refresh()
        scorer, metrics = Scorer(settings, mirror, torch.device("cpu")), ServerMetrics(CollectorRegistry())
        payload, _ = made_up_learner(settings, items).write_all()
        scorer.load(VersionRecord(version=1), payload)
        scorer.warm_up()
        histories, held = Histories(client, settings), Held()
        scoring = Scoring(histories, scorer, metrics)
        unused: Any = None
        recommender = Recommender(settings, scorer, mirror, held, unused, histories, unused, metrics)
        service = recommender_pb2.DESCRIPTOR.services_by_name["RecommenderService"]
        edge = Edge(methods_of(service, recommender), metrics, Guard(""), max_answer_bytes=1 << 22)
        spent: dict[str, float] = defaultdict(float)
        timed(spent)

        def batch(size: int) -> None:
            users = draw.integers(0, USERS, size)
            calls = [recommender_pb2.RecommendRequest(user_id=f"user-{u}", count=COUNT) for u in users]
            for request in [each.SerializeToString() for each in calls]:
                edge.call(PATH, (), 10.0, len).begin(request)
            questions, futures = held.take()
            for future, answer in zip(futures, scoring(questions), strict=True):
                future.set_result(answer)

        for size in sizes:
            for _ in range(20):
                batch(size)
            spent.clear()
            times = -(-requests // size)
            started = time.thread_time()
            for _ in range(times):
                batch(size)
            spent["whole"] = time.thread_time() - started
            spent["metrics"] = counting(metrics, size, times)
            found[str(size)] = {name: round(seconds / (times * size) * 1e6, 1) for name, seconds in spent.items()}
    return found


def counting(metrics: ServerMetrics, size: int, times: int) -> float:
    """Return the processor's time of all that so many batches of Recommend count and time."""
    service, method = PATH[1:].split("/")
    rows = np.arange(1, 1 + COUNT)
    sources = [1 + item % 3 for item in range(COUNT)]
    started = time.thread_time()
    for _ in range(times):
        metrics.batch_scored(size)
        metrics.scored("empty", 0)
        metrics.scored("known", size)
        for _ in range(size):
            metrics.rpc_started(service, method)
            metrics.recommended(rows, sources, 0.004)
            metrics.rpc_handled(service, method, "OK", 0.005)
    return time.thread_time() - started


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 32], help="of batches")
    parser.add_argument("--requests", type=int, default=2000, help="for each size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store:
        found = measure(store.url, arguments.items, arguments.sizes, arguments.requests)
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({"items": arguments.items, "load_average": load, "microseconds_a_request": found}, indent=2))


if __name__ == "__main__":
    main()
