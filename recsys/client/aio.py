"""AsyncClient: the services for programs on asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import grpc
import grpc.aio

from recsys.catalog import CategoryFilter, Item
from recsys.client import calls
from recsys.client.calls import Call, FeedbackResult, Recommendations, Scores
from recsys.client.channel import TlsOptions, metadata_of, multicallables, open_channel, to_error
from recsys.feedback import Feedback
from recsys.v1 import model_pb2, recommender_pb2

Result = TypeVar("Result")


class AsyncClient:
    """Call a server at `target` ("host:port") from one event loop; everything else is as in Client."""

    def __init__(
        self, target: str, *, timeout: float = 1.0, tls: TlsOptions | None = None, token: str | None = None
    ) -> None:
        self._timeout = timeout
        self._metadata = metadata_of(tls, token)
        self._channel = open_channel(grpc.aio, target, tls, token)
        self._methods = multicallables(self._channel)

    async def recommend(
        self,
        user_id: str,
        count: int = 10,
        *,
        exclude_item_ids: Iterable[str] = (),
        allow_seen: bool = False,
        filter: CategoryFilter | None = None,
        context: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Recommendations:
        """Rank items for one user; fewer than `count` come back when fewer pass the filters."""
        call = calls.recommend(
            user_id,
            count,
            exclude_item_ids=exclude_item_ids,
            allow_seen=allow_seen,
            filter=filter,
            context=context,
        )
        return await self._do(call, timeout)

    async def score(
        self,
        user_id: str,
        item_ids: Iterable[str],
        *,
        context: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Scores:
        """Score candidates for one user, in the order given."""
        return await self._do(calls.score(user_id, item_ids, context), timeout)

    async def explain(
        self,
        user_id: str,
        item_id: str,
        *,
        context: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> recommender_pb2.ExplainResponse:
        """Tell what an item's score for a user is made of, and what each entry of the user's history does to it."""
        return await self._do(calls.explain(user_id, item_id, context), timeout)

    async def log_feedback(self, feedback: Iterable[Feedback], *, timeout: float | None = None) -> list[FeedbackResult]:
        """Send feedback, and return what became of each in order; as Client.log_feedback."""
        return [result for call in calls.log_feedback(feedback) for result in await self._do(call, timeout)]

    async def upsert_items(self, items: Iterable[Item], *, timeout: float | None = None) -> int:
        """Add or replace items, all or none; return how many were written."""
        return await self._do(calls.upsert_items(items), timeout)

    async def get_items(self, item_ids: Sequence[str], *, timeout: float | None = None) -> list[Item | None]:
        """Read items in the order asked for; None where an id is not in the catalogue."""
        return await self._do(calls.get_items(item_ids), timeout)

    async def delete_items(self, item_ids: Iterable[str], *, timeout: float | None = None) -> int:
        """Keep items out of recommendations; return how many had been in the catalogue."""
        return await self._do(calls.delete_items(item_ids), timeout)

    async def status(self, *, timeout: float | None = None) -> model_pb2.GetStatusResponse:
        """Tell what the server serves and how fresh it is."""
        return await self._do(calls.status(), timeout)

    async def serving(self, *, timeout: float | None = None) -> bool:
        """Tell whether the server is SERVING: not still loading its first weights, not already stopping."""
        return await self._do(calls.serving(), timeout)

    async def versions(self, *, timeout: float | None = None) -> AsyncIterator[model_pb2.Version]:
        """Go through the retained versions, newest first; `timeout` is that of each page."""
        token = ""
        while True:
            page = await self._do(calls.versions(token), timeout)
            for version in page.versions:
                yield version
            token = page.next_page_token
            if not token:
                return

    async def version(self, number: int, *, timeout: float | None = None) -> model_pb2.Version:
        """Return one retained version."""
        return await self._do(calls.version(number), timeout)

    async def rollback(
        self, version: int, reason: str = "", *, timeout: float = calls.ROLLBACK_SECONDS
    ) -> model_pb2.Version:
        """Put the content of an earlier version in force again; return the new version that has it.

        The feedback learned since is set aside. Done again while that is the last version, it changes nothing.
        """
        return await self._do(calls.rollback(version, reason), timeout)

    async def pause_learning(self, *, timeout: float | None = None) -> None:
        """Tell trainers to stop learning; feedback is accepted as before and waits."""
        await self._do(calls.pause_learning(), timeout)

    async def resume_learning(self, *, timeout: float | None = None) -> None:
        """Tell trainers to go on learning."""
        await self._do(calls.resume_learning(), timeout)

    async def forget_user(self, user_id: str, *, timeout: float = calls.FORGET_SECONDS) -> model_pb2.ForgetUserResponse:
        """Remove what was logged of a user, and return how much it was and what remains; may be called again."""
        return await self._do(calls.forget_user(user_id), timeout)

    async def close(self) -> None:
        """Close the connection; calls in flight fail."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: Call[Result], timeout: float | None) -> Result:
        try:
            seconds = self._timeout if timeout is None else timeout
            response = await self._methods[call.method](call.request, timeout=seconds, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise to_error(failure) from failure
        return call.parse(response)
