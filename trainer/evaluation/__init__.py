"""Evaluation: run the learner over a file of feedback as fast as the machine goes, beside known methods.

Protocols, all over one file of user, item and time:

* test-then-train (`Evaluation`): every event in time order; before learning from an event, rank its item among all seen
  so far that the user does not have. The learner learns in batches, so an item that is new in its batch is a miss for
  it; the other methods learn event by event.
* leave-one-out, temporal and periods (`leave_one_out`, `temporal`, `periods` over a `Contest`): taught in epochs on one
  part, tested on another.

In every protocol an event whose item is new is a miss, one whose user is new counts like any other; an item chosen
again is ranked like one chosen for the first time; negatives are not sampled; ties count against the target only where
the other item is older.
"""

from trainer.evaluation.beside import Beside
from trainer.evaluation.contest import Contest, Teaching
from trainer.evaluation.methods import BASELINES, RECSYS, suitable
from trainer.evaluation.offline import leave_one_out, periods, temporal
from trainer.evaluation.test_then_train import Evaluation

__all__ = [
    "BASELINES",
    "RECSYS",
    "Beside",
    "Contest",
    "Evaluation",
    "Teaching",
    "leave_one_out",
    "periods",
    "suitable",
    "temporal",
]
