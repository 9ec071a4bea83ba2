"""Page: the server's HTTP port: /metrics for Prometheus, a page for people, and the JSON that the page shows."""

from recsys.page.application import Application
from recsys.page.http import HttpServer
from recsys.page.overview import Overview
from recsys.page.questions import Forwarded, InProcess

__all__ = ["Application", "Forwarded", "HttpServer", "InProcess", "Overview"]
