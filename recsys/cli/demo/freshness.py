"""Freshness as a client sees it: how long until an answer is computed from weights that have learned a feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

MEANING = "from sending a feedback to the first answer whose weights have surely learned it, measured by the client"


@dataclass(slots=True)
class Freshness:
    """Measure from what one client alone knows, while it is the only one.

    Of a feedback whose call has returned the client knows that at most all feedback sent until then stands before it in
    the log. So once a version has learned that many, it has learned this one: what is measured is an upper bound, too
    high by the feedback in flight, some hundredths of a second. Times are seconds on one clock that only rises.
    """

    sent: int = 0
    # For each call: feedback sent when it returned, when it was begun, how much feedback it held.
    _calls: list[tuple[int, float, int]] = field(default_factory=list)
    _first_answer: dict[int, float] = field(default_factory=dict)
    _learned: dict[int, int] = field(default_factory=dict)

    def accepted(self, count: int, begun: float) -> None:
        """Note that a call returned; `sent` must include its feedback."""
        self._calls.append((self.sent, begun, count))

    def answered(self, version: int, now: float) -> None:
        """Note an answer."""
        self._first_answer.setdefault(version, now)

    def learned(self, version: int, feedback: int) -> None:
        """Note how much feedback a version has learned since the beginning."""
        self._learned[version] = feedback

    def knows(self, version: int) -> bool:
        """Tell whether it has been noted what a version has learned."""
        return version in self._learned

    def quantiles(self, *shares: float) -> list[float | None]:
        """Return the times within which these shares of the feedback were fresh; None where that is not over yet."""
        versions = sorted(self._first_answer.keys() & self._learned.keys())
        if not versions:
            return [None] * len(shares)
        learned = np.array([self._learned[v] for v in versions])
        # An answer of a later version may arrive first.
        answered = np.minimum.accumulate(np.array([self._first_answer[v] for v in versions])[::-1])[::-1]
        calls = np.array(self._calls, np.float64).reshape(-1, 3)
        place = np.searchsorted(learned, calls[:, 0])
        seconds = np.append(answered, math.inf)[place] - calls[:, 1]
        order = np.argsort(seconds)
        reached = np.cumsum(calls[order, 2])
        found = [seconds[order][np.searchsorted(reached, share * reached[-1])] for share in shares if len(reached)]
        return [float(each) if math.isfinite(each) else None for each in found] or [None] * len(shares)
