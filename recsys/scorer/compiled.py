"""compiled: numba's compiler with the options that all of the scorer's loops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called with arguments of a kind.

    It runs without the interpreter's lock, so that other threads go on meanwhile. It is kept on disk, so that only the
    first start after an installation waits for the compiler. Sums may be taken in any order.
    """
    compile_: Any = numba.njit
    return compile_(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})(function)
