"""Client and AsyncClient: the services as plain Python, with deadlines, safe retries and our own errors."""

from recsys.client.aio import AsyncClient
from recsys.client.calls import FeedbackResult, Recommendation, Recommendations, Score, Scores
from recsys.client.channel import CallFailed, TlsOptions
from recsys.client.sync import Client

__all__ = [
    "AsyncClient",
    "CallFailed",
    "Client",
    "FeedbackResult",
    "Recommendation",
    "Recommendations",
    "Score",
    "Scores",
    "TlsOptions",
]
