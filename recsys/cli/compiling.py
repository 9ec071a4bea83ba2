"""Compiling: what the first start after an installation would wait for, done beforehand."""

from __future__ import annotations

import torch

from recsys.catalog import Catalog, CatalogMirror
from recsys.scorer import Scorer
from recsys.service.responses import RecommendResponses
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.replica import Replica
from trainer.daemon import warm_up


def compile_loops(settings: Settings) -> None:
    """Compile the loops that trainer and server run on this processor; nothing is sent to the store."""
    device = torch.device("cpu")
    warm_up(settings, device)
    for retrieval in ("exact", "partitioned"):
        chosen = settings.model_copy(update={"retrieval": retrieval})
        replica = Replica(chosen, device)
        replica.table.allocate(["one", "two"])
        with connect(chosen) as client:
            mirror = CatalogMirror(Catalog(client, chosen))
            scorer = Scorer(chosen, mirror, device)
            scorer.on_warm_up = RecommendResponses(mirror, chosen.max_id_bytes).of
            scorer.load(VersionRecord(version=1), replica.write_all())
            scorer.warm_up()
