import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "committed_time", "applied_time", "items", "feedback_learned", "backlog", "log_records", "log_bytes", "log_max_bytes", "store_reachable", "software_version", "feedback_classes", "learning_paused", "retained_versions_from", "retained_bytes", "snapshots", "delta_bytes", "snapshot_bytes", "weights_max_bytes", "weights_problem", "durability", "set_aside_feedback", "newest_version", "newest_committed_time", "store_memory_bytes", "store_max_memory_bytes", "held_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TIME_FIELD_NUMBER: _ClassVar[int]
    APPLIED_TIME_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_LEARNED_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_FIELD_NUMBER: _ClassVar[int]
    LOG_RECORDS_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_CLASSES_FIELD_NUMBER: _ClassVar[int]
    LEARNING_PAUSED_FIELD_NUMBER: _ClassVar[int]
    RETAINED_VERSIONS_FROM_FIELD_NUMBER: _ClassVar[int]
    RETAINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    DELTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    NEWEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEWEST_COMMITTED_TIME_FIELD_NUMBER: _ClassVar[int]
    STORE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORE_MAX_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    committed_time: _timestamp_pb2.Timestamp
    applied_time: _timestamp_pb2.Timestamp
    items: int
    feedback_learned: int
    backlog: int
    log_records: int
    log_bytes: int
    log_max_bytes: int
    store_reachable: bool
    software_version: str
    feedback_classes: _containers.RepeatedScalarFieldContainer[str]
    learning_paused: bool
    retained_versions_from: int
    retained_bytes: int
    snapshots: int
    delta_bytes: int
    snapshot_bytes: int
    weights_max_bytes: int
    weights_problem: str
    durability: str
    set_aside_feedback: int
    newest_version: int
    newest_committed_time: _timestamp_pb2.Timestamp
    store_memory_bytes: int
    store_max_memory_bytes: int
    held_version: HeldVersion
    def __init__(self, version: _Optional[int] = ..., committed_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., applied_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., items: _Optional[int] = ..., feedback_learned: _Optional[int] = ..., backlog: _Optional[int] = ..., log_records: _Optional[int] = ..., log_bytes: _Optional[int] = ..., log_max_bytes: _Optional[int] = ..., store_reachable: _Optional[bool] = ..., software_version: _Optional[str] = ..., feedback_classes: _Optional[_Iterable[str]] = ..., learning_paused: _Optional[bool] = ..., retained_versions_from: _Optional[int] = ..., retained_bytes: _Optional[int] = ..., snapshots: _Optional[int] = ..., delta_bytes: _Optional[int] = ..., snapshot_bytes: _Optional[int] = ..., weights_max_bytes: _Optional[int] = ..., weights_problem: _Optional[str] = ..., durability: _Optional[str] = ..., set_aside_feedback: _Optional[int] = ..., newest_version: _Optional[int] = ..., newest_committed_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., store_memory_bytes: _Optional[int] = ..., store_max_memory_bytes: _Optional[int] = ..., held_version: _Optional[_Union[HeldVersion, _Mapping]] = ...) -> None: ...

class HeldVersion(_message.Message):
    __slots__ = ("version", "times", "reason", "held_time")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_TIME_FIELD_NUMBER: _ClassVar[int]
    version: int
    times: int
    reason: str
    held_time: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[int] = ..., times: _Optional[int] = ..., reason: _Optional[str] = ..., held_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class Version(_message.Message):
    __slots__ = ("version", "committed_time", "feedback_learned", "feedback_added", "bytes", "epoch", "position", "chain", "metrics", "snapshot", "kind", "restored_version", "reason", "parent", "trainer_bytes", "settings_digest", "set_aside", "oldest_accepted_time")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_TIME_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_LEARNED_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_ADDED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RESTORED_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TRAINER_BYTES_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FIELD_NUMBER: _ClassVar[int]
    OLDEST_ACCEPTED_TIME_FIELD_NUMBER: _ClassVar[int]
    version: int
    committed_time: _timestamp_pb2.Timestamp
    feedback_learned: int
    feedback_added: int
    bytes: int
    epoch: int
    position: str
    chain: str
    metrics: _containers.ScalarMap[str, float]
    snapshot: bool
    kind: str
    restored_version: int
    reason: str
    parent: int
    trainer_bytes: int
    settings_digest: str
    set_aside: _containers.RepeatedCompositeFieldContainer[LogRange]
    oldest_accepted_time: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[int] = ..., committed_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., feedback_learned: _Optional[int] = ..., feedback_added: _Optional[int] = ..., bytes: _Optional[int] = ..., epoch: _Optional[int] = ..., position: _Optional[str] = ..., chain: _Optional[str] = ..., metrics: _Optional[_Mapping[str, float]] = ..., snapshot: _Optional[bool] = ..., kind: _Optional[str] = ..., restored_version: _Optional[int] = ..., reason: _Optional[str] = ..., parent: _Optional[int] = ..., trainer_bytes: _Optional[int] = ..., settings_digest: _Optional[str] = ..., set_aside: _Optional[_Iterable[_Union[LogRange, _Mapping]]] = ..., oldest_accepted_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class LogRange(_message.Message):
    __slots__ = ("after", "until")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    after: str
    until: str
    def __init__(self, after: _Optional[str] = ..., until: _Optional[str] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("version", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    reason: str
    def __init__(self, version: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PauseLearningRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseLearningResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeLearningRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeLearningResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForgetUserRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class ForgetUserResponse(_message.Message):
    __slots__ = ("history_entries", "log_records", "unlearned_records", "set_aside_records", "remains")
    HISTORY_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LOG_RECORDS_FIELD_NUMBER: _ClassVar[int]
    UNLEARNED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_RECORDS_FIELD_NUMBER: _ClassVar[int]
    REMAINS_FIELD_NUMBER: _ClassVar[int]
    history_entries: int
    log_records: int
    unlearned_records: int
    set_aside_records: int
    remains: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, history_entries: _Optional[int] = ..., log_records: _Optional[int] = ..., unlearned_records: _Optional[int] = ..., set_aside_records: _Optional[int] = ..., remains: _Optional[_Iterable[str]] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions", "next_page_token")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[Version]
    next_page_token: str
    def __init__(self, versions: _Optional[_Iterable[_Union[Version, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
