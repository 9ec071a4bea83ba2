"""Versions of the weights: what one holds as bytes, and the store that commits, keeps and follows them."""

from recsys.store.v1.weights_pb2 import VersionRecord
from recsys.weights.payload import WeightPayload, decode, encode
from recsys.weights.record import Lineage
from recsys.weights.store import Delta, Snapshot, WeightStore

__all__ = ["Delta", "Lineage", "Snapshot", "VersionRecord", "WeightPayload", "WeightStore", "decode", "encode"]
