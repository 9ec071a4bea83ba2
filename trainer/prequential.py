"""Prequential test: rank and classify a batch before it is learned, and find the loss that teaches the mixing weights.

Shapes as in recsys.network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.encoding import to_tensor
from recsys.item_table import ItemTable
from recsys.network import Histories, RecommendationNetwork
from recsys.settings import Settings
from recsys.standing import SLOWEST_TREND
from trainer import full_ranking
from trainer.examples import Examples
from trainer.full_ranking import Ranked
from trainer.quality import MISS, NO_EVENT
from trainer.sample import TOGETHER, Sample, Standings

# Scores of all items held at once, so that memory does not grow with their number: four bytes each, on a GPU some ten
# times.
SCORES_AT_ONCE = 32_000_000
# The mixing weights learn by generalised cross-entropy (Zhang and Sabuncu 2018), (1 - p^q) / q: choices that nobody
# could have foreseen, noise and shuffled feedback among them, move them little. The higher q, the more is found in the
# end, but the less early on: it rises from the first to the second, half of the way when so much feedback was learned.
# The scores are then surer than they should be; the temperature, which learns by plain cross-entropy, sees to it that
# their loss, which the gate and others look at, is that of an honest probability.
ROBUSTNESS = 0.2, 0.5
HALF_RISEN = 20_000

Rows = npt.NDArray[np.int64]


class Look(NamedTuple):
    """Say that of so many examples, a batch's first, all choices were ranked together, among these rows for certain."""

    examples: int
    certain_C: Rows


@dataclass(slots=True)
class StepReport:
    """What a step found before it learned, for each of the batch's B examples, and what it did."""

    # 1 is best; MISS where the item was new or the user had it already, NO_EVENT where feedback is not positive.
    rank_B: Rows
    popularity_rank_B: Rows
    # Cross-entropy over items (positive feedback of known items, else NaN) and over feedback classes, in nats.
    item_loss_B: npt.NDArray[np.float64]
    class_loss_B: npt.NDArray[np.float64]
    # Of each feedback class, as (B, C).
    class_probability_BC: npt.NDArray[np.float32]
    # What leads there from the latest items, and to all items together; NaN where no item was ranked.
    led_B: npt.NDArray[np.float64]
    led_anywhere_B: npt.NDArray[np.float64]
    # Logarithm of the item's share of choices of late, at the slowest speed; NaN where no item was ranked, and all of
    # it where `trust` is off.
    popular_B: npt.NDArray[np.float64]
    # The first look at a sample: None where all items were ranked, or none was asked for.
    look: Look | None = None
    # What counting said of user and item, side by side: None where nothing was tested.
    rates_BR: Tensor | None = None
    learned: bool = True
    # Of the batch, by name as the trainer's metrics have it.
    losses: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = math.nan
    # Of the batch, so much is counted nowhere: see trainer.trust.
    distrusted: int = 0
    # The monitored streams that were found to have changed.
    drifted: frozenset[str] = frozenset()

    @classmethod
    def untested(cls, count: int) -> StepReport:
        """Say nothing of `count` examples."""
        ranks_B, losses_B = np.full(count, NO_EVENT), np.full(count, np.nan)
        return cls(ranks_B, ranks_B, losses_B, losses_B, np.empty((count, 0), np.float32), losses_B, losses_B, losses_B)


class Prequential:
    """Test batches against a network and an item table as they stand."""

    def __init__(self, settings: Settings, network: RecommendationNetwork, table: ItemTable) -> None:
        self._network, self._table = network, table
        self._positive = np.array([c.positive for c in settings.classes])
        # Trust alone asks how popular each choice was, which takes a look at all items or the sample.
        self._asks_popularity = settings.trust
        # Shown, for those who measure more than ranks, the places in the batch of what is ranked, and what was found.
        self.watch: Callable[[Rows, Ranked], None] | None = None

    def test(
        self,
        examples: Examples,
        seen: list[Rows] | None,
        standing: Standings,
        trusted_B: npt.NDArray[np.bool_] | None = None,
        robustness: float | None = None,
    ) -> tuple[StepReport, Tensor]:
        """Rank every item for each positive example, classify all; return what was found and the mixing loss.

        Where gradients are on, that loss's gradient is added to the mixing weights' right away, part by part, so that
        memory does not grow with the number of items.
        `seen` gives per example the rows left out of the ranking; by default those of its history. What is not
        trusted teaches the mixing weights nothing; `robustness` is the power q of that loss. Where `standing` is a
        sample, ranks and losses are estimates; who watches sees all items, and has the ranks among all.
        """
        if robustness is None:
            least, most = ROBUSTNESS
            robustness = least + (most - least) * self._table.clock / (self._table.clock + HALF_RISEN)
        count, device = len(examples), self._table.device
        self._network.eval()
        histories = examples.histories(device)
        vectors = self._table.columns["vector"]
        with torch.no_grad():
            states_BD = self._network.states(vectors, histories.rows_BL, histories)
        class_loss_B, class_probability_BC, rates_BR = self._classify(examples, states_BD, standing, histories)
        report = StepReport(
            rank_B=np.full(count, NO_EVENT),
            popularity_rank_B=np.full(count, NO_EVENT),
            item_loss_B=np.full(count, np.nan),
            class_loss_B=class_loss_B,
            class_probability_BC=class_probability_BC,
            led_B=np.full(count, np.nan),
            led_anywhere_B=np.full(count, np.nan),
            popular_B=np.full(count, np.nan),
            rates_BR=rates_BR,
        )
        positive = self._positive[examples.class_B]
        report.rank_B[positive] = report.popularity_rank_B[positive] = MISS
        chosen = np.flatnonzero(positive & self._known(examples.item_B))
        log_share = self._log_shares(standing) if self._asks_popularity else None
        loss = torch.zeros((), device=device)
        sampled = isinstance(standing, Sample)
        at_once = max(1, SCORES_AT_ONCE // self._table.rows)
        if sampled:
            at_once = TOGETHER if self.watch is None else min(TOGETHER, at_once)
        for start in range(0, len(chosen), at_once):
            part = chosen[start : start + at_once]
            index = to_tensor(part, device)
            item_B = to_tensor(examples.item_B[part], device)
            own = seen and [seen[i] for i in part]
            asked = histories.take(index), states_BD[index]
            found = full_ranking.rank(
                self._network, self._table, *asked, standing, item_B, own, keep=self.watch is not None
            )
            if found.certain_C is not None and report.look is None:
                until = int(chosen[at_once]) if at_once < len(chosen) else count
                report.look = Look(until, found.certain_C)
            ranked = found
            if self.watch is not None:
                if sampled:
                    with torch.no_grad():
                        all_IS = self._table.standing()
                        ranked = full_ranking.rank(self._network, self._table, *asked, all_IS, item_B, own, keep=True)
                self.watch(part, ranked)
            report.rank_B[part], report.popularity_rank_B[part] = ranked.rank_B, ranked.popularity_rank_B
            # Synchronises with the GPU: what was found leaves for the metrics.
            report.item_loss_B[part] = found.loss_B.detach().cpu().numpy()
            report.led_B[part], report.led_anywhere_B[part] = found.led_B2.T
            if log_share is not None:
                report.popular_B[part] = log_share(item_B).cpu().numpy()
            loss_B = (1 - torch.exp(-robustness * found.mixed_loss_B)) / robustness + found.loss_B
            if trusted_B is not None:
                loss_B = loss_B * torch.from_numpy(trusted_B[part]).to(device)
            mean = loss_B.sum() / len(chosen)
            if mean.requires_grad:
                torch.autograd.backward(mean)
            loss = loss + mean.detach()
        return report, loss

    @staticmethod
    def _log_shares(standing: Standings) -> Callable[[Tensor], Tensor]:
        """Return what tells the logarithm of items' shares of choices of late."""
        if isinstance(standing, Sample):
            return standing.log_share
        log_share_I = standing[:, SLOWEST_TREND].log_softmax(0)
        return lambda item_B: log_share_I[item_B]

    def _known(self, item_B: Rows) -> npt.NDArray[np.bool_]:
        total_B = self._table.columns["total"][to_tensor(item_B, self._table.device)]
        # Synchronises with the GPU: which examples can be ranked decides the shapes that follow.
        return np.asarray((total_B > 0).cpu().numpy())

    @torch.no_grad()
    def _classify(
        self, examples: Examples, states_BD: Tensor, standing: Standings, histories: Histories
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32], Tensor]:
        """Return the loss of each example, the probability of each class, and what counting said."""
        device = self._table.device
        item_B = to_tensor(examples.item_B, device)
        context_BP = to_tensor(examples.context_BP, device)
        context_BC = self._network.context_vectors(context_BP)
        vectors_BD = self._table.columns["vector"][item_B]
        known_of_items = self._network.rates.item(self._table.columns["classes"][item_B])
        rates_BR = torch.cat([self._network.user_rates(histories, self._table, context_BP), known_of_items], 1)
        logits_BC = self._network.class_logits(states_BD, vectors_BD, standing[item_B], context_BC, rates_BR)
        losses_B = F.cross_entropy(logits_BC, to_tensor(examples.class_B, device), reduction="none")
        # Synchronises with the GPU: what was found leaves for the metrics.
        return losses_B.cpu().numpy().astype(np.float64), logits_BC.softmax(-1).cpu().numpy(), rates_BR
