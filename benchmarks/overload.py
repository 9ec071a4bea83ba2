"""Overload: how much of its capacity a server still answers in time when it is asked for several times as much.

Store, trainer, servers (one for each transport) and clients are processes of their own. The capacity is what a fixed
number of calls in flight gets answered, measured before and after. In between, calls are sent on schedule (open loop),
each with a deadline, whether or not answers come back; goodput is what was answered in time. The trainer stops before
anything is measured; with `--items` there is none, and weights and histories are made up. Prints one JSON object.
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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import serving
from raw_calls import free_ports, measure, processor_seconds

from recsys import Client, Feedback
from recsys.audience import Audience
from recsys.client import TlsOptions
from recsys.errors import RecsysError
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import recommender_pb2

PATH = "/recsys.v1.RecommenderService/Recommend"
START_SECONDS = 120.0
IN_FLIGHT = 64
USERS = 500
# Settings of each way in: who is bounded, as from elsewhere, passes a front.
WAYS: dict[str, dict[str, object]] = {
    "native": {"transport": "native"},
    "fronted": {"transport": "native", "max_connections": 1000},
    "grpcio": {"transport": "grpcio"},
}


@contextmanager
def part(command: str, store_url: str, **settings: object) -> Iterator[int]:
    """Run the trainer or a server; yield its process id."""
    given = {"redis_url": store_url, "metrics_port": 0, "trainer_metrics_port": 0, **settings}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{f"RECSYS_{k.upper()}": str(v) for k, v in given.items()}}
    process = subprocess.Popen([sys.executable, "-m", "recsys", command], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def teach(client: Client, count: int) -> None:
    """Let the trainer learn from `count` clicks, so that what is measured is the scoring of real histories."""
    audience = Audience(1, events=count, users=USERS)
    feedback = []
    for _ in range(count):
        user_id = audience.next_user()
        feedback.append(Feedback(user_id=user_id, item_id=audience.choose(user_id), feedback_class="click"))
    wait_until(lambda: bool(client.status().software_version))
    for start in range(0, count, 1000):
        client.log_feedback(feedback[start : start + 1000])
    wait_until(lambda: client.status().feedback_learned == count)


def wait_until(reached: Callable[[], bool]) -> None:
    """Ask again and again, also while nobody answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            if reached():
                return
        except RecsysError:
            pass
        time.sleep(0.1)
    raise SystemExit("the system did not get ready in time")


def overload(
    target: str, pid: int, seconds: float, timeout: float, factors: list[float], ca: str | None
) -> dict[str, Any]:
    """Find a server's capacity, then ask for multiples of it."""
    requests = [
        recommender_pb2.RecommendRequest(user_id=f"user-{n}", count=10).SerializeToString() for n in range(USERS)
    ]

    def capacity() -> float:
        asked = measure(target, PATH, requests, seconds=seconds, in_flight=IN_FLIGHT, ca=ca)
        return float(asked["requests_per_second"])

    capacity()
    before, spent = capacity(), processor_seconds(pid)
    found: dict[str, Any] = {}
    for factor in factors:
        asked = measure(target, PATH, requests, seconds=seconds, rate=factor * before, timeout=timeout, ca=ca)
        after = capacity()
        # What else the machine does changes from one second to the next.
        found[f"{factor:g}x"] = {
            "goodput_ratio": round(asked["requests_per_second"] / statistics.mean((before, after)), 3),
            "capacity_before": before,
            "capacity_after": after,
            **asked,
        }
        before = after
    found["processor_seconds"] = round(processor_seconds(pid) - spent, 2)
    return found


def certificate(directory: Path) -> tuple[str, str]:
    """Make a certificate for this machine that is its own authority; return its file and its key's."""
    files = str(directory / "server.pem"), str(directory / "server.key")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    named = ("-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1])
    subprocess.run(["openssl", "req", "-x509", *key, "-days", "1", *named], check=True, capture_output=True)
    return files


def whole(
    transports: list[str], seconds: float, timeout: float, factors: list[float], items: int, tls: bool
) -> dict[str, Any]:
    """Run the system with a server for each transport, and overload one after the other; `items` 0: those learned."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as store, ExitStack() as stack:
        settings: dict[str, object] = {} if items else {"classes": "clicks"}
        secured: dict[str, object] = {}
        ca = None
        if tls:
            ca, key = certificate(Path(directory))
            secured = {"tls_certificate": ca, "tls_key": key}
        if items:
            publisher = (str(Path(serving.__file__).resolve()), "--publish", store.url, "--items", str(items))
            with serving.part(*publisher, wait=True, stdin=subprocess.PIPE):
                pass
        servers = {}
        for transport, port in zip(transports, free_ports(len(transports)), strict=True):
            server = part("serve", store.url, port=port, **WAYS[transport], **settings, **secured)
            servers[transport] = port, stack.enter_context(server)
        port, _ = next(iter(servers.values()))
        with Client(f"127.0.0.1:{port}", timeout=30.0, tls=TlsOptions(ca) if ca else None) as client:
            if items:
                wait_until(lambda: client.status().version > 0)
            else:
                with part("train", store.url, **settings):
                    teach(client, 4000)
        found = {
            transport: overload(f"127.0.0.1:{port}", pid, seconds, timeout, factors, ca)
            for transport, (port, pid) in servers.items()
        }
    return {
        "items": items,
        "tls": tls,
        "deadline_seconds": timeout,
        "seconds": seconds,
        "cores": os.cpu_count(),
        "transports": found,
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--deadline", type=float, default=0.1, help="of each call, in seconds")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="multiples of the capacity")
    parser.add_argument("--transports", nargs="+", default=["native", "fronted", "grpcio"], choices=WAYS)
    parser.add_argument(
        "--items", type=int, default=0, help="made up, instead of the few that a simulated audience has"
    )
    parser.add_argument("--tls", action="store_true", help="encrypted")
    given = parser.parse_args()
    found = whole(given.transports, given.seconds, given.deadline, given.factors, given.items, given.tls)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
