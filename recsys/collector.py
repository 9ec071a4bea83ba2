"""collector: what a process holds for long is not looked through for cyclic garbage again and again."""

from __future__ import annotations

import gc

# New objects that may be part of a cycle before the youngest are looked through: more than a batch of requests holds,
# which would otherwise be looked through several times and go by its last references all the same.
YOUNGEST = 20_000


def settle() -> None:
    """Leave everything that is held now out of later collections; call it once what stays has been loaded.

    A full collection looks at every object of the process: with the ids of 100,000 items that takes 0.2 seconds, in
    which nothing is answered, several times a minute. What is freed by its last reference is freed as before.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNGEST, *gc.get_threshold()[1:])
