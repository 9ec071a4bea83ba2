"""Learner: test a batch, learn it, now and then learn earlier choices again, and say what changed.

One step is a pure function of the weights, the batch, the replay window and the step's number; on one CPU type,
torch version and thread count it repeats bit for bit.

Shapes as in recsys.network; N sampled negatives, U distinct rows of a step, E new examples, X those and impressions
together, of which M were followed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recsys.accounts import NOBODY
from recsys.encoding import to_tensor
from recsys.errors import CorruptWeights
from recsys.item_table import PADDING_ROW, TRANSITION_REACH, ItemTable
from recsys.logs import tell
from recsys.network import Histories, RecommendationNetwork
from recsys.settings import Settings
from recsys.weights import WeightPayload
from recsys.weights.payload import NewItems
from recsys.weights.replica import Replica, fits, items_of, to_array
from recsys.weights.replica import to_tensor as from_array
from trainer import row_adagrad
from trainer.contents import CONTENT_COLUMNS, Contents
from trainer.crowd import CROWD, Crowd
from trainer.crowd import RECENT as CROWD_RECENT
from trainer.drift import CATEGORY_MEMORY, CHOICES, DRIFT, MISLED, TRANSITIONS, Drift
from trainer.examples import Examples, Followed, ReplayWindow, join, learnable
from trainer.hindsight import Hindsight
from trainer.prequential import Prequential, StepReport
from trainer.quality import MISS
from trainer.sample import LATELY, MANY_ROWS, SAMPLING, Sample, Standings
from trainer.sampled_softmax import LeftOut, sampled_softmax
from trainer.strategies import Strategies
from trainer.trust import ACCOUNTS, TRUST, Trust, told

_log = logging.getLogger(__name__)

SQUARED_GRADIENT = "squared_gradient"
OWN_COLUMNS = (SQUARED_GRADIENT, *CONTENT_COLUMNS)
STEPS = "steps"
# The clock at which cold items last followed their categories.
FOLLOWED = "followed"
# Of the replay window, the newest examples, to which a response to a drift looks.
RECENT = 2048
# Choices, the newest, that are counted anew when what followed items has faded: the block that showed that it misleads,
# the one in which the change may fall, and what waits for the next.
RECOUNTED = 3 * CHOICES
# Of what is learned again, negatives for each example of a step, all items at most: on one real stream four foresee
# what is kept apart 0.05 nats better than a half does, for twice the time.
NEGATIVES_AGAIN = 4
# Lists of rows that are kept apart before they become one: nobody may ask for them in a whole epoch.
CHANGES_APART = 64
# Of an item that is no negative.
NO_PLACE = -1
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
        self.contents = Contents(self.table)
        self.window = ReplayWindow(settings)
        self.steps = 0
        self._changed: list[Tensor] = []
        # Rows that got or lost an item: of the changes that were taken last, and since.
        self._named_taken: list[int] = []
        self._named: list[int] = []
        self.strategies = Strategies(settings, self.network)
        self.drift = Drift(settings)
        self.trust = Trust(settings.trust)
        self.crowd = Crowd(settings.trust)
        # What the last step but a replay looked at in place of all rows, where they are many.
        self.sample: Sample | None = None
        self.prequential = Prequential(settings, self.network, self.table)
        self._provisional = settings.provisional_class
        self._positive = np.array([c.positive for c in settings.classes])

    def step(self, examples: Examples, seen: list[np.ndarray] | None = None, *, again: bool = False) -> StepReport:
        """Test, then learn, one batch of new examples whose items already have rows.

        `seen` gives per example the rows that the user already has, left out of the ranking; by default its history.
        `again` tells that the examples were learned before, as in a further epoch over a file: then they are neither
        tested nor counted, nothing is replayed after them, and their classes, which the head would know by heart, are
        not learned. What is `seen`, if given, is then left out of what they are told from.
        A batch whose loss or gradient is not finite leaves the weights as they are and reports learned = False.
        """
        random = np.random.Generator(np.random.Philox(key=self.settings.seed, counter=[0, self.steps, 1, 0]))
        _seed(int(random.integers(1 << 62)), self.device)
        self.steps += 1
        clock = self.table.clock
        self._warm(examples)
        self.strategies.clear()
        self.strategies.boost = self.settings.drift_boost if self.drift.responding else 1.0
        standing = None if again else self._look()
        if standing is None:
            report, mix_loss = StepReport.untested(len(examples)), torch.zeros((), device=self.device)
        else:
            report, mix_loss = self.prequential.test(examples, seen, standing, self._trusted(examples))
        followed = None if again else self.window.followed(examples)
        batch = examples if followed is None else join([examples, followed.impressions])
        with self.strategies.learning(self.steps):
            losses = self._loss(batch, report, followed, standing, random, seen if again else None)
            loss = losses.total
            # Learned again where classes alone learn, there is nothing to learn.
            if loss.requires_grad:
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
            trusted_B = self._judge(examples, report)
            report.distrusted = int((~trusted_B).sum())
            self._count(examples, followed, trusted_B)
            self.remember(examples, self.table.clock)
            self._look_for_crowds()
            categories_BK = self.contents.digests(examples.item_B)
            report.drifted = self.drift.observe(examples, report, len(self.table), categories_BK)
            if TRANSITIONS in report.drifted:
                self.fade(self.settings.drift_fading)
        # Synchronises with the GPU: what was found leaves for the metrics.
        report.losses = {
            "total": float(loss.detach()),
            "item": float(losses.item.detach()) if self._learnable(batch).any() else math.nan,
            "class": float(losses.classes.detach()),
        }
        report.gradient_norm = float(norm)
        if not again and self.table.clock // self.settings.replay_every > clock // self.settings.replay_every:
            self._replay(random)
        return report

    def _look(self) -> Standings:
        """Return what is known of all rows, or of a sample of them where they are many."""
        self.sample = None
        if self.device.type != "cpu" or self.table.rows <= MANY_ROWS:
            return self.table.standing()
        random = np.random.Generator(np.random.Philox(key=self.settings.seed, counter=[0, self.steps, SAMPLING, 0]))
        self.sample = Sample.draw(self.table, self._lately(), self.contents.cold_rows, random)
        return self.sample

    def _lately(self) -> np.ndarray:
        """Return the rows of the newest feedback, and those of as many choices, however many impressions there are."""
        count = 0
        while True:
            count = min(max(LATELY, 4 * count), len(self.window))
            item_B, class_B = self.window.columns(count, "item_B", "class_B")
            chosen = np.flatnonzero(self._positive[class_B])[-LATELY:]
            if len(chosen) == LATELY or count == len(self.window):
                return np.concatenate([item_B[-LATELY:], item_B[chosen]])

    def fade(self, by: float) -> None:
        """Let all that followed items count less, and anew what followed them in the newest choices.

        These showed that the rest misleads: to fade with it is to forget what is true now, and costs most of the gain.
        """
        if by == 1:
            return
        newest = self.window.newest(RECENT)
        counts_B = self._positive[newest.class_B] & self._trusted(newest)
        chosen = np.flatnonzero(counts_B & (newest.item_B != PADDING_ROW))[-RECOUNTED:]
        recounted = newest.take(chosen)
        latest_NK = recounted.histories(self.device).latest_first(TRANSITION_REACH)
        self._changed.append(self.table.fade_transitions(by, latest_NK, to_tensor(recounted.item_B, self.device)))

    def recount(self, examples: Examples) -> None:
        """Count what followed what in these examples alone, so that it holds at any time among them."""
        chosen = np.flatnonzero(self._positive[examples.class_B] & (examples.item_B != PADDING_ROW))
        latest_NK = examples.rows_BL[chosen, -TRANSITION_REACH:][:, ::-1]
        self.table.recount(latest_NK, examples.item_B[chosen])
        self._changed.append(torch.arange(self.table.rows, device=self.device))

    def _judge(self, examples: Examples, report: StepReport) -> np.ndarray:
        """Take in how well histories explain what was chosen; return whose feedback counts."""
        told_B = told(report.led_B, report.led_anywhere_B, report.popular_B, len(self.table))
        # What the user has already tells nothing of habits.
        told_B[report.rank_B <= MISS] = np.nan
        self.trust.observe(examples.account_B, told_B, self.table.clock + len(examples))
        trusted_B = self._trusted(examples)
        # Nor does it tell whether what followed items misleads.
        report.led_anywhere_B[~trusted_B] = np.nan
        return trusted_B

    def _trusted(self, examples: Examples) -> np.ndarray:
        """Tell which feedback counts."""
        chosen_B = np.where(self._positive[examples.class_B], examples.item_B, PADDING_ROW)
        return self.trust.trusted(examples.account_B) & self.crowd.trusted(examples.rows_BL, chosen_B)

    @property
    def distrusted(self) -> int | None:
        """Return of how many accounts nothing is counted at present; None: nobody is attacking."""
        attacked = self.trust.attacked or self.crowd.attacked
        return self.trust.distrusted + self.crowd.accounts if attacked else None

    def _look_for_crowds(self) -> None:
        names = "class_B", "rows_BL", "item_B", "account_B"
        class_B, rows_BL, item_B, account_B = self.window.columns(CROWD_RECENT, *names)
        asked_B = self._positive[class_B] & (item_B != PADDING_ROW) & (account_B != NOBODY)
        self.crowd.observe(rows_BL, item_B, account_B, asked_B)

    def _replay(self, random: np.random.Generator) -> None:
        """Learn choices of the past again; while a drift is responded to, half of them recent ones.

        Drawn with each small batch, against few negatives, the same would be learned by heart. What is distrusted now
        is left out, also where it was learned before that was known. Where item rows are frozen there is nothing to
        learn.
        """
        count = self.settings.replay_size
        if not count or not self.strategies.rows:
            return
        recent = count // 2 if self.settings.drift_boost > 1 and self.drift.responding else 0
        drawn = join(
            [self.window.draw_choices(recent, random, RECENT), self.window.draw_choices(count - recent, random)]
        )
        drawn = drawn.take(np.flatnonzero(self._trusted(drawn)))
        if len(drawn) and not self.step(drawn, again=True).learned:
            tell(_log, logging.WARNING, "a replay is left out: not finite", steps=self.steps)

    def _learnable(self, examples: Examples) -> np.ndarray:
        return learnable(self._positive, examples.item_B, examples.class_B, examples.rows_BL)

    def learn_mixing(self, examples: Examples, seen: list[np.ndarray] | None = None) -> StepReport:
        """Test a batch, and learn from it the weights that mix the score's parts, and nothing else."""
        self.strategies.clear()
        report, mix_loss = self.prequential.test(examples, seen, self.table.standing())
        # Synchronises with the GPU: the one decision that the host takes.
        report.learned = bool(torch.isfinite(mix_loss))
        if report.learned:
            self.strategies.step_mixing()
        return report

    def row(self, item_id: str) -> int:
        """Return the item's row, a new one if it has none."""
        if not (row := self.table.row(item_id)):
            self.allocate([item_id])
            row = self.table.row(item_id)
        return row

    def allocate(self, item_ids: Iterable[str]) -> None:
        """Give rows to the items that have none."""
        if new := self.table.allocate(item_ids):
            rows = [row for _, row in new]
            self._changed.append(torch.tensor(rows, device=self.device))
            self._named.extend(rows)

    def catalogue(self, contents: Mapping[str, Sequence[str]]) -> None:
        """Take in the categories of items, none for one that was deleted.

        An item that has no row gets one, cold, while there is room.
        """
        table = self.table
        room = max(0, self.settings.max_items - len(table)) if self.settings.max_items else len(contents)
        unknown = [item_id for item_id, categories in contents.items() if categories and not table.row(item_id)][:room]
        self.allocate(unknown)
        known = [item_id for item_id in contents if table.row(item_id)]
        rows, new = (table.look_up(item_ids) for item_ids in (known, unknown))
        self.contents.write(rows, [contents[item_id] for item_id in known], new)
        # As if used just now: what is catalogued is not the first to lose its row.
        table.columns["touched"][to_tensor(new, self.device)] = table.clock
        self._changed.append(to_tensor(rows, self.device))
        self._make_vectors(self.contents.cold_among(rows))

    def follow_contents(self) -> None:
        """Have cold items follow what was learned of their categories, if that is due."""
        if self.contents.due():
            self.contents.followed = self.table.clock
            self._make_vectors(self.contents.cold_rows)

    def _warm(self, examples: Examples) -> None:
        """Have items on which there is feedback now be cold no longer."""
        rows = self.contents.cold_among(examples.item_B)
        self._make_vectors(rows)
        self.contents.end(rows)

    def _make_vectors(self, rows_R: np.ndarray) -> None:
        if len(rows_R):
            self.contents.follow(rows_R)
            self._changed.append(torch.from_numpy(rows_R).to(self.device))

    def free(self, rows_R: np.ndarray) -> None:
        """Take the rows, ascending, from their items; nothing of these is left, in the replay window either."""
        self._changed.append(self.table.remove(rows_R))
        self.contents.look_again()
        self.crowd.free(rows_R)
        self._named.extend(rows_R.tolist())
        gone_I = np.zeros(self.table.rows, np.bool_)
        gone_I[rows_R] = True
        self.window.forget(gone_I)

    def remember(self, examples: Examples, clock: int) -> None:
        """Put examples into the replay window; `clock` is the table's after the last of them.

        Where rows pass from item to item, what got its row later is left out, so that it is the same after a restart.
        """
        if self.table.dated:
            clock_B = np.arange(clock - len(examples), clock) + 1
            later_BL, later_B = (
                # Synchronises with the GPU: the replay window is the host's.
                self.table.columns["first"][to_tensor(rows, self.device)].cpu().numpy() >= clocks
                for rows, clocks in ((examples.rows_BL, clock_B[:, None]), (examples.item_B, clock_B))
            )
            if later_BL.any() or later_B.any():
                examples = examples.without(later_BL, later_B)
        self.window.add(examples)

    def named(self) -> NewItems:
        """Return the rows that got or lost an item lately with what they hold, in ascending order.

        Lately is since the last call of `take_changed` but one.
        """
        rows = np.array(sorted({*self._named_taken, *self._named}), np.int64)
        return NewItems(self.table.item_ids.take(rows), rows)

    def write(self, rows: Tensor, first_new: int) -> tuple[WeightPayload, WeightPayload]:
        """Write what servers need and what only a trainer needs: dense parts, `rows`, items from `first_new`.

        Items that got or lost one of the rows before it are written too, if `rows` are what was taken last.
        """
        dense: dict[str, np.ndarray] = {STEPS: np.array([self.steps], np.int64), **self.strategies.write()}
        dense |= self.drift.write() | self.trust.write() | self.crowd.write()
        dense[FOLLOWED] = np.array([self.contents.followed], np.int64)
        passed_on = self.named().split(first_new)[0]
        served = self.replica.write(rows, passed_on + items_of(self.table, first_new))
        columns = {name: to_array(self.table.columns[name][rows]) for name in OWN_COLUMNS}
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
        self._named_taken, self._named = [], []
        self.steps = int(own.dense[STEPS][0])
        rows = from_array(own.rows, self.device).to(torch.int64)
        for name in OWN_COLUMNS:
            self.table.columns[name].index_copy_(0, rows, from_array(own.columns[name], self.device))
        self.contents.look_again()
        self.contents.followed = int(own.dense[FOLLOWED][0])
        self.strategies.restore(own.dense)
        self.drift.restore(own.dense)
        self.sample = None
        self.trust.restore(own.dense)
        self.crowd.restore(own.dense)

    def _check(self, own: WeightPayload) -> None:
        """Refuse a trainer's payload that does not fit; nothing is changed."""
        if not {STEPS, FOLLOWED} <= set(own.dense) or set(own.columns) != set(OWN_COLUMNS):
            raise CorruptWeights("the trainer's part of the weights does not fit the settings")
        fits(STEPS, own.dense[STEPS], (1,), torch.int64)
        fits(FOLLOWED, own.dense[FOLLOWED], (1,), torch.int64)
        for name in OWN_COLUMNS:
            column = self.table.columns[name]
            fits(name, own.columns[name], (len(own.rows), *column.shape[1:]), column.dtype)
        self.drift.check(own.dense)
        self.trust.check(own.dense)
        self.crowd.check(own.dense, own.rows)
        known = (STEPS, FOLLOWED, DRIFT, MISLED, CATEGORY_MEMORY, TRUST, ACCOUNTS, CROWD)
        self.strategies.check({name: array for name, array in own.dense.items() if name not in known})

    def take_changed(self) -> Tensor:
        """Return the rows changed since the last call, ascending, and start anew."""
        changed, self._changed = self.changed(), []
        self._named_taken, self._named = self._named, []
        return changed

    def changed(self) -> Tensor:
        """Return the rows changed since they were taken last, ascending."""
        if self._changed:
            self._changed = [torch.unique(torch.cat(self._changed))]
        return self._changed[0] if self._changed else torch.zeros(0, dtype=torch.int64, device=self.device)

    def _loss(
        self,
        examples: Examples,
        report: StepReport,
        followed: Followed | None,
        standing: Standings | None,
        random: np.random.Generator,
        seen: Sequence[np.ndarray] | None,
    ) -> _Losses:
        """Compute the losses of a batch: new examples, reported on, then impressions that were followed.

        Without a standing of items that over the classes is left out. What is `seen` is no negative of its example.
        """
        self.network.train()
        histories = examples.histories(self.device)
        item_X = to_tensor(examples.item_B, self.device)
        drawn_N = self._negatives(random, again=len(examples) if standing is None else 0)
        negative_N = to_tensor(drawn_N, self.device)
        every = torch.cat([histories.rows_BL.reshape(-1), item_X, negative_N])
        rows_U, inverse = torch.unique(every, return_inverse=True)
        vectors_UD = self.table.columns["vector"][rows_U].requires_grad_(self.strategies.rows)
        places, count = histories.rows_BL.numel(), len(examples)
        index_BL = inverse[:places].view_as(histories.rows_BL)
        states_XD = self.network.states(vectors_UD, index_BL, histories)
        items_XD = F.embedding(inverse[places : places + count], vectors_UD)
        negatives_ND = F.embedding(inverse[places + count :], vectors_UD)
        chosen = np.flatnonzero(self._learnable(examples))
        chosen_P = to_tensor(chosen, self.device)
        item_loss = sampled_softmax(
            states_XD.index_select(0, chosen_P),
            items_XD.index_select(0, chosen_P),
            negatives_ND,
            # Each negative, drawn uniformly, stands for so many others; the own item is there for certain.
            math.log(self._learning_items() / len(drawn_N)),
            self._own_among(drawn_N, examples.item_B[chosen], seen and [seen[i] for i in chosen.tolist()]),
        )
        class_loss = torch.zeros((), device=self.device)
        if standing is not None:
            states = states_XD.detach(), items_XD.detach()
            class_loss = self._class_loss(examples, report, followed, histories, states, standing)
        extra = self.strategies.distillation(histories, vectors_UD, index_BL, states_XD, negatives_ND)
        return _Losses(rows_U, vectors_UD, item_loss, class_loss, extra)

    def _class_loss(
        self,
        examples: Examples,
        report: StepReport,
        followed: Followed | None,
        histories: Histories,
        states: tuple[Tensor, Tensor],
        standing: Standings,
    ) -> Tensor:
        """Compute the loss over the classes of the new examples, the first; `states` are those of users and items.

        What follows an impression says what became of that one: the class is learned where the impression was given.
        """
        new = len(report.rank_B)
        rows_E, followed_E, taken_EC, rates_ER = np.arange(new), None, None, report.rates_BR
        item_E, class_E = (to_tensor(array[:new], self.device) for array in (examples.item_B, examples.class_B))
        counts_EC, standing_ES = self.table.columns["classes"][item_E], standing[item_E]
        if followed is not None and self._provisional is not None:
            place_M = to_tensor(followed.place_M, self.device)
            rows_E[followed.place_M] = np.arange(len(examples) - len(place_M), len(examples))
            followed_E = torch.zeros(new, device=self.device).index_fill_(0, place_M, 1.0)
            taken_EC = torch.zeros_like(counts_EC)
            taken_EC[place_M, self._provisional] = 1.0
            hindsight = Hindsight(self.window, self.table, self._positive, self._provisional)
            known = counts_EC[place_M], standing_ES[place_M]
            counts_EC[place_M], standing_ES[place_M] = hindsight.look(followed, item_E[place_M], *known)
            # The test asked what is known now.
            rates_ER = None
        index_E = to_tensor(rows_E, self.device)
        context_EP = to_tensor(examples.context_BP[rows_E], self.device)
        if rates_ER is None:
            user_ER = self.network.user_rates(histories.take(index_E), self.table, context_EP, taken_EC)
            rates_ER = torch.cat([user_ER, self.network.rates.item(counts_EC)], 1)
        logits_EC = self.network.class_logits(
            states[0][index_E],
            states[1][:new],
            standing_ES,
            self.network.context_vectors(context_EP),
            rates_ER,
        )
        return self.strategies.class_loss(logits_EC, class_E, followed_E)

    def _negatives(self, random: np.random.Generator, again: int) -> np.ndarray:
        """Draw the rows of a step's negatives; where `again` examples are learned again, more of them, each once."""
        learning, count = self._learning_items(), max(self.settings.negatives, NEGATIVES_AGAIN * again)
        if len(self.table) == len(self.contents.cold_rows):
            # Nobody chose any of the items yet.
            return np.full(count, PADDING_ROW)
        if again:
            number_N = 1 + random.choice(learning, min(count, learning), replace=False, shuffle=False)
        else:
            number_N = random.integers(1, learning + 1, count)
        return self.table.used_rows(number_N, self.contents.cold_rows)

    def _own_among(self, negative_N: np.ndarray, item_X: np.ndarray, seen: Sequence[np.ndarray] | None) -> LeftOut:
        """Return which negatives are an example's own item; with `seen`, where no two are alike, or its user has."""
        if seen is None:
            # Few are among them: to ask each example for each would take as long as its product with them.
            place_M = np.flatnonzero(np.isin(negative_N, item_X))
            example_E, match_E = np.nonzero(item_X[:, None] == negative_N[place_M])
            return LeftOut(place_M[match_E], np.searchsorted(example_E, np.arange(len(item_X)), side="right"))
        place_I = np.full(self.table.rows, NO_PLACE)
        place_I[negative_N] = np.arange(len(negative_N))
        had = [np.append(rows, item) for rows, item in zip(seen, item_X.tolist(), strict=True)]
        place_E = place_I[np.concatenate([np.empty(0, np.int64), *had])]
        among_E = place_E != NO_PLACE
        ends_X = np.cumsum([len(rows) for rows in had], dtype=np.int64)
        return LeftOut(place_E[among_E], np.concatenate([[0], np.cumsum(among_E)])[ends_X])

    def _learning_items(self) -> int:
        return max(1, len(self.table) - len(self.contents.cold_rows))

    def _apply(self, losses: _Losses, report: StepReport, new: int) -> None:
        """Step the dense part, and row-wise Adagrad (one accumulator a row) on the rows used unless they are frozen."""
        self.strategies.step(report, new)
        rows_U, gradient_UD = losses.rows_U, losses.vectors_UD.grad
        if gradient_UD is None:
            return
        columns, rate = self.table.columns, self.settings.row_learning_rate * self.strategies.rate
        moved = row_adagrad.move(columns["vector"], columns[SQUARED_GRADIENT], rows_U, gradient_UD, rate)
        self._changed.append(moved)
        if len(self._changed) > CHANGES_APART:
            self.changed()

    def _count(self, examples: Examples, followed: Followed | None, trusted_B: np.ndarray) -> None:
        latest_BK = examples.histories(self.device).latest_first(TRANSITION_REACH)
        positive_B = torch.from_numpy(self._positive[examples.class_B]).to(self.device)
        class_B = to_tensor(examples.class_B, self.device)
        self.network.rates.count(class_B, to_tensor(examples.context_BP, self.device))
        item_B = to_tensor(examples.item_B, self.device)
        counted_B = item_B.masked_fill(~torch.from_numpy(trusted_B).to(self.device), PADDING_ROW)
        self._changed.append(self.table.count(latest_BK, counted_B, positive_B, class_B))
        if followed is not None and self._provisional is not None:
            # What is not counted takes nothing back either, nor is taken back.
            kept_M = np.flatnonzero(trusted_B[followed.place_M] & self._trusted(followed.impressions))
            item_M = item_B[to_tensor(followed.place_M[kept_M], self.device)]
            latest_MK = followed.impressions.take(kept_M).histories(self.device).latest_first(TRANSITION_REACH)
            self._changed.append(torch.unique(self.table.retract(latest_MK, item_M, self._provisional)))
            # As old as when the batch was counted, in which nothing has faded yet.
            age_M = np.where(followed.age_M > 0, followed.age_M + len(examples) - 1, 0)
            context_MP = to_tensor(followed.impressions.context_BP, self.device)
            self.network.rates.retract(self._provisional, to_tensor(age_M, self.device), context_MP)


def _seed(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from; torch.manual_seed does the same for every kind of device, which takes 1 ms."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
