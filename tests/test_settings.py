"""Settings: where they come from, what is refused and how it is said, and the table of all of them in README.md.

Run as a program it prints that table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from recsys.errors import SettingsError
from recsys.settings import CLASS_PRESETS, LEARNING_SETTINGS, FeedbackClass, Settings, load

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- settings -->", "<!-- /settings -->"
CLICK = {"name": "click", "positive": True, "history": True, "worth": 1.0}


def settings_table() -> str:
    """Write every setting with its default and description as a Markdown table."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = (
            "shop" if name == "classes" else str(field.default).lower() if field.annotation is bool else field.default
        )
        shown = f"`{default}`" if default != "" else ""
        lines.append(f"| `{name}` | {shown} | {field.description} |")
    return "\n".join(lines)


def _file(folder: Path, text: str) -> Path:
    path = folder / "recsys.toml"
    path.write_text(text, encoding="utf-8")
    return path


# Where settings come from


def test_flags_go_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = _file(tmp_path, "port = 1\nseed = 1\nheads = 1\n")
    environment = {"RECSYS_PORT": "2", "RECSYS_SEED": "2", "OTHER": "x"}
    found = load({"port": 3, "heads": None}, file=file, environment=environment)
    assert (found.port, found.seed, found.heads, found.blocks) == (3, 2, 1, 1)


def test_without_anything_the_defaults_hold() -> None:
    assert load(environment={}) == Settings()
    assert load({}, environment={"PATH": "x", "RECSYSTEM": "y", "RECSYS_TEST_CUDA": "1"}) == Settings()
    assert Settings().classes == CLASS_PRESETS["shop"]


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = _file(tmp_path, "seed = 5\n")
    assert load(environment={"RECSYS_CONFIG": str(file)}).seed == 5
    other = tmp_path / "other.toml"
    other.write_text("seed = 6\n")
    assert load(file=other, environment={"RECSYS_CONFIG": str(file)}).seed == 6
    assert load(environment={"RECSYS_CONFIG": ""}).seed == 1


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_SEED", "77")
    assert load().seed == 77


def test_text_from_the_environment_becomes_what_it_means() -> None:
    environment = {
        "RECSYS_REFLECTION": "false",
        "RECSYS_DROPOUT": "0.25",
        "RECSYS_DATA_DIR": "/x",
        "RECSYS_DEVICE": "cpu",
    }
    found = load(environment=environment)
    assert (found.reflection, found.dropout, found.data_dir, found.device) == (False, 0.25, Path("/x"), "cpu")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 2  # type: ignore[misc]


# What is refused


@pytest.mark.parametrize("source", ["file", "environment", "flag"])
def test_an_unknown_setting_is_refused_and_named(tmp_path: Path, source: str) -> None:
    file = _file(tmp_path, "sede = 1\n" if source == "file" else "")
    environment = {"RECSYS_SEDE": "1"} if source == "environment" else {}
    with pytest.raises(SettingsError, match=rf"^unknown setting 'sede' \(from {source}.*\)") as caught:
        load({"sede": 1} if source == "flag" else None, file=file, environment=environment)
    assert caught.value.reason == "INVALID_SETTINGS"
    if source == "file":
        assert str(file) in str(caught.value)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load({"port": -1}, file=_file(tmp_path, "sede = 1\n"), environment={"RECSYS_DROPOUT": "much"})
    text = str(caught.value)
    for part in ("'sede'", "port (from flag)", "got -1", "dropout (from environment)", "got 'much'"):
        assert part in text


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [
        *[("port", 0, 65535), ("dimension", 4, 1024), ("history_length", 1, 1000), ("blocks", 1, 16)],
        *[
            ("successors", 1, 1024),
            ("context_buckets", 1, 1 << 20),
            ("batch_size", 1, 65_536),
            ("negatives", 1, 65_536),
        ],
        *[("replay_size", 0, 4096), ("seed", 0, (1 << 31) - 1), ("max_context", 0, 1000), ("torch_threads", 1, 256)],
        *[("max_id_bytes", 1, 4096), ("snapshots_retained", 1, 100), ("max_score_batch", 1, 4096)],
    ],
)
def test_ranges(name: str, lowest: int, highest: int) -> None:
    for value in (lowest, highest):
        assert getattr(load({name: value}, environment={}), name) == value
    for value in (lowest - 1, highest + 1):
        with pytest.raises(SettingsError, match=rf"^{name} \(from flag\): .*, got {value}$"):
            load({name: value}, environment={})


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"learning_rate": 0}, "greater than 0"),
        ({"dropout": 1}, "less than 1"),
        ({"gradient_clip": 0}, "greater than 0"),
        ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
        ({"key_prefix": "a b"}, "key_prefix"),
        ({"key_prefix": "{a}"}, "key_prefix"),
        ({"heads": 5}, "5 does not divide dimension 64"),
        ({"history_length": 51, "history_limit": 50}, "51 is above history_limit 50"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        load(values, environment={})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml does not exist"):
        load(file=tmp_path / "absent.toml", environment={})
    with pytest.raises(SettingsError, match=r"recsys\.toml cannot be read"):
        load(file=_file(tmp_path, "seed = \n"), environment={})
    broken = tmp_path / "latin.toml"
    broken.write_bytes(b'host = "\xe4"')
    with pytest.raises(SettingsError, match=r"latin\.toml cannot be read"):
        load(file=broken, environment={})


# Classes


def test_presets() -> None:
    assert {
        name: [(c.name, c.positive, c.history, c.worth) for c in preset] for name, preset in CLASS_PRESETS.items()
    } == {
        "shop": [
            ("impression", False, False, 0.0),
            *[("click", True, True, 1.0), ("like", True, True, 2.0), ("purchase", True, True, 5.0)],
        ],
        "clicks": [("impression", False, False, 0.0), ("click", True, True, 1.0)],
        "ratings": [(f"{n / 2:.1f}", True, True, n / 2) for n in range(1, 11)],
    }
    for name, preset in CLASS_PRESETS.items():
        assert load({"classes": name}, environment={}).classes == preset
        assert load(environment={"RECSYS_CLASSES": name}).classes == preset


def test_classes_as_json_and_as_toml(tmp_path: Path) -> None:
    expected = (FeedbackClass(**CLICK), FeedbackClass(name="seen", positive=False, history=True, worth=0))
    text = json.dumps([c.model_dump() for c in expected])
    assert load(environment={"RECSYS_CLASSES": text}).classes == expected
    assert load({"classes": expected}, environment={}).classes == expected
    toml = "".join(
        f'[[classes]]\nname = "{c.name}"\npositive = {str(c.positive).lower()}\nhistory = true\nworth = {c.worth}\n'
        for c in expected
    )
    found = load(file=_file(tmp_path, toml), environment={})
    assert found.classes == expected
    assert found.class_index == {"click": 0, "seen": 1}


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ("books", r"neither a preset \(shop, clicks, ratings\) nor JSON: 'books'"),
        ("[]", "at least 1 item"),
        (json.dumps([CLICK, CLICK]), "names repeat"),
        (json.dumps([{**CLICK, "positive": False}]), "at least one must be positive"),
        (json.dumps([{**CLICK, "colour": "red"}]), r"classes\.0\.colour"),
        (json.dumps([{**CLICK, "worth": -1}]), r"classes\.0\.worth"),
        ('[{"name": "c", "positive": true, "history": true, "worth": NaN}]', r"classes\.0\.worth"),
        (json.dumps([{**CLICK, "name": ""}]), r"classes\.0\.name"),
        (json.dumps([{"name": "click"}]), r"classes\.0\.positive"),
        (json.dumps([{**CLICK, "name": f"c{n}"} for n in range(101)]), "at most 100 items"),
    ],
)
def test_classes_that_cannot_be_are_refused(classes: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        load({"classes": classes}, environment={})


def test_a_hundred_classes_are_allowed() -> None:
    classes = [{**CLICK, "name": f"c{n}"} for n in range(100)]
    assert len(load({"classes": classes}, environment={}).classes) == 100


# What learning depends on


def _other(name: str) -> Any:
    """Give a value of the same kind that is not the default."""
    field = Settings.model_fields[name]
    default = field.default
    if name == "classes":
        return CLASS_PRESETS["ratings"]
    if get_origin(field.annotation) is Literal:
        return next(value for value in get_args(field.annotation) if value != default)
    return (
        not default
        if isinstance(default, bool)
        else Path("other")
        if isinstance(default, Path)
        else default * 2 or (type(default)(1) if isinstance(default, int | float) else "x")
    )


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_digest_changes_with_what_learning_depends_on_alone(name: str) -> None:
    other = Settings().model_copy(update={name: _other(name)})
    assert getattr(other, name) != getattr(Settings(), name)
    assert (other.learning_digest() != Settings().learning_digest()) == (name in LEARNING_SETTINGS)


def test_learning_settings() -> None:
    assert set(Settings.model_fields) > LEARNING_SETTINGS
    # Where a process listens, what it keeps and how it serves is not for learning to know.
    for name in ("redis_url", "port", "publish_seconds", "queue_limit", "log_max_bytes", "device"):
        assert name not in LEARNING_SETTINGS


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.floats(0, 10), st.booleans())
def test_the_digest_knows_every_part_of_a_class(worth: float, history: bool) -> None:
    changed = load({"classes": [{**CLICK, "worth": worth, "history": history}]}, environment={})
    same = (worth, history) == (1.0, True)
    assert (changed.learning_digest() == load({"classes": [CLICK]}, environment={}).learning_digest()) == same


def test_the_digest_is_the_same_wherever_a_setting_comes_from(tmp_path: Path) -> None:
    by_flag = load({"dropout": 0.2, "seed": 4}, environment={}).learning_digest()
    assert load(environment={"RECSYS_DROPOUT": "0.20", "RECSYS_SEED": "4"}).learning_digest() == by_flag
    assert load(file=_file(tmp_path, "seed = 4\ndropout = 0.2"), environment={}).learning_digest() == by_flag
    assert re.fullmatch("[0-9a-f]{32}", by_flag)


# What people read


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert not field.description.endswith("."), name
        assert "|" not in field.description, f"{name}: would break the table"
        assert not field.is_required(), f"{name}: has no default"
    assert all(field.description for name, field in FeedbackClass.model_fields.items() if name != "name")


def test_the_table_in_readme_is_complete() -> None:
    if not README.exists():
        pytest.skip("there is no README.md yet")
    _, _, rest = README.read_text(encoding="utf-8").partition(f"{START}\n")
    table, end, _ = rest.partition(END)
    assert end, f"README.md lacks {START} and {END}"
    assert table.strip() == settings_table(), "print it anew: python tests/test_settings.py"


if __name__ == "__main__":
    print(settings_table())
