"""status: are recommendations good, fresh and healthy, and what to do if not; what the page shows, in a terminal."""

from __future__ import annotations

import json as json_
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from recsys.cli.client_commands import TIMEOUT_SECONDS, Server, connected, time_text, version_facts
from recsys.cli.output import AsJson, console, facts, plain, size
from recsys.condition import ACCURACY, BESIDE, Facts, drifts, duration, judge
from recsys.errors import RecsysError

if TYPE_CHECKING:
    from recsys.client import Client
    from recsys.v1.model_pb2 import GetStatusResponse, Version

WATCH_SECONDS = 2.0
# The newest versions, of which freshness and usual accuracy are told.
VERSIONS = 100
# Versions older than this say nothing of how fresh recommendations are now.
RECENT_MS = 60_000
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "unknown": "dim"}
MARKS = {"ok": "yes", "warning": "look", "problem": "NO", "unknown": "?"}
QUESTIONS = ("good", "fresh", "healthy")


def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="look again and again, until Ctrl-C")] = False,
    server: Server = None,
    json: AsJson = False,
) -> None:
    """Tell whether recommendations are good, fresh and healthy, and what to do if not.

    Exit code 0 only when the server is SERVING. With --watch and --json one object is printed for each look.
    """
    with connected(ctx, server) as client:
        if not watch:
            found = _look(client)
            _show(found, json)
            raise typer.Exit(0 if found["serving"] else 1)
        try:
            _watch(client, json)
        except KeyboardInterrupt:
            return


def _watch(client: Client, json: bool) -> None:
    out = console()
    live = Live(console=out, auto_refresh=False) if out.is_terminal and not json else None
    with live or nullcontext():
        while True:
            try:
                found = _look(client)
            except RecsysError as error:
                # A server that is away comes back, or whoever watches gives up.
                if json:
                    print(json_.dumps({"serving": False, "problem": str(error)}), flush=True)
                elif live:
                    live.update(f"[bold red]no answer[/]: {plain(str(error))}", refresh=True)
                else:
                    out.print(f"no answer: {plain(str(error))}")
            else:
                if live:
                    live.update(_page(found), refresh=True)
                else:
                    _show(found, json)
            time.sleep(WATCH_SECONDS)


def _show(found: Mapping[str, Any], json: bool) -> None:
    if json:
        print(json_.dumps(found, ensure_ascii=False), flush=True)
    else:
        console().print(_page(found))


def _look(client: Client) -> dict[str, Any]:
    """Ask a server for everything, as programs read it."""
    found = client.status(timeout=TIMEOUT_SECONDS)
    # Health alone knows of a server that is still loading, or already stopping.
    serving = client.serving(timeout=TIMEOUT_SECONDS)
    versions = list(islice(client.versions(timeout=TIMEOUT_SECONDS), VERSIONS)) if found.store_reachable else []
    newest = version_facts(versions[0]) if versions else {}
    metrics: dict[str, float] = newest.get("metrics", {})
    freshness = _freshness_seconds(found, versions)
    condition = judge(_facts(found, versions, freshness))
    return {
        "serving": serving,
        "condition": asdict(condition),
        "accuracy": {name: metrics.get(name) for name in (ACCURACY, BESIDE)},
        "metrics": {name: value for name, value in metrics.items() if not name.startswith("drift_")},
        "drift": {name: value for name, value in metrics.items() if name.startswith("drift_")},
        "version": found.version,
        "committed_time": time_text(found.committed_time) if found.version else None,
        "applied_time": time_text(found.applied_time) if found.version else None,
        "newest_version": found.newest_version,
        "newest_verdict": newest.get("verdict"),
        "newest_reason": newest.get("reason"),
        "freshness_seconds": freshness,
        "held_version": _held(found),
        "items": found.items,
        "feedback_learned": found.feedback_learned,
        "backlog": found.backlog,
        "set_aside_feedback": found.set_aside_feedback,
        "held_versions": sum(v.kind == "learned" and bool(v.reason) for v in versions),
        "log_records": found.log_records,
        "log_bytes": found.log_bytes,
        "log_max_bytes": found.log_max_bytes,
        "learning_paused": found.learning_paused,
        "durability": found.durability,
        "retained_versions_from": found.retained_versions_from,
        "retained_bytes": found.retained_bytes,
        "delta_bytes": found.delta_bytes,
        "snapshot_bytes": found.snapshot_bytes,
        "weights_max_bytes": found.weights_max_bytes,
        "weights_problem": found.weights_problem,
        "snapshots": found.snapshots,
        "store_reachable": found.store_reachable,
        "store_memory_bytes": found.store_memory_bytes,
        "store_max_memory_bytes": found.store_max_memory_bytes,
        "software_version": found.software_version,
        "feedback_classes": list(found.feedback_classes),
    }


def _held(found: GetStatusResponse) -> dict[str, Any] | None:
    """Describe the version that is held back at present."""
    if not found.HasField("held_version"):
        return None
    held = found.held_version
    return {"version": held.version, "times": held.times, "reason": held.reason, "time": time_text(held.held_time)}


def _freshness_seconds(found: GetStatusResponse, versions: Sequence[Version]) -> float | None:
    """Return how long the oldest feedback of a version took to be committed, and that to be applied; recent median."""
    now_ms = time.time_ns() // 1_000_000
    took = sorted(
        v.committed_time.ToMilliseconds() - v.oldest_accepted_time.ToMilliseconds()
        for v in versions
        if v.HasField("oldest_accepted_time") and now_ms - v.committed_time.ToMilliseconds() < RECENT_MS
    )
    if not took:
        return None
    apply_ms = found.applied_time.ToMilliseconds() - found.committed_time.ToMilliseconds() if found.version else 0
    return max(0, took[len(took) // 2] + max(0, apply_ms)) / 1000


def _facts(found: GetStatusResponse, versions: Sequence[Version], freshness: float | None) -> Facts:
    newest = versions[0] if versions else None
    reachable = found.store_reachable
    return Facts(
        now_ms=time.time_ns() // 1_000_000,
        store_problem="" if reachable else "the store does not answer",
        serving_problem=found.weights_problem,
        served_version=found.version,
        newest_version=max(0, found.newest_version),
        newest_committed_ms=found.newest_committed_time.ToMilliseconds(),
        newest_verdict=version_facts(newest)["verdict"] if newest else "",
        newest_reason=newest.reason if newest else "",
        held_times=found.held_version.times,
        held_reason=found.held_version.reason,
        feedback_learned=newest.feedback_learned if newest else found.feedback_learned,
        backlog=max(0, found.backlog),
        paused=found.learning_paused,
        metrics=dict(newest.metrics) if newest else {},
        earlier_accuracy=[v.metrics[ACCURACY] for v in versions[1:] if ACCURACY in v.metrics],
        freshness_seconds=freshness,
        set_aside=max(0, found.set_aside_feedback),
        log_bytes=found.log_bytes,
        log_max_bytes=found.log_max_bytes if reachable else 0,
        used_memory=found.store_memory_bytes,
        max_memory=max(0, found.store_max_memory_bytes),
    )


def _page(found: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_answers(found["condition"])]
    for finding in found["condition"]["findings"]:
        style = STYLES[finding["level"]]
        command = f" [bold]{plain(finding['command'])}[/]" if finding["command"] else ""
        parts.append(
            f"[{style}]{finding['level']}[/]: {plain(finding['title'])}\n  {plain(finding['advice'])}{command}"
        )
    return Group(*parts, "", facts(_rows(found)))


def _rows(found: Mapping[str, Any]) -> dict[str, str]:
    """Write what stands behind the answers, in a dozen lines: a terminal shows no more; --json has all."""
    ours, theirs = (_ratio(found["accuracy"][name]) for name in (ACCURACY, BESIDE))
    freshness, newest, held = found["freshness_seconds"], found["newest_verdict"], found["held_version"]
    committed = f", committed {found['committed_time']}, {found['items']:,} items" if found["version"] else ""
    rows = {
        "server": f"{'serving' if found['serving'] else 'not serving'}, software {found['software_version']}",
        "accuracy": f"{ours} of choices among the first ten, popularity {theirs}",
        "drift": ", ".join(drifts(found["drift"])) or "none in the newest version",
        "freshness": "-" if freshness is None else f"{duration(freshness)} from feedback to served",
        "served": f"version {found['version']:,}{committed}",
    }
    if not found["store_reachable"]:
        return rows | {"store": "does not answer", "durability": found["durability"]}
    rows["newest"] = f"version {found['newest_version']:,}{f', {newest}' if newest else ''}"
    if held:
        rows["held"] = f"version {held['version']:,}, since {held['time']}"
    learned = "learning is paused" if found["learning_paused"] else f"{found['feedback_learned']:,} learned"
    rows["backlog"] = f"{found['backlog']:,} feedback to learn, {learned}"
    rows["set aside"] = f"{found['set_aside_feedback']:,} feedback"
    log = _of(found["log_bytes"], found["log_max_bytes"])
    rows["feedback log"] = f"{found['log_records']:,} records, {log}"
    weights = _of(found["retained_bytes"], found["weights_max_bytes"])
    rows["versions kept"] = f"from {found['retained_versions_from']:,} on, {found['snapshots']} full copies, {weights}"
    rows["store"] = _of(found["store_memory_bytes"], found["store_max_memory_bytes"])
    rows["durability"] = found["durability"]
    return rows


def _of(used: int, bound: int) -> str:
    """Write how much of a bound is used; 0 is no bound."""
    return f"{size(used)} of {size(bound)} ({used / bound:.0%})" if bound else f"{size(used)}, no bound"


def _answers(condition: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name in QUESTIONS:
        answer = condition[name]
        table.add_row(name, f"[{STYLES[answer['level']]}]{MARKS[answer['level']]}[/]", plain(answer["sentence"]))
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
