"""A real headless Chromium, driven over its DevTools protocol by a pipe; no library, no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Debian's package `chromium` has the first; CHROMIUM may name any.
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")
SECONDS = 30
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-default-apps", "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe"),
    # Nothing but this machine: whatever else it would look for fails at once.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, MAP rebound.test 127.0.0.1",
)
# The browser reads from descriptor 3 and writes to 4.
MOVE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD_CLOEXEC, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Return the browser's path, None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


needs_chromium = pytest.mark.skipif(
    not find_chromium(), reason="no Chromium on the PATH; Debian's package `chromium` is one, or name it in CHROMIUM"
)


class Browser:
    """Run a browser with one tab; every call waits for its answer."""

    def __init__(self, folder: str) -> None:
        program = find_chromium()
        assert program
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", MOVE, str(to_read), str(to_write), *command],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        # What the page said, and what it asked for: errors, broken policies, requests.
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = next(t for t in self._send("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self._send(f"{domain}.enable")

    def close(self) -> None:
        """End it."""
        self._session = None
        self._send("Browser.close")
        self._process.wait(SECONDS)
        os.close(self._read)
        os.close(self._write)

    def _send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            found = os.read(self._read, 1 << 16)
            assert found, "the browser has gone"
            self._rest += found
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        given = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif message.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.problems.append(given["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return message

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the window's size in CSS pixels, and the scheme that the user prefers."""
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go to an address, and know only what it says and asks for: the page before may ask a server that has gone."""
        for each in ("about:blank", url):
            self._send("Page.navigate", url=each)
            self.until(f"location.href === {json.dumps(each)} && document.readyState === 'complete'")
            if each != url:
                self.problems.clear()
                self.requests.clear()

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, outside its policy, and return what it gives."""
        found = self._send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = SECONDS) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"!!({condition})"):
            assert time.monotonic() < deadline, f"never became true: {condition}; the page shows {self.text()[:3000]}"
            time.sleep(0.05)

    def text(self, selector: str = "body") -> str:
        """Return the text that is shown in the first element that the selector finds."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def press(self, key: str, text: str = "") -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self._send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._send("Input.dispatchKeyEvent", type="keyUp", **common)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self._send("Input.insertText", text=text)

    def names(self) -> list[tuple[str, str]]:
        """Return role and name of everything that assistive technology finds."""
        nodes = self._send("Accessibility.getFullAXTree")["nodes"]
        return [
            (n.get("role", {}).get("value", ""), n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]
        ]

    def screenshot(self, path: Path) -> None:
        """Take a picture of the whole page."""
        size = self._send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browse() -> Iterator[Browser]:
    """Run a browser with an empty profile."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            yield browser
        finally:
            browser.close()
