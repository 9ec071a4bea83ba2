"""Whatever instant a trainer is killed at, those that come after it end with the very same weights."""

from __future__ import annotations

from learning import CUT, PASS, Proxy, append, fork, head, held, learn_all, make_feedback, small, tick, trainer, versions
import time
from recsys.errors import StoreUnavailable
from recsys.settings import Settings
import pytest

def test_x(settings):
    base = small(settings, snapshot_every_bytes=60_000, snapshots_retained=2)
    append(base, make_feedback(37)); tick(base)
    ref = fork(base, "ref")
    t=time.time(); b = learn_all(ref); print("whole", time.time()-t)
    print(versions(ref), [len(held(ref))])
    with Proxy(base.redis_url) as proxy:
        run = fork(base, "r2").model_copy(update={"redis_url": proxy.url})
        t=time.time(); assert learn_all(run) == b; print("proxied", time.time()-t)
        print(len(proxy.commands), proxy.commands)
        from collections import Counter
        print(Counter(proxy.commands))
