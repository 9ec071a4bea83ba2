"""Feedback files: exact streams of small files, bad rows by line, the real files where they are."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recsys.feedback_file.source
from recsys.errors import InputFileError
from recsys.feedback import Feedback
from recsys.feedback_file import BadRow, Columns, FeedbackFile, open_feedback_file, read_items
from recsys.settings import CLASS_PRESETS


def opened(path: Path, text: str | bytes, columns: Columns | None = None) -> FeedbackFile:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return open_feedback_file(path, columns)


def brief(file: FeedbackFile) -> list[tuple[str, str, str, int] | BadRow]:
    return [r if isinstance(r, BadRow) else (r.user_id, r.item_id, r.feedback_class, r.time_ms) for r in file]


def test_movielens_is_sorted_by_time_with_ties_in_file_order(tmp_path: Path) -> None:
    file = opened(
        tmp_path / "ratings.csv",
        "userId,movieId,rating,timestamp\r\n1,7,4.0,20\r\n1,8,0.5,10\r\n2,7,5.0,20\r\n2,9,3,10",
    )
    assert (file.layout, file.rows, file.classes) == ("movielens", 4, CLASS_PRESETS["ratings"])
    assert list(file) == [
        Feedback("1", "8", "0.5", 10_000, 0.5),
        Feedback("2", "9", "3.0", 10_000, 3.0),
        Feedback("1", "7", "4.0", 20_000, 4.0),
        Feedback("2", "7", "5.0", 20_000, 5.0),
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("ratings.dat", "1::7::4::20\n2::8::5::30\n"), ("u.data", "1\t7\t4\t20\n2\t8\t5\t30\n")]
)
def test_movielens_without_a_header(tmp_path: Path, name: str, text: str) -> None:
    file = opened(tmp_path / name, text)
    assert file.layout == "movielens"
    assert brief(file) == [("1", "7", "4.0", 20_000), ("2", "8", "5.0", 30_000)]
    broken = opened(tmp_path / name, text + text[: text.index("7") + 1])
    assert brief(broken)[-1] == BadRow(3, "has 2 fields where 4 are expected")


def test_movies_have_titles_and_categories(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n7,"Heat, The (2013)",Action|Crime\n8,X,(no genres listed)\n'
    )
    file = opened(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,7,4.0,20\n")
    found = [(item.item_id, item.title, list(item.categories)) for item in file.titles()]
    assert found == [("7", "Heat, The (2013)", ["Action", "Crime"]), ("8", "X", [])]


def test_items_are_read_from_any_file_of_them(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n7,Heat,Action|Crime\n")
    (tmp_path / "shop.csv").write_text("categories,item_id\nshoes|red,a\n,b\nred,\n")
    (tmp_path / "movies.dat").write_text("7::Heat::Action|Crime\n")
    pd.DataFrame({"video_id": [5], "tag": ["39,4"]}).to_parquet(tmp_path / "videos.parquet")
    found = {
        path.name: [(item.item_id, item.title, list(item.categories)) for item in read_items(path)]
        for path in sorted(tmp_path.iterdir())
    }
    assert found == {
        "movies.csv": [("7", "Heat", ["Action", "Crime"])],
        "movies.dat": [("7", "Heat", ["Action", "Crime"])],
        "shop.csv": [("a", "", ["shoes", "red"]), ("b", "", [])],
        "videos.parquet": [("5", "", ["tag:39", "tag:4"])],
    }
    (tmp_path / "other.csv").write_text("sku,label\n1,2\n")
    with pytest.raises(InputFileError, match="has no column 'item_id'"):
        read_items(tmp_path / "other.csv")
    with pytest.raises(InputFileError, match="cannot be read"):
        read_items(tmp_path / "absent.csv")


def test_kuairand_drops_copies_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (1, 5, 10, 1, 1, 500),
        (2, 5, 20, 0, None, 0),
        (1, 5, 20, 1, 1, 1500),
        (2, 5, 20, 0, None, 0),
        (1, 5, 20, 0, 1, 1500),
    ]
    names = ["user_id", "video_id", "time_ms", "is_click", "tab", "play_time_ms"]
    pd.DataFrame(rows, columns=names).to_parquet(tmp_path / "log_standard.parquet")
    pd.DataFrame({"video_id": [5], "author_id": [3], "video_type": ["AD"], "tag": ["39,4"]}).to_parquet(
        tmp_path / "video_features.parquet"
    )
    expected = [
        Feedback("1", "5", "click", 10, 0.5, context={"tab": "1"}),
        Feedback("2", "5", "impression", 20, 0.0),
        Feedback("1", "5", "click", 20, 1.5, context={"tab": "1"}),
        Feedback("1", "5", "impression", 20, 1.5, context={"tab": "1"}),
    ]
    for size in (1, 2, 3, 100):
        monkeypatch.setattr(recsys.feedback_file.source, "ROWS", size)
        file = open_feedback_file(tmp_path / "log_standard.parquet")
        assert (file.layout, file.classes, file.rows) == ("kuairand", CLASS_PRESETS["clicks"], 5)
        assert list(file) == expected
    assert [(i.item_id, i.title, list(i.categories)) for i in file.titles()] == [
        ("5", "", ["author:3", "type:AD", "tag:39", "tag:4"])
    ]


def test_bad_rows_are_named_by_line_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [
        b"user_id,item_id,ts,price,event",
        b"a,x,1,,buy",
        b",x,2,1,buy",
        b"a, ,2,1,buy",
        b"a,x,soon,1,buy",
        b"a,x",
        b"",
        b"a,x,2,nan,buy",
        b"\xff,x,2,1,buy",
        b"\xff\xfe,x,2",
        b"a,x,3,-inf,buy",
        b"a,x,,2,buy",
        b"a,x,3,2,",
        b"a,x,-3,2,buy",
        "é,x,4,2.5,see".encode(),
    ]
    columns = Columns("user_id", "item_id", "ts", "event", "price")
    file = opened(tmp_path / "f.csv", b"\n".join(lines), columns)
    assert list(file) == [
        Feedback("a", "x", "buy", 1000),
        BadRow(3, "has no user id"),
        BadRow(4, "has no item id"),
        BadRow(5, "time 'soon' is not a time from 1970 to 9999"),
        BadRow(6, "has 2 fields where 5 are expected"),
        BadRow(8, "value 'nan' is not a finite number"),
        BadRow(9, "user id '\\x1a' is not UTF-8"),
        BadRow(10, "has 3 fields where 5 are expected"),
        BadRow(11, "value '-inf' is not a finite number"),
        BadRow(12, "time '' is not a time from 1970 to 9999"),
        BadRow(13, "class '' is unknown"),
        BadRow(14, "time '-3' is not a time from 1970 to 9999"),
        Feedback("é", "x", "see", 4000, 2.5),
    ]


def test_a_file_that_must_be_sorted_gives_its_bad_rows_first(tmp_path: Path) -> None:
    file = opened(tmp_path / "f.tsv", "user\titem\ttime\na\tx\t9\n\tx\t1\nb\ty\t3\nc\n")
    assert brief(file) == [
        BadRow(3, "has no user id"),
        BadRow(5, "has 1 fields where 3 are expected"),
        ("b", "y", "click", 3000),
        ("a", "x", "click", 9000),
    ]


@pytest.mark.parametrize(
    ("time", "time_ms"),
    [
        ("1262304000", 1_262_304_000_000),
        ("1262304000.25", 1_262_304_000_250),
        ("1262304000123", 1_262_304_000_123),
        ("1262304000123456", 1_262_304_000_123),
        ("2010-01-01", 1_262_304_000_000),
        ("2010-01-01T00:00:00.5Z", 1_262_304_000_500),
        ("2010-01-01 01:00:00+01:00", 1_262_304_000_000),
        ("2010-01-01 00:00:00 UTC", 1_262_304_000_000),
    ],
)
def test_units_of_time_are_told_apart(tmp_path: Path, time: str, time_ms: int) -> None:
    text = f"userId,itemId,time\na,x,\na,x,{time}\na,x,{time}\n"
    assert brief(opened(tmp_path / "f.csv", text))[1:] == [("a", "x", "click", time_ms)] * 2


def test_ids_stay_as_they_are_also_where_blanks_made_floats(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"user": [1.0, None, 2.0], "item": [7.0, 8.0, 9.5], "when": pd.to_datetime(["2010-01-01"] * 3)}
    )
    frame.to_parquet(tmp_path / "f.parquet")
    file = open_feedback_file(tmp_path / "f.parquet", Columns("user", "item", "when"))
    day = 1_262_304_000_000
    assert brief(file) == [("1", "7", "click", day), BadRow(2, "has no user id"), ("2", "9.5", "click", day)]
    assert brief(opened(tmp_path / "f.csv", "user,item\n007,1e5\n")) == [("007", "1e5", "click", 0)]


def test_classes_come_from_labels(tmp_path: Path) -> None:
    file = opened(tmp_path / "f.csv", 'visitorid,event,itemid\n"a ""b""",view,x\nc,impression,"y,\nz"\n')
    assert [(c.name, c.positive, c.history, c.worth) for c in file.classes] == [
        ("impression", False, False, 0.0),
        ("view", True, True, 1.0),
    ]
    assert brief(file) == [('a "b"', "x", "view", 0), ("c", "y,\nz", "impression", 0)]


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([1, 5, 2], {"1": 1.0, "2": 2.0, "5": 5.0}),
        ([-1, 1, 0], {"-1": 1.0, "0": 2.0, "1": 3.0}),
        ([3], {"3": 1.0}),
        ([1_000_001, 1_000_002], {"1000001.0": 1.0, "1000002.0": 2.0}),
        (range(101), {str(10 * i): 10.0 * (i + 1) for i in range(10)}),
    ],
)
def test_classes_come_from_values(tmp_path: Path, values: list[int], classes: dict[str, float]) -> None:
    file = opened(tmp_path / "f.csv", "user,item,score\n" + "".join(f"u,{v},{v}\n" for v in values))
    assert {c.name: c.worth for c in file.classes} == classes
    assert all(c.positive and c.history for c in file.classes)
    lowest = [float(c.name) for c in file.classes]
    for feedback in file:
        assert isinstance(feedback, Feedback)
        assert float(feedback.feedback_class) == max(low for low in lowest if low <= float(feedback.item_id))


def test_movielens_ratings_off_the_scale_are_bad(tmp_path: Path) -> None:
    file = opened(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,0,5\n1,3,4.2,5\n1,4,x,5\n")
    assert [row.line for row in file if isinstance(row, BadRow)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.csv", None, "does not exist"),
        ("f.csv", "", "no rows"),
        ("f.csv", "user,item\n", "no rows"),
        ("f.txt", "user,item\na,b\n", "unknown suffix"),
        ("f.parquet", "user", "cannot be read"),
        ("f.dat", "a::b\n", "separated by '::'"),
        ("f.csv", "who,what\na,b\n", "it has who, what: name them with --user and --item"),
        ("f.csv", "user,user,item\na,b,c\n", "same name: user"),
        ("f.csv", "user,item,score\na,b,\n", "holds no number"),
        ("f.csv", "user,item,event\na,b,impression\n", "no class but impression"),
        ("f.csv", f"user,item,event\na,b,{'x' * 65}\n", "cannot be a class"),
        ("f.csv", "user,item,event\n" + "".join(f"a,b,{i}\n" for i in range(101)), "over 100 classes"),
    ],
)
def test_files_are_refused_with_a_reason(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputFileError, match=message) as refusal:
        open_feedback_file(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_directories_and_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="directory"):
        open_feedback_file(tmp_path)
    with pytest.raises(InputFileError, match="has no column when; it has user, item"):
        opened(tmp_path / "f.csv", "user,item\na,b\n", Columns("user", "item", "when"))


FIELD = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters='",'), max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(FIELD, FIELD, st.integers(0, 50)), min_size=1, max_size=30), blocks=st.booleans())
def test_every_line_is_read_or_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str, int]], blocks: bool
) -> None:
    monkeypatch.setattr(recsys.feedback_file.source, "BLOCK_BYTES", 64 if blocks else 1 << 20)
    # Every third line is malformed.
    lines = [f"{u},{i},{t}" if n % 3 else f"{u},{i}" for n, (u, i, t) in enumerate(rows, 2)]
    file = opened(tmp_path / "f.csv", "user,item,ts\n" + "".join(line + "\n" for line in lines))
    expected, bad = [], []
    for line, (u, i, t) in enumerate(rows, 2):
        if line % 3 == 0 or not u.strip() or not i.strip():
            bad.append(line)
        else:
            expected.append((t, u, i))
    expected.sort(key=lambda row: row[0])
    found = list(file)
    assert [(f.time_ms // 1000, f.user_id, f.item_id) for f in found if isinstance(f, Feedback)] == expected
    assert [row.line for row in found if isinstance(row, BadRow)] == bad
    assert sum(map(len, file.chunks())) == len(expected)


def test_movielens_as_published(shared_data: Path) -> None:
    file = open_feedback_file(shared_data / "ml-latest-small" / "ratings.csv")
    rows = list(file)
    assert len(rows) == file.rows == 100_836
    feedback = [row for row in rows if isinstance(row, Feedback)]
    assert len(feedback) == len(rows)
    assert all(a.time_ms <= b.time_ms for a, b in pairwise(feedback))
    assert feedback[0] == Feedback("429", "22", "4.0", 828_124_615_000, 4.0)
    assert {row.feedback_class for row in feedback} == {c.name for c in file.classes}
    assert len(file.titles()) == 9742


def test_kuairand_as_published(shared_data: Path) -> None:
    file = open_feedback_file(shared_data / "kuairand-pure" / "log_standard.parquet")
    classes = Counter(row.feedback_class if isinstance(row, Feedback) else "bad" for row in file)
    assert (file.rows, dict(classes)) == (228_329, {"click": 100_013, "impression": 122_439})
    assert len(file.titles()) == 7583
