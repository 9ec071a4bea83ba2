"""Finding: what one check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Say what was looked at and found, and what to do where it is not right."""

    check: str
    level: Level
    found: str
    advice: str = ""
