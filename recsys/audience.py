"""An audience: made-up users whose next choice is known as a distribution, so the best possible accuracy is known too.

Users have tastes over categories, follow habits from item to item, take no item twice, and arrive over time as items
do; half-way many tastes turn. The same seed gives the same audience and, asked the same, the same choices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from recsys.v1.catalog_pb2 import Item

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CATEGORIES = (
    *("Jazz", "Travel", "Cooking", "History", "Science", "Comedy", "Drama", "Nature", "Sport", "Crime", "Romance"),
    *("Technology", "Art", "Gardening", "Mystery", "Fantasy", "Politics", "Health", "Animals", "Music"),
)
ADJECTIVES = (
    *("Quiet", "Golden", "Hidden", "Broken", "Silver", "Distant", "Burning", "Gentle", "Frozen", "Restless", "Crimson"),
    *("Hollow", "Bright", "Forgotten", "Wild", "Velvet", "Lonely", "Northern", "Paper", "Midnight", "Early", "Last"),
    *("Second", "Little", "Open", "Salt", "Copper", "Blue", "Winter", "Summer"),
)
NOUNS = (
    *("River", "Garden", "Harbour", "Mountain", "Letter", "Mirror", "Forest", "Station", "Window", "Island", "Bridge"),
    *("Orchard", "Lantern", "Shore", "Valley", "Clock", "Compass", "Kitchen", "Meadow", "Tower", "Road", "Market"),
    *("Piano", "Storm", "Library", "Star", "Field", "Stone", "Train", "Sparrow"),
)
SUCCESSORS = 6
# What the last choice is worth to the next one, in logits: its category, and its successors in order of habit.
CATEGORY_PULL = 1.0
HABITS = np.array([5.4, 4.9, 4.4, 3.9, 3.4, 2.9])
# How much less the choice before the last one counts.
FADING = 0.5
# A click needs a look, and then has at most this probability; looks fade from place to place.
BEST_CLICK = 0.6
LOOK_FADING = 0.85


class Audience:
    """Be users who choose among items; `step` counts the choices and clicks so far.

    Call `next_user`, then `respond` with recommendations or `choose` without, or both; each choice and each click is
    a step. Half-way through `events` steps the tastes of a share `drifting` of the users turn to other categories. A
    tenth of the users is there from the start, and all items but a share `late_items`; the last of both have arrived
    when nine tenths are over.

    Raises:
        ValueError: when the numbers do not make an audience.
    """

    def __init__(
        self,
        seed: int,
        users: int = 500,
        items: int = 800,
        categories: int = 12,
        events: int = 20_000,
        late_items: float = 0.3,
        drifting: float = 0.7,
    ) -> None:
        if not 2 <= categories <= len(CATEGORIES) or items < max(2 * categories, SUCCESSORS + 2) or users < 1:
            raise ValueError(f"an audience needs 2 to {len(CATEGORIES)} categories, twice as many items, and users")
        if items > len(ADJECTIVES) * len(NOUNS):
            raise ValueError(f"an audience has at most {len(ADJECTIVES) * len(NOUNS)} items")
        world, self._random = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
        self.events = events
        self.step = 0
        self.item_ids = [f"item-{i}" for i in range(items)]
        self.user_ids = [f"user-{u}" for u in range(users)]
        self._item_index = {item_id: i for i, item_id in enumerate(self.item_ids)}
        self._user_index = {user_id: u for u, user_id in enumerate(self.user_ids)}
        self._category = world.integers(categories, size=items)
        self._categories = categories
        self._names = world.permutation(len(ADJECTIVES) * len(NOUNS))[:items]
        self._quality = world.gumbel(0.0, 0.8, size=items)
        # Two loved categories each: enough to tell users apart, few enough to be learned from ten choices.
        tastes = world.normal(0.0, 0.5, size=(users, categories))
        loved = world.permuted(np.tile(np.arange(categories), (users, 1)), axis=1)[:, :2]
        np.put_along_axis(tastes, loved, [[2.6, 1.8]], axis=1)
        turns = np.where(world.random(users) < drifting, world.integers(1, categories, size=users), 0)
        turned = (np.arange(categories) - turns[:, None]) % categories
        self._tastes = (tastes, np.take_along_axis(tastes, turned, axis=1))
        self._successors = self._plant_successors(world)
        late = world.permutation(items)[: int(late_items * items)]
        self._item_arrival = np.zeros(items, np.int64)
        self._item_arrival[late] = world.integers(1, max(2, int(0.9 * events)), size=len(late))
        self._user_arrival = np.maximum(0, np.linspace(-0.1, 0.9, users, endpoint=False) * events).astype(np.int64)
        self._user_arrival[0] = 0
        self._seen = np.zeros((users, items), np.bool_)
        self._recent: list[list[int]] = [[] for _ in range(users)]

    def _plant_successors(self, world: np.random.Generator) -> Integers:
        """Give each item other items that follow it, mostly of its own category."""
        items = len(self._category)
        successors = np.empty((items, SUCCESSORS), np.int64)
        for item in range(items):
            odds = np.where(self._category == self._category[item], float(self._categories), 1.0)
            odds[item] = 0.0
            successors[item] = world.choice(items, SUCCESSORS, replace=False, p=odds / odds.sum())
        return successors

    def items(self) -> list[Item]:
        """Describe the items that have arrived, in a fixed order."""
        return [self._describe(i) for i in np.flatnonzero(self._item_arrival <= self.step).tolist()]

    def new_items(self, since: int) -> list[Item]:
        """Describe the items that arrived after step `since`, until now."""
        arrived = (self._item_arrival > since) & (self._item_arrival <= self.step)
        return [self._describe(i) for i in np.flatnonzero(arrived).tolist()]

    def _describe(self, item: int) -> Item:
        adjective, noun = divmod(int(self._names[item]), len(NOUNS))
        category = CATEGORIES[int(self._category[item])]
        title = f"{ADJECTIVES[adjective]} {NOUNS[noun]} ({category})"
        return Item(item_id=self.item_ids[item], title=title, categories=[category])

    def next_user(self) -> str:
        """Draw the user who acts next, among those who have arrived."""
        arrived = int(np.searchsorted(self._user_arrival, self.step, side="right"))
        return self.user_ids[int(self._random.integers(arrived))]

    def history(self, user_id: str) -> list[str]:
        """List what a user has chosen or clicked, oldest first."""
        return [self.item_ids[item] for item in self._recent[self._user_index[user_id]]]

    def choice_probabilities(self, user_id: str, step: int | None = None) -> Floats:
        """Return each item's probability to be the user's next choice, in the order of `item_ids`.

        Items seen or not arrived at `step` (now, unless given) have 0. The history is the present one in any case.
        """
        probabilities = np.zeros(len(self.item_ids))
        logits, open_items = self._logits(self._user_index[user_id], self.step if step is None else step)
        if len(open_items):
            weights = np.exp(logits - logits.max())
            probabilities[open_items] = weights / weights.sum()
        return probabilities

    def best_hit_rate(self, user_id: str, k: int) -> float:
        """Return the probability that the user's next choice is among the k likeliest: no recommender hits more."""
        return float(np.sort(self.choice_probabilities(user_id))[-k:].sum())

    def choose(self, user_id: str) -> str:
        """Draw the user's own next item; it becomes part of the history.

        Raises:
            ValueError: when the user has seen every item there is.
        """
        cumulated = np.cumsum(self.choice_probabilities(user_id))
        if cumulated[-1] == 0.0:
            raise ValueError(f"{user_id} has seen every item")
        item = int(np.searchsorted(cumulated, self._random.random() * cumulated[-1], side="right"))
        self._take(self._user_index[user_id], item)
        return self.item_ids[item]

    def respond(self, user_id: str, recommended: Sequence[str]) -> list[tuple[str, bool]]:
        """Show items in this order and return each with whether it was clicked; clicks become part of the history.

        Place p (from 0) is looked at with probability LOOK_FADING**p; then an item is clicked with BEST_CLICK times
        the root of how likely a choice it is, compared with the likeliest. Items that the user has, that are unknown,
        have not arrived or were clicked higher up in the list are never clicked.
        """
        user = self._user_index[user_id]
        before = self.choice_probabilities(user_id)
        appeal = np.sqrt(before / max(float(before.max()), 1e-300))
        looked = self._random.random(len(recommended)) < LOOK_FADING ** np.arange(len(recommended))
        threshold = self._random.random(len(recommended)) / BEST_CLICK
        answers = []
        for place, item_id in enumerate(recommended):
            item = self._item_index.get(item_id)
            clicked = False
            if item is not None and not self._seen[user, item]:
                clicked = bool(looked[place] and threshold[place] < appeal[item])
                if clicked:
                    self._take(user, item)
            answers.append((item_id, clicked))
        return answers

    def _take(self, user: int, item: int) -> None:
        self._seen[user, item] = True
        self._recent[user].append(item)
        self.step += 1

    def _logits(self, user: int, step: int) -> tuple[Floats, Integers]:
        """Return the logits of the items that are open to the user, and their indices."""
        tastes = self._tastes[int(2 * step >= self.events)][user]
        pull = tastes.copy()
        logits = self._quality.copy()
        for weight, item in zip((1.0, FADING), reversed(self._recent[user][-2:]), strict=False):
            pull[self._category[item]] += weight * CATEGORY_PULL
            logits[self._successors[item]] += weight * HABITS
        open_items = np.flatnonzero((self._item_arrival <= step) & ~self._seen[user])
        return (logits + pull[self._category])[open_items], open_items
