"""CatalogService and ModelService over a socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from calls import (
    click,
    log,
    violations,
)
from serving import ITEMS, WAYS, Running, commit_versions, serve

from recsys.settings import load
from recsys.store.embedded import EmbeddedStore
from recsys.v1 import catalog_pb2, model_pb2
from recsys.v1.catalog_pb2_grpc import CatalogServiceStub
from recsys.v1.model_pb2_grpc import ModelServiceStub


@pytest.fixture(scope="module", params=WAYS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_server(embedded_store: EmbeddedStore, transport: str) -> Iterator[Running]:
    flags = {"redis_url": embedded_store.url, "port": 0, "metrics_port": 0, **WAYS[transport]}
    with serve(load(flags, environment={})) as running:
        yield running


@pytest.fixture
def running(shared_server: Running) -> Running:
    """A server that serves version 1 over an empty store."""
    shared_server.reset()
    return shared_server


# --- Catalogue


def test_items_are_written_read_and_deleted(running: Running) -> None:
    stub: Any = CatalogServiceStub(running.channel)
    items = [
        catalog_pb2.Item(item_id="a", title="A", categories=["x", "y"]),
        catalog_pb2.Item(item_id="b"),
        catalog_pb2.Item(item_id="a", title="A again"),
    ]
    assert stub.UpsertItems(catalog_pb2.UpsertItemsRequest(items=items)).upserted == 2
    found = stub.GetItems(catalog_pb2.GetItemsRequest(item_ids=["b", "none", "a"]))
    assert list(found.items) == [items[1], items[2]]
    assert list(found.missing_item_ids) == ["none"]
    assert stub.DeleteItems(catalog_pb2.DeleteItemsRequest(item_ids=["a", "none"])).deleted == 1
    assert list(stub.GetItems(catalog_pb2.GetItemsRequest(item_ids=["a"])).missing_item_ids) == ["a"]


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ([], "items"),
        ([{"item_id": "a"}] * 1001, "items"),
        ([{"item_id": "a"}, {"item_id": ""}], "items[1].item_id"),
        ([{"item_id": "a", "title": "t" * 1025}], "items[0].title"),
        ([{"item_id": "a", "categories": ["c"] * 101}], "items[0].categories"),
        ([{"item_id": "a", "categories": ["c", ""]}], "items[0].categories[1]"),
    ],
)
def test_upsert_refuses_all_or_nothing(running: Running, items: list[dict[str, Any]], field: str) -> None:
    request = catalog_pb2.UpsertItemsRequest(items=[catalog_pb2.Item(**item) for item in items])
    assert list(violations(lambda: CatalogServiceStub(running.channel).UpsertItems(request))) == [field]
    assert running.store.dbsize() == 0


@pytest.mark.parametrize(("ids", "field"), [([], "item_ids"), (["a"] * 1001, "item_ids"), ([""], "item_ids[0]")])
def test_reading_and_deleting_refuse(running: Running, ids: list[str], field: str) -> None:
    stub: Any = CatalogServiceStub(running.channel)
    for call in (
        lambda: stub.GetItems(catalog_pb2.GetItemsRequest(item_ids=ids)),
        lambda: stub.DeleteItems(catalog_pb2.DeleteItemsRequest(item_ids=ids)),
    ):
        assert list(violations(call)) == [field]


# --- Status and versions


def test_status_tells_what_is_served_and_what_is_not_learned(running: Running) -> None:
    stub: Any = ModelServiceStub(running.channel)
    log(running, click(), click(), click())
    status = stub.GetStatus(model_pb2.GetStatusRequest())
    assert (status.version, status.items, status.feedback_learned) == (1, len(ITEMS), 2)
    assert status.committed_time.ToMilliseconds() == 1_700_000_000_000
    assert status.applied_time.ToMilliseconds() == 1_700_000_000_250
    assert (status.backlog, status.log_records, status.store_reachable) == (3, 3, True)
    assert 0 < status.log_bytes < status.log_max_bytes == 1 << 30
    assert list(status.feedback_classes) == ["impression", "click", "like", "purchase"]
    assert status.software_version
    commit_versions(running, 1)
    assert stub.GetStatus(model_pb2.GetStatusRequest()).backlog == 1
    running.store.delete("recsys:{log}:stats")
    assert stub.GetStatus(model_pb2.GetStatusRequest()).backlog == 0


def test_versions_come_in_pages_newest_first(running: Running) -> None:
    stub: Any = ModelServiceStub(running.channel)
    weights = commit_versions(running, 5)
    pages: list[list[int]] = []
    token = ""
    while not pages or token:
        page = stub.ListVersions(model_pb2.ListVersionsRequest(page_size=2, page_token=token))
        pages.append([version.version for version in page.versions])
        token = page.next_page_token
    assert pages == [[5, 4], [3, 2], [1]]
    newest = stub.ListVersions(model_pb2.ListVersionsRequest()).versions[0]
    head = weights.head()
    assert head is not None
    assert newest == model_pb2.Version(
        version=5,
        committed_time={"seconds": head.committed_ms // 1000, "nanos": head.committed_ms % 1000 * 1_000_000},
        feedback_learned=10,
        feedback_added=2,
        bytes=head.bytes,
        epoch=1,
        position="5-0",
        chain=head.chain.hex(),
        metrics={"hr": 0.5},
        kind="learned",
        parent=4,
        trainer_bytes=head.trainer_bytes,
        settings_digest="digest",
    )


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": 1001}, "page_size"),
        *(({"page_token": token}, "page_token") for token in ("x", "-1", "0", "1.5", "²", "1" * 19)),
    ],
)
def test_versions_refuse(running: Running, fields: dict[str, Any], field: str) -> None:
    request = model_pb2.ListVersionsRequest(**fields)
    assert list(violations(lambda: ModelServiceStub(running.channel).ListVersions(request))) == [field]
