"""All loops are compiled before a trainer takes feedback and a server answers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from recsys.settings import Settings
from trainer.daemon import warm_up

# In a process of its own: what earlier tests compiled would hide what is missing.
COMPILED = """
import sys
import torch
from numba.core.dispatcher import Dispatcher
from recsys.catalog import Catalog, CatalogMirror
from recsys.cli.app import main
from recsys.encoding import RowHistory
from recsys.scorer import Query, Scorer
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.log_pb2 import HistoryEntry
from recsys.store.v1.weights_pb2 import VersionRecord
from trainer.daemon import warm_up
from trainer.examples import Event, encode
from trainer.learner import Learner

def compiled():
    loops = {each for module in list(sys.modules.values()) for each in vars(module).values()
             if isinstance(each, Dispatcher)}
    return {f"{each.py_func.__module__}.{each.py_func.__name__}{kinds}" for each in loops for kinds in each.signatures}

settings, cpu = Settings(replay_every=8), torch.device("cpu")
if sys.argv[1] == "trainer":
    warm_up(settings, cpu)
else:
    assert not main(["compile"])
warm = compiled()
assert warm, "nothing was compiled"
learner = Learner(settings, cpu)
items = [f"item-{number}" for number in range(60)]
learner.allocate(items)
rows = learner.table.look_up(items)
for start in range(40):
    history = RowHistory(rows[start : start + 9], (1,) * 9, tuple(range(9)))
    learner.step(encode([Event(rows[start + 10], 1, start, history, {})], settings))
    if sys.argv[1] == "trainer":
        continue
    if not start:
        scorer = Scorer(settings, CatalogMirror(Catalog(connect(settings), settings)), cpu)
        scorer.load(VersionRecord(version=1), learner.write_all()[0])
    elif start % 10 == 0:
        delta, _ = learner.write(learner.take_changed(), learner.table.rows)
        scorer.apply(VersionRecord(version=1 + start // 10), delta)
    asked = [HistoryEntry(item_id=each, feedback_class="click", time_ms=1) for each in items[:start]]
    scorer.answer([Query(history=asked)] * (1 + start) + [Query(history=asked, candidates=items)])
print("\\n".join(sorted(compiled() - warm)))
"""


@pytest.mark.parametrize("part", ["trainer", "everything"])
def test_nothing_more_is_compiled(part: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED, part], stdout=subprocess.PIPE, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line not in ("", "compiled")]
    assert told == []


@pytest.mark.parametrize(
    "values",
    [
        {"history_length": 1},
        {"max_items": 1},
        {"trainable": "head"},
        {"replay_size": 0, "trainable": "lora"},
    ],
    ids=str,
)
def test_any_settings_can_be_warmed_up(values: dict[str, Any]) -> None:
    warm_up(Settings(**values), torch.device("cpu"))
