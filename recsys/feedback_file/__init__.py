"""Feedback files: read CSV or Parquet as one stream in time order; bad rows are told apart, the rest is read."""

from recsys.feedback_file.layout import Columns
from recsys.feedback_file.source import BadRow
from recsys.feedback_file.stream import Chunk, FeedbackFile, open_feedback_file
from recsys.feedback_file.titles import read_items

__all__ = ["BadRow", "Chunk", "Columns", "FeedbackFile", "open_feedback_file", "read_items"]
