"""compiled: numba's compiler with the options that all of the loops written for it share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numba

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called with arguments of a kind.

    It runs without the interpreter's lock, so that other threads go on meanwhile. It is kept on disk, so that only the
    first start after an installation waits for the compiler; where nothing can be written, each start does. Sums may be
    taken in any order.
    """
    compile_: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
    found = compile_(function)
    try:
        found.enable_caching()
    except RuntimeError:
        _warn()
    return found


@cache
def _warn() -> None:
    """Tell it once, not for each function."""
    logger.warning("no folder for compiled code can be written, each start compiles anew: give NUMBA_CACHE_DIR")
