"""Learner: test a batch, learn it together with replayed ones, and say what changed.

One step is a pure function of the weights, the batch, the replay window and the step's number; on one CPU type,
torch version and thread count it repeats bit for bit.

Shapes as in recsys.network; N sampled negatives, U distinct rows of a step, X new and replayed examples together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.encoding import to_tensor
from recsys.item_table import TRANSITION_REACH, ItemTable
from recsys.network import RecommendationNetwork
from recsys.settings import Settings
from recsys.weights import WeightPayload
from recsys.weights.replica import Replica, items_of, to_array
from recsys.weights.replica import to_tensor as from_array
from trainer.examples import Examples, ReplayWindow, join
from trainer.quality import MISS, NO_EVENT

MIX_LEARNING_RATE = 0.01
# Scores held at once while testing, so that memory does not grow with the number of items.
SCORES_AT_ONCE = 8_000_000
ADAGRAD_EPSILON = 1e-10
SQUARED_GRADIENT = "squared_gradient"
STEPS = "steps"
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
MASKED = -1e9
# Of the feedback classes' cross-entropy, beside that over items.
CLASS_LOSS_WEIGHT = 1.0


@dataclass(slots=True)
class StepReport:
    """What a step found before it learned, for each of the batch's B examples, and what it did."""

    # 1 is best; MISS where the item was new, NO_EVENT where the feedback is not positive.
    rank_B: np.ndarray
    popularity_rank_B: np.ndarray
    # Cross-entropy over items (positive feedback of known items, else NaN) and over feedback classes.
    item_loss_B: np.ndarray
    class_loss_B: np.ndarray
    learned: bool = True
    # Of the batch and what was replayed with it; by name as the trainer's metrics have it.
    losses: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = math.nan


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
        self._positive = np.array([c.positive for c in settings.classes])
        self._positive_C = torch.tensor([c.positive for c in settings.classes], device=device)

    def step(self, examples: Examples, seen: list[np.ndarray] | None = None) -> StepReport:
        """Test, then learn, one batch of new examples whose items already have rows.

        `seen` gives per example the rows that the user already has, left out of the ranking; by default its history.
        A batch whose loss or gradient is not finite leaves the weights as they are and reports learned = False.
        """
        random = np.random.Generator(np.random.Philox(key=self.settings.seed, counter=[0, self.steps, 1, 0]))
        torch.manual_seed(int(random.integers(1 << 62)))
        self.steps += 1
        trend_IS = self.table.log_trend()
        report, mix_loss = self._test(examples, seen, trend_IS)
        replayed = self.window.draw(self.settings.replay_size, random)
        self.window.add(examples)
        rows_U, vectors_UD, item_loss, class_loss = self._loss(join([examples, replayed]), trend_IS, random)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = item_loss + CLASS_LOSS_WEIGHT * class_loss
        torch.autograd.backward(loss + mix_loss)
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
        # Synchronises with the GPU: what was found leaves for the metrics.
        report.losses = {"total": float(loss), "item": float(item_loss), "class": float(class_loss)}
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

    def restore(self, served: WeightPayload, own: WeightPayload) -> None:
        """Move to the version that both payloads lead to; the replay window is filled by the caller.

        Raises:
            CorruptWeights: when they do not fit these settings.
        """
        self.replica.apply(served)
        self.steps = int(own.dense[STEPS][0])
        rows = from_array(own.rows, self.device).to(torch.int64)
        self.table.columns[SQUARED_GRADIENT].index_copy_(
            0, rows, from_array(own.columns[SQUARED_GRADIENT], self.device)
        )
        for name, parameter, optimizer in self._optimized():
            found = {key: own.dense[f"{name}.{key}"] for key in OPTIMIZER_STATE if f"{name}.{key}" in own.dense}
            if found:
                optimizer.state[parameter] = {key: from_array(value, self.device) for key, value in found.items()}

    def _optimized(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        mix, dense = self.optimizers[1], self.optimizers[0]
        for name, parameter in self.network.named_parameters():
            yield name, parameter, mix if name.startswith("mix.") else dense

    def take_changed(self) -> Tensor:
        """Return the rows changed since the last call, ascending, and start anew."""
        changed, self._changed = self._changed, []
        return torch.unique(torch.cat(changed)) if changed else torch.zeros(0, dtype=torch.int64, device=self.device)

    def _test(self, examples: Examples, seen: list[np.ndarray] | None, trend_IS: Tensor) -> tuple[StepReport, Tensor]:
        """Rank every item for each positive example; return the report and the loss that teaches the mixing weights."""
        self.network.eval()
        count = len(examples)
        report = StepReport(np.full(count, NO_EVENT), np.full(count, NO_EVENT), np.full(count, np.nan), np.zeros(count))
        report.class_loss_B[:] = self._test_classes(examples, trend_IS)
        positive = self._positive[examples.class_B]
        report.rank_B[positive] = report.popularity_rank_B[positive] = MISS
        chosen = np.flatnonzero(positive & self._known(examples.item_B))
        mix_loss = torch.zeros((), device=self.device)
        at_once = max(1, SCORES_AT_ONCE // self.table.rows)
        for start in range(0, len(chosen), at_once):
            part = chosen[start : start + at_once]
            mix_loss = mix_loss + self._test_part(examples, part, seen, trend_IS, report)
        return report, mix_loss / max(1, len(chosen))

    def _known(self, item_B: np.ndarray) -> np.ndarray:
        total_B = self.table.columns["total"][to_tensor(item_B, self.device)]
        # Synchronises with the GPU: which examples can be ranked decides the shapes that follow.
        return np.asarray((total_B > 0).cpu().numpy())

    def _test_part(
        self, examples: Examples, part: np.ndarray, seen: list[np.ndarray] | None, trend_IS: Tensor, report: StepReport
    ) -> Tensor:
        histories = examples.take(part).histories(self.device)
        item_B = to_tensor(examples.item_B[part], self.device)
        table = self.table
        vectors_ID = table.column("vector")
        with torch.no_grad():
            last_B = histories.rows_BL[:, -1]
            states_BD = self.network.states(vectors_ID[histories.rows_BL], vectors_ID[last_B], histories)
            transitions = table.transitions(histories.latest_first(TRANSITION_REACH))
            lift_BI = self.network.lift(transitions, table.rows)
        weights_BP = self.network.mixing_weights(histories)
        scores_BI = self.network.scores(weights_BP, states_BD, vectors_ID, trend_IS, lift_BI)
        hidden_BI = (table.column("total") == 0).repeat(len(part), 1)
        if seen is None:
            hidden_BI.scatter_(1, histories.rows_BL, True)
        else:
            for i, example in enumerate(part):
                hidden_BI[i, torch.from_numpy(seen[example])] = True
        hidden_BI.scatter_(1, item_B[:, None], False)
        hidden_BI[:, 0] = True
        scores_BI = scores_BI.masked_fill(hidden_BI, MASKED)
        loss_B = F.cross_entropy(scores_BI, item_B, reduction="none")
        # Synchronises with the GPU: what was found leaves for the metrics.
        report.item_loss_B[part] = loss_B.detach().cpu().numpy()
        report.rank_B[part] = ranks(scores_BI.detach(), item_B).cpu().numpy()
        popularity_BI = table.column("total").masked_fill(hidden_BI, MASKED)
        report.popularity_rank_B[part] = ranks(popularity_BI, item_B).cpu().numpy()
        return loss_B.sum()

    def _test_classes(self, examples: Examples, trend_IS: Tensor) -> np.ndarray:
        with torch.no_grad():
            histories = examples.histories(self.device)
            item_B = to_tensor(examples.item_B, self.device)
            vectors = self.table.columns["vector"]
            states_BD = self.network.states(vectors[histories.rows_BL], vectors[histories.rows_BL[:, -1]], histories)
            logits_BC = self.network.class_logits(
                states_BD,
                vectors[item_B],
                trend_IS[item_B],
                self.network.context_vectors(to_tensor(examples.context_BP, self.device)),
            )
            losses_B = F.cross_entropy(logits_BC, to_tensor(examples.class_B, self.device), reduction="none")
            # Synchronises with the GPU: what was found leaves for the metrics.
            return losses_B.cpu().numpy()

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
        others_XN = states_XD @ negatives_ND.T + math.log(max(1.0, len(self.table) / len(negative_N)))
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
            touched = self.table.count(histories.latest_first(TRANSITION_REACH), to_tensor(counted.item_B, self.device))
            self._changed.append(touched)


def ranks(scores_BI: Tensor, item_B: Tensor) -> Tensor:
    """Return each item's rank, 1 the best; a tie counts against it only where the other item is older."""
    own_B1 = scores_BI.gather(1, item_B[:, None])
    older_BI = torch.arange(scores_BI.shape[1], device=scores_BI.device) < item_B[:, None]
    return 1 + (scores_BI > own_B1).sum(1) + ((scores_BI == own_B1) & older_BI).sum(1)
