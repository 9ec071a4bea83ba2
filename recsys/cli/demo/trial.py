"""Trial: play a stream against a server as its clients would, and keep count of how well it does.

Each event is tested before it is logged: the recommendations asked for first are compared with what the user then
chooses. Users are served concurrently, each user strictly in order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from recsys.catalog import Item
from recsys.cli.demo.freshness import MEANING, Freshness
from recsys.cli.demo.streams import COUNT, Act, Stream, Visit
from recsys.client import AsyncClient, Recommendations
from recsys.feedback import Feedback
from trainer.baselines import Popularity
from trainer.quality import MISS, Quality

IN_FLIGHT = 12
# On a machine that learns, serves and plays all the users at once, answers may be slow without anything being wrong.
TIMEOUT_SECONDS = 30.0
REFRESH_SECONDS = 0.5
# The last feedback is waited for as long as more is learned within this time.
STALL_SECONDS = 20.0
POLL_SECONDS = 0.05
CATALOG_BATCH = 500
EXAMPLES = 3


class PopularityTest:
    """Rank what users choose by how often it was chosen before, as one who sees every choice at once would."""

    def __init__(self) -> None:
        self._popularity = Popularity()
        self._rows: dict[str, int] = {}
        self._seen: dict[str, list[int]] = {}

    def test(self, user_id: str, item_id: str) -> int:
        """Return the item's rank among the known items that the user does not have; MISS for another."""
        seen = np.array(self._seen.get(user_id, []), np.int64)
        return self._popularity.rank(self._rows.get(item_id, len(self._rows) + 1), seen)

    def add(self, user_id: str, item_id: str) -> None:
        """Count a positive feedback."""
        row = self._rows.setdefault(item_id, len(self._rows) + 1)
        self._popularity.add(row)
        seen = self._seen.setdefault(user_id, [])
        if row not in seen:
            seen.append(row)


class Trial:
    """Play one stream once: `run`, then `settle`; `numbers` tells how far it is at any time."""

    def __init__(self, client: AsyncClient, stream: Stream, positive: Sequence[str]) -> None:
        self._client, self.stream, self._positive = client, stream, frozenset(positive)
        self._quality = Quality()
        self._popularity = PopularityTest()
        self.freshness = Freshness()
        self._titles: dict[str, str] = {}
        self._recent: dict[str, list[str]] = {}
        self._accepted = self._refused = 0
        self._best_hits = self._best_clicks = 0.0
        self._clicks = self._impressions = 0
        self._learned = self._version = self._backlog = 0
        self._started = self._seconds = 0.0

    async def run(self, stopping: asyncio.Event) -> None:
        """Play until the stream ends or `stopping` is set; visits under way are finished."""
        self._started = time.monotonic()
        await self._add_items(self.stream.items())
        try:
            async with asyncio.TaskGroup() as group:
                await self._begin_visits(group, stopping)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        self._seconds = time.monotonic() - self._started

    async def _begin_visits(self, group: asyncio.TaskGroup, stopping: asyncio.Event) -> None:
        latest: dict[str, asyncio.Task[None]] = {}
        in_flight = asyncio.Semaphore(IN_FLIGHT)
        ahead = asyncio.Semaphore(self.stream.ahead)
        for visit in self.stream:
            await ahead.acquire()
            if stopping.is_set():
                return
            task = group.create_task(self._visit(visit, latest.get(visit.user_id), in_flight))
            latest[visit.user_id] = task
            task.add_done_callback(lambda _: ahead.release())

    async def _visit(self, visit: Visit, before: asyncio.Task[None] | None, in_flight: asyncio.Semaphore) -> None:
        if before is not None:
            await before
        async with in_flight:
            answer = await self._recommend(visit.user_id, COUNT) if visit.wanted else None
            act = visit.act(answer)
            self._count(visit.user_id, answer, act)
            await self._add_items(act.arrived)
            await self._log(act.feedback)

    async def _recommend(self, user_id: str, count: int) -> Recommendations:
        answer = await self._client.recommend(user_id, count, timeout=TIMEOUT_SECONDS)
        self.freshness.answered(answer.version, time.monotonic())
        return answer

    async def _add_items(self, items: Sequence[Item]) -> None:
        self._titles.update((item.item_id, item.title) for item in items)
        for start in range(0, len(items), CATALOG_BATCH):
            await self._client.upsert_items(items[start : start + CATALOG_BATCH], timeout=TIMEOUT_SECONDS)

    async def _log(self, feedback: Sequence[Feedback]) -> None:
        begun = time.monotonic()
        self.freshness.sent += len(feedback)
        results = await self._client.log_feedback(feedback, timeout=TIMEOUT_SECONDS)
        accepted = sum(result.accepted for result in results)
        self._accepted += accepted
        self._refused += len(results) - accepted
        self.freshness.accepted(accepted, begun)

    def _count(self, user_id: str, answer: Recommendations | None, act: Act) -> None:
        if act.chosen is not None and answer is not None:
            ids = [item.item_id for item in answer.items]
            rank = ids.index(act.chosen) + 1 if act.chosen in ids else MISS
            self._quality.add_ranks("recsys", np.array([rank]))
            self._quality.add_ranks("popularity", np.array([self._popularity.test(user_id, act.chosen)]))
            self._best_hits += act.best_hit or 0.0
        if act.best_clicks is not None:
            self._impressions += len(act.feedback)
            self._clicks += sum(each.feedback_class in self._positive for each in act.feedback)
            self._best_clicks += act.best_clicks
        for each in act.feedback:
            if each.feedback_class in self._positive:
                self._popularity.add(user_id, each.item_id)
                # Put at the end: the examples are of the users who acted last.
                self._recent[user_id] = [*self._recent.pop(user_id, []), each.item_id][-EXAMPLES:]

    async def watch(self, show: Callable[[], None]) -> None:
        """Look at the server's status and call `show`, for ever."""
        while True:
            await self.look()
            show()
            await asyncio.sleep(REFRESH_SECONDS)

    async def look(self) -> None:
        """Ask what the server serves, and what the versions since the last look have learned."""
        status = await self._client.status(timeout=TIMEOUT_SECONDS)
        self._learned, self._version, self._backlog = status.feedback_learned, status.version, status.backlog
        async for version in self._client.versions(timeout=TIMEOUT_SECONDS):
            if self.freshness.knows(version.version):
                break
            self.freshness.learned(version.version, version.feedback_learned)

    async def settle(self, stopping: asyncio.Event) -> None:
        """Wait until all that was accepted is learned and an answer shows it, as long as there is progress."""
        moved, learned = time.monotonic(), -1
        while not stopping.is_set():
            for user_id in list(self._recent)[-1:]:
                await self._recommend(user_id, 1)
            await self.look()
            if self._learned >= self._accepted:
                break
            if self._learned > learned:
                moved, learned = time.monotonic(), self._learned
            elif time.monotonic() - moved > STALL_SECONDS:
                break
            await asyncio.sleep(POLL_SECONDS)
        for user_id in list(self._recent)[-1:]:
            await self._recommend(user_id, 1)

    def numbers(self) -> dict[str, Any]:
        """Return what is known so far as one object for JSON; null for what is not, or not of this stream."""
        p50, p99 = self.freshness.quantiles(0.5, 0.99)
        events = self._quality.events
        seconds = self._seconds or time.monotonic() - self._started
        numbers: dict[str, Any] = {
            "stream": self.stream.name,
            "events": events,
            "bad_rows": self.stream.bad_rows,
            "feedback_accepted": self._accepted,
            "feedback_refused": self._refused,
            "feedback_learned": self._learned,
            "feedback_lost": self._accepted - self._learned,
        }
        for prefix, method in (("", "recsys"), ("popularity_", "popularity")):
            for recent in (False, True):
                metrics = self._quality.metrics(method, recent=recent)
                name = f"{prefix}{'recent_' if recent else ''}"
                # Only ten items are asked for, so what the twentieth was cannot be told.
                numbers |= {name + m: metrics.get(m) for m in ("hr_at_1", "hr_at_10", "ndcg_at_10", "mrr_at_10")}
        simulated = self._best_hits > 0
        return numbers | {
            "best_hr_at_10": self._best_hits / events if simulated else None,
            "click_rate": self._clicks / self._impressions if self._impressions else None,
            "best_click_rate": self._best_clicks / self._impressions if self._impressions else None,
            "freshness_p50_seconds": p50,
            "freshness_p99_seconds": p99,
            "freshness": MEANING,
            "versions_published": self._version,
            "backlog": self._backlog,
            "seconds": round(seconds, 3),
            "feedback_per_second": self._accepted / seconds if seconds else 0.0,
        }

    async def examples(self) -> list[dict[str, Any]]:
        """Ask for recommendations to the users who acted last."""
        found = []
        for user_id in list(self._recent)[: -EXAMPLES - 1 : -1]:
            answer = await self._recommend(user_id, 5)
            found.append(
                {
                    "user_id": user_id,
                    "latest": [self._title(item_id) for item_id in self._recent[user_id]],
                    "recommendations": [
                        {"item_id": i.item_id, "title": self._title(i.item_id), "source": i.source, "reason": i.reason}
                        for i in answer.items
                    ],
                }
            )
        return found

    def _title(self, item_id: str) -> str:
        return self._titles.get(item_id) or item_id
