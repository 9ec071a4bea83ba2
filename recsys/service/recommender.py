"""RecommenderService: recommend, score and take feedback; the store and the network do the work in batches."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace

from recsys import traces
from recsys.batcher import Batcher
from recsys.catalog import CatalogMirror
from recsys.errors import NotReady, Overloaded, RecsysError, StoreUnavailable, Violation
from recsys.feedback import Feedback
from recsys.feedback_log import Appended, FeedbackLog
from recsys.histories import Histories
from recsys.logs import Summary, tell
from recsys.metrics import ServerMetrics
from recsys.recommendation_id import parse
from recsys.scorer import Answer, Explanation, Query, RankedItems, Scorer, Scores, explain
from recsys.service import validation
from recsys.service.edge import Pending
from recsys.service.responses import RecommendResponses, score_response, scored_item
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings
from recsys.v1 import recommender_pb2

DEFAULT_COUNT = 10
NOTHING: frozenset[str] = frozenset()
# After a failed read the store is left alone for this many times as long as the failure took: a store that hangs
# costs the scoring thread a sixth of its time, one that refuses connections next to nothing.
PAUSE_PER_FAILURE = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Question:
    """Hold a query whose history is still to be fetched."""

    user_id: str
    query: Query


class Scoring:
    """Answer a batch of questions: all histories in one round trip, then one pass of the scorer.

    When the store cannot be reached the questions are answered with empty histories, that is from what is trending,
    and counted as `histories_unavailable`: a user gets a poorer answer instead of none.
    """

    def __init__(
        self,
        histories: Histories,
        scorer: Scorer,
        metrics: ServerMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._histories = histories
        self._scorer = scorer
        self._metrics = metrics
        self._clock = clock
        self._paused_until = float("-inf")

    def __call__(self, questions: list[Question]) -> list[Answer]:
        """Answer in the order asked."""
        self._metrics.batch_scored(len(questions))
        histories = self._read([question.user_id for question in questions])
        for question, history in zip(questions, histories, strict=True):
            question.query.history = history
        return self._scorer.answer([question.query for question in questions])

    def _read(self, user_ids: Sequence[str]) -> Sequence[bytes]:
        started = self._clock()
        if started >= self._paused_until:
            try:
                found = self._histories.read_serialized(user_ids)
                empty = sum(not history for history in found)
                self._metrics.scored("empty", empty)
                self._metrics.scored("known", len(found) - empty)
                return found
            except StoreUnavailable as error:
                now = self._clock()
                self._paused_until = now + PAUSE_PER_FAILURE * (now - started)
                _log.warning("answering without histories: %s", error)
        self._metrics.scored("unavailable", len(user_ids))
        for _ in user_ids:
            self._metrics.rejected("histories_unavailable")
        return [b""] * len(user_ids)


class Appending:
    """Append the feedback of all calls that wait, in one round trip to the log."""

    def __init__(self, log: FeedbackLog) -> None:
        self._log = log

    def __call__(self, calls: list[list[Feedback]]) -> list[list[Appended]]:
        """Return what became of each call's feedback, in order."""
        appended = iter(self._log.append([feedback for call in calls for feedback in call]))
        return [[next(appended) for _ in call] for call in calls]


class Recommender:
    """Serve recsys.v1.RecommenderService; errors are raised as RecsysError and translated at the edge."""

    def __init__(
        self,
        settings: Settings,
        scorer: Scorer,
        mirror: CatalogMirror,
        scoring: Batcher[Question, Answer],
        appending: Batcher[list[Feedback], list[Appended]],
        histories: Histories,
        explaining: StoreCalls,
        metrics: ServerMetrics,
    ) -> None:
        self._settings = settings
        self._scorer = scorer
        self._responses = RecommendResponses(mirror, settings.max_id_bytes)
        scorer.on_warm_up = self._responses.of
        self._scoring = scoring
        self._appending = appending
        self._histories = histories
        self._explaining = explaining
        self._metrics = metrics
        self._refused = Summary()
        self._positive = frozenset(each.name for each in settings.classes if each.positive)
        # What refuses a call of some methods before it is looked at: under overload that is most of what comes.
        self.refusals = {"Recommend": self._refusal, "Score": self._refusal}
        metrics.watch_queue(lambda: len(scoring))

    def Recommend(self, request: recommender_pb2.RecommendRequest, deadline: float) -> Pending:
        """Rank items for one user."""
        started = time.perf_counter()
        validation.recommend_request(request, self._settings)
        query = Query(
            history=(),
            count=request.count if request.HasField("count") else DEFAULT_COUNT,
            exclude=frozenset(request.exclude_item_ids) if request.exclude_item_ids else NOTHING,
            allow_seen=request.allow_seen,
            filter=validation.category_filter(request),
            context=dict(request.context) if request.context else {},
        )
        future = self._score(Question(request.user_id, query), deadline)
        return Pending(future, lambda answer: self._recommended(answer, started))

    def _recommended(self, answer: Answer, started: float) -> bytes:
        assert isinstance(answer.items, RankedItems)
        response = self._responses.of(answer)
        self._metrics.recommended(answer.items.rows, answer.items.sources, time.perf_counter() - started)
        if _log.isEnabledFor(logging.DEBUG):
            named = recommender_pb2.RecommendResponse.FromString(response).recommendation_id
            told = {"recommendation_id": named, "version": answer.version, "items": len(answer.items)}
            tell(_log, logging.DEBUG, "recommended", **told)
        return response

    def Score(self, request: recommender_pb2.ScoreRequest, deadline: float) -> Pending:
        """Score the caller's candidates, in the caller's order."""
        validation.score_request(request, self._settings)
        query = Query(history=(), candidates=list(request.item_ids), context=dict(request.context))
        return Pending(self._score(Question(request.user_id, query), deadline), _scored)

    def Explain(self, request: recommender_pb2.ExplainRequest, deadline: float) -> Pending:
        """Tell what one item's score is made of; without the store there is no answer rather than a wrong one."""
        validation.explain_request(request, self._settings)
        return Pending(self._explaining.submit(lambda: self._explain(request), deadline), _explained)

    def _explain(self, request: recommender_pb2.ExplainRequest) -> Explanation:
        (history,) = self._histories.read([request.user_id])
        context, length = dict(request.context), self._settings.history_length
        return explain(self._scorer, history, request.item_id, context, length)

    def LogFeedback(
        self, request: recommender_pb2.LogFeedbackRequest, deadline: float
    ) -> Pending | recommender_pb2.LogFeedbackResponse:
        """Accept or refuse each feedback by itself; what is accepted is in the log when this is answered."""
        checked = validation.feedback_list(request.feedback, self._settings, time.time_ns() // 1_000_000)
        accepted = [each for each in checked if isinstance(each, Feedback)]
        if not accepted:
            return self._logged(checked, [])
        return Pending(self._append(accepted, deadline), lambda appended: self._logged(checked, appended))

    def _append(self, accepted: list[Feedback], deadline: float) -> Future[list[Appended]]:
        """Append to the log; where the call is sampled each record says in which span."""
        span = traces.begin("append feedback", **{"recsys.feedback": len(accepted)})
        if span is None:
            return self._appending.submit(accepted, deadline)
        traceparent = span.traceparent
        try:
            named = [replace(each, traceparent=traceparent) for each in accepted]
            appending = self._appending.submit(named, deadline)
        except Overloaded as error:
            span.end(type(error).__name__)
            raise
        appending.add_done_callback(span.done)
        return appending

    def _logged(
        self, checked: list[Feedback | Violation], appended: list[Appended]
    ) -> recommender_pb2.LogFeedbackResponse:
        self._count_feedback(checked, appended)
        outcome = iter(appended)
        return recommender_pb2.LogFeedbackResponse(
            results=[
                _refused(index, each) if isinstance(each, Violation) else _accepted(index, next(outcome))
                for index, each in enumerate(checked)
            ],
            accepted=len(appended),
            refused=len(checked) - len(appended),
        )

    def _refusal(self, deadline: float) -> RecsysError | None:
        """Tell what is in the way of scoring."""
        if not self._scorer.warm:
            # Who waited for that would let the batcher expect as much of every batch.
            return NotReady("the first weights are not loaded yet")
        return self._scoring.refusal(deadline)

    def _score(self, question: Question, deadline: float) -> Future[Answer]:
        return self._scoring.submit(question, deadline)

    def _count_feedback(self, checked: list[Feedback | Violation], appended: list[Appended]) -> None:
        duplicates = sum(each.duplicate for each in appended)
        self._metrics.feedback_accepted(len(appended) - duplicates)
        self._metrics.feedback_duplicate(duplicates)
        refused = Counter(each.field for each in checked if isinstance(each, Violation))
        for name, count in refused.items():
            self._metrics.feedback_refused(name, count)
        if refused and (counts := self._refused.add(refused)):
            tell(_log, logging.WARNING, "feedback refused, by field", **counts)
        served = self._scorer.version
        accepted = (each for each in checked if isinstance(each, Feedback))
        for feedback, outcome in zip(accepted, appended, strict=True):
            if feedback.recommendation_id and not outcome.duplicate:
                found, positive = parse(feedback.recommendation_id), feedback.feedback_class in self._positive
                self._metrics.recommendation_feedback(found, feedback.item_id, served, positive=positive)
                if _log.isEnabledFor(logging.DEBUG):
                    named, version = feedback.recommendation_id, found.version if found else None
                    tell(_log, logging.DEBUG, "feedback on a recommendation", recommendation_id=named, version=version)


def _scored(answer: Answer) -> bytes:
    assert isinstance(answer.items, Scores)
    return score_response(answer.items, answer.version)


def _explained(explanation: Explanation) -> recommender_pb2.ExplainResponse:
    item = explanation.item
    response = recommender_pb2.ExplainResponse(item=scored_item(item), version=explanation.version)
    if item.parts is not None:
        response.parts.MergeFrom(recommender_pb2.ScoreParts(**asdict(item.parts)))
    for entry, influence in explanation.influences:
        told = response.history.add(item_id=entry.item_id, feedback_class=entry.feedback_class, influence=influence)
        told.time.FromMilliseconds(entry.time_ms)
    return response


def _accepted(index: int, appended: Appended) -> recommender_pb2.FeedbackResult:
    return recommender_pb2.FeedbackResult(index=index, accepted=True, duplicate=appended.duplicate)


def _refused(index: int, violation: Violation) -> recommender_pb2.FeedbackResult:
    return recommender_pb2.FeedbackResult(index=index, field=violation.field, refusal=violation.description)
