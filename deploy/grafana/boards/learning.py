"""Learning: how accurate the learner is on feedback that it has not seen, and what learning takes."""

from __future__ import annotations

from boards.board import Board, Panel
from boards.queries import newest, quantile, rate


def _accuracy(metric: str) -> dict[str, str]:
    return {"{{method}}, {{window}}": newest(f'recsys_prequential_{metric}_ratio{{k="10"}}', "method, window")}


_ACCURACY = [
    Panel(
        "Hit ratio, of the first ten",
        "Share of chosen items among the first ten of all items. Below popularity for long: see the runbook of "
        "RecsysAccuracyBelowPopularity. recent below all: it is getting worse.",
        "percentunit",
        _accuracy("hit"),
    ),
    Panel(
        "NDCG, of the first ten",
        "As the hit ratio, with more credit near the top. Falling while hits stay: the order got worse; see what "
        "worth_weight and the classes' worth say.",
        "percentunit",
        _accuracy("ndcg"),
    ),
    Panel(
        "Mean reciprocal rank, of the first ten",
        "How near the top the chosen item was. Read it together with NDCG; one alone may jump.",
        "percentunit",
        _accuracy("mrr"),
    ),
    Panel(
        "Log loss of feedback classes",
        "In nats, lower is better. A step upwards: the audience or the meaning of a class has changed; see Drift and "
        "Data.",
        "none",
        {"{{window}}": newest("recsys_prequential_log_loss", "window")},
        width=6,
    ),
    Panel(
        "AUC",
        "Probability that positive feedback was rated above other feedback; 0.5 is a coin. It needs feedback of both "
        "kinds: log impressions, too.",
        "percentunit",
        {"{{window}}": newest("recsys_prequential_auc_ratio", "window")},
        width=6,
        base="red",
        limits=((0.5, "green"),),
    ),
    Panel(
        "Calibration error",
        "Mean difference between the probability of positive feedback and its share. Above a few percent: the expected "
        "worth orders wrongly; lower worth_weight until it has fallen.",
        "percentunit",
        {"{{window}}": newest("recsys_prequential_calibration_error_ratio", "window")},
        width=6,
        limits=((0.05, "red"),),
    ),
    Panel(
        "Hit ratio of new users and new items",
        "Of users without history, and of items chosen less than ten times before. New items near zero: give them "
        "titles and categories, or they wait for their first clicks.",
        "percentunit",
        {"{{slice}}": newest('recsys_prequential_slice_hit_ratio{window="recent", k="10"}', "slice")},
        width=6,
    ),
]
_PACE = [
    Panel(
        "Feedback learned and left out, per second",
        "skipped, by reason: malformed or unknown_class point at a client, non_finite at extreme values or learning "
        "rates, not_admitted at items still below item_admission.",
        "cps",
        {
            "learned": rate("recsys_feedback_learned_total"),
            "skipped, {{reason}}": rate("recsys_feedback_skipped_total", "reason"),
        },
    ),
    Panel(
        "Backlog",
        "Feedback waiting to be learned. A sawtooth is healthy; a slope is not: give the trainer a faster device, "
        "or raise batch_growth.",
        "short",
        {"backlog": newest("recsys_feedback_backlog")},
        limits=((1000, "yellow"), (10_000, "red")),
    ),
    Panel(
        "Versions and batches per second",
        "Versions committed, and batches learned. Batches without versions: they are held, or the store refuses them.",
        "ops",
        {
            "versions": rate("recsys_versions_committed_total"),
            "batches": rate("recsys_learning_steps_total"),
        },
    ),
    Panel(
        "Time per version",
        "p99 to learn and to commit. Learning dominates on a CPU; commits above 100 ms point at the store, see Store.",
        "s",
        {"learn": quantile(0.99, "recsys_learn_seconds"), "commit": quantile(0.99, "recsys_commit_seconds")},
    ),
    Panel(
        "Time in the trainer's stages, p50",
        "What most feedback meets. accepted_to_read high: the trainer is behind. read_to_learned near publish_seconds: "
        "little feedback comes, all is well.",
        "s",
        {
            "{{stage}}": quantile(
                0.5,
                "recsys_freshness_seconds",
                "stage",
                'stage=~"accepted_to_read|read_to_learned|learned_to_committed"',
            )
        },
    ),
    Panel(
        "Held by the gate",
        "Versions that were worse than the one being served, and feedback set aside because of it. More than now and "
        "then: `recsys quarantine list` says what it was.",
        "none",
        {
            "versions held": "sum (increase(recsys_versions_held_total[$__rate_interval]))",
            "feedback set aside": "sum (increase(recsys_feedback_set_aside_total[$__rate_interval]))",
        },
    ),
]
_STEPS = [
    Panel(
        "Loss while learning",
        "In nats, of the last version, on its feedback when it was new. Rising for long while accuracy falls: lower "
        "the learning rates.",
        "none",
        {"{{part}}": newest("recsys_learning_loss", "part")},
        width=12,
    ),
    Panel(
        "Norm of the gradient",
        "Of the last step's dense part, before it is clipped. At gradient_clip all the time: lower learning_rate. "
        "Jumps alone are harmless.",
        "none",
        {"norm": newest("recsys_gradient_norm")},
        width=12,
    ),
]

BOARD = Board(
    "learning",
    "recsys learning",
    "How accurate recommendations are on feedback not learned from yet, and whether learning keeps pace.",
    {
        "Accuracy, measured on feedback before it is learned": _ACCURACY,
        "Pace": _PACE,
        "Steps": _STEPS,
    },
)
