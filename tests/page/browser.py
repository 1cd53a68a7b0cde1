"""Headless Chromium, driven by its DevTools protocol over a pair of pipes: no library, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
PATIENCE = 90.0
"""Seconds until a wait is given up."""


class PageError(AssertionError):
    """The browser refused a command, or what was awaited did not come."""


class Browser:
    """One process. Commands and answers are JSON, ended by a zero byte."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
        os.close(commands)
        os.close(answers)
        there = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # Chromium reads 3 and writes 4
        command = ["bash", "-c", there, "chromium", CHROMIUM, *FLAGS, f"--user-data-dir={folder}"]
        self._process = subprocess.Popen(
            [*command, "about:blank"],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in ends:
            os.close(fd)
        self._rest = b""
        self._last_id = 0
        self.events: list[dict[str, Any]] = []
        """Since the start, of all pages, in order."""

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command. Raises PageError."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._read(until)
            if answer.get("id") != self._last_id:
                self.events.append(answer)
            elif "error" in answer:
                raise PageError(f"{method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._in, 2**16) if ready else b""
            if not data:
                raise PageError("the browser is gone" if ready else "the browser does not answer")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        try:
            self.call("Browser.close")
        except (PageError, OSError):
            self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def open(
        self, url: str, *, width: int = 1440, height: int = 900, dark: bool = False
    ) -> BrowserPage:
        """A tab of its own, with storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = BrowserPage(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.scheme(dark)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class BrowserPage:
    """A tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int) -> None:
        """In CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def scheme(self, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def run(self, script: str) -> Any:
        """The value of an expression. Raises PageError for one that throws."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            text = details.get("exception", {}).get("description", details["text"])
            raise PageError(f"{script}: {text}")
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """The first value of an expression that is not falsy."""
        until = time.monotonic() + PATIENCE
        while not (value := self.run(script)):
            if time.monotonic() > until:
                raise PageError(f"never came true: {script}\n{self.run('document.body.innerText')}")
            time.sleep(0.03)
        return value

    def text(self, selector: str) -> str:
        found = self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        assert isinstance(found, str)
        return found

    def click(self, selector: str) -> None:
        """As a mouse does, at its middle."""
        name = json.dumps(selector)
        self.run(f"document.querySelector({name}).scrollIntoView({{block: 'center'}})")
        box = self.run(f"JSON.stringify(document.querySelector({name}).getBoundingClientRect())")
        where = json.loads(box)
        at = {"x": where["x"] + where["width"] / 2, "y": where["y"] + where["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            mouse = {"type": kind, "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", **mouse, **at)

    def fill(self, selector: str, text: str) -> None:
        """Write into a field, in place of what is there."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{field}.focus(); {field}.select()")
        assert self.run(f"document.activeElement === {field}"), f"{selector} takes no focus"
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, by its name and its Windows code."""
        for kind in ("keyDown", "keyUp"):
            press: dict[str, Any] = {"type": kind, "key": key, "code": key}
            press |= {"windowsVirtualKeyCode": code} | ({"text": text} if text else {})
            self.call("Input.dispatchKeyEvent", **press)

    def enter(self) -> None:
        self.press("Enter", 13, "\r")

    def png(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def urls(self) -> list[str]:
        """Of all requests of this tab."""
        return [
            event["params"]["request"]["url"] for event in self._events("Network.requestWillBeSent")
        ]

    def bodies(self) -> list[Any]:
        """Of all requests of this tab that had one, as JSON."""
        sent = [e["params"]["request"] for e in self._events("Network.requestWillBeSent")]
        return [json.loads(one["postData"]) for one in sent if "postData" in one]

    def complaints(self) -> list[str]:
        """Exceptions of scripts, violations of the policy and the like. That a status is none of
        success is what the page shows itself."""
        thrown = [e["params"]["exceptionDetails"] for e in self._events("Runtime.exceptionThrown")]
        found = [one.get("exception", {}).get("description", one["text"]) for one in thrown]
        logged = [e["params"]["entry"] for e in self._events("Log.entryAdded")]
        return found + [one["text"] for one in logged if one["source"] != "network"]

    def _events(self, method: str) -> Iterator[dict[str, Any]]:
        self.run("0")  # what came before it is read
        for event in self._browser.events:
            if event.get("method") == method and event.get("sessionId") == self._session:
                yield event


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """With an empty profile in ``folder``."""
    running = Browser(folder)
    try:
        yield running
    finally:
        running.close()
