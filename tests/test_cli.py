"""The command line: flags made from the settings, one line per error, and each command against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving import Running, serve

from recsys.cli import import_command, main
from recsys.feedback_log import FeedbackLog
from recsys.settings import CLASS_PRESETS, Settings

COMMANDS = (
    *("demo", "up", "serve", "train", "store", "config"),
    *("recommend", "feedback", "import", "status", "versions", "evaluate", "fit"),
    *("rollback", "pause", "resume", "verify", "rebuild"),
)
HEADER = "user,item,time,class\n"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, and tables as wide as they want to be."""
    monkeypatch.delenv("RECSYS_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command that succeeds and read the one object that it prints."""

    def run(*arguments: str, code: int = 0) -> Any:
        assert main([*arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def error_of(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], code: int) -> str:
    """Run a command that fails; what it says is one line, on stderr."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: recsys {command}" in capsys.readouterr().out


def test_help_of_those_that_take_settings_names_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "up", "serve", "train", "config", "evaluate", "fit", "verify", "rebuild"):
        main([command, "--help"])
        shown = capsys.readouterr().out
        missing = [n for n in Settings.model_fields if f"--{n.replace('_', '-')} " not in shown]
        assert missing == []


def test_help_needs_neither_torch_nor_grpc() -> None:
    code = (
        "import sys; from recsys.cli import main; main(['--help']); sys.exit(bool({'torch', 'grpc'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_the_program_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "recsys", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "recsys 0.1.0\n")


def test_flags_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: Callable[..., Any]
) -> None:
    file = tmp_path / "recsys.toml"
    file.write_text("port = 1\nmetrics_port = 2\ntrainer_metrics_port = 3\n")
    monkeypatch.setenv("RECSYS_METRICS_PORT", "20")
    monkeypatch.setenv("RECSYS_TRAINER_METRICS_PORT", "30")
    names = ("port", "metrics_port", "trainer_metrics_port", "seed")
    expected = (
        {"port": 1, "metrics_port": 20, "trainer_metrics_port": 300, "seed": 1},
        "file environment flag default",
    )
    flag = ["--trainer-metrics-port", "300"]
    for arguments in (["-c", str(file), "config", *flag], ["config", "--config", str(file), *flag]):
        found = output(*arguments)
        assert {n: found["settings"][n] for n in names} == expected[0]
        assert [found["origin"][n] for n in names] == expected[1].split()
    monkeypatch.setenv("RECSYS_CONFIG", str(file))
    assert output("config")["settings"]["port"] == 1
    assert output("-c", str(_toml(tmp_path, "port = 9")), "config")["settings"]["port"] == 9


def test_every_kind_of_setting_is_taken_from_its_flag(output: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["--no-reflection", "--learning-rate", "0.5", "--classes", "ratings", "--data-dir", str(tmp_path)]
    found = output("config", *arguments, "--device", "cpu")["settings"]
    assert (found["reflection"], found["learning_rate"], found["device"]) == (False, 0.5, "cpu")
    assert found["data_dir"] == str(tmp_path)
    assert [c["name"] for c in found["classes"]] == [c.name for c in CLASS_PRESETS["ratings"]]


def test_what_cannot_be_taken_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recsys.toml"
    file.write_text("prot = 1\n")
    assert "--prot" in error_of(capsys, ["serve", "--prot", "1"], 2)
    assert "'prot' (from file" in error_of(capsys, ["-c", str(file), "serve"], 2)
    assert "does not exist" in error_of(capsys, ["config", "-c", str(tmp_path / "other.toml")], 2)
    assert "port (from flag)" in error_of(capsys, ["train", "--port", "70000"], 2)
    assert "nonsense" in error_of(capsys, ["nonsense"], 2)
    assert "USER" in error_of(capsys, ["recommend"], 2)
    assert "name both --user and --item" in error_of(capsys, ["evaluate", "--data", "x.csv", "--user", "u"], 2)
    assert "name one file" in error_of(capsys, ["evaluate"], 2)
    assert "name one file" in error_of(capsys, ["evaluate", "x.csv", "--data", "x.csv"], 2)
    assert "with --server" in error_of(capsys, ["-c", str(_toml(tmp_path, "port = 0")), "status"], 2)
    monkeypatch.setenv("RECSYS_PROT", "1")
    assert "'prot' (from environment)" in error_of(capsys, ["status"], 2)


def _toml(directory: Path, text: str) -> Path:
    path = directory / "settings.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:1/0", "redis://host:1/0"),
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://user:se@cret@[::1]:1/0", "rediss://user:***@[::1]:1/0"),
        ("unix://user@/run/redis.sock?db=1&password=secret", "unix://user@/run/redis.sock?db=1&password=***"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_passwords_are_masked(
    url: str, shown: str, capsys: pytest.CaptureFixture[str], output: Callable[..., Any]
) -> None:
    assert output("config", "--redis-url", url)["settings"]["redis_url"] == shown
    assert main(["config", "--redis-url", url]) == 0
    assert "secret" not in capsys.readouterr().out


def test_recommend_shows_titles_and_reasons_and_takes_every_filter(
    settings: Settings, output: Callable[..., Any]
) -> None:
    with serve(settings) as running:
        at = ["--server", running.target]
        assert output("feedback", "ann", "item-0", "click", *at) == {"accepted": True, "duplicate": False}
        found = output("recommend", "ann", "-n", "2", "--exclude", "item-1", "--exclude", "item-2", *at)
        assert found["version"] == 1
        assert [item["item_id"] for item in found["items"]] == ["item-3", "item-4"]
        assert found["items"][0]["source"] == "transition"
        assert "item-0" in found["items"][0]["reason"]
        seen = output("recommend", "ann", "--count", "1", "--allow-seen", *at)
        assert [item["item_id"] for item in seen["items"]] == ["item-0"]
        assert output("recommend", "ann", "--any-of", "a", "--all-of", "b", "--none-of", "c", *at)["version"] == 1


def test_a_table_is_for_people(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(settings) as running:
        at = ["--server", running.target]
        assert main(["feedback", "ann", "item-0", "purchase", "9.5", *at]) == 0
        assert main(["recommend", "ann", *at]) == 0
        assert main(["status", *at]) == 0
        assert main(["versions", *at]) == 0
        shown = capsys.readouterr().out
    assert "item-10" in shown
    assert "healthy" in shown


def test_a_feedback_that_the_server_refuses_is_an_error(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(settings) as running:
        arguments = ["feedback", "ann", "item-0", "clack", "--server", running.target]
        assert "'clack' is unknown; allowed are impression, click" in error_of(capsys, arguments, 1)


def test_status_succeeds_only_when_serving(settings: Settings, output: Callable[..., Any]) -> None:
    with serve(settings, ready=False) as running:
        assert output("status", "--server", running.target, code=1)["serving"] is False
    with serve(settings) as running:
        found = output("status", "--server", running.target)
        assert (found["serving"], found["version"], found["store_reachable"]) == (True, 1, True)
        assert found["committed_time"] == "2023-11-14T22:13:20Z"


def test_the_server_is_found_through_the_settings_too(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, output: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(settings) as running:
        monkeypatch.setenv("RECSYS_PORT", str(running.server.port))
        # What a server in a container listens on.
        monkeypatch.setenv("RECSYS_HOST", "0.0.0.0")
        assert output("status")["serving"] is True
    assert "UNAVAILABLE" in error_of(capsys, ["status"], 1)


def _import(running: Running, path: Path, *more: str) -> list[str]:
    return ["import", str(path), "--server", running.target, *more]


def test_an_import_leaves_bad_rows_out_and_counts_nothing_twice(
    settings: Settings, tmp_path: Path, output: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    rows = [f"u{n % 7},i{n % 11},{1_700_000_000 + n},{'click' if n % 3 else 'impression'}\n" for n in range(1200)]
    path.write_text(HEADER + "".join(rows) + "u1,,1700009999,click\n" + f"u1,{'i' * 300},1700010000,click\n")
    with serve(settings) as running:
        dry = output(*_import(running, path, "--dry-run"))
        assert (dry["imported"], dry["bad"]) == (1201, 1)
        assert FeedbackLog(running.store, settings).appended() == 0
        found = output(*_import(running, path))
        assert (found["imported"], found["duplicates"], found["refused"], found["bad"]) == (1200, 0, 1, 1)
        assert found["bad_rows"] == [{"line": 1202, "reason": "has no item id"}]
        assert found["refused_rows"][0]["line"] == 1203
        assert "item_id has 300 bytes" in found["refused_rows"][0]["reason"]
        again = output(*_import(running, path))
        assert (again["imported"], again["duplicates"], again["refused"]) == (0, 1200, 1)
        entries = FeedbackLog(running.store, settings).read_after("0-0", 2000)
        logged = [(e.record.user_id, e.record.item_id) for e in entries if e.record]
        assert logged == [tuple(row.split(",")[:2]) for row in rows]
        assert main(_import(running, path)) == 0
        assert "line 1203" in capsys.readouterr().out


def test_an_import_says_that_it_waits_and_for_whom_it_does_not(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEADER + "".join(f"u,i{number},1700000000,click\n" for number in range(20)))
    monkeypatch.setattr(import_command, "FIRST_PATIENCE_SECONDS", 5.0)
    with serve(settings.model_copy(update={"store_timeout_seconds": 0.2})) as running:
        command = _import(running, path, "--json")
        running.store.execute_command("CLIENT", "PAUSE", 8000, "WRITE")
        assert main(command) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["imported"] == 20
        said = captured.err.splitlines()
        assert [line for line in said if line.startswith("trying again")] == ["trying again for 120 seconds"]
        assert FeedbackLog(running.store, settings).appended() == 20
    # Nobody has ever answered there.
    assert main(command) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-2] == "trying again for 5 seconds"
    assert said[-1].startswith("error: UNAVAILABLE")


def test_the_same_name_with_other_content_is_another_file(
    settings: Settings, tmp_path: Path, output: Callable[..., Any]
) -> None:
    with serve(settings) as running:
        for folder in ("a", "b"):
            path = tmp_path / folder / "log.csv"
            path.parent.mkdir()
            path.write_text(f"{HEADER}{folder},i,1700000000,click\n")
            assert output(*_import(running, path))["imported"] == 1


def test_columns_can_be_named_and_values_come_along(
    settings: Settings, tmp_path: Path, output: Callable[..., Any]
) -> None:
    path = tmp_path / "shop.csv"
    path.write_text("who,what,did,price\nann,tea,purchase,3.5\nann,pot,click,\n")
    names = ["--user", "who", "--item", "what", "--class", "did", "--value", "price"]
    with serve(settings) as running:
        assert output(*_import(running, path, *names))["imported"] == 2
        entries = FeedbackLog(running.store, settings).read_after("0-0", 10)
        assert [(e.record.item_id, e.record.HasField("value"), e.record.value) for e in entries if e.record] == [
            ("tea", True, 3.5),
            ("pot", False, 0.0),
        ]


def test_titles_beside_the_file_go_to_the_catalogue_first(
    settings: Settings, tmp_path: Path, output: Callable[..., Any]
) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\nann,item-5,4.0,1700000000\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\nitem-0,Tea (1999),Drama|Comedy\n")
    ratings = settings.model_copy(update={"classes": CLASS_PRESETS["ratings"]})
    with serve(ratings) as running:
        found = output(*_import(running, path))
        assert (found["items"], found["imported"]) == (1, 1)
        first = output("recommend", "bob", "-n", "1", "--server", running.target)["items"][0]
        assert (first["item_id"], first["title"]) == ("item-0", "Tea (1999)")


def test_classes_that_the_server_does_not_know_are_told_before_anything_is_sent(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\nann,item-5,4.0,1700000000\n")
    (tmp_path / "movies.csv").write_text("movieId,title,genres\nitem-0,Tea (1999),Drama|Comedy\n")
    with serve(settings) as running:
        message = error_of(capsys, _import(running, path), 1)
        assert "--classes 'ratings'" in message
        assert "RECSYS_CLASSES='ratings'" in message
        assert running.store.keys("*") == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["import"], ["evaluate", "--data"], ["demo", "--data-dir", str(tmp_path), "--data"]):
        assert "does not exist" in error_of(capsys, [*command, str(tmp_path / "none.csv")], 1)


def test_evaluate_measures_a_file_with_the_files_classes(
    tmp_path: Path, output: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    rows = (f"u{n % 5},i{n % 8},{1_700_000_000 + n},{('view', 'buy')[n % 2]}\n" for n in range(300))
    path.write_text(HEADER + "".join(rows) + "u1,,1700009999,buy\n")
    small = ["--dimension", "8", "--history-length", "5", "--device", "cpu"]
    found = output("evaluate", "--data", str(path), *small)
    assert (found["feedback"], found["events"], found["bad_rows"]) == (300, 300, 1)
    names = ["recsys", "popularity", "popularity_decayed", "item_knn", "cooccurrence", "isgd"]
    assert [method["name"] for method in found["methods"]] == names
    assert output("evaluate", str(path), "--methods", "isgd,recsys", *small)["methods"][0]["name"] == "isgd"
    assert output("evaluate", "--data", str(path), "--events", "100", *small)["feedback"] == 100
    assert main(["evaluate", "--data", str(path), "--events", "100", *small]) == 0
    assert "NDCG@10" in capsys.readouterr().out
