"""The HTTP port: the page in a real browser, the JSON behind it, and whom both are kept from."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import Browser, browse, needs_chromium
from learning import append, make_feedback, small, tick, trainer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from serving import Loop, Running, commit_versions, serve
from stores import OwnStore

from recsys.condition import Facts, Finding, Verdict, judge
from recsys.page import Forwarded
from recsys.page import http as http_server
from recsys.page.application import policy
from recsys.page.http import HttpServer
from recsys.page.overview import HistoryPoint, Learning, Seen, Store
from recsys.page.store_look import Case, Held, Version
from recsys.page.traffic import Now, Point, Traffic, quantile
from recsys.server import Server, assemble
from recsys.service.auth import digest_of
from recsys.settings import Settings, load
from recsys.v1 import catalog_pb2
from recsys.v1.catalog_pb2_grpc import CatalogServiceStub
from recsys.weights import Lineage, ObjectionRecord, WeightStore

SECONDS = 30
DOCS = Path(__file__).resolve().parents[1] / "docs" / "page.md"
HOSTILE = '<img src=x onerror="document.title=1">'
JSON = {"Content-Type": "application/json"}
TOKENS = {"reader": ["recommend"], "writer": ["feedback"], "boss": ["admin"]}


def ask(
    port: int, path: str, body: Any = None, *, method: str | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Make one HTTP request; underscores in header names are hyphens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = (JSON if data is not None else {}) | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if data is None else "POST"), path, data, given)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def said(running: Running, path: str, body: Any = None, **headers: str) -> Any:
    status, _, data = ask(running.server.metrics_port, path, body, **headers)
    assert status == 200, data
    return json.loads(data)


def refused(port: int, path: str, body: Any = None, **given: Any) -> tuple[int, str]:
    status, headers, data = ask(port, path, body, **given)
    assert headers["Content-Type"] == "application/json"
    error = json.loads(data)["error"]
    assert error["status"] == status
    return status, error["message"]


def looked(running: Running, **headers: str) -> Any:
    """Ask for the overview until something was looked at."""
    deadline = time.monotonic() + SECONDS
    while (seen := said(running, "/api/overview", **headers))["loading"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return seen


@contextmanager
def with_tokens(settings: Settings, folder: Path, **changes: Any) -> Iterator[Running]:
    path = folder / "tokens.toml"
    path.write_text(
        "".join(
            f'[[token]]\nname = "{name}"\nsha256 = "{digest_of(name)}"\nroles = {json.dumps(roles)}\n'
            for name, roles in TOKENS.items()
        )
    )
    with serve(settings.model_copy(update={"tokens_file": str(path), **changes})) as running:
        yield running


# --- What anyone gets


def test_the_page_lets_a_browser_run_nothing_else(settings: Settings) -> None:
    with serve(settings) as running:
        status, headers, data = ask(running.server.metrics_port, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert headers["Cache-Control"] == "no-store"
        found = headers["Content-Security-Policy"]
        assert found == policy(data.decode())
        assert "default-src 'none'" in found
        assert "unsafe" not in found
        assert len(re.findall("sha256-", found)) == 2
        assert not re.search(r'\s(on\w+|style)="', data.decode()), "the policy would not let these run"
        assert not re.search(r"(src|href)=\"(https?:)?//", data.decode())
        assert "innerHTML" not in data.decode()
        assert ask(running.server.metrics_port, "/", method="HEAD")[2] == b""


def test_metrics_stand_beside_it(settings: Settings) -> None:
    with serve(settings) as running:
        status, _, data = ask(running.server.metrics_port, "/metrics")
        assert (status, b"recsys_served_version" in data) == (200, True)


def test_the_overview_says_what_stands(settings: Settings) -> None:
    with serve(settings) as running:
        commit_versions(running, 3)
        seen = looked(running)
        assert set(seen) == {field.name for field in fields(Seen)}
        assert seen["learning"]["newest_version"] == 3
        assert seen["learning"]["feedback_learned"] == 6
        assert [point["version"] for point in seen["history"]] == [1, 2, 3]
        assert seen["metrics"] == {"hr": 0.5}
        assert seen["store"]["reachable"] is True
        assert seen["condition"]["good"]["level"] == "unknown"
        found = said(running, "/api/versions?limit=2")["versions"]
        assert [version["version"] for version in found] == [3, 2]
        assert {version["verdict"] for version in found} == {"learned"}


def test_the_traffic_of_a_real_server_is_seen(settings: Settings) -> None:
    with serve(settings) as running:
        looked(running)
        said(running, "/api/recommendations", {"user_id": "u"})
        deadline = time.monotonic() + SECONDS
        while not (found := looked(running)["serving"])["recommend_per_second"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert found["recommend_p99_seconds"] > 0
        assert found["calls_per_second"] >= found["recommend_per_second"]
        assert found["failed_ratio"] == 0


def test_recommendations_come_with_titles_and_reasons(settings: Settings) -> None:
    with serve(settings) as running:
        item = catalog_pb2.Item(item_id="item-1", title="One")
        CatalogServiceStub(running.channel).UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=SECONDS)
        found = said(running, "/api/recommendations", {"user_id": "u", "count": 3})
        assert [each["item_id"] for each in found["items"]] == ["item-0", "item-1", "item-2"]
        assert [each["title"] for each in found["items"]] == ["", "One", ""]
        assert found["items"][0]["source"] == "trending"
        assert found["items"][0]["reason"] == "chosen by many at present"
        assert found["version"] == 1
        assert len(said(running, "/api/recommendations", {"user_id": "u"})["items"]) == 10


# --- What nobody gets


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/none", None, {}, 404),
        ("/api/overview/", None, {}, 404),
        ("/api/overview", b"{}", {}, 405),
        ("/api/recommendations", None, {}, 405),
        ("/api/versions?limit=0", None, {}, 400),
        ("/api/versions?limit=201", None, {}, 400),
        ("/api/versions?limit=x", None, {}, 400),
        ("/api/recommendations", b"{", {}, 400),
        ("/api/recommendations", b"[" * 4000, {}, 400),
        ("/api/recommendations", {}, {}, 400),
        ("/api/recommendations", {"user_id": 1}, {}, 400),
        ("/api/recommendations", {"user_id": ""}, {}, 400),
        ("/api/recommendations", {"user_id": "u" * 300}, {}, 400),
        ("/api/recommendations", {"user_id": "\ud800"}, {}, 400),
        ("/api/recommendations", {"user_id": "u", "count": 51}, {}, 400),
        ("/api/recommendations", {"user_id": "u", "count": True}, {}, 400),
        ("/api/recommendations", {"user_id": "u", "x": 1}, {}, 400),
        ("/api/explanations", {"user_id": "u"}, {}, 400),
        ("/api/recommendations", {"user_id": "u" * 5000}, {}, 413),
        ("/api/recommendations", {"user_id": "u"}, {"Content_Type": "text/plain"}, 415),
        ("/api/overview", None, {"Host": "rebound.example"}, 421),
        ("/", None, {"Host": "rebound.example:9464"}, 421),
        ("/api/overview", None, {"Origin": "http://other.example"}, 403),
        ("/api/overview", None, {"Origin": "null"}, 403),
        ("/api/overview", None, {"Sec_Fetch_Site": "cross-site"}, 403),
        ("/api/recommendations", {"user_id": "u"}, {"Sec_Fetch_Site": "same-site"}, 403),
    ],
)
def test_what_is_wrong_is_refused_in_one_shape(
    settings: Settings, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    with serve(settings) as running:
        found, message = refused(running.server.metrics_port, path, body, **headers)
        assert (found, bool(message)) == (status, True)


def test_who_is_no_other_sites_page_is_let_in(settings: Settings) -> None:
    with serve(settings) as running:
        port = running.server.metrics_port
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}"):
            assert ask(port, "/api/overview", Host=host, Origin=f"http://{host}")[0] == 200
        # By a link from anywhere the page itself may be opened.
        assert ask(port, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


def test_roles_are_those_of_the_services(settings: Settings, tmp_path: Path) -> None:
    with with_tokens(settings, tmp_path) as running:
        port = running.server.metrics_port
        wanted = {
            "/api/overview": {"reader": 200, "boss": 200, "writer": 403, "none": 401, None: 401},
            "/api/versions": {"reader": 200, "boss": 200, "writer": 403, "none": 401, None: 401},
            "/api/recommendations": {"reader": 200, "boss": 403, "writer": 403, "none": 401, None: 401},
            "/api/explanations": {"boss": 403, "writer": 403, "none": 401, None: 401},
        }
        for path, outcomes in wanted.items():
            body = {"user_id": "u", "item_id": "i"} if path == "/api/explanations" else {"user_id": "u"}
            for token, status in outcomes.items():
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                question = None if path in ("/api/overview", "/api/versions") else body
                found, got, _ = ask(port, path, question, **headers)
                assert found == status, (path, token)
                assert ("WWW-Authenticate" in got) == (status == 401)
        assert ask(port, "/")[0] == 200, "the page itself holds nothing"
        assert ask(port, "/metrics")[0] == 200


def test_a_token_is_not_taken_from_a_network(settings: Settings, tmp_path: Path) -> None:
    """The peer's address is what decides; the request comes by the machine's other address where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        address = probe.getsockname()[0]
    with with_tokens(settings, tmp_path, host="0.0.0.0", tls_certificate="", insecure=True) as running:
        application = running.server._page
        for insecure, status in ((True, 200), (False, 403)):
            application._settings = running.settings.model_copy(update={"insecure": insecure})
            connection = http.client.HTTPConnection(address, running.server.metrics_port, timeout=SECONDS)
            connection.request("GET", "/api/overview", headers={"Authorization": "Bearer reader"})
            answer = connection.getresponse()
            assert (answer.status, b"ssh -L" in answer.read()) == (status, not insecure)
            connection.close()


# --- What holds nobody up


def test_a_store_that_hangs_holds_up_no_answer(tmp_path: Path) -> None:
    with OwnStore(tmp_path / "store") as own:
        given = {"redis_url": own.url, "port": 0, "metrics_port": 0, "store_timeout_seconds": 6.0}
        with serve(load(given, environment={})) as running:
            commit_versions(running, 2)
            assert looked(running)["store"]["reachable"]
            own.freeze()
            try:
                deadline, slowest = time.monotonic() + SECONDS, 0.0
                while True:
                    started = time.monotonic()
                    seen = said(running, "/api/overview")
                    slowest = max(slowest, time.monotonic() - started)
                    if not seen["store"]["reachable"]:
                        break
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            finally:
                own.thaw()
            # Well below what any question to the store took.
            assert slowest < 5.0
            assert seen["condition"]["healthy"]["sentence"] == "the store does not answer"
            # What it last said stays.
            assert seen["learning"]["newest_version"] == 2
            while not looked(running)["store"]["reachable"]:
                assert time.monotonic() < deadline


def test_threads_are_bounded_and_nobody_keeps_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(http_server, "CONNECTION_SECONDS", 0.5)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    server = HttpServer("127.0.0.1", 0, app)
    try:
        held = [socket.create_connection(("127.0.0.1", server.port), SECONDS) for _ in range(3)]
        for connection in held:
            # A slow peer: there is always more to come.
            connection.sendall(b"GET / HTTP/1.0\r\nX: ")
        deadline = time.monotonic() + SECONDS
        while (status := ask(server.port, "/")[0]) != 503:
            assert status == 200
            assert time.monotonic() < deadline
        for connection in held:
            assert connection.recv(1) == b"", "it was cut off"
            connection.close()
        while ask(server.port, "/")[0] != 200:
            assert time.monotonic() < deadline
    finally:
        server.close()


def test_questions_are_passed_on_to_whichever_process_answers(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gone = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
    with serve(settings) as running:
        here = f"http://127.0.0.1:{running.server.metrics_port}/metrics"
        questions = Forwarded(lambda: {"0": gone, "1": here})
        for _ in range(3):
            reply = questions.ask("/api/recommendations", {"user_id": "u", "count": 2}, None)
            assert (reply.status, len(reply.body["items"])) == (200, 2)
        reply = questions.ask("/api/recommendations", {"user_id": "u" * 300, "count": 2}, None)
        assert (reply.status, reply.body["error"]["status"]) == (400, 400)
        assert Forwarded(lambda: {"0": gone}).ask("/api/recommendations", {}, None).status == 503


# --- What is told


def test_every_field_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    parts = (Seen, Now, Learning, Store, HistoryPoint, Point, Version, Held, Case, Finding, Verdict)
    missing = [f"{part.__name__}.{f.name}" for part in parts for f in fields(part) if f"`{f.name}`" not in text]
    assert missing == []


def test_quantiles_are_those_of_promql() -> None:
    infinity = float("inf")
    gained = {1.0: 10.0, 2.0: 30.0, infinity: 40.0}
    before = dict.fromkeys(gained, 0.0)
    assert quantile(0.5, before, gained) == 1.5
    assert quantile(0.25, before, gained) == 1.0
    assert quantile(0.99, before, gained) == 2.0, "beyond the last bound there is only that bound to tell"
    assert quantile(0.5, gained, gained) is None
    assert quantile(0.5, {}, {}) is None
    # What was there before does not count.
    assert quantile(0.5, {1.0: 10.0, 2.0: 10.0, infinity: 10.0}, gained) == pytest.approx(1.75)


def test_traffic_is_what_changed_within_the_last_minute() -> None:
    registry = CollectorRegistry()
    feedback = Counter("recsys_feedback_accepted", ".", registry=registry)
    handled = Counter("grpc_server_handled", ".", ["grpc_code"], registry=registry)
    seconds = Histogram("recsys_recommend_seconds", ".", registry=registry, buckets=(0.1, 0.2))
    Gauge("recsys_served_version", ".", registry=registry).set(7)
    now = [0.0]
    traffic = Traffic(registry.collect, lambda: now[0])
    feedback.inc(1000)
    first, points = traffic.look()
    assert (first.feedback_per_second, first.failed_ratio, points) == (None, None, [])
    for at in (30.0, 60.0, 90.0):
        now[0] = at
        feedback.inc(60)
        handled.labels("OK").inc(8)
        handled.labels("INTERNAL").inc(1)
        handled.labels("INVALID_ARGUMENT").inc(1)
        seconds.observe(0.15)
        found, points = traffic.look()
    assert found.version == 7
    assert found.window_seconds == 60.0
    assert found.feedback_per_second == 2.0
    assert found.failed_ratio == 0.1
    assert found.recommend_p50_seconds == pytest.approx(0.15)
    assert [point.feedback_per_second for point in points] == [2.0, 2.0, 2.0]
    now[0] = 1000.0
    assert traffic.look()[0].feedback_per_second is None, "a mean over a quarter of an hour says nothing of now"


NOW = 1_700_000_000_000
WELL: dict[str, Any] = {
    "now_ms": NOW,
    "served_version": 9,
    "newest_version": 9,
    "newest_committed_ms": NOW - 1000,
    "feedback_learned": 5000,
    "metrics": {"hr_at_10": 0.2, "popularity_hr_at_10": 0.1},
}


@pytest.mark.parametrize(
    ("changes", "levels", "text"),
    [
        ({}, "ok ok ok", ""),
        ({"feedback_learned": 100}, "unknown ok ok", ""),
        ({"metrics": {}}, "unknown ok ok", ""),
        ({"metrics": {"hr_at_10": 0.05, "popularity_hr_at_10": 0.1}}, "problem ok ok", "recsys rollback"),
        ({"earlier_accuracy": [0.5, 0.4, 0.5]}, "warning ok ok", "fallen from 0.500 to 0.200"),
        ({"metrics": {**WELL["metrics"], "drift_loss_detected": 1.0}}, "warning ok ok", "drift: loss"),
        (
            {"metrics": {**WELL["metrics"], "under_attack": 1.0, "distrusted_accounts": 1234.0}},
            "warning ok ok",
            "under attack: 1,234 accounts behave as if taken over",
        ),
        (
            {"metrics": {**WELL["metrics"], "under_attack": 1.0, "distrusted_accounts": 500.0, "pushed_items": 5.0}},
            "warning ok ok",
            "under attack: 500 accounts are not counted, 5 items are pushed",
        ),
        ({"held_times": 2, "held_reason": "it r"}, "warning ok ok", "version 10 is held: it r"),
        ({"newest_verdict": "set aside", "newest_reason": "r"}, "warning ok ok", "quarantine list"),
        ({"store_problem": "the store does not answer"}, "ok unknown problem", "recsys doctor"),
        ({"paused": True, "backlog": 5}, "ok warning ok", "recsys resume"),
        ({"backlog": 5, "newest_committed_ms": NOW - 60_000}, "ok problem ok", "recsys train"),
        ({"backlog": 0, "newest_committed_ms": NOW - 60_000}, "ok ok ok", ""),
        ({"served_version": 8, "newest_committed_ms": NOW - 9000}, "ok problem ok", "recsys verify"),
        ({"served_version": 8}, "ok ok ok", ""),
        ({"served_version": 0, "newest_version": 0, "metrics": {}}, "unknown problem problem", "recsys train"),
        ({"freshness_seconds": 2.0}, "ok warning ok", "takes 2 s to be served"),
        ({"freshness_seconds": 20.0}, "ok problem ok", "takes 20 s to be served"),
        ({"failed_ratio": 0.005}, "ok ok warning", "0.5% of calls fail"),
        ({"failed_ratio": 0.5}, "ok ok problem", "50.0% of calls fail"),
        ({"answer_seconds": 0.5}, "ok ok warning", "500 ms"),
        ({"log_bytes": 85, "log_max_bytes": 100}, "ok ok warning", "log_max_bytes"),
        ({"used_memory": 99, "max_memory": 100}, "ok ok problem", "99% full"),
        ({"set_aside": 3}, "ok ok warning", "3 feedback are set aside"),
        ({"serving_problem": "version 9: damaged"}, "ok ok problem", "verify --repair"),
    ],
)
def test_every_condition_is_judged_and_advised(changes: dict[str, Any], levels: str, text: str) -> None:
    found = judge(Facts(**{**WELL, **changes}))
    assert f"{found.good.level} {found.fresh.level} {found.healthy.level}" == levels
    assert text in " ".join(f"{f.title} {f.advice} {f.command}" for f in found.findings)
    assert bool(found.findings) == ({"warning", "problem"} & {*levels.split()} != set())
    assert all(f.advice and f.command for f in found.findings)


def test_accuracy_that_was_not_measured_is_not_called_too_early() -> None:
    early, unmeasured = (judge(Facts(**{**WELL, "metrics": {}, "feedback_learned": n})).good for n in (1999, 2000))
    assert early.sentence == "too early to tell: 1,999 feedback learned, 2,000 are needed"
    assert "not measured" in unmeasured.sentence


# --- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browse() as found:
        yield found


def shown(browser: Browser, running: Running) -> str:
    """Open the page and wait until it shows what stands."""
    url = f"http://127.0.0.1:{running.server.metrics_port}/"
    browser.open(url)
    browser.until("document.querySelector('#pulse').textContent.startsWith('as of')")
    return url


def check_quiet(browser: Browser, url: str) -> None:
    """Nothing went wrong in the page, and it asked nobody but its own server."""
    assert browser.problems == []
    assert {urlsplit(each).netloc for each in browser.requests if not each.startswith("data:")} == {
        urlsplit(url).netloc
    }


def commit(running: Running, count: int, **metrics: float) -> None:
    weights = WeightStore(running.store, running.settings)
    epoch = weights.acquire()
    for parent in range(count):
        reason = HOSTILE if parent == count - 1 else ""
        weights.commit(
            *(epoch, parent, b"payload", b"trainer"),
            Lineage(f"{parent + 1}-0", 3000, 3, "digest", metrics, [NOW], NOW + 500, reason=reason),
        )


# Relative luminance and contrast as WCAG 2 defines them, for every text on the page against what is painted under it.
CONTRAST = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const part = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  const under = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const low = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const e = node.parentElement;
    if (!node.textContent.trim() || !e.checkVisibility() || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const s = getComputedStyle(e), a = light(parse(e.closest("svg") ? s.fill : s.color)), b = light(under(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(`${node.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return low;
})()
"""


@needs_chromium
def test_the_page_can_be_read_in_every_light_and_width(settings: Settings, browser: Browser) -> None:
    with serve(settings) as running:
        commit(running, 30, hr_at_10=0.2, popularity_hr_at_10=0.1, drift_item_mix_psi=0.02)
        for width in (1280, 390):
            for dark in (False, True):
                browser.resize(width, dark=dark)
                url = shown(browser, running)
                browser.run("document.querySelector('#ask button').click()")
                browser.until("document.querySelectorAll('#versions tr').length === 30")
                assert browser.run(CONTRAST) == []
                assert browser.run("document.documentElement.scrollWidth") <= width
                check_quiet(browser, url)
        assert "2.0 times as often right as popularity" in browser.text("#good").lower()
        assert "item mix psi" in browser.text("#drift")
        # What users and items are called is text, and nothing else.
        assert HOSTILE in browser.text("#versions")
        assert browser.run("document.querySelectorAll('main img').length") == 0
        unnamed = [
            role for role, name in browser.names() if role in ("button", "textbox", "region", "image") and not name
        ]
        assert unnamed == []


@needs_chromium
def test_a_version_that_is_held_is_shown_until_it_passes(settings: Settings, browser: Browser) -> None:
    with serve(settings) as running:
        commit(running, 2)
        weights = WeightStore(running.store, settings)
        weights.write_objection(ObjectionRecord(version=3, times=2, reason=HOSTILE, time_ms=NOW))
        told = {"version": 3, "times": 2, "reason": f"it {HOSTILE}", "time_ms": NOW}
        assert looked(running)["learning"]["held"] == told
        browser.resize(1280)
        shown(browser, running)
        browser.until("document.querySelectorAll('#versions tr').length === 3")
        first = browser.text("#versions tr")
        assert (first.split()[0], "held now" in first, "held 2 times" in first) == ("3", True, True)
        assert HOSTILE in browser.text("#findings")
        assert browser.run("document.querySelectorAll('main img').length") == 0
        weights.commit(weights.acquire(), 2, b"payload", b"trainer", Lineage("3-0", 3000, 3, "digest", {}, [NOW], NOW))
        browser.until("document.querySelector('#versions .badge').textContent === 'learned'")
        assert browser.run("document.querySelectorAll('#versions tr').length") == 3


@needs_chromium
def test_a_user_is_tried_by_keyboard_alone(settings: Settings, browser: Browser) -> None:
    with serve(settings) as running:
        item = catalog_pb2.Item(item_id="item-0", title=HOSTILE)
        CatalogServiceStub(running.channel).UpsertItems(catalog_pb2.UpsertItemsRequest(items=[item]), timeout=SECONDS)
        browser.resize(1280)
        url = shown(browser, running)
        for _ in range(20):
            browser.press("Tab")
            if browser.run("document.activeElement.id") == "user":
                break
        browser.write(HOSTILE)
        browser.press("Enter", "\r")
        browser.until("document.querySelectorAll('#answer li').length === 10")
        assert HOSTILE in browser.text("#answer p")
        assert HOSTILE in browser.text("#answer li")
        assert "chosen by many at present" in browser.text("#answer")
        assert browser.run("document.querySelectorAll('main img').length") == 0
        check_quiet(browser, url)


@needs_chromium
def test_why_is_told_by_a_server_that_has_learned(settings: Settings, browser: Browser) -> None:
    quick = small(settings, drain_seconds=0.05)
    loop = Loop(quick)
    try:
        with trainer(quick) as daemon:
            daemon.start()
            append(quick, make_feedback(60, 3))
            tick(quick)
            while daemon.step():
                pass
        server = Server(quick, assemble(quick))
        loop.run(server.start())
        try:
            loop.run(server.serving())
            browser.resize(390)
            browser.open(f"http://127.0.0.1:{server.metrics_port}/")
            browser.until("!document.querySelector('#shown').hidden")
            browser.run("document.querySelector('#user').value = 'user-1'")
            browser.run("document.querySelector('#ask button').click()")
            browser.until("document.querySelector('#answer li')")
            browser.run("document.querySelector('#answer li button').click()")
            browser.until("document.querySelector('#answer .why')")
            told = browser.text("#answer .why")
            for part in ("network", "standing", "transitions", "worth", "Expected feedback", "history"):
                assert part in told
            assert browser.run("document.documentElement.scrollWidth") <= 390
            assert browser.problems == []
        finally:
            loop.run(server.stop())
    finally:
        loop.close()


@needs_chromium
def test_a_server_that_goes_is_told_and_what_was_known_stays(settings: Settings, browser: Browser) -> None:
    with serve(settings) as running:
        browser.resize(1280)
        shown(browser, running)
        running.stop()
        browser.until("!document.querySelector('#trouble').hidden")
        assert "does not answer" in browser.text("#trouble")
        assert "What stands below is from" in browser.text("#trouble")
        assert browser.run("document.querySelector('#shown').classList.contains('stale')")


@needs_chromium
def test_a_token_is_asked_for_and_kept_in_the_tab(settings: Settings, browser: Browser, tmp_path: Path) -> None:
    with with_tokens(settings, tmp_path) as running:
        browser.resize(1280)
        browser.open(f"http://127.0.0.1:{running.server.metrics_port}/")
        browser.until("!document.querySelector('#unlock').hidden")
        assert browser.run("document.querySelector('#shown').hidden")
        for token, condition in (
            ("wrong", "document.querySelector('#unlock-why').textContent.includes('not known')"),
            ("reader", "!document.querySelector('#shown').hidden"),
        ):
            browser.run("document.querySelector('#token').focus()")
            browser.write(token)
            browser.press("Enter", "\r")
            browser.until(condition)
        shown(browser, running)
        assert browser.run("sessionStorage.getItem('token')") == "reader"
        assert browser.run("localStorage.length + document.cookie.length") == 0
        browser.run("sessionStorage.clear()")


@needs_chromium
def test_the_policy_stops_what_was_put_into_the_page(settings: Settings, browser: Browser) -> None:
    with serve(settings) as running:
        shown(browser, running)
        browser.run(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s); "
            "const i = new Image(); i.src = 'http://127.0.0.1:9/'; document.body.append(i)"
        )
        assert browser.run("window.ran === undefined")
        browser.until("true")
        assert any("Content Security Policy" in problem for problem in browser.problems)
