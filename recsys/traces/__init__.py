"""Traces: spans from a request to the version that learned from it, by OpenTelemetry; off, they cost next to nothing.

A call is a span, its append to the log another below it; a version links to the appends that it learned. No id of a
user or item is in a span, nor the message of an error, which may hold one.
"""

from recsys.traces.tracing import Sources, begin, call, learned, span, start, stop, within

__all__ = ["Sources", "begin", "call", "learned", "span", "start", "stop", "within"]
