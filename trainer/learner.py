"""Learner: test a batch, learn it together with replayed ones, and say what changed.

One step is a pure function of the weights, the batch, the replay window and the step's number; on one CPU type,
torch version and thread count it repeats bit for bit.

Shapes as in recsys.network; N sampled negatives, U distinct rows of a step, X new and replayed examples together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

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

MIX_LEARNING_RATE = 0.01
ADAGRAD_EPSILON = 1e-10
SQUARED_GRADIENT = "squared_gradient"
STEPS = "steps"
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
# Of the feedback classes' cross-entropy, beside that over items.
CLASS_LOSS_WEIGHT = 1.0


class Learner:
    """Own the weights while they learn: network, item table, optimizer state, replay window, step count."""

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
        mix = list(self.network.mix.parameters())
        self._dense = [p for p in self.network.parameters() if all(p is not m for m in mix)]
        decay = settings.weight_decay
        self.optimizers = (
            torch.optim.AdamW(self._dense, lr=settings.learning_rate, weight_decay=decay, fused=True),
            torch.optim.AdamW(mix, lr=MIX_LEARNING_RATE, weight_decay=0.0, fused=True),
        )
        self._prequential = Prequential(settings, self.network, self.table)
        self._positive = np.array([c.positive for c in settings.classes])
        self._positive_C = torch.tensor([c.positive for c in settings.classes], device=device)

    def step(self, examples: Examples, seen: list[np.ndarray] | None = None) -> StepReport:
        """Test, then learn, one batch of new examples whose items already have rows.

        `seen` gives per example the rows that the user already has, left out of the ranking; by default its history.
        A batch whose loss or gradient is not finite leaves the weights as they are and reports learned = False.
        """
        random = np.random.Generator(np.random.Philox(key=self.settings.seed, counter=[0, self.steps, 1, 0]))
        _seed(int(random.integers(1 << 62)), self.device)
        self.steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        trend_IS = self.table.log_trend()
        report, mix_loss = self._prequential.test(examples, seen, trend_IS)
        replayed = self.window.draw(self.settings.replay_size, random)
        rows_U, vectors_UD, item_loss, class_loss = self._loss(join([examples, replayed]), trend_IS, random)
        loss = item_loss + CLASS_LOSS_WEIGHT * class_loss
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self._dense, self.settings.gradient_clip)
        gradient_UD = vectors_UD.grad
        assert gradient_UD is not None
        finite = torch.isfinite(norm) & torch.isfinite(loss) & torch.isfinite(mix_loss)
        finite = finite & torch.isfinite(gradient_UD).all()
        # Synchronises with the GPU: the one decision of a step that the host takes.
        if not bool(finite):
            report.learned = False
            return report
        self._apply(rows_U, gradient_UD)
        self._count(examples)
        self.window.add(examples)
        # Synchronises with the GPU: what was found leaves for the metrics.
        report.losses = {
            "total": float(loss.detach()),
            "item": float(item_loss.detach()),
            "class": float(class_loss.detach()),
        }
        report.gradient_norm = float(norm)
        return report

    def allocate(self, item_ids: Iterable[str]) -> None:
        """Give rows to the items that have none."""
        if new := self.table.allocate(item_ids):
            first, last = new[0][1], new[-1][1]
            self._changed.append(torch.arange(first, last + 1, device=self.device))

    def write(self, rows: Tensor, first_new: int) -> tuple[WeightPayload, WeightPayload]:
        """Write what servers need and what only a trainer needs: dense parts, `rows`, items from `first_new`."""
        dense: dict[str, np.ndarray] = {STEPS: np.array([self.steps], np.int64)}
        for name, parameter, optimizer in self._optimized():
            for key, value in optimizer.state.get(parameter, {}).items():
                dense[f"{name}.{key}"] = to_array(value)
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
        for name, parameter, optimizer in self._optimized():
            # Before a parameter's first gradient the optimizer has no state for it.
            optimizer.state.pop(parameter, None)
            if f"{name}.step" in own.dense:
                optimizer.state[parameter] = {
                    key: from_array(own.dense[f"{name}.{key}"], self.device) for key in OPTIMIZER_STATE
                }

    def _check(self, own: WeightPayload) -> None:
        """Refuse a trainer's payload that does not fit; nothing is changed."""
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {STEPS: ((1,), torch.int64)}
        for name, parameter, _ in self._optimized():
            if f"{name}.step" in own.dense:
                shapes = ((), tuple(parameter.shape), tuple(parameter.shape))
                for key, shape in zip(OPTIMIZER_STATE, shapes, strict=True):
                    expected[f"{name}.{key}"] = (shape, torch.float32)
        if set(own.dense) != set(expected) or set(own.columns) != {SQUARED_GRADIENT}:
            raise CorruptWeights("the trainer's part of the weights does not fit the settings")
        for name, (shape, dtype) in expected.items():
            fits(name, own.dense[name], shape, dtype)
        fits(SQUARED_GRADIENT, own.columns[SQUARED_GRADIENT], (len(own.rows),), torch.float32)

    def _optimized(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        mix, dense = self.optimizers[1], self.optimizers[0]
        for name, parameter in self.network.named_parameters():
            yield name, parameter, mix if name.startswith("mix.") else dense

    def take_changed(self) -> Tensor:
        """Return the rows changed since the last call, ascending, and start anew."""
        changed, self._changed = self._changed, []
        return torch.unique(torch.cat(changed)) if changed else torch.zeros(0, dtype=torch.int64, device=self.device)

    def _loss(
        self, examples: Examples, trend_IS: Tensor, random: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the distinct rows, a leaf with their vectors, and the losses over items and over classes."""
        self.network.train()
        histories = examples.histories(self.device)
        item_X = to_tensor(examples.item_B, self.device)
        class_X = to_tensor(examples.class_B, self.device)
        negative_N = to_tensor(random.integers(1, self.table.rows, self.settings.negatives), self.device)
        every = torch.cat([histories.rows_BL.reshape(-1), item_X, negative_N])
        rows_U, inverse = torch.unique(every, return_inverse=True)
        vectors_UD = self.table.columns["vector"][rows_U].requires_grad_(True)
        places, count = histories.rows_BL.numel(), len(examples)
        index_BL = inverse[:places].view_as(histories.rows_BL)
        last_XD = F.embedding(index_BL[:, -1], vectors_UD)
        states_XD = self.network.states(F.embedding(index_BL, vectors_UD), last_XD, histories)
        items_XD = F.embedding(inverse[places : places + count], vectors_UD)
        positive_X = self._positive_C[class_X] & (histories.rows_BL[:, -1] != 0)
        item_loss = self._item_loss(
            states_XD, items_XD, F.embedding(inverse[places + count :], vectors_UD), item_X, negative_N, positive_X
        )
        class_logits_XC = self.network.class_logits(
            states_XD,
            items_XD,
            trend_IS[item_X],
            self.network.context_vectors(to_tensor(examples.context_BP, self.device)),
        )
        return rows_U, vectors_UD, item_loss, F.cross_entropy(class_logits_XC, class_X)

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

    def _apply(self, rows_U: Tensor, gradient_UD: Tensor) -> None:
        """Step AdamW on the dense part and row-wise Adagrad (one accumulator a row) on the rows used."""
        for optimizer in self.optimizers:
            optimizer.step()
        used = rows_U != 0
        rows_U, gradient_UD = rows_U[used], gradient_UD[used]
        table = self.table
        accumulated_U = table.columns[SQUARED_GRADIENT][rows_U] + gradient_UD.square().mean(1)
        table.columns[SQUARED_GRADIENT].index_copy_(0, rows_U, accumulated_U)
        rate_U1 = self.settings.row_learning_rate / (accumulated_U.sqrt() + ADAGRAD_EPSILON)[:, None]
        vectors_UD = table.columns["vector"][rows_U] - rate_U1 * gradient_UD
        table.columns["vector"].index_copy_(0, rows_U, vectors_UD)
        self._changed.append(rows_U)

    def _count(self, examples: Examples) -> None:
        positive = self._positive[examples.class_B]
        if positive.any():
            counted = examples.take(np.flatnonzero(positive))
            histories = counted.histories(self.device)
            self.table.count(histories.latest_first(TRANSITION_REACH), to_tensor(counted.item_B, self.device))


def _seed(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from; torch.manual_seed does the same for every kind of device, which takes 1 ms."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
