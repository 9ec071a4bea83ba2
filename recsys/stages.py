"""The stages between a feedback's acceptance and the first answer that knows of it: what server and trainer both time.

Each process observes the stages that end in it, under one metric name, so that a panel shows them side by side.
"""

from __future__ import annotations

from typing import Literal, get_args

TrainerStage = Literal["accepted_to_read", "read_to_learned", "learned_to_committed"]
ServerStage = Literal["committed_to_applied", "accepted_to_applied", "accepted_to_answered"]

TRAINER_STAGES: tuple[TrainerStage, ...] = get_args(TrainerStage)
SERVER_STAGES: tuple[ServerStage, ...] = get_args(ServerStage)

FRESHNESS_METRIC = "recsys_freshness_seconds"
FRESHNESS_HELP = "Time that feedback spent in a stage between its acceptance and the first answer that knows of it."
# The edge at 1.0 is the objective: 99 of 100 within a second. The long tail tells catching up from a standstill.
FRESHNESS_BUCKETS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0),
    *(30.0, 60.0, 300.0, 1800.0),
)
