"""Logs: one line per event, in two forms; what comes often is summed up; nobody's id is told at level info."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest
from calls import click, log, recommend
from learning import append, make_feedback, small, trainer
from serving import serve

from recsys.feedback import Feedback
from recsys.logs import JsonFormatter, Summary, TextFormatter, configure, tell
from recsys.settings import Settings

NAMES = ("planted-user", "planted-item")


@pytest.fixture
def restored() -> Iterator[None]:
    """Put the process's logging back as it was."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    levels = {name: logging.getLogger(name).level for name in ("", "recsys", "trainer")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def record(words: str, **fields: object) -> logging.LogRecord:
    caught: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = caught.append  # type: ignore[assignment,method-assign]
    logger = logging.Logger("recsys.here")
    logger.addHandler(handler)
    tell(logger, logging.WARNING, words, **fields)
    (found,) = caught
    found.created = 1_700_000_000.25
    return found


def test_text_is_one_line_that_can_be_taken_apart() -> None:
    found = record("version applied", version=3, seconds=0.12345678, reason='two "words"\nand a line', none=None)
    assert TextFormatter().format(found) == (
        "2023-11-14T22:13:20.250Z WARNING recsys.here: version applied version=3 seconds=0.123457 "
        'reason="two \\"words\\"\\nand a line"'
    )
    plain = logging.LogRecord("a", logging.INFO, "", 0, "some %s\nlines", ("more",), None)
    assert TextFormatter().format(plain).endswith(" INFO a: some more\\nlines")


def test_json_is_one_object_a_line() -> None:
    found = JsonFormatter().format(record("version applied", version=3, error=ValueError("no\nway")))
    assert "\n" not in found
    assert json.loads(found) == {
        **{"time": "2023-11-14T22:13:20.250Z", "level": "warning", "logger": "recsys.here"},
        **{"event": "version applied", "version": 3, "error": "no\nway"},
    }
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        failed = logging.LogRecord("a", logging.ERROR, "", 0, "call %d failed", (7,), sys.exc_info())
    told = json.loads(JsonFormatter().format(failed))
    assert told["event"] == "call 7 failed"
    assert "RuntimeError: broken" in told["error"]


def test_often_is_told_seldom_and_completely() -> None:
    now = [100.0]
    summary = Summary(10.0, lambda: now[0])
    assert summary.add({"versions": 1}) == {"versions": 1}
    for _ in range(5):
        now[0] += 1
        assert summary.add({"versions": 1, "bytes": 2}) is None
    now[0] = 110.0
    assert summary.add({"versions": 1}) == {"versions": 6, "bytes": 10}


def test_levels_and_forms_follow_the_settings(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    configure(Settings(log_format="json", log_level="debug"))
    logging.getLogger("recsys.x").debug("ours")
    logging.getLogger("elsewhere").debug("not ours")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["ours"]
    configure(Settings(log_level="error"))
    tell(logging.getLogger("trainer.x"), logging.WARNING, "unheard")
    tell(logging.getLogger("trainer.x"), logging.ERROR, "heard", version=1)
    assert capsys.readouterr().err.endswith(" ERROR trainer.x: heard version=1\n")


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_a_server_tells_no_ids_and_names_answers_when_asked(
    settings: Settings, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    user, item = NAMES
    with caplog.at_level(level), serve(settings) as running:
        answer = recommend(running, user_id=user)
        of = {"user_id": user, "item_id": item, "recommendation_id": answer.recommendation_id}
        done = log(running, click(**of), click(**of, feedback_class="nonsense"), click(user_id=user * 30, item_id=item))
        assert (done.accepted, done.refused) == (1, 2)
        assert recommend(running, user_id=user, exclude_item_ids=[item]).items
    assert "feedback refused, by field feedback_class=1 user_id=1" in caplog.text
    assert (f"recommended recommendation_id={answer.recommendation_id} version=1" in caplog.text) == (
        level == logging.DEBUG
    )
    assert (f"recommendation recommendation_id={answer.recommendation_id} version=1" in caplog.text) == (
        level == logging.DEBUG
    )
    assert not any(name in caplog.text for name in NAMES)


def test_a_trainer_tells_versions_and_no_ids(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    settings = small(settings)
    user, item = NAMES
    planted = [Feedback(user, item, each.feedback_class, each.time_ms) for each in make_feedback(9)]
    append(settings, [*make_feedback(40), *planted])
    with caplog.at_level(logging.INFO), trainer(settings) as daemon:
        daemon.start()
        while daemon.step():
            pass
        assert daemon.version > 2
    told = [record.getMessage() for record in caplog.records if record.name == "trainer.daemon"]
    assert sum(text.startswith("version committed version=2 versions=1 feedback=") for text in told) == 1
    assert not any(name in caplog.text for name in NAMES)
