"""A recommender that learns while it serves: the shared nouns and the serving side."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys.catalog import CategoryFilter, Item
    from recsys.client import AsyncClient, Client
    from recsys.feedback import Feedback

__version__ = "0.1.0"
__all__ = ["AsyncClient", "CategoryFilter", "Client", "Feedback", "Item", "__version__"]

# Imported when first asked for: `import recsys` alone stays quick, and parts of the package import each other freely.
_HOMES = {
    "AsyncClient": "recsys.client",
    "CategoryFilter": "recsys.catalog",
    "Client": "recsys.client",
    "Feedback": "recsys.feedback",
    "Item": "recsys.catalog",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'recsys' has no attribute {name!r}")
