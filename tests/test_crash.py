"""Whatever instant a trainer is killed at, those that come after it end with the very same weights."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from typing import NoReturn

import pytest
from learning import CUT, PASS, Proxy, append, fork, head, held, learn_all, make_feedback, small, tick, trainer

from recsys.errors import StoreUnavailable
from recsys.settings import Settings
from recsys.store.connection import connect
from recsys.weights import WeightStore
from trainer.daemon import Daemon

SECONDS = 60


def live(daemon: Daemon) -> NoReturn:
    """Learn until something fails."""
    daemon.start()
    while True:
        daemon.step()


@pytest.mark.parametrize(("snapshot_every_bytes", "feedback"), [(1, 9), (1 << 30, 14)])
def test_a_trainer_may_die_after_any_command(settings: Settings, snapshot_every_bytes: int, feedback: int) -> None:
    """Let a trainer's first n commands through and none after them, for every n; then let another one finish."""
    base = small(settings, snapshot_every_bytes=snapshot_every_bytes, snapshots_retained=1, replay_capacity=6)
    append(base, make_feedback(feedback))
    tick(base)
    reference = fork(base, "reference")
    weights = learn_all(reference)
    with Proxy(base.redis_url) as proxy:
        assert learn_all(fork(base, "counted").model_copy(update={"redis_url": proxy.url})) == weights
        commands = list(proxy.commands)
        assert len(commands) > 20
        for last in range(len(commands)):
            killed = fork(base, f"killed-{last}")
            proxy.restart(lambda number, _, last=last: PASS if number <= last else CUT)
            with trainer(killed.model_copy(update={"redis_url": proxy.url})) as daemon:
                # Nobody tries again.
                daemon.stopping.set()
                with pytest.raises(StoreUnavailable):
                    live(daemon)
            learn_all(killed)
            assert (head(killed), held(killed)) == (head(reference), weights), f"killed after {commands[:last]}"


def test_killed_processes_lose_and_repeat_nothing(settings: Settings) -> None:
    """SIGKILL a real trainer at random instants while feedback comes in, then let one stop as it should."""
    base = small(
        settings, snapshot_every_bytes=1 << 17, snapshots_retained=1, publish_seconds=0.05, batches_per_version=1
    )
    program = "import sys; from recsys.settings import Settings; from trainer.daemon import run; "
    program += "run(Settings.model_validate_json(sys.argv[1]))"
    draw = random.Random(3)
    appended = 0
    version = 1
    for kill in (True, True, False):
        append(base, make_feedback(90, appended, first=appended))
        appended += 90
        process = subprocess.Popen(
            [sys.executable, "-c", program, base.model_dump_json()], stdout=subprocess.PIPE, text=True
        )
        with process:
            try:
                assert process.stdout
                assert process.stdout.readline().startswith("learning on cpu from version ")
                target = (head(base)[0] + draw.randrange(2, 15)) if kill else 0
                with connect(base) as client:
                    weights = WeightStore(client, base)
                    while (found := weights.head()) and (
                        found.version < target if kill else found.feedback_learned < appended
                    ):
                        assert process.poll() is None
                        # Wakes up as soon as there is a version more.
                        client.xread({f"{base.key_prefix}:{{weights}}:deltas": f"{found.version}-0"}, block=500)
                assert process.poll() is None
            finally:
                process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
                process.wait(SECONDS)
        assert process.returncode == (-signal.SIGKILL if kill else 0)
        assert head(base)[0] > version
        version = head(base)[0]
    assert head(base)[3] == appended
    # With the ticks that those trainers appended, one that was never killed makes the same versions.
    reference = fork(base, "reference")
    assert learn_all(reference) == held(base)
    assert head(reference) == head(base)
