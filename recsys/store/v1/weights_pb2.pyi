from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class PayloadHeader(_message.Message):
    __slots__ = ("rows", "new_items", "id_bytes", "dense", "columns", "whole", "kept_rows")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    NEW_ITEMS_FIELD_NUMBER: _ClassVar[int]
    ID_BYTES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    KEPT_ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    new_items: int
    id_bytes: int
    dense: _containers.RepeatedCompositeFieldContainer[Tensor]
    columns: _containers.RepeatedCompositeFieldContainer[Tensor]
    whole: bool
    kept_rows: int
    def __init__(self, rows: _Optional[int] = ..., new_items: _Optional[int] = ..., id_bytes: _Optional[int] = ..., dense: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., columns: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., whole: _Optional[bool] = ..., kept_rows: _Optional[int] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("after", "until")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    after: str
    until: str
    def __init__(self, after: _Optional[str] = ..., until: _Optional[str] = ...) -> None: ...

class VersionRecord(_message.Message):
    __slots__ = ("version", "parent", "epoch", "position", "feedback_learned", "feedback_added", "committed_ms", "settings_digest", "checksum", "trainer_checksum", "chain", "chunks", "bytes", "trainer_chunks", "trainer_bytes", "metrics", "accepted_ms", "attempt", "window_position", "kind", "restored_version", "set_aside", "reason")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_LEARNED_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_ADDED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_MS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TRAINER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINER_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TRAINER_BYTES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_MS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_POSITION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RESTORED_VERSION_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    parent: int
    epoch: int
    position: str
    feedback_learned: int
    feedback_added: int
    committed_ms: int
    settings_digest: str
    checksum: bytes
    trainer_checksum: bytes
    chain: bytes
    chunks: int
    bytes: int
    trainer_chunks: int
    trainer_bytes: int
    metrics: _containers.ScalarMap[str, float]
    accepted_ms: _containers.RepeatedScalarFieldContainer[int]
    attempt: str
    window_position: str
    kind: str
    restored_version: int
    set_aside: _containers.RepeatedCompositeFieldContainer[Range]
    reason: str
    def __init__(self, version: _Optional[int] = ..., parent: _Optional[int] = ..., epoch: _Optional[int] = ..., position: _Optional[str] = ..., feedback_learned: _Optional[int] = ..., feedback_added: _Optional[int] = ..., committed_ms: _Optional[int] = ..., settings_digest: _Optional[str] = ..., checksum: _Optional[bytes] = ..., trainer_checksum: _Optional[bytes] = ..., chain: _Optional[bytes] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ..., trainer_chunks: _Optional[int] = ..., trainer_bytes: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., accepted_ms: _Optional[_Iterable[int]] = ..., attempt: _Optional[str] = ..., window_position: _Optional[str] = ..., kind: _Optional[str] = ..., restored_version: _Optional[int] = ..., set_aside: _Optional[_Iterable[_Union[Range, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class SnapshotRecord(_message.Message):
    __slots__ = ("version", "epoch", "attempt", "checksum", "trainer_checksum", "chunks", "bytes", "trainer_chunks", "trainer_bytes", "record")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    TRAINER_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINER_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TRAINER_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    version: int
    epoch: int
    attempt: str
    checksum: bytes
    trainer_checksum: bytes
    chunks: int
    bytes: int
    trainer_chunks: int
    trainer_bytes: int
    record: VersionRecord
    def __init__(self, version: _Optional[int] = ..., epoch: _Optional[int] = ..., attempt: _Optional[str] = ..., checksum: _Optional[bytes] = ..., trainer_checksum: _Optional[bytes] = ..., chunks: _Optional[int] = ..., bytes: _Optional[int] = ..., trainer_chunks: _Optional[int] = ..., trainer_bytes: _Optional[int] = ..., record: _Optional[_Union[VersionRecord, _Mapping]] = ...) -> None: ...

class ObjectionRecord(_message.Message):
    __slots__ = ("version", "times", "reason", "time_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    version: int
    times: int
    reason: str
    time_ms: int
    def __init__(self, version: _Optional[int] = ..., times: _Optional[int] = ..., reason: _Optional[str] = ..., time_ms: _Optional[int] = ...) -> None: ...
