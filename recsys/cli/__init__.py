"""The command line: one command to run everything, and one for each thing that a client or an operator does."""

from recsys.cli.app import main

__all__ = ["main"]
