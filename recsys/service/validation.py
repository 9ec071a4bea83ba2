"""What requests may hold: every limit comes from the settings, and every fault is named by its field."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recsys.catalog import CategoryFilter, Item, check_item
from recsys.errors import InvalidInput, Violation
from recsys.feedback import Feedback, check, check_context, check_id, from_wire
from recsys.settings import Settings
from recsys.v1 import catalog_pb2, model_pb2, recommender_pb2

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
MAX_REASON_BYTES = 1000
# The details travel in a header of bounded size: the first faults are enough to find the rest.
MAX_VIOLATIONS = 20


def recommend_request(request: recommender_pb2.RecommendRequest, settings: Settings) -> None:
    """Check a RecommendRequest.

    Raises:
        InvalidInput: naming every field at fault, the first MAX_VIOLATIONS of them.
    """
    faults = [
        check_id("user_id", request.user_id, settings.max_id_bytes),
        _count(request, settings.max_recommend_count),
    ]
    # What most requests leave out costs as much to look through as all else.
    if request.exclude_item_ids:
        faults += _id_list("exclude_item_ids", request.exclude_item_ids, settings.max_excluded, settings)
    if request.HasField("filter"):
        for name in ("any_of", "all_of", "none_of"):
            categories = getattr(request.filter, name)
            faults += _id_list(f"filter.{name}", categories, settings.max_categories, settings, empty=True)
    if request.context:
        faults.append(check_context(request.context, settings))
    _refuse(faults)


def score_request(request: recommender_pb2.ScoreRequest, settings: Settings) -> None:
    """Check a ScoreRequest.

    Raises:
        InvalidInput: as recommend_request does.
    """
    _refuse(
        [
            check_id("user_id", request.user_id, settings.max_id_bytes),
            *_id_list("item_ids", request.item_ids, settings.max_candidates, settings),
            check_context(request.context, settings),
        ]
    )


def explain_request(request: recommender_pb2.ExplainRequest, settings: Settings) -> None:
    """Check an ExplainRequest.

    Raises:
        InvalidInput: as recommend_request does.
    """
    _refuse(
        [
            check_id("user_id", request.user_id, settings.max_id_bytes),
            check_id("item_id", request.item_id, settings.max_id_bytes),
            check_context(request.context, settings),
        ]
    )


def user(request: model_pb2.ForgetUserRequest, settings: Settings) -> str:
    """Return the user that is to be forgotten.

    Raises:
        InvalidInput: when there can be no such user.
    """
    _refuse([check_id("user_id", request.user_id, settings.max_id_bytes)])
    return request.user_id


def feedback_list(
    messages: Sequence[recommender_pb2.Feedback], settings: Settings, now_ms: int
) -> list[Feedback | Violation]:
    """Read a LogFeedbackRequest's list: each feedback, or what is wrong with it, in order.

    Raises:
        InvalidInput: when the list itself is empty or too long.
    """
    _refuse([_length("feedback", messages, settings.max_feedback_batch)])
    return [_read(message, settings, now_ms) for message in messages]


def item_ids(ids: Sequence[str], settings: Settings) -> list[str]:
    """Check and return the ids of a catalogue request.

    Raises:
        InvalidInput: as recommend_request does.
    """
    _refuse(_id_list("item_ids", ids, settings.max_candidates, settings))
    return list(ids)


def items(messages: Sequence[catalog_pb2.Item], settings: Settings) -> list[Item]:
    """Read the items of an UpsertItemsRequest: all pass or the request is refused.

    Raises:
        InvalidInput: naming each fault as `items[index].field`.
    """
    _refuse([_length("items", messages, settings.max_candidates)])
    read = [Item(message.item_id, message.title, tuple(message.categories)) for message in messages]
    faults = ((index, check_item(item, settings)) for index, item in enumerate(read))
    _refuse(Violation(f"items[{index}].{fault.field}", fault.description) for index, fault in faults if fault)
    return read


def page(request: model_pb2.ListVersionsRequest) -> tuple[int, int | None]:
    """Return a page's size and the version that it ends before, None for the newest.

    Raises:
        InvalidInput: when the size is out of range or the token none of ours.
    """
    token = request.page_token
    ours = token.isascii() and token.isdigit() and len(token) <= 18 and int(token) > 0
    _refuse(
        [
            _at_most("page_size", request.page_size, MAX_PAGE_SIZE),
            None if ours or not token else Violation("page_token", "is not from a response; pass one back unchanged"),
        ]
    )
    return request.page_size or DEFAULT_PAGE_SIZE, int(token) if token else None


def rollback(request: model_pb2.RollbackRequest) -> None:
    """Check a RollbackRequest.

    Raises:
        InvalidInput: when there can be no such version, or the reason is too long.
    """
    length = len(request.reason.encode())
    _refuse([_version(request.version), _at_most("reason", length, MAX_REASON_BYTES, " bytes long")])


def version(request: model_pb2.GetVersionRequest) -> int:
    """Return the version that is asked for.

    Raises:
        InvalidInput: when there can be no such version.
    """
    _refuse([_version(request.version)])
    return request.version


def category_filter(request: recommender_pb2.RecommendRequest) -> CategoryFilter | None:
    """Return the request's filter, None when it lets everything pass."""
    if not request.HasField("filter"):
        return None
    given = request.filter
    if not (given.any_of or given.all_of or given.none_of):
        return None
    return CategoryFilter(
        any_of=frozenset(given.any_of), all_of=frozenset(given.all_of), none_of=frozenset(given.none_of)
    )


def _read(message: recommender_pb2.Feedback, settings: Settings, now_ms: int) -> Feedback | Violation:
    try:
        feedback = from_wire(message)
    except ValueError:
        return Violation("time", "is outside the years 1 to 9999, or its nanoseconds are outside 0 to 999,999,999")
    return check(feedback, settings, now_ms) or feedback


def _refuse(faults: Iterable[Violation | None]) -> None:
    found = [fault for fault in faults if fault]
    if found:
        raise InvalidInput(found[:MAX_VIOLATIONS])


def _version(version: int) -> Violation | None:
    return Violation("version", f"is {version}; versions count from 1") if version < 1 else None


def _count(request: recommender_pb2.RecommendRequest, limit: int) -> Violation | None:
    if request.HasField("count") and request.count == 0:
        return Violation("count", f"is 0; give 1 to {limit}, or leave it out for the default")
    return _at_most("count", request.count, limit)


def _at_most(field: str, value: int, limit: int, unit: str = "") -> Violation | None:
    return Violation(field, f"is {value}{unit}; at most {limit} is allowed") if value > limit else None


def _length(field: str, values: Sequence[object], limit: int, *, empty: bool = False) -> Violation | None:
    if len(values) > limit:
        return Violation(field, f"has {len(values)} entries; at most {limit} are allowed")
    return Violation(field, f"is empty; give 1 to {limit} entries") if not values and not empty else None


def _id_list(field: str, ids: Sequence[str], limit: int, settings: Settings, *, empty: bool = False) -> list[Violation]:
    """Check a list's length first: a list that is too long is not walked."""
    fault = _length(field, ids, limit, empty=empty)
    if fault:
        return [fault]
    checked = (check_id(f"{field}[{index}]", value, settings.max_id_bytes) for index, value in enumerate(ids))
    return [fault for fault in checked if fault]
