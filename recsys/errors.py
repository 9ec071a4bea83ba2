"""One tree of errors: every failure that a user can meet is a RecsysError with a reason that programs can read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """Say what is wrong with one field: what was given and what is allowed."""

    field: str
    description: str


class RecsysError(Exception):
    """Carry a brief message for a person and, in `reason`, UPPER_SNAKE_CASE for a program."""

    reason = "INTERNAL"


class InvalidInput(RecsysError):
    """Refuse a request because of the fields named in `violations` (at least one)."""

    reason = "INVALID_INPUT"

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = violations
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))


class SettingsError(RecsysError):
    """Refuse settings that are unknown, malformed or contradict each other."""

    reason = "INVALID_SETTINGS"


class InputFileError(RecsysError):
    """Refuse a file as a whole: absent, unreadable, or without the columns it must have."""

    reason = "INVALID_FILE"


class MissingExtra(RecsysError):
    """Tell that an optional library is not installed; the message says how to get it."""

    reason = "MISSING_EXTRA"


class Unauthenticated(RecsysError):
    """Refuse a caller that shows no bearer token, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(RecsysError):
    """Refuse a caller whose token has none of the roles that the method takes."""

    reason = "PERMISSION_DENIED"


class NotReady(RecsysError):
    """Tell that the first weights are not loaded yet; trying again later helps."""

    reason = "WEIGHTS_NOT_LOADED"


class StoreUnavailable(RecsysError):
    """Tell that the store cannot be reached or did not answer in time; trying again later helps."""

    reason = "STORE_UNAVAILABLE"


class StoreReadOnly(StoreUnavailable):
    """Tell that the store answers but takes no writes, as with a full disk, until that is over; nothing was written."""

    reason = "STORE_READ_ONLY"


class NotDurable(StoreUnavailable):
    """Tell that what was written did not become as durable in time as the settings ask; it may stand or be lost."""

    reason = "NOT_DURABLE"


class StoreFull(RecsysError):
    """Tell that the store or the feedback log has reached its bound; nothing was written."""

    reason = "STORE_FULL"


class Overloaded(RecsysError):
    """Tell that a bounded queue is full, or that the call's turn would come too late; nothing was done.

    `retry_seconds` is when trying again may help, None where that is not known.
    """

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_seconds: float | None = None) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(message)


class DeadlinePassed(RecsysError):
    """Tell that the caller's deadline passed before work on the request began; nothing was done."""

    reason = "DEADLINE_PASSED"


class CorruptWeights(RecsysError):
    """Tell that weights in the store fail their checksum, miss a part, or do not fit this network."""

    reason = "CORRUPT_WEIGHTS"


class FencedOff(RecsysError):
    """Tell a trainer that a newer trainer has taken over."""

    reason = "FENCED_OFF"


class OtherVersionCameFirst(FencedOff):
    """Tell a writer that the version it continues is not the last one any more, as after a rollback."""

    reason = "OTHER_VERSION_CAME_FIRST"


class NotRetained(RecsysError):
    """Tell that a version, or the log behind it, is not kept any more; the message says which ones are."""

    reason = "NOT_RETAINED"


class AddressInUse(RecsysError):
    """Tell that a port is taken by another process."""

    reason = "ADDRESS_IN_USE"


class DataDirectoryInUse(RecsysError):
    """Tell that another process holds the data directory."""

    reason = "DATA_DIRECTORY_IN_USE"
