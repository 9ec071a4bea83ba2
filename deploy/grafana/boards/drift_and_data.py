"""Drift and data: has what users do or send changed, and is what they send usable."""

from __future__ import annotations

from boards.board import Board, Panel
from boards.queries import newest, rate, share

_SCORE = "recsys_drift_score"


def _measure(measure: str) -> dict[str, str]:
    return {"{{stream}}": newest(f'{_SCORE}{{measure="{measure}"}}', "stream")}


_DETECTED = [
    Panel(
        "Drifts detected, per version",
        "Streams in which a detector found a change; an orange mark in every chart. item_loss, class_loss and "
        "miss_at_10 say that recommendations got worse: watch the hit ratio come back, or set drift_boost. The others "
        "say that the input changed: find out whether a release, an import or the audience did it.",
        "none",
        {"{{stream}}": "sum by (stream) (increase(recsys_drifts_total[$__rate_interval]))"},
        width=16,
        stacked=True,
    ),
    Panel(
        "Drifts in accuracy, last hour",
        "Detections in item_loss, class_loss and miss_at_10. Several in an hour: tastes turn faster than is learned; "
        "raise drift_boost, or shorten replay_capacity.",
        "none",
        {"drifts": 'sum (increase(recsys_drifts_total{stream=~"item_loss|class_loss|miss_at_10"}[1h]))'},
        stat=True,
        limits=((1, "yellow"), (5, "red")),
    ),
]
_ATTACK = [
    Panel(
        "Under attack",
        "Whether many accounts choose what their histories no longer explain, as accounts that were taken over do, or "
        "newcomers push items that hardly anybody else chooses. What they choose is not counted meanwhile. Find where "
        "it comes from: see the runbook of RecsysUnderAttack.",
        "none",
        {"under attack": newest("recsys_under_attack")},
        stat=True,
        limits=((1, "red"),),
        texts={"0": "no", "1": "UNDER ATTACK"},
    ),
    Panel(
        "Accounts that are not counted",
        "Of late, as if taken over or pushing items. Falling while feedback comes: their users are back, or gone. Many "
        "for hours: a lasting change, to which learning gets used after some ten thousand feedback.",
        "short",
        {"accounts": newest("recsys_accounts_distrusted")},
    ),
    Panel(
        "Feedback that is not counted, per second",
        "Of such accounts; the network learns from it all the same. Beside the feedback learned it says how large the "
        "attack is. Above half of it: go back to the version before, and stop the source.",
        "cps",
        {"not counted": rate("recsys_feedback_distrusted_total"), "learned": rate("recsys_feedback_learned_total")},
    ),
]
_MIXES = [
    Panel(
        "Population stability index",
        "Of items, their categories, classes, contexts, history lengths, time gaps and scores, against a rolling "
        "reference. Below 0.1: as usual; above 0.25: another population. item_mix after an import of items is as it "
        "should be.",
        "none",
        _measure("psi"),
        limits=((0.25, "red"),),
    ),
    Panel(
        "Jensen-Shannon divergence",
        "The same comparison in bits, at most 1; steadier with rare items. High in time_gap or history_length alone: "
        "crawlers, or a client that batches.",
        "suffix: bits",
        _measure("js"),
    ),
    Panel(
        "Movement of a version",
        "How far the newest version moved from the one before: item vectors by cosine distance, the network by the "
        "change of its norm. A jump without drift: look at what was learned then, `recsys versions show VERSION`.",
        "none",
        {"{{stream}}, {{measure}}": newest(f'{_SCORE}{{stream=~"item_vectors|network"}}', "stream, measure")},
    ),
]
_LEVELS = [
    Panel(
        "ADWIN, share of a detection",
        "Of losses, misses, unknown items and new users: 1 is a detection. Near 1 for long in a loss: accuracy is "
        "sliding; see Learning.",
        "percentunit",
        _measure("adwin"),
        limits=((1.0, "red"),),
    ),
    Panel(
        "Page-Hinkley, share of a detection",
        "The same streams, quicker on slow slides: 1 is a detection, after which it begins anew.",
        "percentunit",
        _measure("page_hinkley"),
        limits=((1.0, "red"),),
    ),
    Panel(
        "Feedback of new users and on new items",
        "Share of positive feedback. Much of either: accuracy is lower by itself. A sudden wave of new users is a "
        "campaign, or a client that has lost its ids.",
        "percentunit",
        {"{{slice}}": newest('recsys_prequential_slice_ratio{window="recent"}', "slice")},
    ),
]
_USABLE = [
    Panel(
        "Feedback refused, per second, by field",
        "The caller must change: the field says what was wrong. time: clocks ahead by more than max_future_seconds. "
        "feedback_class: a class that is not in the settings.",
        "cps",
        {"{{field}}": rate("recsys_feedback_refused_total", "field")},
    ),
    Panel(
        "Feedback read but not learned, per second",
        "malformed and unknown_class: settings of server and trainer differ. non_finite: see the runbook of "
        "RecsysNonFiniteBatches. not_admitted: items still below item_admission.",
        "cps",
        {"{{reason}}": rate("recsys_feedback_skipped_total", "reason")},
    ),
    Panel(
        "Duplicates, and feedback that names no recommendation of ours",
        "Share of accepted feedback that came again by its id: clients that retry. And of feedback with a "
        "recommendation_id, the share on items that were not in that answer: ids mixed up by a client.",
        "percentunit",
        {
            "came again": share(rate("recsys_feedback_duplicate_total"), rate("recsys_feedback_accepted_total")),
            "not in the answer": share(
                rate('recsys_recommendation_feedback_total{position="other"}'),
                rate("recsys_recommendation_feedback_total"),
            ),
        },
    ),
]

BOARD = Board(
    "drift-and-data",
    "recsys drift and data",
    "Has what users do or send changed, and can what they send be used?",
    {
        "Detected": _DETECTED,
        "Accounts": _ATTACK,
        "Distributions": _MIXES,
        "Levels": _LEVELS,
        "Feedback": _USABLE,
    },
)
