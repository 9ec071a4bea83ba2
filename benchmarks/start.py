"""Start: how long a fresh process takes from a snapshot in the store to weights that can answer, and its memory.

Made-up weights are written as a snapshot; a process of its own then loads and applies them, as a server does when it
starts. Then whole servers are started on it, until they serve. Prints one JSON object. Run it twice after a change, or
`recsys compile` before: a process that compiles its loops takes longer and keeps more memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from made_up import longest_commands, made_up_learner, made_up_lineage, watch_commands

from recsys.settings import load
from recsys.store.connection import connect
from recsys.store.embedded import EmbeddedStore
from recsys.weights import WeightPayload, WeightStore, encode
from recsys.weights.replica import Replica

KIB = 1024
# A server that takes less of a core than this for so long has nothing left to do.
AT_REST, REST_SECONDS = 0.2, 1.0


def write(store_url: str, items: int) -> dict[str, object]:
    """Write a snapshot of `items` items, twice, so that the first is let go of.

    Return the bytes of what servers and of what trainers read, and how long a command kept the store from all others.
    """
    settings = load({"redis_url": store_url}, environment={})
    with connect(settings) as connection:
        store = WeightStore(connection, settings)
        epoch = store.acquire()
        served, own = made_up_learner(settings, items).write_all()
        payload, own_payload = encode(served), encode(own)
        # The version itself is small: what it says is of no interest here.
        empty = encode(WeightPayload())
        store.commit(epoch, 0, empty, empty, made_up_lineage(settings, 1))
        watch_commands(connection)
        for _ in range(2):
            store.write_snapshot(epoch, 1, payload, own_payload)
        longest = longest_commands(connection)
    return {
        "served_bytes": len(payload),
        "trainer_bytes": len(own_payload),
        "longest_store_commands_milliseconds": longest,
    }


def load_here(store_url: str) -> dict[str, float | int]:
    """Load the snapshot into this process."""
    settings = load({"redis_url": store_url}, environment={})
    torch.set_num_threads(settings.torch_threads)
    before = peak_bytes()
    with connect(settings) as connection:
        started, cpu = time.perf_counter(), time.process_time()
        replica = Replica(settings, torch.device("cpu"))
        snapshot = WeightStore(connection, settings).load_snapshot(place=replica.place)
        loaded = time.perf_counter()
        assert snapshot is not None
        replica.apply(snapshot.payload)
        applied, cpu = time.perf_counter(), time.process_time() - cpu
    return {
        "load_seconds": round(loaded - started, 3),
        "apply_seconds": round(applied - loaded, 3),
        "seconds": round(applied - started, 3),
        "cpu_seconds": round(cpu, 3),
        "rows": replica.table.rows,
        "weights_bytes": sum(replica.table.column(name).nbytes for name in replica.table.columns),
        "peak_bytes_before": before,
        "peak_bytes": peak_bytes(),
    }


def serve(store_url: str) -> dict[str, float | int]:
    """Start a server on the snapshot, and return how long it takes to serve, and then to be at rest, and its memory."""
    command = [sys.executable, "-m", "recsys", "serve", "--redis-url", store_url, "--port", "0", "--metrics-port", "0"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            server.stdout.readline()
            serving = time.perf_counter()
            # Partitions are found while it serves.
            taken = -1.0
            while (now := cpu_seconds(server.pid)) - taken > AT_REST * REST_SECONDS:
                taken, resting = now, time.perf_counter()
                time.sleep(REST_SECONDS)
            found = Path(f"/proc/{server.pid}/status").read_text("ascii").splitlines()
        finally:
            server.terminate()
    values = {
        name: int(value.split()[0]) * KIB for name, value in (line.split(":", 1) for line in found) if "kB" in value
    }
    return {
        "seconds": round(serving - started, 3),
        "until_at_rest_seconds": round(resting - started, 3),
        "resident_bytes": values["VmRSS"],
        "anonymous_bytes": values["RssAnon"],
        "peak_bytes": values["VmHWM"],
    }


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def measure(items: int, repeats: int) -> dict[str, object]:
    """Write a snapshot of `items` items and load it `repeats` times, each in a fresh process; serve it as often."""
    with tempfile.TemporaryDirectory() as directory, EmbeddedStore(Path(directory)) as embedded:
        this = [sys.executable, __file__, "--store-url", embedded.url, "--items", str(items)]
        # Written by a process of its own too, so that its memory is free again before anything is measured.
        written = json.loads(subprocess.run([*this, "--write"], check=True, capture_output=True).stdout)
        loads = [json.loads(subprocess.run(this, check=True, capture_output=True).stdout) for _ in range(repeats)]
        servers = [serve(embedded.url) for _ in range(repeats)]
    return {"items": items, **written, "loads": loads, "servers": servers}


def main() -> None:
    """Parse the command line and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store-url", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        print(json.dumps(write(arguments.store_url, arguments.items)))
    elif arguments.store_url:
        print(json.dumps(load_here(arguments.store_url)))
    else:
        print(json.dumps(measure(arguments.items, arguments.repeats)))


if __name__ == "__main__":
    main()
