"""Overload: how much of its capacity a server still answers in time when it is asked for several times as much.

Store, trainer and server are processes of their own, and so are the clients. The capacity is measured first, with a
fixed number of calls in flight. Then calls are sent on schedule (open loop), each with a deadline, whether or not
answers come back; goodput is what was answered in time. The trainer stops before anything is measured.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from recsys import Client, Feedback
from recsys.audience import Audience
from recsys.errors import RecsysError
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import recommender_pb2

PORT = 50081
TARGET = f"127.0.0.1:{PORT}"
ENVIRONMENT = {
    "RECSYS_PORT": str(PORT),
    "RECSYS_METRICS_PORT": "50082",
    "RECSYS_TRAINER_METRICS_PORT": "50083",
    "RECSYS_CLASSES": "clicks",
    "OMP_NUM_THREADS": "1",
}
METHOD = "/recsys.v1.RecommenderService/Recommend"
START_SECONDS = 120.0
IN_FLIGHT = 64
CONNECTIONS = 4
USERS = 500
# At once, when a tick of the sender comes late; a schedule that slips is reported.
TICK_SECONDS = 0.002


@contextmanager
def part(command: str, store_url: str) -> Iterator[None]:
    """Run the trainer or the server."""
    environment = {**os.environ, **ENVIRONMENT, "RECSYS_REDIS_URL": store_url}
    process = subprocess.Popen([sys.executable, "-m", "recsys", command], env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
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


class Caller:
    """Ask for recommendations over a few connections, with requests and answers as bytes: it must not be the limit."""

    def __init__(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(TARGET, options=options) for _ in range(CONNECTIONS)]
        self._calls: list[Any] = [channel.unary_unary(METHOD) for channel in self._channels]
        self._requests = [
            recommender_pb2.RecommendRequest(user_id=f"user-{n}", count=10).SerializeToString() for n in range(USERS)
        ]
        self.outcomes: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = {}

    async def call(self, number: int, timeout: float) -> None:
        """Make one call and note what became of it, and when."""
        started = time.monotonic()
        try:
            await self._calls[number % CONNECTIONS](self._requests[number % USERS], timeout=timeout)
            outcome = "OK"
        except grpc.aio.AioRpcError as error:
            outcome = error.code().name
        elapsed = time.monotonic() - started
        outcome = outcome if outcome != "OK" or elapsed <= timeout else "LATE"
        self.outcomes[outcome] += 1
        self.seconds.setdefault(outcome, []).append(elapsed)

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()


async def closed_loop(seconds: float) -> dict[str, Any]:
    """Keep IN_FLIGHT calls in flight; return how many were answered each second."""
    caller = Caller()
    until = time.monotonic() + seconds

    async def one_after_another(first: int) -> None:
        number = first
        while time.monotonic() < until:
            await caller.call(number, 10.0)
            number += IN_FLIGHT

    await asyncio.gather(*map(one_after_another, range(IN_FLIGHT)))
    await caller.close()
    return {"per_second": caller.outcomes["OK"] / seconds, "outcomes": dict(caller.outcomes)}


async def open_loop(rate: float, seconds: float, timeout: float) -> dict[str, Any]:
    """Send at `rate` for `seconds`; return what became of the calls."""
    caller = Caller()
    tasks: set[asyncio.Task[None]] = set()
    started, sent, lag = time.monotonic(), 0, 0.0
    while (now := time.monotonic() - started) < seconds:
        due = int(now * rate)
        lag = max(lag, (due - sent) / rate)
        for number in range(sent, due):
            task = asyncio.create_task(caller.call(number, timeout))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        sent = due
        await asyncio.sleep(TICK_SECONDS)
    await asyncio.gather(*tasks)
    await caller.close()
    return {
        "sent_per_second": round(sent / seconds, 1),
        "answered_in_time_per_second": round(caller.outcomes["OK"] / seconds, 1),
        "outcomes": dict(caller.outcomes),
        "p50_ms": {name: round(sorted(found)[len(found) // 2] * 1000, 1) for name, found in caller.seconds.items()},
        "largest_lag_of_sender_ms": round(lag * 1000, 1),
    }


def in_a_process_of_its_own(*arguments: object) -> dict[str, Any]:
    """Run this file as a client."""
    command = [sys.executable, str(Path(__file__).resolve()), "--client", *map(str, arguments)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def measure(seconds: float, timeout: float, factors: list[float]) -> dict[str, Any]:
    """Run the system, find its capacity, then ask for multiples of it."""
    overload = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        EmbeddedStore(Path(directory)) as store,
        part("serve", store.url),
    ):
        with part("train", store.url), Client(TARGET, timeout=30.0) as client:
            teach(client, 4000)
        in_a_process_of_its_own(0, 2.0, 0)
        capacity = in_a_process_of_its_own(0, seconds, 0)["per_second"]
        for factor in factors:
            found = in_a_process_of_its_own(factor * capacity, seconds, timeout)
            goodput = found["answered_in_time_per_second"]
            overload[f"{factor:g}x"] = {"goodput_ratio": round(goodput / capacity, 3), **found}
    return {
        "capacity_per_second": round(capacity, 1),
        "deadline_ms": timeout * 1000,
        "seconds": seconds,
        "cores": os.cpu_count(),
        "overload": overload,
    }


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--deadline", type=float, default=0.1, help="of each call, in seconds")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="multiples of the capacity")
    parser.add_argument(
        "--client", nargs=3, type=float, metavar=("RATE", "SECONDS", "DEADLINE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.client:
        rate, seconds, timeout = arguments.client
        found = asyncio.run(open_loop(rate, seconds, timeout) if rate else closed_loop(seconds))
    else:
        found = measure(arguments.seconds, arguments.deadline, arguments.factors)
    print(json.dumps(found, indent=None if arguments.client else 2))


if __name__ == "__main__":
    main()
