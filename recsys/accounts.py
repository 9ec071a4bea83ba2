"""accounts: the number that stands for a user where no id is kept, and the few places that all numbers share."""

from __future__ import annotations

import zlib

# Feedback that is nobody's.
NOBODY = 0
# What is remembered by account has so many places; the newer account has its place.
PLACES = 4096


def account(user_id: str) -> int:
    """Return the number that stands for a user's account, the same on every machine, never NOBODY."""
    return 1 + zlib.crc32(user_id.encode()) % (2**31 - 1)


def place(user_id: str) -> int:
    """Return the place of a user's account, which it shares with one account in PLACES: it tells of nobody alone."""
    return account(user_id) % PLACES
