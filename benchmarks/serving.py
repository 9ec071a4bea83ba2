"""Serving: how many recommendations a second one server process gives, and how soon, beside others in one run.

Made-up weights (100,000 items of length 64), users with 30 to 50 history entries in the store, ten items asked for,
and a new version of the weights every second. The peers: `noop` answers bytes that it holds, over the same transport,
and bounds what any server can do; `straightforward` is what one writes in an afternoon: grpcio with threads, one read
of the history, one forward pass of the same network, one product with all items, torch.topk. `triton` is the same
behind NVIDIA's Triton, in batches that it forms, with histories that come with the request; it needs `--triton`, an
interpreter that has nvidia-pytriton (of a Python that is not the system's, name its lib in LD_LIBRARY_PATH).
`--retrieval` compares retrieval alone with FAISS, where faiss-cpu is installed.

Requests a second are those of a closed loop with many calls in flight; times are those of an open loop at 70% of that
rate, from the moment a call was due; `alone_p50_seconds` is one call at a time. The measurements are taken in turn,
several rounds, and medians are given. Servers, store, publisher and client are processes of their own; with two cores
or more the measured server has the last one to itself. `--plot` draws times against load. `--ripple` measures ours
alone: without new versions, with one and with ten a second, in turn; the same with versions of another model in the
same store, which the server does not follow, so that all they change is what store, publisher and client do to the
times; and Score of 500 candidates, one call at a time.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import retrieval
import torch
import triton_peer
from made_up import changed, made_up_learner, made_up_lineage
from raw_calls import free_ports, measure, processor_seconds

from recsys import Client, Feedback
from recsys.encoding import encode_histories, row_history, to_histories
from recsys.errors import RecsysError
from recsys.feedback_log import FeedbackLog
from recsys.histories import Histories
from recsys.network import Histories as network_histories
from recsys.settings import Settings, load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import recommender_pb2, recommender_pb2_grpc
from recsys.weights import WeightStore, encode
from recsys.weights.replica import Replica

PATH, SCORE_PATH = "/recsys.v1.RecommenderService/Recommend", "/recsys.v1.RecommenderService/Score"
USERS = 500
HISTORY = (30, 50)
COUNT = 10
START_SECONDS = 120.0
# Of the highest rate: where times are given, and where they are drawn.
LOAD = 0.7
LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
IN_FLIGHT = 64
LEAST_PRIORITY = 19
THREADS = 8
PUBLISH_SECONDS = 1.0
ROWS_PER_VERSION = 1000
# Whose versions, and how many a second; the keys of the model that the server does not follow begin with its name.
FOLLOWED, ELSEWHERE = "followed", "elsewhere"
KINDS = ((FOLLOWED, 0), (FOLLOWED, 1), (FOLLOWED, 10), (ELSEWHERE, 1), (ELSEWHERE, 10))
NEVER = 3600.0
# Of the highest rate; and beside which of these how many candidates are scored.
RIPPLE_LOAD = 0.5
BESIDE_SCORE = KINDS[2]
CANDIDATES = 500


def settings_for(store_url: str, **others: Any) -> Settings:
    """Return the settings that every part uses."""
    return load({"redis_url": store_url, "replay_capacity": USERS * HISTORY[1], **others}, environment={})


def publish(settings: Settings, items: int, pause: float) -> None:
    """Write the first version and the histories, say so, and then commit a version every `pause` seconds until ended.

    A line on standard input is another pause.
    """
    # It shares a core with the client, which would notice answers late while a version is made.
    os.setpriority(os.PRIO_PROCESS, 0, LEAST_PRIORITY)
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
            while select.select([sys.stdin], [], [], pause)[0]:
                pause = float(os.read(sys.stdin.fileno(), 1 << 12).split()[-1])
            served, own = changed(learner, min(ROWS_PER_VERSION, items // 2), version)
            store.commit(epoch, version, encode(served), encode(own), made_up_lineage(settings, version + 1))


def committed(settings: Settings) -> int:
    """Return the last version that was committed."""
    with connect(settings) as connection:
        head = WeightStore(connection, settings).head()
    assert head
    return head.version


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
        states_BD = network.states(vectors_ID, rows_BL, histories)
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
def part(
    *arguments: str,
    wait: bool = False,
    environment: dict[str, str] | None = None,
    cores: set[int] | None = None,
    interpreter: str = sys.executable,
    stdin: int | None = None,
) -> Iterator[int]:
    """Run a part as a process of its own; yield its id, with `wait` once it has said that it is ready."""
    process = subprocess.Popen(
        [interpreter, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdin=stdin,
        stdout=subprocess.PIPE if wait else subprocess.DEVNULL,
        preexec_fn=partial(os.sched_setaffinity, 0, cores) if cores else None,
    )
    try:
        if wait:
            assert process.stdout
            while (line := process.stdout.readline()) != b"ready\n":
                assert line, f"{arguments} ended before it was ready"
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


@dataclass(frozen=True, slots=True)
class Asked:
    """A server that is measured: where it listens, its process, and what it is asked."""

    target: str
    pid: int
    path: str
    requests: list[bytes]

    def ask(self, seconds: float, **how: Any) -> dict[str, Any]:
        """Ask in one way."""
        found = measure(self.target, self.path, self.requests, seconds=seconds, **how)
        assert set(found["outcomes"]) <= {"OK"}, found
        return found


def round_of(server: Asked, seconds: float) -> dict[str, Any]:
    """Measure one server once in each way."""
    server.ask(min(seconds, 2.0), in_flight=IN_FLIGHT)
    before = processor_seconds(server.pid)
    closed = server.ask(seconds, in_flight=IN_FLIGHT)
    spent = processor_seconds(server.pid) - before
    opened = server.ask(seconds, rate=LOAD * closed["requests_per_second"])
    return {
        "requests_per_second": closed["requests_per_second"],
        "p50_seconds": opened["p50_seconds"],
        "p99_seconds": opened["p99_seconds"],
        "alone_p50_seconds": server.ask(min(seconds, 2.0), in_flight=1)["p50_seconds"],
        "processor_seconds_per_request": spent / seconds / closed["requests_per_second"],
        "client_processor_share": closed["sender_processor_share"],
    }


def median_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: round(statistics.median(each[key] for each in rounds), 6) for key in rounds[0]}


def to_torchscript(store_url: str, path: Path) -> list[bytes]:
    """Write the network of the first version for Triton; return requests of users with histories of their own."""
    settings, draw = settings_for(store_url), np.random.default_rng(7)
    replica = Replica(settings, torch.device("cpu"))
    with connect(settings) as connection:
        replica.apply(next(iter(WeightStore(connection, settings).read_after(0, count=1))).payload)
    network, vectors_ID = replica.network.eval(), replica.table.column("vector").clone()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("vectors_ID", vectors_ID)

        def forward(self, history_B3L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows_BL, classes_BL, gaps_BL = history_B3L.unbind(1)
            histories = network_histories(rows_BL, classes_BL, gaps_BL)
            states_BD = self.network.states(self.vectors_ID, rows_BL, histories)
            scores_BI = (states_BD @ self.vectors_ID.T).scatter(1, rows_BL, -torch.inf)
            found = scores_BI.topk(COUNT, dim=1)
            return found.values, found.indices

    length = settings.history_length
    histories = np.zeros((USERS, 3, length), np.int64)
    for user in range(USERS):
        taken = int(draw.integers(HISTORY[0], HISTORY[1] + 1))
        histories[user, :, -taken:] = draw.integers(1, [[len(vectors_ID)], [3], [30]], (3, taken))
    with torch.no_grad():
        torch.jit.trace(Whole(), torch.from_numpy(histories[:2])).save(str(path))
    return [infer_request(each) for each in histories]


def infer_request(history_3L: np.ndarray) -> bytes:
    """Write a ModelInferRequest of Triton's protocol; to import its stubs would ask for another protobuf."""

    def field(number: int, data: bytes) -> bytes:
        size = len(data)
        sizes = bytes([size]) if size < 128 else bytes([size % 128 + 128, size // 128])
        return bytes([number << 3 | 2]) + sizes + data

    tensor = field(1, b"history") + field(2, b"INT64") + field(3, bytes([1, *history_3L.shape]))
    return field(1, triton_peer.NAME.encode()) + field(5, tensor) + field(7, history_3L.tobytes())


def start(
    stack: ExitStack, store_url: str, directory: str, triton: str | None, server_cores: set[int] | None
) -> dict[str, Asked]:
    """Start every server and wait until it answers."""
    this = str(Path(__file__).resolve())
    ports = dict(zip(("recsys", "straightforward", "noop", "triton"), free_ports(4), strict=True))
    targets = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
    requests = [
        recommender_pb2.RecommendRequest(user_id=f"user-{user}", count=COUNT).SerializeToString()
        for user in range(USERS)
    ]
    environment = {"RECSYS_PORT": str(ports["recsys"]), "RECSYS_METRICS_PORT": "0", "RECSYS_REDIS_URL": store_url}
    pid = stack.enter_context(part("-m", "recsys", "serve", environment=environment, cores=server_cores))
    servers = {"recsys": Asked(targets["recsys"], pid, PATH, requests)}
    until_answered(targets["recsys"])
    with grpc.insecure_channel(targets["recsys"]) as channel:
        answer: bytes = channel.unary_unary(PATH, None, None)(requests[0], timeout=10)
    for name, argument in (("straightforward", store_url), ("noop", answer.hex())):
        pid = stack.enter_context(part(this, f"--{name}", argument, "--port", str(ports[name]), cores=server_cores))
        until_answered(targets[name])
        servers[name] = Asked(targets[name], pid, PATH, requests)
    if triton:
        network = Path(directory) / "network.pt"
        asked = to_torchscript(store_url, network)
        site, length = str(Path(torch.__file__).parents[1]), str(settings_for(store_url).history_length)
        arguments = (str(Path(triton_peer.__file__)), site, str(network), str(ports["triton"]), length, str(COUNT))
        pid = stack.enter_context(part(*arguments, wait=True, cores=server_cores, interpreter=triton))
        servers["triton"] = Asked(targets["triton"], pid, "/inference.GRPCInferenceService/ModelInfer", asked)
    return servers


def whole(items: int, seconds: float, rounds: int, plot: str | None, triton: str | None) -> dict[str, Any]:
    """Run everything and measure in turn."""
    cores = sorted(os.sched_getaffinity(0))
    server_cores = {cores[-1]} if len(cores) > 1 else None
    if server_cores:
        # The store, the publisher and the client: what this process starts.
        os.sched_setaffinity(0, cores[:-1])
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store, ExitStack() as stack:
        publisher = (str(Path(__file__).resolve()), "--publish", store.url, "--items", str(items))
        stack.enter_context(part(*publisher, wait=True, stdin=subprocess.PIPE))
        servers = start(stack, store.url, directory, triton, server_cores)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        before, began = committed(settings_for(store.url)), time.monotonic()
        for _ in range(rounds):
            for name, server in servers.items():
                found[name].append(round_of(server, seconds))
        versions = (committed(settings_for(store.url)) - before) / (time.monotonic() - began)
        results = [{"name": name, **median_of(each)} for name, each in found.items()]
        rates = {str(result["name"]): float(result["requests_per_second"]) for result in results}
        if plot:
            draw_times(servers, rates, seconds, plot)
    return {
        "items": items,
        "in_flight": IN_FLIGHT,
        "seconds": seconds,
        "rounds": rounds,
        "versions_per_second": round(versions, 2),
        "cores": len(cores),
        "load_average": round(os.getloadavg()[0], 1),
        "results": results,
        "times_straightforward": round(rates["recsys"] / rates["straightforward"], 2),
        "share_of_noop": round(rates["recsys"] / rates["noop"], 3),
    }


def ripple(items: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure what new versions do to the times of ours, and Score."""
    cores = sorted(os.sched_getaffinity(0))
    server_cores = {cores[-1]} if len(cores) > 1 else None
    if server_cores:
        os.sched_setaffinity(0, cores[:-1])
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store, ExitStack() as stack:
        publisher = (str(Path(__file__).resolve()), "--publish", store.url, "--items", str(items))
        pauses = {}
        whose = {FOLLOWED: settings_for(store.url), ELSEWHERE: settings_for(store.url, key_prefix=ELSEWHERE)}
        for name, others in ((FOLLOWED, ()), (ELSEWHERE, ("--elsewhere",))):
            told, pauses[name] = os.pipe()
            stack.enter_context(part(*publisher, *others, wait=True, stdin=told))
            os.write(pauses[name], f"{NEVER}\n".encode())
        server = start(stack, store.url, directory, None, server_cores)["recsys"]
        draw = np.random.default_rng(3)
        wanted = [
            recommender_pb2.ScoreRequest(
                user_id=f"user-{user}",
                item_ids=[f"item-{item}" for item in draw.choice(items, CANDIDATES, replace=False) + 1],
            ).SerializeToString()
            for user in range(USERS)
        ]
        scoring = replace(server, path=SCORE_PATH, requests=wanted)
        closed = server.ask(seconds, in_flight=IN_FLIGHT)["requests_per_second"]
        found: dict[tuple[str, int], list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        scored = []
        for _ in range(rounds):
            for name, versions in KINDS:
                os.write(pauses[name], f"{1 / versions if versions else NEVER}\n".encode())
                time.sleep(PUBLISH_SECONDS)
                before, began = committed(whose[name]), time.monotonic()
                asked = server.ask(seconds, rate=RIPPLE_LOAD * closed)
                came = (committed(whose[name]) - before) / (time.monotonic() - began)
                found[name, versions].append(asked | {"committed_per_second": came})
                if (name, versions) == BESIDE_SCORE:
                    scored.append(scoring.ask(seconds, in_flight=1))
                os.write(pauses[name], f"{NEVER}\n".encode())
    quantiles = ("p50_seconds", "p99_seconds")
    figures = (*quantiles, "committed_per_second")
    return {
        "items": items,
        "rate": RIPPLE_LOAD * closed,
        **{
            f"{name}_versions_per_second": {
                versions: median_of([{figure: each[figure] for figure in figures} for each in rounds_])
                for (kind, versions), rounds_ in found.items()
                if kind == name
            }
            for name in pauses
        },
        f"score_{CANDIDATES}": median_of([{name: each[name] for name in quantiles} for each in scored]),
        "load_average": round(os.getloadavg()[0], 1),
    }


def draw_times(servers: dict[str, Asked], rates: dict[str, float], seconds: float, path: str) -> None:
    """Draw each server's times against load, the ceiling apart."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, server in servers.items():
        if name == "noop":
            continue
        points = [(share * rates[name], server.ask(seconds, rate=share * rates[name])) for share in LOADS]
        for quantile, style in (("p50", "-"), ("p99", "--")):
            milliseconds = [1000 * each[f"{quantile}_seconds"] for _, each in points]
            axes.plot([rate for rate, _ in points], milliseconds, style, marker=".", label=f"{name} {quantile}")
    axes.set(xscale="log", yscale="log", xlabel="requests per second, on schedule", ylabel="milliseconds")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", help="a PNG to write")
    parser.add_argument("--triton", help="an interpreter that has nvidia-pytriton")
    parser.add_argument("--retrieval", action="store_true", help="compare retrieval alone")
    parser.add_argument("--ripple", action="store_true", help="what new versions do to times, and Score; ours alone")
    parser.add_argument("--json", action="store_true", help="print one line")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    for name in ("--publish", "--straightforward", "--noop"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--elsewhere", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    roles: dict[str, Callable[[], None]] = {
        "publish": lambda: publish(
            settings_for(arguments.publish, **({"key_prefix": ELSEWHERE} if arguments.elsewhere else {})),
            *(arguments.items, PUBLISH_SECONDS),
        ),
        "straightforward": lambda: serve_straightforward(arguments.straightforward, arguments.port),
        "noop": lambda: serve_noop(bytes.fromhex(arguments.noop), arguments.port),
    }
    for name, role in roles.items():
        if getattr(arguments, name):
            role()
            return
    if arguments.retrieval:
        found = retrieval.compare(settings_for("redis://unused"), arguments.items, arguments.rounds)
    elif arguments.ripple:
        found = ripple(arguments.items, arguments.seconds, arguments.rounds)
    else:
        found = whole(arguments.items, arguments.seconds, arguments.rounds, arguments.plot, arguments.triton)
    print(json.dumps(found, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
