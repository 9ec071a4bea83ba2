"""Made-up ratings whose structure resembles that of published files: users come one after another, most within an hour.

Users have tastes that drift, items follow items that are like them, some are popular, and nobody rates one twice. Most
ratings of a user share their second with others. Writes what `recsys evaluate` reads; the same numbers give the same
file. Shapes: U users, I items, D tastes, S items that follow one, B users at once, N ratings.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TASTES, GENRES, FOLLOWERS, AT_ONCE = 16, 24, 12, 512
LEAST_RATINGS = 20
# Of each place back in the history, how much more likely what follows that item is, beside all items by taste.
LEADS = (0.55, 0.2, 0.12)
BEGIN_S, SPAN_S = 956_700_000, 3 * 365 * 86_400

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Items:
    """Hold what items are like, how popular they are, and which follow them."""

    vectors_ID: Floats
    popular_I: Floats
    follow_IS: Longs
    centres: Floats


def make_items(items: int, draw: np.random.Generator) -> Items:
    """Make items of several genres."""
    centres = draw.standard_normal((GENRES, TASTES), dtype=np.float32)
    genre_I = draw.integers(0, GENRES, items)
    vectors = (0.75 * centres[genre_I] + 0.65 * draw.standard_normal((items, TASTES), dtype=np.float32)) / 4
    popular_I = (1.1 * draw.standard_normal(items)).astype(np.float32)
    noise = draw.gumbel(size=(items, items)).astype(np.float32)
    near = vectors @ vectors.T * 4 + 0.3 * popular_I[None] + noise
    np.fill_diagonal(near, -np.inf)
    return Items(vectors, popular_I, np.argpartition(-near, FOLLOWERS, axis=1)[:, :FOLLOWERS], centres)


def rate(items: Items, users: int, mean: float, draw: np.random.Generator) -> tuple[Longs, Longs, Longs]:
    """Return users, items and ratings, by user, each in the user's order."""
    count = len(items.popular_I)
    length_U = np.clip(draw.lognormal(np.log(mean * 0.6), 1.0, users), LEAST_RATINGS, 12 * mean).astype(int)
    length_U = np.sort(np.minimum(length_U, count // 3))[::-1]
    first, second = (items.centres[draw.integers(0, GENRES, users)] for _ in range(2))
    noise = draw.standard_normal((users, TASTES), dtype=np.float32)
    taste_UD = (1.6 * first + 1.0 * second + 1.0 * noise).astype(np.float32)
    has_UI = np.zeros((users, count), np.bool_)
    last_UK = np.full((users, len(LEADS)), -1)
    found: list[tuple[Longs, Longs, Longs]] = []
    for step in range(length_U[0]):
        active = int((length_U > step).sum())
        taste_UD[:active] += 0.12 * draw.standard_normal((active, TASTES), dtype=np.float32)
        taste_UD[:active] *= 0.99
        for start in range(0, active, AT_ONCE):
            user_B = np.arange(start, min(active, start + AT_ONCE))
            liking_BI = 1.1 * taste_UD[user_B] @ items.vectors_ID.T
            item_B = choose(items, liking_BI, has_UI[user_B], last_UK[user_B], draw)
            has_UI[user_B, item_B] = True
            last_UK[user_B, 1:] = last_UK[user_B, :-1]
            last_UK[user_B, 0] = item_B
            liked_B = liking_BI[np.arange(len(user_B)), item_B]
            rating_B = np.clip(np.round(3.4 + 0.35 * liked_B + 0.8 * draw.standard_normal(len(user_B))), 1, 5)
            found.append((user_B, item_B, rating_B.astype(int)))
    user_N, item_N, rating_N = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(user_N, kind="stable")
    return user_N[order], item_N[order], rating_N[order]


def choose(
    items: Items, liking_BI: Floats, has_BI: NDArray[np.bool_], last_BK: Longs, draw: np.random.Generator
) -> Longs:
    """Choose an item for each user that the user does not have, by taste, popularity and what came last."""
    score_BI = np.exp(liking_BI + items.popular_I)
    score_BI[has_BI] = 0
    whole_B = score_BI.sum(1)
    share_S = (1 / np.arange(1, FOLLOWERS + 1)).astype(np.float32)
    share_S /= share_S.sum()
    for place, lead in enumerate(LEADS):
        led = np.flatnonzero(last_BK[:, place] >= 0)
        following = items.follow_IS[last_BK[led, place]]
        more = lead * share_S[None] * whole_B[led, None]
        more[has_BI[led[:, None], following]] = 0
        np.add.at(score_BI, (led[:, None], following), more)
    race_BI = draw.standard_exponential(score_BI.shape, dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        race_BI = np.where(score_BI > 0, (race_BI + 1e-30) / score_BI, np.inf)
    return race_BI.argmin(1)


def when(user_N: Longs, users: int, draw: np.random.Generator) -> Longs:
    """Return the second of each rating: users begin one after another, most of them early."""
    begin_U = (np.sort(draw.beta(0.8, 2.5, users)) * SPAN_S).astype(np.int64)[draw.permutation(users)]
    count = len(user_N)
    pause_N = np.where(draw.random(count) < 0.55, 0, draw.geometric(1 / 25, count))
    # Some come back days later.
    pause_N = np.where(draw.random(count) < 0.006, draw.integers(3600, 40 * 86_400, count), pause_N)
    first_N = np.r_[True, user_N[1:] != user_N[:-1]]
    pause_N[first_N] = 0
    total_N = np.cumsum(pause_N)
    start_N = np.maximum.accumulate(np.where(first_N, np.arange(count), 0))
    found: Longs = BEGIN_S + begin_U[user_N] + total_N - total_N[start_N]
    return found


def main() -> None:
    """Write a file of ratings in the order of time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--users", type=int, default=6000)
    parser.add_argument("--items", type=int, default=3500)
    parser.add_argument("--mean", type=float, default=170, help="ratings of a user, about")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    draw = np.random.default_rng(given.seed)
    user_N, item_N, rating_N = rate(make_items(given.items, draw), given.users, given.mean, draw)
    time_N = when(user_N, given.users, draw)
    order = np.argsort(time_N, kind="stable")
    with given.file.open("w") as file:
        file.write("userId,movieId,rating,timestamp\n")
        columns = (user_N + 1, item_N + 1, rating_N, time_N)
        rows = zip(*(column[order].tolist() for column in columns), strict=True)
        file.writelines(f"{user},{item},{rating},{time}\n" for user, item, rating, time in rows)


if __name__ == "__main__":
    main()
