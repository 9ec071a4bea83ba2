"""CatalogService: upsert, read and delete items."""

from __future__ import annotations

from recsys.catalog import Catalog
from recsys.service import validation
from recsys.service.edge import Context, deadline_of
from recsys.service.store_calls import StoreCalls
from recsys.settings import Settings
from recsys.v1 import catalog_pb2
from recsys.v1.catalog_pb2_grpc import CatalogServiceServicer


class CatalogItems(CatalogServiceServicer):
    """Serve recsys.v1.CatalogService over the catalogue in the store."""

    def __init__(self, settings: Settings, catalog: Catalog, calls: StoreCalls) -> None:
        self._settings = settings
        self._catalog = catalog
        self._calls = calls

    async def UpsertItems(
        self, request: catalog_pb2.UpsertItemsRequest, context: Context
    ) -> catalog_pb2.UpsertItemsResponse:
        """Write all items or none."""
        deadline = deadline_of(context)
        items = validation.items(request.items, self._settings)
        await self._calls.run(lambda: self._catalog.upsert(items), deadline)
        return catalog_pb2.UpsertItemsResponse(upserted=len({item.item_id for item in items}))

    async def GetItems(self, request: catalog_pb2.GetItemsRequest, context: Context) -> catalog_pb2.GetItemsResponse:
        """Read items in the order asked for, and list the missing ones."""
        deadline = deadline_of(context)
        item_ids = validation.item_ids(request.item_ids, self._settings)
        found = await self._calls.run(lambda: self._catalog.get(item_ids), deadline)
        return catalog_pb2.GetItemsResponse(
            items=[
                catalog_pb2.Item(item_id=item.item_id, title=item.title, categories=item.categories)
                for item in found
                if item
            ],
            missing_item_ids=[item_id for item_id, item in zip(item_ids, found, strict=True) if not item],
        )

    async def DeleteItems(
        self, request: catalog_pb2.DeleteItemsRequest, context: Context
    ) -> catalog_pb2.DeleteItemsResponse:
        """Keep items out of recommendations until they are upserted again."""
        deadline = deadline_of(context)
        item_ids = validation.item_ids(request.item_ids, self._settings)
        deleted = await self._calls.run(lambda: self._catalog.delete(item_ids), deadline)
        return catalog_pb2.DeleteItemsResponse(deleted=deleted)
