"""CatalogService: upsert, read and delete items."""

from __future__ import annotations

from recsys.catalog import Catalog, Item
from recsys.feedback_log import FeedbackLog
from recsys.service import validation
from recsys.service.edge import Pending
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings
from recsys.v1 import catalog_pb2


class CatalogItems:
    """Serve recsys.v1.CatalogService over the catalogue in the store, and tell the log what learning has to know.

    The log comes first: a call that fails in between is made again, and then appends nothing twice.
    """

    def __init__(self, settings: Settings, catalog: Catalog, log: FeedbackLog, calls: StoreCalls) -> None:
        self._settings = settings
        self._catalog = catalog
        self._log = log
        self._calls = calls

    def UpsertItems(self, request: catalog_pb2.UpsertItemsRequest, deadline: float) -> Pending:
        """Write all items or none."""
        items = validation.items(request.items, self._settings)
        written = len({item.item_id for item in items})

        def write() -> None:
            self._log.append_items({item.item_id: item.categories for item in items})
            self._catalog.upsert(items)

        return Pending(
            self._calls.submit(write, deadline),
            lambda _: catalog_pb2.UpsertItemsResponse(upserted=written),
        )

    def GetItems(self, request: catalog_pb2.GetItemsRequest, deadline: float) -> Pending:
        """Read items in the order asked for, and list the missing ones."""
        item_ids = validation.item_ids(request.item_ids, self._settings)

        def response(found: list[Item | None]) -> catalog_pb2.GetItemsResponse:
            return catalog_pb2.GetItemsResponse(
                items=[
                    catalog_pb2.Item(item_id=item.item_id, title=item.title, categories=item.categories)
                    for item in found
                    if item
                ],
                missing_item_ids=[item_id for item_id, item in zip(item_ids, found, strict=True) if not item],
            )

        return Pending(self._calls.submit(lambda: self._catalog.get(item_ids), deadline), response)

    def DeleteItems(self, request: catalog_pb2.DeleteItemsRequest, deadline: float) -> Pending:
        """Keep items out of recommendations until they are upserted again."""
        item_ids = validation.item_ids(request.item_ids, self._settings)

        def delete() -> int:
            self._log.append_items(dict.fromkeys(item_ids, ()))
            return self._catalog.delete(item_ids)

        return Pending(
            self._calls.submit(delete, deadline),
            lambda deleted: catalog_pb2.DeleteItemsResponse(deleted=deleted),
        )
