"""Gate: may this version be published? It is tested beside the version being served, on feedback new to both.

Three questions, each with a confidence bound so that noise alone holds nothing: is the version worse at ranking or at
classifying feedback that neither has learned; is it worse on feedback of the past, drawn from the replay window; are
its numbers finite and of usual size. Pure functions of weights and feedback: rebuilt versions get the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recsys.settings import Settings
from recsys.weights.replica import SERVED_COLUMNS, Replica
from trainer.drift import ITEM_VECTORS, NETWORK
from trainer.examples import Examples, ReplayWindow
from trainer.learner import Learner
from trainer.prequential import Look, Prequential, StepReport

# Losses of single events are capped, in nats, so that a few surprises do not decide.
LARGEST_LOSS = 15.0
# Fewer events than this prove nothing.
LEAST_EVENTS = 30
# Feedback of the past is asked only when the window holds this many times what a version learns.
WINDOW_VERSIONS = 20


@dataclass(slots=True)
class Comparison:
    """Compare two versions on the same events by the difference of their losses, in nats; above 0 is worse."""

    differences: list[float] = field(default_factory=list)

    def add(self, candidate: np.ndarray, served: np.ndarray) -> None:
        """Add pairs of losses; events that the served version could not be asked are left out.

        A candidate whose loss is no number where the served one's is counts as wrong as can be.
        """
        candidate = np.where(np.isnan(candidate), LARGEST_LOSS, candidate)
        difference = np.minimum(candidate, LARGEST_LOSS) - np.minimum(served, LARGEST_LOSS)
        self.differences.extend(difference[np.isfinite(difference)].tolist())

    def at_least(self, confidence: float) -> float:
        """Return what the mean difference surely reaches, `confidence` standard errors below it; -inf if unknown."""
        count = len(self.differences)
        if count < LEAST_EVENTS:
            return -math.inf
        values = np.array(self.differences)
        return float(values.mean() - confidence * values.std(ddof=1) / math.sqrt(count))

    @property
    def mean(self) -> float:
        """Return the mean difference, 0 before the first."""
        return float(np.mean(self.differences)) if self.differences else 0.0


class Gate:
    """Hold a copy of the version being served and compare the one in the making with it."""

    def __init__(self, settings: Settings, learner: Learner) -> None:
        self._settings, self._learner = settings, learner
        self._served = Replica(settings, learner.device)
        self._served.network.eval()
        self._prequential = Prequential(settings, self._served.network, self._served.table)
        self.accept(None)

    def accept(self, rows: Tensor | None) -> None:
        """Take the learner's weights as the version being served; `rows` have changed, None means all."""
        own, served = self._learner.replica, self._served
        if rows is None:
            served.table.clear()
            served.table.extend(own.table.item_ids[1:])
            rows = torch.arange(own.table.rows, device=own.device)
        self._allocate()
        served.table.write(rows, {name: own.table.columns[name][rows] for name in SERVED_COLUMNS}, ())
        served.table.clock = own.table.clock
        served.network.load_state_dict(own.network.state_dict())
        self.ranking, self.classes = Comparison(), Comparison()
        self._batches = 0

    def _allocate(self) -> None:
        """Give the served copy the rows that the learner has, so that both read the same examples."""
        named, table = self._learner.named(), self._served.table
        if len(changed := table.assign(named.rows, named.ids)):
            table.begin(changed.tolist())

    def free(self, rows_R: np.ndarray) -> None:
        """Take rows from their items, as the learner has."""
        self._served.table.remove(rows_R)

    def observe(self, examples: Examples, report: StepReport) -> None:
        """Compare on a batch that neither version has learned; `report` is what the learner's own test found."""
        self._batches += 1
        if self._batches == 1:
            # Both are the same still.
            return
        self._allocate()
        # Of those that the learner ranked together, so that they can be ranked among the same.
        count = report.look.examples if report.look else len(examples)
        picked = np.linspace(0, count - 1, min(count, self._settings.gate_events)).astype(np.int64)
        served = self._test(self._prequential, examples.take(picked), self._served, report.look)
        self.ranking.add(report.item_loss_B[picked], served.item_loss_B)
        self.classes.add(report.class_loss_B[picked], served.class_loss_B)

    @torch.no_grad()
    def _test(
        self, prequential: Prequential, examples: Examples, replica: Replica, look: Look | None = None
    ) -> StepReport:
        # Where the learner looked at a sample, of the same rows: by chance neither version is ahead. So, too, where the
        # other version's memory led for certain: what one looks at surely and the other by chance scatters.
        sample, table = self._learner.sample, replica.table
        standing = sample.of(table, look and look.certain_C) if sample else table.standing()
        report, _ = prequential.test(examples, None, standing)
        return report

    def objection(self) -> str | None:
        """Return why the version must not be published, or None."""
        settings = self._settings
        if problem := self._unusual():
            return problem
        questions = [
            ("ranks new feedback", self.ranking, settings.gate_margin),
            ("classifies new feedback", self.classes, settings.gate_margin),
        ]
        past = self._past()
        if past is not None:
            # Some of the past is forgotten for the sake of the present; only a collapse is held.
            questions.append(("ranks feedback of the past", past, settings.gate_past_margin))
        for what, comparison, margin in questions:
            worse = comparison.at_least(settings.gate_confidence)
            if worse > margin:
                return f"{what} worse than the version served: by {comparison.mean:.3f} nats, surely by {worse:.3f}"
        return None

    def _past(self) -> Comparison | None:
        window: ReplayWindow = self._learner.window
        settings = self._settings
        # Where only the catalogue changed nothing was learned, nor are there rows that the learner looked at.
        if not self._batches or len(window) < WINDOW_VERSIONS * settings.batch_size * settings.batches_per_version:
            return None
        random = np.random.Generator(np.random.Philox(key=settings.seed, counter=[0, self._learner.steps, 2, 0]))
        examples = window.draw(settings.gate_events * settings.batches_per_version, random)
        # A version of one batch was observed by neither: its new items may be drawn already.
        self._allocate()
        own = Prequential(settings, self._learner.network, self._learner.table)
        candidate = self._test(own, examples, self._learner.replica)
        # Of many, those that were ranked together, as of a batch.
        count = candidate.look.examples if candidate.look else len(examples)
        served = self._test(self._prequential, examples.take(np.arange(count)), self._served, candidate.look)
        comparison = Comparison()
        comparison.add(candidate.item_loss_B[:count], served.item_loss_B)
        return comparison

    @torch.no_grad()
    def movement(self, rows: Tensor) -> dict[str, float]:
        """Return how far the version in the making is from the one being served, by what moved.

        Mean cosine distance of the vectors of `rows`; norm of the change of the network, as a share of its norm.
        """
        # Rows that came with this version: the copy served may have no room for them yet.
        rows = rows[rows < self._served.table.rows]
        own, served = (replica.table.columns["vector"][rows] for replica in (self._learner.replica, self._served))
        # An item that came or went has no vector to have moved from or to.
        both = own.any(1) & served.any(1)
        # Synchronises with the GPU: what was found leaves for the metrics.
        distance = (
            1.0 - float(functional.cosine_similarity(own[both], served[both]).mean()) if bool(both.any()) else 0.0
        )
        before = dict(self._served.network.named_parameters())
        pairs = [(p, before[name]) for name, p in self._learner.network.named_parameters()]
        change = math.hypot(*(_norm(own - served) for own, served in pairs))
        norm = math.hypot(*(_norm(served) for _, served in pairs))
        return {ITEM_VECTORS: distance, NETWORK: change / max(norm, 1e-12)}

    def _unusual(self) -> str | None:
        """Say which part of the weights is not finite, or has grown beyond what one version may."""
        served = self._served.network.state_dict()
        # Counts grow as feedback comes.
        counts = {name for name, _ in self._learner.network.named_buffers()}
        for name, tensor in self._learner.network.state_dict().items():
            norm, before = _norm(tensor), _norm(served[name])
            if not math.isfinite(norm):
                return f"holds {name} that is not finite"
            if name not in counts and norm > self._settings.gate_growth * before + 1.0:
                return f"holds {name} whose norm grew from {before:.3g} to {norm:.3g}"
        # All others are those of a version that passed.
        if not bool(torch.isfinite(self._learner.table.columns["vector"][self._learner.changed()]).all()):
            return "holds an item vector that is not finite"
        return None


def _norm(tensor: Tensor) -> float:
    # Synchronises with the GPU: a verdict is the host's.
    return float(torch.linalg.vector_norm(tensor.to(torch.float64)))


def describe(objections: Sequence[str]) -> str:
    """Put the objections to one version into a sentence; "" for none."""
    return f"held {len(objections)} times, the last time because it {objections[-1]}" if objections else ""
