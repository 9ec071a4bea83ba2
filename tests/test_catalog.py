"""The catalogue and its mirror against a real store."""

from __future__ import annotations

import threading

import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.catalog import (
    BEGINNING,
    PAGE,
    Catalog,
    CatalogMirror,
    CategoryFilter,
    Item,
    check_item,
)
from recsys.errors import StoreFull, Violation
from recsys.settings import Settings

TOYS = Item("1", "Toy Story", ("animation", "comedy"))
HEAT = Item("2", "Heat", ("crime",))
PLAIN = Item("3")


@pytest.fixture
def catalog(store: redis.Redis, settings: Settings) -> Catalog:
    return Catalog(store, settings)


@pytest.fixture
def mirror(catalog: Catalog) -> CatalogMirror:
    return CatalogMirror(catalog)


def choose(*, any_of: str = "", all_of: str = "", none_of: str = "") -> CategoryFilter:
    return CategoryFilter(frozenset(any_of.split()), frozenset(all_of.split()), frozenset(none_of.split()))


def test_items_are_added_replaced_and_read_in_the_order_asked(catalog: Catalog) -> None:
    catalog.upsert([TOYS, HEAT, PLAIN])
    assert catalog.get(["3", "unknown", "1"]) == [PLAIN, None, TOYS]
    catalog.upsert([Item("1", "Toy Story 2")])
    assert catalog.get(["1", "2", "1"]) == [Item("1", "Toy Story 2"), HEAT, Item("1", "Toy Story 2")]


def test_of_items_with_one_id_the_last_counts(catalog: Catalog) -> None:
    catalog.upsert([Item("1", "old"), Item("1", "new")])
    assert catalog.get(["1"]) == [Item("1", "new")]


def test_deleting_counts_what_had_been_there(catalog: Catalog) -> None:
    catalog.upsert([TOYS, HEAT])
    assert catalog.delete(["1", "unknown", "1"]) == 1
    assert catalog.delete(["1"]) == 0
    assert catalog.get(["1", "2", "unknown"]) == [None, HEAT, None]
    assert dict(catalog.scan()) == {"1": None, "2": HEAT, "unknown": None}


def test_empty_calls_change_nothing(store: redis.Redis, catalog: Catalog) -> None:
    catalog.upsert([])
    assert catalog.delete([]) == 0
    assert catalog.get([]) == []
    assert store.dbsize() == 0


def test_a_store_out_of_memory_refuses_the_whole_call(store: redis.Redis, catalog: Catalog) -> None:
    catalog.upsert([TOYS])
    before = catalog.last_position()
    store.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreFull):
            catalog.upsert([HEAT, PLAIN])
        with pytest.raises(StoreFull):
            catalog.delete(["1"])
    finally:
        store.config_set("maxmemory", 0)
    assert dict(catalog.scan()) == {"1": TOYS}
    assert catalog.last_position() == before


def test_changes_are_told_in_order(catalog: Catalog) -> None:
    assert catalog.changes_after(BEGINNING, 10) == []
    catalog.upsert([PLAIN])
    start = catalog.last_position()
    catalog.upsert([TOYS, HEAT])
    catalog.delete(["1"])
    changes = catalog.changes_after(start, 10)
    assert changes is not None
    assert [change.item_id for change in changes] == ["1", "2", "1"]
    assert catalog.changes_after(start, 2) == changes[:2]
    assert catalog.changes_after(changes[0].position, 10) == changes[1:]
    assert catalog.changes_after(changes[-1].position, 10) == []
    assert changes[-1].position == catalog.last_position()


def test_changes_that_may_be_missing_are_told(store: redis.Redis, settings: Settings) -> None:
    catalog = Catalog(store, settings, changes_retained=1)
    catalog.upsert([PLAIN])
    start = catalog.last_position()
    catalog.upsert([Item(str(i)) for i in range(1000)])
    assert catalog.changes_after(start, 10) is None
    assert catalog.changes_after(BEGINNING, 10) is None
    assert store.xlen(f"{settings.key_prefix}:{{catalog}}:changes") < 1000


def test_the_mirror_loads_then_follows(catalog: Catalog, mirror: CatalogMirror) -> None:
    assert (mirror.revision, len(mirror), mirror.title("1")) == (0, 0, None)
    catalog.upsert([TOYS, HEAT])
    assert mirror.refresh()
    assert (mirror.revision, len(mirror), mirror.title("1"), mirror.title("3")) == (1, 2, "Toy Story", None)
    assert not mirror.refresh()
    assert mirror.revision == 1
    catalog.upsert([PLAIN, Item("2", "Heat (1995)")])
    catalog.delete(["1", "unknown"])
    assert mirror.refresh()
    assert (mirror.revision, len(mirror), mirror.title("1"), mirror.title("2")) == (2, 2, None, "Heat (1995)")
    assert mirror.title("3") is None
    assert mirror.deleted == {"1", "unknown"}
    assert not mirror.refresh()


def test_a_mirror_of_nothing_follows_too(catalog: Catalog, mirror: CatalogMirror) -> None:
    assert mirror.refresh()
    assert not mirror.refresh()
    catalog.upsert([TOYS])
    assert mirror.refresh()
    assert (len(mirror), mirror.title("1")) == (1, "Toy Story")


def test_a_deleted_item_comes_back_by_upserting(catalog: Catalog, mirror: CatalogMirror) -> None:
    catalog.upsert([TOYS])
    catalog.delete(["1"])
    mirror.refresh()
    assert mirror.deleted == {"1"}
    assert mirror.selection(choose(any_of="comedy")) == (frozenset(), frozenset())
    kept = mirror.deleted
    catalog.upsert([TOYS])
    mirror.refresh()
    assert mirror.deleted == frozenset()
    assert mirror.selection(choose(any_of="comedy")) == ({"1"}, frozenset())
    # What was handed out stays as it was.
    assert kept == {"1"}


def test_the_mirror_loads_and_follows_over_pages(catalog: Catalog, mirror: CatalogMirror) -> None:
    catalog.upsert([Item(str(i), categories=("all",)) for i in range(2 * PAGE + 1)])
    mirror.refresh()
    assert len(mirror) == 2 * PAGE + 1
    catalog.delete([str(i) for i in range(2 * PAGE)])
    assert mirror.refresh()
    assert mirror.selection(choose(any_of="all")) == ({str(2 * PAGE)}, frozenset())
    assert len(mirror.deleted) == 2 * PAGE


def test_the_mirror_loads_again_when_changes_are_missing(store: redis.Redis, settings: Settings) -> None:
    catalog = Catalog(store, settings, changes_retained=1)
    mirror = CatalogMirror(catalog)
    catalog.upsert([TOYS, HEAT])
    mirror.refresh()
    catalog.delete(["1"])
    catalog.upsert([Item(str(i)) for i in range(10, 1010)])
    assert mirror.refresh()
    assert len(mirror) == 1001
    assert mirror.deleted == {"1"}
    assert not mirror.refresh()


def test_the_mirror_notices_an_emptied_store(store: redis.Redis, catalog: Catalog, mirror: CatalogMirror) -> None:
    catalog.upsert([TOYS])
    catalog.delete(["2"])
    mirror.refresh()
    store.flushall()
    assert mirror.refresh()
    assert (len(mirror), mirror.title("1"), mirror.deleted) == (0, None, set())
    assert mirror.selection(choose(any_of="comedy")) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    ("categories", "only", "never"),
    [
        (choose(), None, set()),
        (choose(any_of="comedy crime"), {"1", "2", "4"}, set()),
        (choose(all_of="animation comedy"), {"1"}, set()),
        (choose(any_of="comedy crime", all_of="crime comedy"), {"4"}, set()),
        (choose(none_of="crime"), None, {"2", "4"}),
        (choose(any_of="comedy", none_of="crime animation"), {"1", "4"}, {"1", "2", "4"}),
        (choose(any_of="western"), set(), set()),
        (choose(all_of="comedy western"), set(), set()),
        (choose(none_of="western"), None, set()),
    ],
)
def test_selection(
    catalog: Catalog, mirror: CatalogMirror, categories: CategoryFilter, only: set[str] | None, never: set[str]
) -> None:
    catalog.upsert([TOYS, HEAT, PLAIN, Item("4", "Fargo", ("crime", "comedy"))])
    mirror.refresh()
    assert mirror.selection(categories) == (only, never)


CATEGORIES = st.frozensets(st.sampled_from("abc"))


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from("123"), st.none() | CATEGORIES, st.booleans()), max_size=12),
    filters=st.lists(st.builds(CategoryFilter, CATEGORIES, CATEGORIES, CATEGORIES), min_size=1, max_size=5),
)
def test_a_mirror_that_follows_selects_what_the_definition_says(
    store: redis.Redis,
    settings: Settings,
    steps: list[tuple[str, frozenset[str] | None, bool]],
    filters: list[CategoryFilter],
) -> None:
    store.flushall()
    catalog = Catalog(store, settings)
    mirror = CatalogMirror(catalog)
    model: dict[str, frozenset[str] | None] = {}
    for item_id, categories, refresh in steps:
        model[item_id] = categories
        if categories is None:
            catalog.delete([item_id])
        else:
            catalog.upsert([Item(item_id, categories=tuple(categories))])
        if refresh:
            mirror.refresh()
    mirror.refresh()
    present = {item_id: categories for item_id, categories in model.items() if categories is not None}
    assert len(mirror) == len(present)
    assert mirror.deleted == model.keys() - present.keys()
    for wanted in filters:
        only, never = mirror.selection(wanted)
        passing = {
            item_id
            for item_id, categories in present.items()
            if (not wanted.any_of or wanted.any_of & categories)
            and wanted.all_of <= categories
            and not wanted.none_of & categories
        }
        assert (set(present) if only is None else set(only)) - never == passing


def test_readers_see_whole_refreshes(catalog: Catalog, mirror: CatalogMirror) -> None:
    sides = [Item("x", categories=("left",)), Item("x", categories=("right",))]
    catalog.upsert(sides[:1])
    mirror.refresh()
    done = threading.Event()

    def change() -> None:
        for turn in range(1, 200):
            catalog.upsert([sides[turn % 2]])
            mirror.refresh()
        done.set()

    thread = threading.Thread(target=change)
    thread.start()
    both = choose(any_of="left right")
    while not done.is_set():
        assert mirror.selection(both) == ({"x"}, frozenset())
    thread.join()


def test_items_are_checked(settings: Settings) -> None:
    assert check_item(Item("x" * 256, "t" * 1024, ("c" * 256,) * 100), settings) is None
    assert check_item(Item("ä" * 129), settings) == Violation("item_id", "has 258 bytes; at most 256 are allowed")
    assert check_item(Item(""), settings) == Violation("item_id", "is empty; give 1 to 256 bytes")
    assert check_item(Item("x", "t" * 1025), settings) == Violation("title", "has 1025 bytes; at most 1024 are allowed")
    assert check_item(Item("x", categories=("c",) * 101), settings) == Violation(
        "categories", "has 101 categories; at most 100 are allowed"
    )
    assert check_item(Item("x", categories=("c", "")), settings) == Violation(
        "categories[1]", "is empty; give 1 to 256 bytes"
    )
