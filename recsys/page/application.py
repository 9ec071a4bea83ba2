"""Application: what each address of the HTTP port answers, and to whom; documented in docs/page.md.

The page is one file with nothing in it from elsewhere, and a policy that lets a browser run nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from prometheus_client import make_wsgi_app
from prometheus_client.registry import Collector

from recsys.errors import PermissionDenied, Unauthenticated
from recsys.page.http import App
from recsys.page.overview import MAX_VERSIONS, Overview
from recsys.page.questions import EXPLAIN, RECOMMEND, Body, Questions, Refused, Reply
from recsys.service.auth import Guard
from recsys.settings import Settings, is_loopback

OVERVIEW, VERSIONS = "/api/overview", "/api/versions"
# Who may ask for what the server is and how it does may see it here too.
STATUS_METHOD = "/recsys.v1.ModelService/GetStatus"
MAX_BODY_BYTES = 4096
MAX_COUNT, DEFAULT_COUNT = 50, 10
DEFAULT_VERSIONS = 50

REASONS = {
    **{200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"},
    **{405: "Method Not Allowed", 413: "Content Too Large", 415: "Unsupported Media Type"},
    **{421: "Misdirected Request", 429: "Too Many Requests", 500: "Internal Server Error"},
    **{503: "Service Unavailable", 504: "Gateway Timeout"},
}
SAFE = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)

_log = logging.getLogger(__name__)

Environ = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]


class Application:
    """Answer HTTP requests; a WSGI application that may be called from any thread."""

    def __init__(
        self, settings: Settings, metrics: Collector, overview: Overview, questions: Questions, guard: Guard
    ) -> None:
        """Prepare; `metrics` is what /metrics shows, `questions` ask the guard themselves."""
        self._settings = settings
        self._metrics: App = make_wsgi_app(metrics)
        self._overview, self._questions = overview, questions
        self._guard = guard
        self._local = is_loopback(settings.host)
        page = files("recsys.page").joinpath("page.html").read_text(encoding="utf-8")
        self._page, self._policy = page.encode(), policy(page)

    def __call__(self, environ: Environ, start_response: Start) -> Iterable[bytes]:
        """Answer one request; nothing escapes, so that a peer never sees our insides."""
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        try:
            if path == "/" and method in ("GET", "HEAD"):
                self._check_host(environ)
                headers = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", self._policy)]
                return _send(start_response, 200, headers, b"" if method == "HEAD" else self._page)
            reply = self._api(path, method, environ)
        except Refused as refused:
            reply = refused.reply
        except Exception:
            _log.exception("could not answer %s", path)
            reply = Refused(500, "internal error; the server's log has the details").reply
        headers = [("Content-Type", "application/json")]
        if reply.status == 401:
            headers.append(("WWW-Authenticate", "Bearer"))
        return _send(start_response, reply.status, headers, json.dumps(_finite(reply.body)).encode())

    def close(self) -> None:
        """Stop looking."""
        self._overview.close()

    def _api(self, path: str, method: str, environ: Environ) -> Reply:
        wanted = {OVERVIEW: "GET", VERSIONS: "GET", RECOMMEND: "POST", EXPLAIN: "POST"}.get(path)
        if wanted is None:
            raise Refused(404, f"there is nothing here; the page is at /, its data at {OVERVIEW}, metrics at /metrics")
        if method != wanted:
            raise Refused(405, f"{path} takes {wanted}")
        self._check_host(environ)
        self._check_peer(environ)
        authorization = environ.get("HTTP_AUTHORIZATION")
        if wanted == "POST":
            # The services ask for the role themselves, each for its own.
            return self._questions.ask(path, _question(path, environ), authorization)
        self._check_token(authorization)
        if path == VERSIONS:
            limit = _limit(environ.get("QUERY_STRING", ""))
            return Reply(200, {"versions": [asdict(version) for version in self._overview.versions(limit)]})
        return Reply(200, asdict(self._overview.seen()))

    def _check_host(self, environ: Environ) -> None:
        """Refuse what another site's page asks for, also by a name of its own that points here (DNS rebinding).

        Raises:
            Refused: when the request does not come from this page or from no page at all.
        """
        host = environ.get("HTTP_HOST", "")
        if self._local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise Refused(421, "this server answers to localhost, 127.0.0.1 and [::1] only")
        origin = environ.get("HTTP_ORIGIN")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("none", "same-origin"):
            # A link from elsewhere to the page itself is nobody's harm.
            if environ["PATH_INFO"] == "/" and environ.get("HTTP_SEC_FETCH_MODE") == "navigate":
                return
            raise Refused(403, "other sites' pages may not ask here")

    def _check_peer(self, environ: Environ) -> None:
        """Refuse tokens that came over a network in the clear, so that nobody makes a habit of it."""
        settings = self._settings
        if settings.tokens_file and not settings.insecure and not is_loopback(environ.get("REMOTE_ADDR", "")):
            raise Refused(
                403,
                "tokens would cross the network unencrypted: come by way of this machine, such as with "
                f"ssh -L {settings.metrics_port}:127.0.0.1:{settings.metrics_port}, or set insecure = true where the "
                "network is guarded otherwise",
            )

    def _check_token(self, authorization: str | None) -> None:
        try:
            self._guard.check(STATUS_METHOD, [("authorization", authorization)] if authorization else [])
        except Unauthenticated as error:
            raise Refused(401, str(error)) from None
        except PermissionDenied as error:
            raise Refused(403, str(error)) from None


def policy(page: str) -> str:
    """Write the Content-Security-Policy that lets the page's own script and style run, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _question(path: str, environ: Environ) -> Body:
    """Read a question's body: an object with known fields of the right types.

    Raises:
        Refused: saying what is wrong.
    """
    if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send application/json")
    length = environ.get("CONTENT_LENGTH") or ""
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise Refused(413, f"say how long the body is, at most {MAX_BODY_BYTES} bytes")
    try:
        given = json.loads(environ["wsgi.input"].read(int(length)))
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    texts = ("user_id",) if path == RECOMMEND else ("user_id", "item_id")
    if not isinstance(given, dict) or not {*given} <= {*texts, "count"} or not {*texts} <= {*given}:
        raise Refused(400, f"the body is an object with {' and '.join(texts)}, and count for recommendations")
    if not all(isinstance(given[name], str) and _is_text(given[name]) for name in texts):
        raise Refused(400, f"{' and '.join(texts)} are texts")
    count = given.get("count", DEFAULT_COUNT)
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise Refused(400, f"count is a whole number from 1 to {MAX_COUNT}")
    return {name: given[name] for name in texts} | ({"count": count} if path == RECOMMEND else {})


def _is_text(value: str) -> bool:
    """Tell whether a string is Unicode that can be sent: JSON can name halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _limit(query: str) -> int:
    given = parse_qs(query).get("limit", [str(DEFAULT_VERSIONS)])[-1]
    if not re.fullmatch("[0-9]{1,4}", given) or not 1 <= int(given) <= MAX_VERSIONS:
        raise Refused(400, f"limit is a whole number from 1 to {MAX_VERSIONS}")
    return int(given)


def _finite(value: Any) -> Any:
    """Put null in place of numbers that JSON cannot write."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _send(start_response: Start, status: int, headers: list[tuple[str, str]], body: bytes) -> Iterable[bytes]:
    start_response(f"{status} {REASONS.get(status, 'Error')}", [*headers, *SAFE, ("Content-Length", str(len(body)))])
    return [body]
