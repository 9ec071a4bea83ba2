"""Serving: calls, their time and failures, and what users did with what was recommended."""

from __future__ import annotations

from boards.board import Board, Panel
from boards.queries import HANDLED, SERVICES, mean, newest, of_all, quantile, rate, share

_SHOWN = "recsys_items_recommended_total"
_CLICKED = 'recsys_recommendation_feedback_total{outcome="positive"}'
_BY_AGE = "recsys_recommendation_version_feedback_total"
_FAILED = f'grpc_server_handled_total{{{SERVICES}, grpc_code!="OK"}}'

_CALLS = [
    Panel(
        "Calls per second",
        "Handled calls by method. Recommend without LogFeedback: the site shows items but does not tell what users "
        "did with them, so nothing is learned.",
        "reqps",
        {"{{grpc_method}}": rate(HANDLED, "grpc_method")},
    ),
    Panel(
        "Calls that failed, per second",
        "By code. INVALID_ARGUMENT: the caller must change. RESOURCE_EXHAUSTED: add servers, or see whether the log is "
        "full. UNAVAILABLE: look at the store and at whether weights are loaded. INTERNAL: the server's log.",
        "reqps",
        {"{{grpc_code}}": rate(_FAILED, "grpc_code")},
    ),
    Panel(
        "Latency",
        "Time to handle a call. A rising p99 with a long queue: add servers. Without one: look at the store.",
        "s",
        {
            "{{grpc_method}} p50": quantile(0.5, "grpc_server_handling_seconds", "grpc_method", SERVICES),
            "{{grpc_method}} p99": quantile(0.99, "grpc_server_handling_seconds", "grpc_method", SERVICES),
        },
        limits=((0.25, "red"),),
    ),
    Panel(
        "Waiting and batches",
        "Requests waiting to be scored, and how many are scored at once. Both high for long: add servers, or "
        "server_processes.",
        "short",
        {"waiting": "sum (recsys_queue_requests)", "in a batch, mean": mean("recsys_score_batch_requests")},
    ),
    Panel(
        "Requests turned away, per second",
        "overloaded: add servers, or raise queue_limit if callers can wait. deadline_passed: callers wait too "
        "briefly or the queue is long. histories_unavailable: the store. not_ready: no weights yet.",
        "reqps",
        {"{{reason}}": rate("recsys_requests_rejected_total", "reason")},
    ),
    Panel(
        "Time per answer",
        "Of Recommend, waiting included. Well below the call's latency: the time goes into gRPC or the store.",
        "s",
        {"p50": quantile(0.5, "recsys_recommend_seconds"), "p99": quantile(0.99, "recsys_recommend_seconds")},
        limits=((0.25, "red"),),
    ),
]
_VERSION = [
    Panel(
        "Version served",
        "By server, and process where there are several. One that stays behind does not follow: its log says why, "
        "`recsys verify` whether the stored versions are whole.",
        "none",
        {"{{instance}} {{process}}": newest("recsys_served_version", "instance, process")},
    ),
    Panel(
        "Age of what is served",
        "Since the served version was committed, and since it was applied. Both rise while no feedback arrives. The "
        "first alone: versions come late to this server.",
        "s",
        {
            "committed": "time() - min(recsys_served_version_committed_timestamp_seconds > 0)",
            "applied": "time() - min(recsys_served_version_applied_timestamp_seconds > 0)",
        },
    ),
    Panel(
        "Time until served, p99",
        "From commit to applied: the server and the way to it. From acceptance to the first answer: what a user can "
        "notice; it waits for somebody to ask.",
        "s",
        {
            "{{stage}}": quantile(
                0.99,
                "recsys_freshness_seconds",
                "stage",
                'stage=~"committed_to_applied|accepted_to_applied|accepted_to_answered"',
            )
        },
        limits=((1.0, "red"),),
    ),
]
_LISTS = [
    Panel(
        "Where items come from",
        "Share of recommended items by the part of the score that lifted them. Nearly all trending: histories are "
        "missing, or nothing has been learned yet.",
        "percentunit",
        {"{{source}}": of_all(_SHOWN, "source")},
        stacked=True,
    ),
    Panel(
        "What was known of the user",
        "Share of scored requests. empty: new users, or ids that change. unavailable: the store could not be read, and "
        "answers fall back on what is trending.",
        "percentunit",
        {"{{history}}": of_all("recsys_scored_requests_total", "history")},
        stacked=True,
    ),
    Panel(
        "Coverage and popularity",
        "Of the last thousand answers: share of all items that appeared, and share of places that went to the most "
        "chosen hundredth. Coverage falling while the head rises: everyone is shown the same; lower worth_weight.",
        "percentunit",
        {
            "coverage": newest("recsys_recommended_coverage_ratio"),
            "most chosen hundredth": newest("recsys_recommended_head_ratio"),
        },
    ),
    Panel(
        "Novelty",
        "Mean information of the recommended items in bits: one more is half as popular. Falling: lists drift to what "
        "everybody chooses already. Items known: falling when items expired.",
        "suffix: bits",
        {"novelty": newest("recsys_recommended_novelty")},
        width=12,
    ),
    Panel(
        "Items known",
        "Items that the served weights hold. Falling: items expired, or the weights were replaced; see max_items and "
        "item_expiry.",
        "short",
        {"items": newest("recsys_items"), "expired since the start": "sum (recsys_items_expired_total)"},
        width=12,
    ),
]
_USERS = [
    Panel(
        "Click-through by source",
        "Positive feedback per item recommended by that part of the score. A source far below the others: "
        "its items are shown in vain. Needs the recommendation_id in feedback.",
        "percentunit",
        {"{{source}}": share(rate(_CLICKED, "source"), rate(_SHOWN, "source"))},
    ),
    Panel(
        "Click-through by position",
        "It falls from place to place, as people look less. Flat: the order says nothing, or is not the one shown. "
        "Rising: clients sort by themselves.",
        "percentunit",
        {"{{position}}": share(rate(_CLICKED, "position"), rate(_SHOWN, "position"))},
    ),
    Panel(
        "Positive share by age of the answer",
        "Of feedback on recommendations, by how many versions before the one now served the answer came from. Older "
        "answers much worse: lists are kept too long by a cache.",
        "percentunit",
        {
            "{{versions_behind}}": share(
                rate(f'{_BY_AGE}{{outcome="positive"}}', "versions_behind"), rate(_BY_AGE, "versions_behind")
            )
        },
    ),
]

BOARD = Board(
    "serving",
    "recsys serving",
    "Calls and what they take; which version answers; what was recommended and what users did with it.",
    {"Calls": _CALLS, "Version": _VERSION, "Lists": _LISTS, "What users did": _USERS},
)
