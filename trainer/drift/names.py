"""Names of what is monitored, in a version's metrics, in the trainer's payload and as labels; a closed list."""

# What the detectors' memory is called in the trainer's payload.
DRIFT = "drift"
# And what is remembered to tell whether what followed items misleads, and of the mix of categories.
MISLED, CATEGORY_MEMORY = "drift_misled", "drift_category_mix"
# Distributions, and means of which higher is worse. Categories are those that the catalogue gives the items.
CATEGORY_MIX = "category_mix"
MIXES = ("item_mix", "class_mix", "context_mix", "history_length", "time_gap", "score", CATEGORY_MIX)
LEVELS = ("item_loss", "class_loss", "miss_at_10", "unknown_items", "new_users")
# By stream what is measured of it; a version's movement from the one before is shown beside, nothing is detected in it.
ITEM_VECTORS, NETWORK = "item_vectors", "network"
# What followed items: how much better less of it would foresee.
TRANSITIONS = "transitions"
MEASURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MIXES, ("psi", "js")),
    **dict.fromkeys(LEVELS, ("adwin", "page_hinkley")),
    ITEM_VECTORS: ("cosine_distance",),
    NETWORK: ("norm_change",),
    TRANSITIONS: ("fading_gain",),
}
# In a version's metrics: 1 where something was detected in the feedback that the version added, else 0.
DETECTED = "drift_detected"


def score_key(stream: str, measure: str) -> str:
    """Return the key of a measure in a version's metrics."""
    return f"drift_{stream}_{measure}"


def detected_key(stream: str) -> str:
    """Return the key that is 1 in the metrics of a version in whose feedback the stream was found to have changed."""
    return f"drift_{stream}_detected"
