"""Serving: how many recommendations a second one server process gives, and how soon, beside two others in one run.

Made-up weights (100,000 items of length 64), users with 30 to 50 history entries in the store, ten items asked for,
and a new version of the weights every second. The peers: `noop` answers bytes that it holds, over the same transport,
and bounds what any server can do; `straightforward` is what one writes in an afternoon: grpcio with threads, one read
of the history, one forward pass of the same network, one product with all items, torch.topk.

Requests a second are those of a closed loop with many calls in flight; times are those of an open loop at half of that
rate, from the moment a call was due; `alone_p50_seconds` is one call at a time. The measurements are taken in turn,
several rounds, and medians are given. Servers, store, publisher and client are processes of their own.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from made_up import changed, made_up_learner, made_up_lineage
from raw_calls import free_ports, measure, processor_seconds

from recsys import Client, Feedback
from recsys.encoding import encode_histories, row_history, to_histories
from recsys.errors import RecsysError
from recsys.feedback_log import FeedbackLog
from recsys.histories import Histories
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import recommender_pb2, recommender_pb2_grpc
from recsys.weights import WeightStore, encode
from recsys.weights.replica import Replica

PATH = "/recsys.v1.RecommenderService/Recommend"
USERS = 500
HISTORY = (30, 50)
COUNT = 10
START_SECONDS = 120.0
IN_FLIGHT = 64
THREADS = 8
PUBLISH_SECONDS = 1.0
ROWS_PER_VERSION = 1000


def settings_for(store_url: str) -> Settings:
    """Return the settings that every part uses."""
    return load({"redis_url": store_url, "replay_capacity": USERS * HISTORY[1]}, environment={})


def publish(store_url: str, items: int) -> None:
    """Write the first version and the histories, say so, and then commit a version every second until told to end."""
    settings = settings_for(store_url)
    draw = np.random.default_rng(2)
    learner = made_up_learner(settings, items)
    with connect(settings) as connection:
        store = WeightStore(connection, settings)
        epoch = store.acquire()
        served, own = learner.write_all()
        store.commit(epoch, 0, encode(served), encode(own), made_up_lineage(settings, 1))
        log = FeedbackLog(connection, settings)
        for user in range(USERS):
            chosen = draw.integers(1, items + 1, int(draw.integers(HISTORY[0], HISTORY[1] + 1)))
            log.append([Feedback(f"user-{user}", f"item-{item}", "click") for item in chosen])
        print("ready", flush=True)
        for version in range(1, sys.maxsize):
            time.sleep(PUBLISH_SECONDS)
            served, own = changed(learner, min(ROWS_PER_VERSION, items // 2), version)
            store.commit(epoch, version, encode(served), encode(own), made_up_lineage(settings, version + 1))


class Straightforward(recommender_pb2_grpc.RecommenderServiceServicer):
    """Answer one request with one forward pass."""

    def __init__(self, store_url: str) -> None:
        torch.set_num_threads(1)
        self._settings = settings_for(store_url)
        client = connect(self._settings)
        self._histories = Histories(client, self._settings)
        self._replica = Replica(self._settings, torch.device("cpu"))
        first = next(iter(WeightStore(client, self._settings).read_after(0, count=1)))
        self._replica.apply(first.payload)
        self._replica.network.eval()

    @torch.inference_mode()
    def Recommend(self, request: recommender_pb2.RecommendRequest, context: grpc.ServicerContext) -> Any:
        """Rank all items by the product of their vectors with the user's state."""
        settings, table, network = self._settings, self._replica.table, self._replica.network
        history = self._histories.read([request.user_id])[0]
        rows = row_history(history[-settings.history_length :], table, settings.class_index)
        encoded = encode_histories([rows], [time.time_ns() // 1_000_000], settings.history_length)
        histories = to_histories(encoded, torch.device("cpu"))
        vectors_ID = table.column("vector")
        rows_BL = histories.rows_BL
        states_BD = network.states(vectors_ID[rows_BL], vectors_ID[rows_BL[:, -1]], histories)
        scores_I = vectors_ID @ states_BD[0]
        scores_I[rows_BL[0]] = -torch.inf
        found = scores_I.topk(request.count)
        items = [
            recommender_pb2.RecommendedItem(item_id=table.item_ids[row], score=score)
            for row, score in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        return recommender_pb2.RecommendResponse(items=items, version=1)


def serve_straightforward(store_url: str, port: int) -> None:
    """Serve as one does by the library's tutorial."""
    server = grpc.server(ThreadPoolExecutor(THREADS))
    recommender_pb2_grpc.add_RecommenderServiceServicer_to_server(Straightforward(store_url), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def serve_noop(answer: bytes, port: int) -> None:
    """Answer every call with the same bytes, over the transport that the server chooses here."""
    from pygrpc_native import EVENT_CALL, NativeGrpcFront

    front = NativeGrpcFront(f"127.0.0.1:{port}", [(PATH, False)], io_threads=1, call_details=True)
    front.start()
    while (events := front.recv_batch_details(256)) is not None:
        for kind, call_id, *_ in events:
            if kind == EVENT_CALL:
                front.respond(call_id, answer)


@contextmanager
def part(*arguments: str, wait: bool = False, environment: dict[str, str] | None = None) -> Iterator[int]:
    """Run a part as a process of its own; yield its id, with `wait` once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE if wait else subprocess.DEVNULL,
    )
    try:
        if wait:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def until_answered(target: str) -> None:
    """Wait until a server recommends."""
    deadline = time.monotonic() + START_SECONDS
    with Client(target, timeout=10.0) as client:
        while True:
            try:
                assert len(client.recommend("user-0", COUNT).items) == COUNT
                return
            except RecsysError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def round_of(target: str, pid: int, seconds: float) -> dict[str, Any]:
    """Measure one server once in each way."""
    requests = [
        recommender_pb2.RecommendRequest(user_id=f"user-{user}", count=COUNT).SerializeToString()
        for user in range(USERS)
    ]

    def ask(**how: Any) -> dict[str, Any]:
        found = measure(target, PATH, requests, seconds=seconds, **how)
        assert set(found["outcomes"]) <= {"OK"}, found
        return found

    ask(in_flight=IN_FLIGHT)
    before = processor_seconds(pid)
    closed = ask(in_flight=IN_FLIGHT)
    spent = processor_seconds(pid) - before
    opened = ask(rate=closed["requests_per_second"] / 2)
    return {
        "requests_per_second": closed["requests_per_second"],
        "p50_seconds": opened["p50_seconds"],
        "p99_seconds": opened["p99_seconds"],
        "alone_p50_seconds": ask(in_flight=1)["p50_seconds"],
        "processor_seconds_per_request": spent / seconds / closed["requests_per_second"],
        "client_processor_share": closed["sender_processor_share"],
    }


def median_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: round(statistics.median(each[key] for each in rounds), 6) for key in rounds[0]}


def whole(items: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Run everything and measure in turn."""
    this = str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store, ExitStack() as stack:
        stack.enter_context(part(this, "--publish", store.url, "--items", str(items), wait=True))
        ours, theirs, idle = free_ports(3)
        ports = {"recsys": ours, "straightforward": theirs, "noop": idle}
        targets = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        environment = {"RECSYS_PORT": str(ours), "RECSYS_METRICS_PORT": "0", "RECSYS_REDIS_URL": store.url}
        pids = {"recsys": stack.enter_context(part("-m", "recsys", "serve", environment=environment))}
        until_answered(targets["recsys"])
        with grpc.insecure_channel(targets["recsys"]) as channel:
            request = recommender_pb2.RecommendRequest(user_id="user-0", count=COUNT).SerializeToString()
            answer: bytes = channel.unary_unary(PATH)(request, timeout=10)
        for name, argument in (("straightforward", store.url), ("noop", answer.hex())):
            pids[name] = stack.enter_context(part(this, f"--{name}", argument, "--port", str(ports[name])))
            until_answered(targets[name])
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in pids}
        for _ in range(rounds):
            for name, pid in pids.items():
                found[name].append(round_of(targets[name], pid, seconds))
    results = [{"name": name, **median_of(each)} for name, each in found.items()]
    rates = {result["name"]: float(result["requests_per_second"]) for result in results}
    return {
        "items": items,
        "in_flight": IN_FLIGHT,
        "seconds": seconds,
        "rounds": rounds,
        "cores": os.cpu_count(),
        "results": results,
        "times_straightforward": round(rates["recsys"] / rates["straightforward"], 2),
        "share_of_noop": round(rates["recsys"] / rates["noop"], 3),
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one line")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    for role in ("--publish", "--straightforward", "--noop"):
        parser.add_argument(role, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    roles: dict[str, Callable[[], None]] = {
        "publish": lambda: publish(arguments.publish, arguments.items),
        "straightforward": lambda: serve_straightforward(arguments.straightforward, arguments.port),
        "noop": lambda: serve_noop(bytes.fromhex(arguments.noop), arguments.port),
    }
    for name, role in roles.items():
        if getattr(arguments, name):
            role()
            return
    found = whole(arguments.items, arguments.seconds, arguments.rounds)
    print(json.dumps(found, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
