"""Strategies: how the network learns, against forgetting and over-fitting; each one small class, chosen by settings.

The learner knows this door alone. With the default settings it is plain AdamW on everything.
"""

from trainer.strategies.chosen import Strategies

__all__ = ["Strategies"]
