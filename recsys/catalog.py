"""Catalog: what is known of items besides feedback, which of them are deleted, and a copy for servers to filter by."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import redis

from recsys.errors import Violation
from recsys.feedback import check_id
from recsys.settings import Settings
from recsys.store.connection import store_errors
from recsys.v1 import catalog_pb2

# Items and tombstones per HSCAN page, and changes per read, of a mirror.
PAGE = 1000
BEGINNING = "0-0"


@dataclass(frozen=True, slots=True)
class Item:
    """Hold what people and filters are told of an item."""

    item_id: str
    title: str = ""
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CategoryFilter:
    """Keep an item only when its categories pass every part that is not empty."""

    any_of: frozenset[str] = frozenset()
    all_of: frozenset[str] = frozenset()
    none_of: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Change:
    """Tell that an item was upserted or deleted; the catalogue itself says which."""

    position: str
    item_id: str


def check_item(item: Item, settings: Settings) -> Violation | None:
    """Return the first thing wrong with an item, or None."""
    violation = check_id("item_id", item.item_id, settings.max_id_bytes)
    if violation:
        return violation
    size = len(item.title.encode())
    if size > settings.max_title_bytes:
        return Violation("title", f"has {size} bytes; at most {settings.max_title_bytes} are allowed")
    return _check_categories("categories", item.categories, settings)


def _check_categories(name: str, categories: Sequence[str], settings: Settings) -> Violation | None:
    if len(categories) > settings.max_categories:
        return Violation(name, f"has {len(categories)} categories; at most {settings.max_categories} are allowed")
    violations = (check_id(f"{name}[{i}]", category, settings.max_id_bytes) for i, category in enumerate(categories))
    return next((violation for violation in violations if violation), None)


class Catalog:
    """Keep items in the store, all or none of a call, and tell in a change stream which ones changed.

    A deleted item leaves a tombstone, a few bytes more than its id, until it is upserted again. The change stream
    keeps about the last `changes_retained` changes.
    """

    def __init__(self, client: redis.Redis, settings: Settings, *, changes_retained: int = 100_000) -> None:
        self._client = client
        self._changes_retained = changes_retained
        # item_id -> serialized Item, or nothing at all for a tombstone: an item always has its id in it.
        self._items = f"{settings.key_prefix}:{{catalog}}:items"
        self._changes = f"{settings.key_prefix}:{{catalog}}:changes"

    def upsert(self, items: Sequence[Item]) -> None:
        """Add validated items or replace all that was known of them; of items with one id the last counts."""
        self._write({item.item_id: _to_bytes(item) for item in items})

    def get(self, item_ids: Sequence[str]) -> list[Item | None]:
        """Read items in the order asked for; None where an id is unknown or deleted."""
        if not item_ids:
            return []
        with store_errors():
            stored: Any = self._client.hmget(self._items, list(item_ids))
        return [_from_bytes(data) for data in stored]

    def delete(self, item_ids: Sequence[str]) -> int:
        """Replace items by tombstones, unknown ids too; return how many had been in the catalogue."""
        return self._write(dict.fromkeys(item_ids, b""))

    def scan(self) -> Iterator[tuple[str, Item | None]]:
        """Go through all items and tombstones (None) in pages; for copies, not for answering requests.

        What changes meanwhile may come in its old state, its new one, or both.
        """
        cursor = 0
        while True:
            with store_errors():
                page: Any = self._client.hscan(self._items, cursor, count=PAGE)
            cursor, stored = page
            for item_id, data in stored.items():
                yield item_id.decode(), _from_bytes(data)
            if not cursor:
                return

    def changes_after(self, position: str, count: int) -> list[Change] | None:
        """Read up to `count` changes after a position; None when changes may be missing: read everything again.

        A position is that of an earlier change, or "0-0" for a stream without changes.
        """
        with store_errors():
            entries: Any = self._client.xrange(self._changes, min=position, max="+", count=count + 1)
        changes = [Change(key.decode(), fields[b"i"].decode()) for key, fields in entries]
        # The stream loses entries at its old end only: while the one at the position stands, all after it do.
        if changes and changes[0].position == position:
            return changes[1:]
        return [] if not changes and position == BEGINNING else None

    def last_position(self) -> str:
        """Return the position of the latest change; "0-0" when there is none."""
        with store_errors():
            entries: Any = self._client.xrevrange(self._changes, count=1)
        return str(entries[0][0].decode()) if entries else BEGINNING

    def _write(self, values: Mapping[str, bytes]) -> int:
        if not values:
            return 0
        with store_errors():
            transaction = self._client.pipeline(transaction=True)
            transaction.hmget(self._items, list(values))
            transaction.hset(self._items, items=[part for pair in values.items() for part in pair])
            for item_id in values:
                transaction.xadd(self._changes, {"i": item_id}, maxlen=self._changes_retained, approximate=True)
            before = transaction.execute()[0]
        return sum(1 for data in before if data)


class CatalogMirror:
    """Hold a copy of the catalogue in this process, for titles and filters.

    One thread may call `refresh` while others read. Sets that were handed out are never changed afterwards: a
    refresh puts new ones in their place.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._position: str | None = None
        self._lock = threading.Lock()
        self._items: dict[str, Item] = {}
        self._members: dict[str, Set[str]] = {}
        self._deleted: Set[str] = frozenset()
        self._revision = 0

    def refresh(self) -> bool:
        """Load everything the first time, then what changed; return whether `revision` rose.

        Loads everything again when the change stream no longer reaches back to what was last read. When the store
        fails, what is held stays as it was after the last whole page of changes.
        """
        before = self._revision
        while True:
            changes = None if self._position is None else self._catalog.changes_after(self._position, PAGE)
            if changes is None:
                # The position first: what changes during the scan is then read once more, not missed.
                position = self._catalog.last_position()
                self._install(dict(self._catalog.scan()), position, afresh=True)
            elif changes:
                item_ids = list(dict.fromkeys(change.item_id for change in changes))
                found = dict(zip(item_ids, self._catalog.get(item_ids), strict=True))
                self._install(found, changes[-1].position)
            if changes is None or len(changes) < PAGE:
                return self._revision != before

    @property
    def revision(self) -> int:
        """Return a number that rises with every applied change; 0 until the first refresh.

        Whoever keeps something computed from the mirror reads this first, then computes.
        """
        return self._revision

    @property
    def deleted(self) -> Set[str]:
        """Return the ids that must never be recommended."""
        return self._deleted

    def title(self, item_id: str) -> str | None:
        """Return an item's title, or None when it has none or is not in the catalogue."""
        item = self._items.get(item_id)
        return item.title or None if item else None

    def selection(self, categories: CategoryFilter) -> tuple[Set[str] | None, Set[str]]:
        """Return the only ids that may come back (None: any) and the ids that must not.

        An item without categories, or not in the catalogue, passes a filter that has none_of only.
        """
        with self._lock:
            any_of, all_of, none_of = (
                [self._members.get(category, frozenset()) for category in part]
                for part in (categories.any_of, categories.all_of, categories.none_of)
            )
        required = [_union(any_of), *all_of] if any_of else all_of
        # From the smallest on, so that the work is bounded by it.
        required.sort(key=len)
        only = frozenset(required[0]).intersection(*required[1:]) if required else None
        return only, _union(none_of)

    def __len__(self) -> int:
        return len(self._items)

    def _install(self, found: Mapping[str, Item | None], position: str, *, afresh: bool = False) -> None:
        items = {} if afresh else self._items
        members = {} if afresh else self._members
        deleted = set() if afresh else set(self._deleted)
        touched: dict[str, set[str]] = {}

        def members_of(category: str) -> set[str]:
            if category not in touched:
                touched[category] = set(members.get(category, ()))
            return touched[category]

        for item_id, item in found.items():
            known = items.get(item_id)
            for category in known.categories if known else ():
                members_of(category).discard(item_id)
            for category in item.categories if item else ():
                members_of(category).add(item_id)
            if item:
                deleted.discard(item_id)
            else:
                deleted.add(item_id)
        with self._lock:
            for item_id, item in found.items():
                if item:
                    items[item_id] = item
                else:
                    items.pop(item_id, None)
            for category, item_ids in touched.items():
                if item_ids:
                    members[category] = item_ids
                else:
                    members.pop(category, None)
            self._items, self._members, self._deleted = items, members, deleted
            self._position = position
            self._revision += 1


def _union(sets: Iterable[Set[str]]) -> Set[str]:
    return frozenset().union(*sets)


def _to_bytes(item: Item) -> bytes:
    message = catalog_pb2.Item(item_id=item.item_id, title=item.title, categories=item.categories)
    return message.SerializeToString()


def _from_bytes(data: bytes | None) -> Item | None:
    if not data:
        return None
    message = catalog_pb2.Item.FromString(data)
    # Few categories stand in many items: one copy of each.
    return Item(message.item_id, message.title, tuple(sys.intern(category) for category in message.categories))
