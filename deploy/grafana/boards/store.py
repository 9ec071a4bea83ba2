"""Store: is it reached, does it have room, and what do commits and snapshots take."""

from __future__ import annotations

from boards.board import Board, Panel
from boards.queries import newest, quantile, rate

_NEAR = ((0.8, "yellow"), (0.9, "red"))

_ROOM = [
    Panel(
        "Reached",
        "While every server reaches the store. Not reached: answers go on from the weights held, feedback is refused; "
        "see the runbook of RecsysStoreUnreachable.",
        "none",
        {"reached": "min(recsys_store_reachable)"},
        width=6,
        stat=True,
        base="red",
        limits=((1, "green"),),
        texts={"1": "reached", "0": "NOT reached"},
    ),
    Panel(
        "Feedback log, of its bound",
        "Past its bound feedback is refused. Near it: raise log_max_bytes if the store has the memory, or lower "
        "replay_capacity.",
        "percentunit",
        {"used": f"{newest('recsys_feedback_log_bytes')} / {newest('recsys_feedback_log_max_bytes > 0')}"},
        width=6,
        stat=True,
        limits=_NEAR,
    ),
    Panel(
        "Store's memory, of its bound",
        "Past its bound the store refuses writes. Without a bound (maxmemory 0) the machine's memory is the bound, and "
        "this says nothing: see the bytes below.",
        "percentunit",
        {
            "used": f"{newest('recsys_store_memory_bytes')} "
            f"/ ({newest('recsys_store_max_memory_bytes')} > 0) or vector(0)"
        },
        width=6,
        stat=True,
        limits=_NEAR,
    ),
    Panel(
        "Trainer's commands that failed, last hour",
        "The trainer tries again by itself and loses nothing. Many: the store is overloaded, or the network to it "
        "is bad; `recsys doctor` measures its answers.",
        "none",
        {"failed": "sum (increase(recsys_store_errors_total[1h]))"},
        width=6,
        stat=True,
        limits=((1, "yellow"), (100, "red")),
    ),
]
_DISK = [
    Panel(
        "Files written",
        "Whether the store could write each of its files the last time. append_only or dump failed: it refuses "
        "feedback and versions until it can; rewrite failed: the append-only file grows on. Make room on its disk, see "
        "the runbook of RecsysStoreCannotWrite.",
        "none",
        {"{{file}}": "min by (file) (recsys_store_file_written >= 0)"},
        stat=True,
        base="red",
        limits=((1, "green"),),
        texts={"1": "written", "0": "FAILED"},
    ),
    Panel(
        "Append-only file, and room on its disk",
        "The room is known where the store runs beside a server, not in another container. A rewrite takes as much "
        "again as the file that it makes: with less room than the file has, make room, or give the store another disk.",
        "bytes",
        {
            "append-only file": newest("recsys_store_append_only_bytes"),
            "room": "min (recsys_store_disk_free_bytes)",
        },
        width=16,
    ),
]
_LOG = [
    Panel(
        "Log size",
        "Bytes in the feedback log. It grows until the replay window is full, then stays. Beyond that: learning is "
        "behind, and nothing can be trimmed.",
        "bytes",
        {"used": newest("recsys_feedback_log_bytes"), "bound": newest("recsys_feedback_log_max_bytes")},
    ),
    Panel(
        "Records in the log",
        "Feedback kept for learning and replay. Rising without end: the trainer does not learn.",
        "short",
        {"records": newest("recsys_feedback_log_records")},
    ),
    Panel(
        "Bytes per record",
        "Mostly the history inside each record. Too large: lower history_length, or shorten item ids.",
        "bytes",
        {"mean": f"{newest('recsys_feedback_log_bytes')} / ({newest('recsys_feedback_log_records')} > 0)"},
    ),
]
_MEMORY = [
    Panel(
        "Memory",
        "Of all that the store holds: log, histories, weights. Rising steadily beyond the log: users' histories; see "
        "history_limit. A bound of 0 is none.",
        "bytes",
        {"used": newest("recsys_store_memory_bytes"), "bound": newest("recsys_store_max_memory_bytes")},
    ),
    Panel(
        "Bytes committed per second",
        "What every server receives. Too much for the network: raise batches_per_version or publish_seconds.",
        "Bps",
        {"committed": rate("recsys_committed_bytes_total")},
    ),
    Panel(
        "Newest snapshot",
        "Size of a full copy of the weights; snapshots_retained of them are kept. Large: lower dimension, or bound "
        "max_items.",
        "bytes",
        {"snapshot": newest("recsys_snapshot_bytes")},
    ),
]
_TIME = [
    Panel(
        "Time to commit",
        "Above 100 ms: the store or the network to it is slow, or a version is large. Freshness waits for it.",
        "s",
        {"p50": quantile(0.5, "recsys_commit_seconds"), "p99": quantile(0.99, "recsys_commit_seconds")},
        limits=((0.1, "red"),),
    ),
    Panel(
        "Time to write a snapshot, mean since the start",
        "Learning pauses meanwhile. Seconds: raise snapshot_every_bytes, so that there are fewer.",
        "s",
        {"snapshot": "sum (recsys_snapshot_seconds_sum) / (sum (recsys_snapshot_seconds_count) > 0)"},
    ),
    Panel(
        "Errors and reloads, per second",
        "Commands of the trainer that failed, and loads of whole snapshots by servers. start is a start; corrupt is "
        "damage: `recsys verify` finds it, `recsys verify --repair` goes back to what is whole.",
        "ops",
        {
            "trainer's errors": rate("recsys_store_errors_total"),
            "reloads, {{reason}}": rate("recsys_weights_reloads_total", "reason"),
        },
    ),
]

BOARD = Board(
    "store",
    "recsys store",
    "Is the store reached, does it have room, and how fast does it take what is learned?",
    {"Room": _ROOM, "Disk": _DISK, "Feedback log": _LOG, "Memory and weights": _MEMORY, "Time and errors": _TIME},
)
