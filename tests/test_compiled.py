"""Compiled code is kept on disk, and never that of other sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from numba.core import caching

from recsys import compiled as module
from recsys.compiled import compiled


def test_code_is_compiled_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled(lambda x: x + 1)(41) == 42
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_what_is_kept_is_of_these_sources() -> None:
    kept = compiled(lambda x: x + 1)._cache._cache_file
    assert module._sources(Path(module.__file__).parents[1]) in kept._source_stamp


def test_what_was_compiled_for_types_that_are_gone_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> None:
        raise ModuleNotFoundError("No module named 'recsys.gone'")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_load_index", gone)
    assert compiled(lambda x: x + 1)(41) == 42


@pytest.mark.parametrize(
    ("changed", "counts"),
    [
        ("recsys/loops.py", True),
        ("recsys/constants.py", True),
        ("trainer/deep/__init__.py", True),
        ("recsys/cli.py", False),
    ],
)
def test_sources_are_files_with_loops_and_all_they_take(tmp_path: Path, changed: str, counts: bool) -> None:
    sources = {
        "recsys/loops.py": "from recsys.compiled import compiled\nfrom recsys.constants import FLOOR\n",
        "recsys/constants.py": "from trainer.deep import FLOOR\n",
        "trainer/deep/__init__.py": "FLOOR = 1\n",
        "recsys/cli.py": "from recsys.loops import run\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    before = module._sources(tmp_path)
    module._sources.cache_clear()
    (tmp_path / changed).write_text(sources[changed] + "OTHER = 2\n", "utf-8")
    assert (module._sources(tmp_path) != before) == counts
