"""Calls: what each method of a client sends and how its answer reads, for the plain and the asyncio client alike."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from grpc_health.v1 import health_pb2

from recsys.catalog import CategoryFilter, Item
from recsys.feedback import Feedback, to_wire
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

Result = TypeVar("Result")

# What a server takes by default: feedback in one call, and bytes in one message with room to spare.
MAX_FEEDBACK_BATCH = 1000
MAX_REQUEST_BYTES = 3 << 20
PAGE_SIZE = 100
# A rollback moves all of the weights.
ROLLBACK_SECONDS = 60.0
# Forgetting a user reads all of the feedback log.
FORGET_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Call(Generic[Result]):
    """Hold one call: the method's full name, its request, and what makes a result of the response."""

    method: str
    request: Any
    parse: Callable[[Any], Result]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Hold one recommended item; `source` is "network", "transition" or "trending", `reason` a sentence."""

    item_id: str
    score: float
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Recommendations:
    """Hold one answer, best item first; `recommendation_id` belongs into the feedback that it causes."""

    recommendation_id: str
    version: int
    items: Sequence[Recommendation]


@dataclass(frozen=True, slots=True)
class Score:
    """Hold one candidate's score, and the probability of each feedback class by its name."""

    item_id: str
    score: float
    known: bool
    class_probabilities: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scores:
    """Hold the scores of candidates in the order asked for."""

    version: int
    items: Sequence[Score]


@dataclass(frozen=True, slots=True)
class FeedbackResult:
    """Tell what became of one feedback: accepted (perhaps a duplicate), or refused for `field`."""

    accepted: bool
    duplicate: bool = False
    field: str = ""
    refusal: str = ""


def recommend(
    user_id: str,
    count: int,
    *,
    exclude_item_ids: Iterable[str],
    allow_seen: bool,
    filter: CategoryFilter | None,
    context: Mapping[str, str] | None,
) -> Call[Recommendations]:
    """Ask for recommendations."""
    request = recommender_pb2.RecommendRequest(
        user_id=user_id,
        count=count,
        exclude_item_ids=exclude_item_ids,
        allow_seen=allow_seen,
        context=context,
    )
    if filter is not None:
        request.filter.any_of.extend(sorted(filter.any_of))
        request.filter.all_of.extend(sorted(filter.all_of))
        request.filter.none_of.extend(sorted(filter.none_of))
    return Call("/recsys.v1.RecommenderService/Recommend", request, _recommendations)


def score(user_id: str, item_ids: Iterable[str], context: Mapping[str, str] | None) -> Call[Scores]:
    """Ask for the scores of candidates."""
    request = recommender_pb2.ScoreRequest(user_id=user_id, item_ids=item_ids, context=context)
    return Call("/recsys.v1.RecommenderService/Score", request, _scores)


def explain(user_id: str, item_id: str, context: Mapping[str, str] | None) -> Call[recommender_pb2.ExplainResponse]:
    """Ask what one score is made of."""
    request = recommender_pb2.ExplainRequest(user_id=user_id, item_id=item_id, context=context)
    return Call("/recsys.v1.RecommenderService/Explain", request, lambda response: response)


def log_feedback(feedback: Iterable[Feedback]) -> Iterator[Call[list[FeedbackResult]]]:
    """Send feedback, in as many calls as a server's limits ask for.

    Feedback without an id gets one: the channel repeats a call whose answer was lost, and by its id the server knows
    what it has counted already.
    """
    batch: list[recommender_pb2.Feedback] = []
    size = 0
    for each in feedback:
        message = to_wire(each if each.feedback_id else replace(each, feedback_id=uuid.uuid4().hex))
        size += message.ByteSize()
        if batch and (len(batch) == MAX_FEEDBACK_BATCH or size > MAX_REQUEST_BYTES):
            yield _log_feedback(batch)
            batch = []
            size = message.ByteSize()
        batch.append(message)
    if batch:
        yield _log_feedback(batch)


def upsert_items(items: Iterable[Item]) -> Call[int]:
    """Add or replace items."""
    request = catalog_pb2.UpsertItemsRequest(
        items=[catalog_pb2.Item(item_id=i.item_id, title=i.title, categories=i.categories) for i in items]
    )
    return Call("/recsys.v1.CatalogService/UpsertItems", request, lambda response: int(response.upserted))


def get_items(item_ids: Sequence[str]) -> Call[list[Item | None]]:
    """Read items."""

    def parse(response: catalog_pb2.GetItemsResponse) -> list[Item | None]:
        found = {i.item_id: Item(i.item_id, i.title, tuple(i.categories)) for i in response.items}
        return [found.get(item_id) for item_id in item_ids]

    return Call("/recsys.v1.CatalogService/GetItems", catalog_pb2.GetItemsRequest(item_ids=item_ids), parse)


def delete_items(item_ids: Iterable[str]) -> Call[int]:
    """Delete items."""
    request = catalog_pb2.DeleteItemsRequest(item_ids=item_ids)
    return Call("/recsys.v1.CatalogService/DeleteItems", request, lambda response: int(response.deleted))


def status() -> Call[model_pb2.GetStatusResponse]:
    """Ask what is served."""
    return Call("/recsys.v1.ModelService/GetStatus", model_pb2.GetStatusRequest(), lambda response: response)


def serving() -> Call[bool]:
    """Ask the health service whether the whole server is SERVING."""
    return Call(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest(),
        lambda response: bool(response.status == health_pb2.HealthCheckResponse.SERVING),
    )


def versions(page_token: str) -> Call[model_pb2.ListVersionsResponse]:
    """Ask for one page of versions."""
    request = model_pb2.ListVersionsRequest(page_size=PAGE_SIZE, page_token=page_token)
    return Call("/recsys.v1.ModelService/ListVersions", request, lambda response: response)


def version(number: int) -> Call[model_pb2.Version]:
    """Ask for one version."""
    request = model_pb2.GetVersionRequest(version=number)
    return Call("/recsys.v1.ModelService/GetVersion", request, lambda response: response)


def rollback(number: int, reason: str) -> Call[model_pb2.Version]:
    """Put an earlier version in force again."""
    request = model_pb2.RollbackRequest(version=number, reason=reason)
    return Call("/recsys.v1.ModelService/Rollback", request, lambda response: response)


def pause_learning() -> Call[None]:
    """Stop learning."""
    return Call("/recsys.v1.ModelService/PauseLearning", model_pb2.PauseLearningRequest(), lambda response: None)


def resume_learning() -> Call[None]:
    """Go on learning."""
    return Call("/recsys.v1.ModelService/ResumeLearning", model_pb2.ResumeLearningRequest(), lambda response: None)


def forget_user(user_id: str) -> Call[model_pb2.ForgetUserResponse]:
    """Remove what was logged of a user."""
    request = model_pb2.ForgetUserRequest(user_id=user_id)
    return Call("/recsys.v1.ModelService/ForgetUser", request, lambda response: response)


def _log_feedback(batch: Sequence[recommender_pb2.Feedback]) -> Call[list[FeedbackResult]]:
    request = recommender_pb2.LogFeedbackRequest(feedback=batch)
    return Call("/recsys.v1.RecommenderService/LogFeedback", request, _feedback_results)


def _feedback_results(response: recommender_pb2.LogFeedbackResponse) -> list[FeedbackResult]:
    return [FeedbackResult(r.accepted, r.duplicate, r.field, r.refusal) for r in response.results]


def _recommendations(response: recommender_pb2.RecommendResponse) -> Recommendations:
    return Recommendations(
        response.recommendation_id,
        response.version,
        [Recommendation(i.item_id, i.score, _source(i.source), i.reason) for i in response.items],
    )


def _scores(response: recommender_pb2.ScoreResponse) -> Scores:
    return Scores(
        response.version,
        [Score(i.item_id, i.score, i.known, dict(i.class_probabilities)) for i in response.items],
    )


def _source(number: int) -> str:
    """Name a source; one that a newer server knows and this client does not stays a number."""
    known = recommender_pb2.Source.DESCRIPTOR.values_by_number.get(number)
    return known.name.removeprefix("SOURCE_").lower() if known else str(number)
