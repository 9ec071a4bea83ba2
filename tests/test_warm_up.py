"""The trainer compiles all of its loops before it takes feedback."""

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
from recsys.encoding import RowHistory
from recsys.settings import Settings
from trainer.daemon import warm_up
from trainer.examples import Event, encode
from trainer.learner import Learner

def compiled():
    loops = {each for module in list(sys.modules.values()) for each in vars(module).values()
             if isinstance(each, Dispatcher)}
    return {f"{each.py_func.__module__}.{each.py_func.__name__}{kinds}" for each in loops for kinds in each.signatures}

settings = Settings()
warm_up(settings, torch.device("cpu"))
warm = compiled()
assert warm, "nothing was compiled"
learner = Learner(settings, torch.device("cpu"))
items = [f"item-{number}" for number in range(60)]
learner.allocate(items)
rows = learner.table.look_up(items)
for start in range(40):
    history = RowHistory(rows[start : start + 9], (0,) * 9, tuple(range(9)))
    learner.step(encode([Event(rows[start + 10], 0, start, history, {})], settings))
print("\\n".join(sorted(compiled() - warm)))
"""


def test_learning_compiles_nothing_more() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == ""


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
