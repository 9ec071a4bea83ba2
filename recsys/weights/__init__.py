"""Versions of the weights: what one holds as bytes, and the store that commits, keeps and follows them."""

from recsys.store.v1.weights_pb2 import ObjectionRecord, VersionRecord
from recsys.weights.payload import WeightPayload, decode, encode
from recsys.weights.record import Lineage, LogRange
from recsys.weights.store import Delta, Snapshot, WeightStore

__all__ = [
    "Delta",
    "Lineage",
    "LogRange",
    "ObjectionRecord",
    "Snapshot",
    "VersionRecord",
    "WeightPayload",
    "WeightStore",
    "decode",
    "encode",
]
