"""The audience: the same seed the same choices, and every planted property found again in what the users do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.audience import Audience


def act(audience: Audience, steps: int) -> list[tuple[str, str]]:
    found = []
    for _ in range(steps):
        user = audience.next_user()
        found.append((user, audience.choose(user)))
    return found


def likeliest(audience: Audience, user: str, k: int) -> list[str]:
    return [audience.item_ids[i] for i in np.argsort(-audience.choice_probabilities(user), kind="stable")[:k]]


def test_a_seed_fixes_the_audience_and_its_choices() -> None:
    first, same, other = Audience(3, users=30), Audience(3, users=30), Audience(4, users=30)
    assert act(first, 200) == act(same, 200) != act(other, 200)
    assert first.items() == same.items() != other.items()
    recommended = likeliest(first, "user-0", 20)
    assert first.respond("user-0", recommended) == same.respond("user-0", recommended)
    assert first.step == same.step >= 200


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(0, 150))
def test_probabilities_cover_exactly_the_items_that_are_open(seed: int, steps: int) -> None:
    audience = Audience(seed, users=5, items=300, events=200)
    act(audience, steps)
    arrived = {item.item_id for item in audience.items()}
    for user in audience.user_ids:
        probabilities = audience.choice_probabilities(user)
        assert probabilities.sum() == pytest.approx(1.0)
        chosen = {i for i, p in zip(audience.item_ids, probabilities, strict=True) if p > 0}
        assert chosen == arrived - set(audience.history(user))
        assert audience.best_hit_rate(user, 300) == pytest.approx(1.0)
        assert audience.best_hit_rate(user, 1) == probabilities.max()


def test_no_user_takes_an_item_twice_and_running_out_is_told() -> None:
    audience = Audience(1, users=1, items=30, events=30, late_items=0.0)
    assert sorted(item for _, item in act(audience, 30)) == sorted(audience.item_ids)
    assert audience.best_hit_rate("user-0", 10) == 0.0
    with pytest.raises(ValueError, match="user-0 has seen every item"):
        audience.choose("user-0")


def test_half_way_the_tastes_of_the_planted_share_turn() -> None:
    audience = Audience(5, users=400, items=200, events=1000, late_items=0.0, drifting=0.7)
    moved = []
    for user in audience.user_ids:
        early, before, after = (audience.choice_probabilities(user, step) for step in (0, 499, 500))
        assert np.array_equal(early, before)
        moved.append(0.5 * np.abs(before - after).sum())
    turned = np.array(moved) > 0
    assert turned.mean() == pytest.approx(0.7, abs=0.08)
    assert np.mean(np.array(moved)[turned]) > 0.4


def test_items_and_users_arrive_while_the_stream_runs() -> None:
    audience = Audience(2, users=100, items=200, events=1000)
    at_start = {item.item_id for item in audience.items()}
    assert len(at_start) == 140
    first = act(audience, 500)
    arrived = {item.item_id for item in audience.new_items(since=0)}
    assert {item.item_id for item in audience.items()} == at_start | arrived
    assert not at_start & arrived
    assert 15 <= len(arrived) <= 50
    assert {item for _, item in first} <= at_start | arrived
    assert audience.new_items(since=audience.step) == []
    second = act(audience, 500)
    assert len(audience.items()) == 200
    assert {item for _, item in second} & arrived
    assert len({user for user, _ in first}) < len({user for user, _ in first + second})


def test_items_have_different_titles_that_name_their_category() -> None:
    items = Audience(7, late_items=0.0).items()
    assert len({item.title for item in items}) == 800
    assert all(item.title.endswith(f" ({item.categories[0]})") for item in items)
    assert len({item.categories[0] for item in items}) == 12


def test_the_best_hit_rate_is_what_knowing_everything_hits_and_popularity_does_not() -> None:
    audience = Audience(1, events=4000)
    counts = dict.fromkeys(audience.item_ids, 0)
    expected = variance = hits = popular = 0.0
    for _ in range(audience.events):
        user = audience.next_user()
        rate = audience.best_hit_rate(user, 10)
        expected, variance = expected + rate, variance + rate * (1 - rate)
        best = likeliest(audience, user, 10)
        seen = set(audience.history(user))
        ranked = sorted((i for i in counts if i not in seen), key=counts.__getitem__, reverse=True)[:10]
        item = audience.choose(user)
        hits, popular, counts[item] = hits + (item in best), popular + (item in ranked), counts[item] + 1
    assert abs(hits - expected) < 4 * variance**0.5
    assert 0.5 < hits / audience.events < 0.7
    assert 0.05 < popular / audience.events < 0.2


def test_looks_fade_from_place_to_place() -> None:
    clicks = np.zeros(10)
    audience = Audience(1, users=1500, events=1, late_items=0.0)
    for user in audience.user_ids:
        best = likeliest(audience, user, 1)
        unknown = [f"unknown-{i}" for i in range(9)]
        place = int(user.removeprefix("user-")) % 10
        answers = audience.respond(user, unknown[:place] + best + unknown[place:])
        clicks += [clicked for _, clicked in answers]
    # 150 users per place, the likeliest item: 0.6 at the first place, fading by 0.85.
    for place, found in enumerate(clicks.tolist()):
        chance = 0.6 * 0.85**place
        assert abs(found - 150 * chance) < 4 * (150 * chance * (1 - chance)) ** 0.5
    assert clicks[:5].sum() > clicks[5:].sum()


def test_only_open_items_are_clicked_and_clicks_become_history() -> None:
    audience = Audience(6, users=20, items=200, events=600)
    clicked_before: dict[str, set[str]] = {user: set() for user in audience.user_ids}
    for _ in range(300):
        user = audience.next_user()
        arrived = {item.item_id for item in audience.items()}
        step = audience.step
        # Twice the same list: a second click on one item would be on an item already seen.
        shown = likeliest(audience, user, 8) * 2 + audience.item_ids[:2]
        answers = audience.respond(user, shown)
        clicked = [item for item, was_clicked in answers if was_clicked]
        assert [item for item, _ in answers] == shown
        assert len(clicked) == len(set(clicked)) == audience.step - step
        assert set(clicked) <= arrived - clicked_before[user]
        clicked_before[user] |= set(clicked)
        assert set(audience.history(user)) == clicked_before[user]
    assert audience.step > 100


def test_what_is_recommended_changes_what_is_consumed() -> None:
    shown, alone = Audience(9, users=1, late_items=0.0), Audience(9, users=1, late_items=0.0)
    while not any(clicked for _, clicked in shown.respond("user-0", likeliest(shown, "user-0", 10))):
        pass
    moved = np.abs(shown.choice_probabilities("user-0") - alone.choice_probabilities("user-0")).sum() / 2
    assert moved > 0.3


def test_impossible_audiences_are_refused() -> None:
    for numbers in ({"users": 0}, {"items": 10}, {"categories": 1}, {"categories": 99}, {"items": 901}):
        with pytest.raises(ValueError, match="audience"):
            Audience(1, **numbers)
