from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HistoryEntry(_message.Message):
    __slots__ = ("item_id", "feedback_class", "time_ms")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_CLASS_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    feedback_class: str
    time_ms: int
    def __init__(self, item_id: _Optional[str] = ..., feedback_class: _Optional[str] = ..., time_ms: _Optional[int] = ...) -> None: ...

class History(_message.Message):
    __slots__ = ("history",)
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    history: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    def __init__(self, history: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ...) -> None: ...

class ItemRecord(_message.Message):
    __slots__ = ("item_id", "categories")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    categories: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_id: _Optional[str] = ..., categories: _Optional[_Iterable[str]] = ...) -> None: ...

class FeedbackRecord(_message.Message):
    __slots__ = ("feedback_id", "user_id", "item_id", "feedback_class", "value", "time_ms", "recommendation_id", "context", "traceparent", "history")
    class ContextEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FEEDBACK_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    FEEDBACK_CLASS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TIME_MS_FIELD_NUMBER: _ClassVar[int]
    RECOMMENDATION_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    feedback_id: str
    user_id: str
    item_id: str
    feedback_class: str
    value: float
    time_ms: int
    recommendation_id: str
    context: _containers.ScalarMap[str, str]
    traceparent: str
    history: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    def __init__(self, feedback_id: _Optional[str] = ..., user_id: _Optional[str] = ..., item_id: _Optional[str] = ..., feedback_class: _Optional[str] = ..., value: _Optional[float] = ..., time_ms: _Optional[int] = ..., recommendation_id: _Optional[str] = ..., context: _Optional[_Mapping[str, str]] = ..., traceparent: _Optional[str] = ..., history: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ...) -> None: ...
