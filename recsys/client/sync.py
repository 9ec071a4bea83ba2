"""Client: the services for programs with threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

import grpc

from recsys.catalog import CategoryFilter, Item
from recsys.client import calls
from recsys.client.calls import Call, FeedbackResult, Recommendations, Scores
from recsys.client.channel import TlsOptions, metadata_of, multicallables, open_channel, to_error
from recsys.feedback import Feedback
from recsys.v1 import model_pb2, recommender_pb2

Result = TypeVar("Result")


class Client:
    """Call a server at `target` ("host:port"); safe to share between threads, and worth keeping: it holds a connection.

    A call ends after `timeout` seconds at the latest. It is repeated within that time when the server is UNAVAILABLE.
    Every method raises a RecsysError: the one that the server raised, or CallFailed when the call did not get that far;
    the gRPC error is its `__cause__`.

    `tls` encrypts the connection; without it a `token` is sent to a server on this machine only.

    Raises:
        SettingsError: when a file of `tls` cannot be used, or the token would cross a network in the clear.
    """

    def __init__(
        self, target: str, *, timeout: float = 1.0, tls: TlsOptions | None = None, token: str | None = None
    ) -> None:
        self._timeout = timeout
        self._metadata = metadata_of(tls, token)
        self._channel = open_channel(grpc, target, tls, token)
        self._methods = multicallables(self._channel)

    def recommend(
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
        return self._do(call, timeout)

    def score(
        self,
        user_id: str,
        item_ids: Iterable[str],
        *,
        context: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Scores:
        """Score candidates for one user, in the order given."""
        return self._do(calls.score(user_id, item_ids, context), timeout)

    def explain(
        self,
        user_id: str,
        item_id: str,
        *,
        context: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> recommender_pb2.ExplainResponse:
        """Tell what an item's score for a user is made of, and what each entry of the user's history does to it."""
        return self._do(calls.explain(user_id, item_id, context), timeout)

    def log_feedback(self, feedback: Iterable[Feedback], *, timeout: float | None = None) -> list[FeedbackResult]:
        """Send feedback, and return what became of each in order; `timeout` is that of each call of up to 1,000.

        Nothing is counted twice within this call: feedback without an id gets one. When an error is raised part of the
        list may have been accepted; give ids yourself to send the whole list again.
        """
        return [result for call in calls.log_feedback(feedback) for result in self._do(call, timeout)]

    def upsert_items(self, items: Iterable[Item], *, timeout: float | None = None) -> int:
        """Add or replace items, all or none; return how many were written."""
        return self._do(calls.upsert_items(items), timeout)

    def get_items(self, item_ids: Sequence[str], *, timeout: float | None = None) -> list[Item | None]:
        """Read items in the order asked for; None where an id is not in the catalogue."""
        return self._do(calls.get_items(item_ids), timeout)

    def delete_items(self, item_ids: Iterable[str], *, timeout: float | None = None) -> int:
        """Keep items out of recommendations; return how many had been in the catalogue."""
        return self._do(calls.delete_items(item_ids), timeout)

    def status(self, *, timeout: float | None = None) -> model_pb2.GetStatusResponse:
        """Tell what the server serves and how fresh it is."""
        return self._do(calls.status(), timeout)

    def serving(self, *, timeout: float | None = None) -> bool:
        """Tell whether the server is SERVING: not still loading its first weights, not already stopping."""
        return self._do(calls.serving(), timeout)

    def versions(self, *, timeout: float | None = None) -> Iterator[model_pb2.Version]:
        """Go through the retained versions, newest first; `timeout` is that of each page."""
        token = ""
        while True:
            page = self._do(calls.versions(token), timeout)
            yield from page.versions
            token = page.next_page_token
            if not token:
                return

    def version(self, number: int, *, timeout: float | None = None) -> model_pb2.Version:
        """Return one retained version."""
        return self._do(calls.version(number), timeout)

    def rollback(self, version: int, reason: str = "", *, timeout: float = calls.ROLLBACK_SECONDS) -> model_pb2.Version:
        """Put the content of an earlier version in force again; return the new version that has it.

        The feedback learned since is set aside. Done again while that is the last version, it changes nothing.
        """
        return self._do(calls.rollback(version, reason), timeout)

    def pause_learning(self, *, timeout: float | None = None) -> None:
        """Tell trainers to stop learning; feedback is accepted as before and waits."""
        self._do(calls.pause_learning(), timeout)

    def resume_learning(self, *, timeout: float | None = None) -> None:
        """Tell trainers to go on learning."""
        self._do(calls.resume_learning(), timeout)

    def forget_user(self, user_id: str, *, timeout: float = calls.FORGET_SECONDS) -> model_pb2.ForgetUserResponse:
        """Remove what was logged of a user, and return how much it was and what remains; may be called again."""
        return self._do(calls.forget_user(user_id), timeout)

    def close(self) -> None:
        """Close the connection; calls in flight fail."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: Call[Result], timeout: float | None) -> Result:
        try:
            seconds = self._timeout if timeout is None else timeout
            response = self._methods[call.method](call.request, timeout=seconds, metadata=self._metadata)
        except grpc.RpcError as failure:
            raise to_error(failure) from failure
        return call.parse(response)
