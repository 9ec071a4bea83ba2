"""Titles: read items from a file, such as MovieLens and KuaiRand publish beside the feedback."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet

from recsys.errors import InputFileError
from recsys.feedback_file.column import as_texts
from recsys.feedback_file.layout import LayoutName
from recsys.feedback_file.source import decoded
from recsys.v1.catalog_pb2 import Item


def read_titles(path: Path, layout: LayoutName) -> list[Item]:
    """Read the items beside the feedback in `path`; [] where there is no such file.

    KuaiRand's videos have no titles; their categories are like "author:7", "type:NORMAL" and "tag:39".

    Raises:
        InputFileError: when the file is there and cannot be read.
    """
    readers = {"movielens": {"movies.csv": _movies, "movies.dat": _old_movies}, "kuairand": {VIDEOS: _videos}}
    for name, reader in readers.get(layout, {}).items():
        companion = path.with_name(name)
        if companion.is_file():
            try:
                return [item for item in reader(companion) if item.item_id]
            except (OSError, ValueError, KeyError, csv.Error) as error:
                raise InputFileError(f"{companion} cannot be read: {error}") from None
    return []


def read_items(path: Path) -> list[Item]:
    """Read items from MovieLens' or KuaiRand's file of them, or a .csv with item_id, categories and perhaps title.

    Categories are separated by "|".

    Raises:
        InputFileError: when there is no such file, or it cannot be read.
    """
    reader = {".parquet": _videos, ".dat": _old_movies}.get(path.suffix, _movies)
    try:
        return [item for item in reader(path) if item.item_id]
    except KeyError as error:
        raise InputFileError(f"{path} has no column {error}; items have item_id and categories") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputFileError(f"{path} cannot be read: {error}") from None


VIDEOS = "video_features.parquet"


def _movies(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = csv.DictReader(stream)
        movies = "movieId" in (rows.fieldnames or ())
        item_id, categories = ("movieId", "genres") if movies else ("item_id", "categories")
        for row in rows:
            yield _movie(row[item_id], row.get("title") or "", row[categories] or "")


def _old_movies(path: Path) -> Iterator[Item]:
    with path.open(encoding="latin-1") as stream:
        for line in stream:
            item_id, title, genres = [*line.rstrip("\n").split("::"), "", ""][:3]
            yield _movie(item_id, title, genres)


def _movie(item_id: str, title: str, genres: str) -> Item:
    known = [genre for genre in genres.split("|") if genre and genre != "(no genres listed)"]
    return Item(item_id=item_id, title=title, categories=known)


def _videos(path: Path) -> Iterator[Item]:
    # pyarrow's errors are ValueError and OSError.
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = {"author_id": "author", "video_type": "type", "tag": "tag"}
        columns = [name for name in wanted if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=["video_id", *columns]):
            values = [as_texts(decoded(batch[name])).fill_null("").to_pylist() for name in ("video_id", *columns)]
            for item_id, *features in zip(*values, strict=True):
                # A video has several tags, separated by commas.
                parts = zip(columns, features, strict=True)
                categories = [f"{wanted[n]}:{part}" for n, text in parts for part in text.split(",") if part]
                yield Item(item_id=item_id, categories=categories)
