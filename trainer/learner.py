"""Learner: test a batch, learn it together with replayed ones, and say what changed.

One step is a pure function of the weights, the batch, the replay window and the step's number; on one CPU type,
torch version and thread count it repeats bit for bit.

Shapes as in recsys.network; N sampled negatives, U distinct rows of a step, X new and replayed examples together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.encoding import to_tensor
from recsys.errors import CorruptWeights
from recsys.item_table import TRANSITION_REACH, ItemTable
from recsys.network import RecommendationNetwork
from recsys.settings import Settings
from recsys.weights import WeightPayload
from recsys.weights.replica import Replica, fits, items_of, to_array
from recsys.weights.replica import to_tensor as from_array
from trainer.examples import Examples, ReplayWindow, join
from trainer.prequential import MASKED, Prequential, StepReport
from trainer.strategies import Strategies

ADAGRAD_EPSILON = 1e-10
SQUARED_GRADIENT = "squared_gradient"
STEPS = "steps"
# Of the feedback classes' loss, beside that over items.
CLASS_LOSS_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class _Losses:
    """Hold the distinct rows of a step, a leaf with their vectors, and the mean losses; strategies add `extra`."""

    rows_U: Tensor
    vectors_UD: Tensor
    item: Tensor
    classes: Tensor
    extra: Tensor

    @property
    def total(self) -> Tensor:
        return self.item + CLASS_LOSS_WEIGHT * self.classes + self.extra


class Learner:
    """Own the weights while they learn: network, item table, strategies, replay window, step count."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.replica = Replica(settings, device)
        self.network: RecommendationNetwork = self.replica.network
        self.table: ItemTable = self.replica.table
        self.table.columns[SQUARED_GRADIENT] = torch.zeros_like(self.table.columns["total"])
        self.window = ReplayWindow(settings)
        self.steps = 0
        self._changed: list[Tensor] = []
        self.strategies = Strategies(settings, self.network)
        self.prequential = Prequential(settings, self.network, self.table)
        self._positive = np.array([c.positive for c in settings.classes])
        self._positive_C = torch.tensor([c.positive for c in settings.classes], device=device)

    def step(self, examples: Examples, seen: list[np.ndarray] | None = None, *, again: bool = False) -> StepReport:
        """Test, then learn, one batch of new examples whose items already have rows.

        `seen` gives per example the rows that the user already has, left out of the ranking; by default its history.
        `again` tells that the examples were learned before, as in a further epoch over a file: then they are neither
        tested nor counted, and nothing is replayed with them.
        A batch whose loss or gradient is not finite leaves the weights as they are and reports learned = False.
        """
        random = np.random.Generator(np.random.Philox(key=self.settings.seed, counter=[0, self.steps, 1, 0]))
        _seed(int(random.integers(1 << 62)), self.device)
        self.steps += 1
        self.strategies.clear()
        standing_IS = self.table.standing()
        if again:
            report, mix_loss, batch = StepReport.untested(len(examples)), torch.zeros((), device=self.device), examples
        else:
            report, mix_loss = self.prequential.test(examples, seen, standing_IS)
            batch = join([examples, self.window.draw(self.settings.replay_size, random)])
        with self.strategies.learning(self.steps):
            losses = self._loss(batch, len(examples), standing_IS, random)
            loss = losses.total
            torch.autograd.backward(loss)
            norm = self.strategies.clip(len(batch))
            finite = torch.isfinite(norm) & torch.isfinite(loss) & torch.isfinite(mix_loss)
            if losses.vectors_UD.grad is not None:
                finite = finite & torch.isfinite(losses.vectors_UD.grad).all()
            # Synchronises with the GPU: the one decision of a step that the host takes.
            if not bool(finite):
                report.learned = False
                return report
            self._apply(losses, report, 0 if again else len(examples))
        if not again:
            self._count(examples)
            self.window.add(examples)
        # Synchronises with the GPU: what was found leaves for the metrics.
        report.losses = {
            "total": float(loss.detach()),
            "item": float(losses.item.detach()),
            "class": float(losses.classes.detach()),
        }
        report.gradient_norm = float(norm)
        return report

    def learn_mixing(self, examples: Examples, seen: list[np.ndarray] | None = None) -> StepReport:
        """Test a batch, and learn from it the weights that mix the score's parts, and nothing else."""
        self.strategies.clear()
        report, mix_loss = self.prequential.test(examples, seen, self.table.standing())
        # Synchronises with the GPU: the one decision that the host takes.
        report.learned = bool(torch.isfinite(mix_loss))
        if report.learned:
            self.strategies.step_mixing()
        return report

    def allocate(self, item_ids: Iterable[str]) -> None:
        """Give rows to the items that have none."""
        if new := self.table.allocate(item_ids):
            first, last = new[0][1], new[-1][1]
            self._changed.append(torch.arange(first, last + 1, device=self.device))

    def write(self, rows: Tensor, first_new: int) -> tuple[WeightPayload, WeightPayload]:
        """Write what servers need and what only a trainer needs: dense parts, `rows`, items from `first_new`."""
        dense: dict[str, np.ndarray] = {STEPS: np.array([self.steps], np.int64), **self.strategies.write()}
        served = self.replica.write(rows, items_of(self.table, first_new))
        columns = {SQUARED_GRADIENT: to_array(self.table.columns[SQUARED_GRADIENT][rows])}
        return served, WeightPayload(dense, served.rows, columns)

    def write_all(self) -> tuple[WeightPayload, WeightPayload]:
        """Write all of both parts."""
        served, own = self.write(torch.arange(self.table.rows, device=self.device), 1)
        return replace(served, whole=True), replace(own, whole=True)

    def restore(self, served: WeightPayload, own: WeightPayload) -> None:
        """Move to the version that both payloads lead to; the replay window is filled by the caller.

        Raises:
            CorruptWeights: when they do not fit these settings.
        """
        self._check(own)
        self.replica.apply(served)
        self.steps = int(own.dense[STEPS][0])
        rows = from_array(own.rows, self.device).to(torch.int64)
        accumulated = from_array(own.columns[SQUARED_GRADIENT], self.device)
        self.table.columns[SQUARED_GRADIENT].index_copy_(0, rows, accumulated)
        self.strategies.restore(own.dense)

    def _check(self, own: WeightPayload) -> None:
        """Refuse a trainer's payload that does not fit; nothing is changed."""
        if STEPS not in own.dense or set(own.columns) != {SQUARED_GRADIENT}:
            raise CorruptWeights("the trainer's part of the weights does not fit the settings")
        fits(STEPS, own.dense[STEPS], (1,), torch.int64)
        fits(SQUARED_GRADIENT, own.columns[SQUARED_GRADIENT], (len(own.rows),), torch.float32)
        self.strategies.check({name: array for name, array in own.dense.items() if name != STEPS})

    def take_changed(self) -> Tensor:
        """Return the rows changed since the last call, ascending, and start anew."""
        changed, self._changed = self._changed, []
        return torch.unique(torch.cat(changed)) if changed else torch.zeros(0, dtype=torch.int64, device=self.device)

    def _loss(self, examples: Examples, new: int, standing_IS: Tensor, random: np.random.Generator) -> _Losses:
        """Compute the losses of a batch of which the first `new` are not replayed; classes are learned from these."""
        self.network.train()
        histories = examples.histories(self.device)
        item_X = to_tensor(examples.item_B, self.device)
        class_X = to_tensor(examples.class_B, self.device)
        negative_N = to_tensor(random.integers(1, self.table.rows, self.settings.negatives), self.device)
        every = torch.cat([histories.rows_BL.reshape(-1), item_X, negative_N])
        rows_U, inverse = torch.unique(every, return_inverse=True)
        vectors_UD = self.table.columns["vector"][rows_U].requires_grad_(self.strategies.rows)
        places, count = histories.rows_BL.numel(), len(examples)
        index_BL = inverse[:places].view_as(histories.rows_BL)
        last_XD = F.embedding(index_BL[:, -1], vectors_UD)
        vectors_XLD = F.embedding(index_BL, vectors_UD)
        states_XD = self.network.states(vectors_XLD, last_XD, histories)
        items_XD = F.embedding(inverse[places : places + count], vectors_UD)
        positive_X = self._positive_C[class_X] & (histories.rows_BL[:, -1] != 0)
        negatives_ND = F.embedding(inverse[places + count :], vectors_UD)
        item_loss = self._item_loss(states_XD, items_XD, negatives_ND, item_X, negative_N, positive_X)
        # What is replayed was counted already, and what the head knows by heart it would take for certain.
        class_logits_XC = self.network.class_logits(
            states_XD[:new].detach(),
            items_XD[:new].detach(),
            standing_IS[item_X[:new]],
            self.network.context_vectors(to_tensor(examples.context_BP[:new], self.device)),
            self.network.class_rates(
                self.network.user_counts(histories)[:new], self.table.columns["classes"][item_X[:new]]
            ),
        )
        class_loss = self.strategies.class_loss(class_logits_XC, class_X[:new])
        extra = self.strategies.distillation(histories, vectors_XLD, states_XD, negatives_ND)
        return _Losses(rows_U, vectors_UD, item_loss, class_loss, extra)

    def _item_loss(
        self,
        states_XD: Tensor,
        items_XD: Tensor,
        negatives_ND: Tensor,
        item_X: Tensor,
        negative_N: Tensor,
        positive_X: Tensor,
    ) -> Tensor:
        """Sampled softmax: each uniform negative stands for (items / N) others; the positive is there for certain."""
        own_X1 = (states_XD * items_XD).sum(1, keepdim=True)
        others_XN = states_XD @ negatives_ND.T + math.log(len(self.table) / len(negative_N))
        others_XN = others_XN.masked_fill(negative_N == item_X[:, None], MASKED)
        loss_X = torch.cat([own_X1, others_XN], 1).logsumexp(1) - own_X1[:, 0]
        return (loss_X * positive_X).sum() / positive_X.sum().clamp_min(1)

    def _apply(self, losses: _Losses, report: StepReport, new: int) -> None:
        """Step the dense part, and row-wise Adagrad (one accumulator a row) on the rows used unless they are frozen."""
        self.strategies.step(report, new)
        rows_U, gradient_UD = losses.rows_U, losses.vectors_UD.grad
        if gradient_UD is None:
            return
        # What neither follows nor is followed in anything positive has no gradient, and stays as it is.
        used = (rows_U != 0) & gradient_UD.any(1)
        rows_U, gradient_UD = rows_U[used], gradient_UD[used]
        table = self.table
        accumulated_U = table.columns[SQUARED_GRADIENT][rows_U] + gradient_UD.square().mean(1)
        table.columns[SQUARED_GRADIENT].index_copy_(0, rows_U, accumulated_U)
        rate = self.settings.row_learning_rate * self.strategies.rate
        rate_U1 = rate / (accumulated_U.sqrt() + ADAGRAD_EPSILON)[:, None]
        vectors_UD = table.columns["vector"][rows_U] - rate_U1 * gradient_UD
        table.columns["vector"].index_copy_(0, rows_U, vectors_UD)
        self._changed.append(rows_U)

    def _count(self, examples: Examples) -> None:
        latest_BK = examples.histories(self.device).latest_first(TRANSITION_REACH)
        positive_B = torch.from_numpy(self._positive[examples.class_B]).to(self.device)
        class_B = to_tensor(examples.class_B, self.device)
        self.network.count_classes(class_B)
        item_B = to_tensor(examples.item_B, self.device)
        self._changed.append(self.table.count(latest_BK, item_B, positive_B, class_B))


def _seed(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from; torch.manual_seed does the same for every kind of device, which takes 1 ms."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
