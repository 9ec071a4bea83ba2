"""compiled: numba's compiler with the options that all of the loops written for it share."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba

logger = logging.getLogger(__name__)
# What stands in every file with loops, and how files name what they take from others of ours.
LOOPS = re.compile(r"^from recsys\.compiled import|^from numba", re.MULTILINE)
TAKEN = re.compile(r"^from ((?:recsys|trainer)[\w.]*) import", re.MULTILINE)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called with arguments of a kind.

    It runs without the interpreter's lock, so that other threads go on meanwhile. It is kept on disk, so that only the
    first start after an installation waits for the compiler; where nothing can be written, each start does. Sums may be
    taken in any order, but in every process in the same: what a function calls is made a part of it. Else it would be
    whichever of the copies the process has met first, its own or another's, whose sums are taken in another order.
    """
    return _compiled(function, forceinline=True)


def compiled_apart(function: Callable[..., Any]) -> Any:
    """Compile as `compiled` does, but leave calls to the function as they are: faster where it is seldom called.

    The last bits may then depend on what else a process has compiled: answers may differ in them, weights must not.
    """
    return _compiled(function, forceinline=False)


def _compiled(function: Callable[..., Any], *, forceinline: bool) -> Any:
    compile_: Any = numba.njit(
        nogil=True, forceinline=forceinline, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
    )
    found = compile_(function)
    try:
        found.enable_caching()
    except RuntimeError:
        _warn()
        return found
    # numba looks at a function's own file only, but what it calls in others is compiled into it, and constants are.
    kept = found._cache._cache_file
    kept._source_stamp = (kept._source_stamp, _sources(Path(__file__).parents[1]))
    kept._load_index = partial(_known, kept._load_index)
    return found


def _known(load: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
    """Return what is kept of a function: nothing where it was compiled for types of other sources, which are gone."""
    try:
        return load()
    except (ImportError, AttributeError):
        return {}


@cache
def _sources(root: Path) -> bytes:
    """Return a digest of every file with loops and all that these take from others."""
    texts = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path.read_text("utf-8")
        for package in ("recsys", "trainer")
        for path in (root / package).rglob("*.py")
    }
    wanted, reached = [name for name, text in texts.items() if LOOPS.search(text)], set[str]()
    while wanted:
        if (name := wanted.pop()) not in reached and name in texts:
            reached.add(name)
            wanted += TAKEN.findall(texts[name])
    return hashlib.sha256("".join(texts[name] for name in sorted(reached)).encode()).digest()


@cache
def _warn() -> None:
    """Tell it once, not for each function."""
    logger.warning("no folder for compiled code can be written, each start compiles anew: give NUMBA_CACHE_DIR")
