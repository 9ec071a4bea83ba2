"""Overview: ten seconds for a person on call: are recommendations good, fresh and healthy, and since when."""

from __future__ import annotations

from boards.board import Board, Panel
from boards.queries import APPLIED, FAILED, HANDLED, newest, quantile, rate, share

_HITS = 'recsys_prequential_hit_ratio{{window="recent", k="10", method="{method}"}}'
_FIRING = 'ALERTS{alertname=~"Recsys.+", alertstate="firing"'
_RECOMMENDER = 'grpc_service="recsys.v1.RecommenderService"'
_SCORED = "recsys_scored_requests_total"
_UNKNOWN = f'{_SCORED}{{history!="known"}}'
# Every part of it is 1 or 0, so the product is; without calls no share of them has failed.
_HEALTHY = " * ".join(
    (
        'min(up{job="recsys-server"})',
        'min(up{job="recsys-trainer"})',
        "min(recsys_store_reachable)",
        f"({rate(FAILED)} <= bool 0.01 * {rate(HANDLED)})",
    )
)

_QUESTIONS = [
    Panel(
        "Good? Hits, beside popularity's",
        "How many times more of users' choices are among the first ten than with a list of what is popular, measured "
        "before they are learned. Below 1: a popularity list does as well; see Learning, then Drift and Data. "
        "`recsys versions` says since which version.",
        "suffix: x",
        {"times popularity": f"{newest(_HITS.format(method='recsys'))} / {newest(_HITS.format(method='popularity'))}"},
        stat=True,
        base="red",
        limits=((0.9, "yellow"), (1.0, "green")),
    ),
    Panel(
        "Fresh? Feedback to served weights, p99",
        "From accepted feedback to the first weights that know of it. The objective is a second; above ten nobody can "
        "call it fresh. See the stages below, then the runbook of RecsysFreshnessBurning. Nothing measured: no "
        "feedback came, or nothing is learned.",
        "s",
        {"accepted to served": quantile(0.99, "recsys_freshness_seconds", where=APPLIED)},
        stat=True,
        limits=((1.0, "yellow"), (10.0, "red")),
    ),
    Panel(
        "Healthy? Up, store reached, calls answered",
        "Healthy while server and trainer are up, every server reaches the store and less than 1% of calls fail by "
        "the server's doing. Otherwise see which alert fires below, and its runbook in docs/runbooks.md.",
        "none",
        {"healthy": _HEALTHY},
        stat=True,
        base="red",
        limits=((1.0, "green"),),
        texts={"1": "healthy", "0": "NOT healthy"},
    ),
]
_GLANCE = [
    Panel(
        "Alerts firing",
        "Alerts of recsys that fire now. Each has its runbook in docs/runbooks.md, under its name. Always 0 where the "
        "rules are not loaded.",
        "none",
        {"alerts": f"count({_FIRING}}}) or vector(0)"},
        width=4,
        stat=True,
        limits=((1, "red"),),
    ),
    Panel(
        "Calls",
        "Calls handled per second. Zero while users are about: look at the clients' channel, then at the server.",
        "reqps",
        {"calls": rate(HANDLED)},
        width=4,
        stat=True,
    ),
    Panel(
        "Failed by the server",
        "Share of calls that failed by the server's doing. Above 1%: Serving shows which code, and that says why.",
        "percentunit",
        {"failed": share(rate(FAILED), rate(HANDLED))},
        width=4,
        stat=True,
        limits=((0.001, "yellow"), (0.01, "red")),
    ),
    Panel(
        "Recommend, p99",
        "Time in which 99 of 100 calls of Recommend are answered; the objective is 250 ms. Above it: see Serving, "
        "waiting and batches.",
        "s",
        {"p99": quantile(0.99, "grpc_server_handling_seconds", where=f'{_RECOMMENDER}, grpc_method="Recommend"')},
        width=4,
        stat=True,
        limits=((0.1, "yellow"), (0.25, "red")),
    ),
    Panel(
        "Backlog",
        "Feedback in the log that is not learned yet. Rising for minutes: the trainer is too slow, paused or stopped; "
        "`recsys status` tells which.",
        "short",
        {"backlog": newest("recsys_feedback_backlog")},
        width=4,
        stat=True,
        limits=((1000, "yellow"), (10_000, "red")),
    ),
    Panel(
        "Served version committed",
        "Age of the oldest version being served. It rises while no feedback arrives; while feedback does, compare "
        "served and committed versions below.",
        "s",
        {"age": "time() - min(recsys_served_version_committed_timestamp_seconds > 0)"},
        width=4,
        stat=True,
    ),
]
_OBJECTIVES = [
    Panel(
        "Error budget, burn rate",
        "How many times faster than allowed the budget of an objective is spent: 1 spends exactly all of it. 14.4 over "
        "an hour, or 6 over six, calls a person. availability: 99.9% of Recommend and LogFeedback; latency: 99% within "
        "250 ms; freshness: 99% of feedback served within a second.",
        "none",
        {
            "{{objective}}, last hour": "max by (objective) (job_objective:recsys_slo_burn:ratio_rate1h)",
            "{{objective}}, last six hours": "max by (objective) (job_objective:recsys_slo_burn:ratio_rate6h)",
        },
        width=12,
        limits=((6, "orange"), (14.4, "red")),
    ),
    Panel(
        "Which alerts fire",
        "Alerts by name and severity, over time. Their runbooks stand in docs/runbooks.md. Several at once: begin with "
        "the store, then the trainer; the others mostly follow from those.",
        "none",
        {
            "{{severity}}: {{alertname}}": f"count by (alertname, severity) ({_FIRING}}}) "
            'or label_replace(vector(0), "alertname", "none", "", "")'
        },
        width=12,
        stacked=True,
    ),
]
_GOOD = [
    Panel(
        "Hit ratio, of the first ten",
        "Share of users' choices that were among the first ten of all items, before they were learned. A step down at "
        "an orange mark: the audience changed, and accuracy should come back by itself. At no mark: see what a release "
        "or an import changed.",
        "percentunit",
        {"{{method}}": newest('recsys_prequential_hit_ratio{window="recent", k="10"}', "method")},
    ),
    Panel(
        "Positive feedback per recommended item",
        "What users did with what was recommended, where feedback carries the recommendation_id. Zero: clients do not "
        "send it back. Falling while the hit ratio stays: lists are shown differently, or shown less.",
        "percentunit",
        {
            "click-through": share(
                rate('recsys_recommendation_feedback_total{outcome="positive"}'),
                rate("recsys_items_recommended_total"),
            )
        },
    ),
    Panel(
        "Answers without a history",
        "Share of answers for users of whom nothing was known: what is trending. unavailable: the store could not be "
        "read. Much empty: new users, or ids that change from call to call.",
        "percentunit",
        {"{{history}}": f"{rate(_UNKNOWN, 'history')} / on () group_left () ({rate(_SCORED)} > 0)"},
    ),
]
_FRESH = [
    Panel(
        "Time in each stage, p99",
        "accepted_to_read: the trainer is behind. read_to_learned: learning is slow, or publish_seconds is long. "
        "learned_to_committed: the store. committed_to_applied: the server. accepted_to_answered also waits for "
        "a user to ask.",
        "s",
        {"{{stage}}": quantile(0.99, "recsys_freshness_seconds", "stage")},
        limits=((1.0, "red"),),
    ),
    Panel(
        "Versions",
        "Committed by the trainer and served by the slowest server. A lasting gap: that server does not follow; look "
        "at its log, and at `recsys verify`.",
        "none",
        {"committed": newest("recsys_committed_version"), "served": "min(recsys_served_version)"},
    ),
    Panel(
        "Feedback per second",
        "Accepted and learned should lie on each other. Learned below accepted: the backlog grows.",
        "cps",
        {"accepted": rate("recsys_feedback_accepted_total"), "learned": rate("recsys_feedback_learned_total")},
    ),
]

BOARD = Board(
    "overview",
    "recsys overview",
    "Are recommendations good, fresh and healthy? The first row says so; the rest says since when and why.",
    {
        "Good, fresh, healthy?": _QUESTIONS,
        "At a glance": _GLANCE,
        "Objectives and alerts": _OBJECTIVES,
        "Good": _GOOD,
        "Fresh": _FRESH,
    },
)
