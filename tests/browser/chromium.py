"""A headless Chromium that tests drive by the DevTools protocol over two pipes: no package, no port."""

import base64
import contextlib
import json
import os
import queue
import shutil
import subprocess
import threading
import time

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Nothing of its own on the network, and no state but the new profile's.
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)
PATIENCE_S = 120


def program():
    """Return the path of a Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextlib.contextmanager
def running(profile):
    """Yield a browser with a profile of its own; end it afterwards."""
    # The child reads commands from its descriptor 3 and writes answers to 4.
    commands, to_child = os.pipe()
    from_child, answers = os.pipe()
    line = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
    arguments = ["bash", "-c", line, program(), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(
        arguments,
        pass_fds=(commands, answers),
        env=os.environ | {"TMPDIR": str(profile)},  # it leaves folders behind
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(commands)
        os.close(answers)
        try:
            yield Browser(to_child, from_child)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            os.close(to_child)


class Browser:
    """Sends commands and keeps what the browser tells of itself."""

    def __init__(self, to_child, from_child):
        self._out = to_child
        self._number = 0
        self._messages = queue.Queue()
        self._events = {}
        self._tabs = []
        threading.Thread(target=self._read, args=(from_child,), daemon=True).start()

    def _read(self, descriptor):
        with os.fdopen(descriptor, "rb") as stream:
            rest = b""
            while chunk := stream.read1(1 << 16):
                *whole, rest = (rest + chunk).split(b"\0")
                for message in whole:
                    self._messages.put(json.loads(message))

    def send(self, method, session=None, **params):
        """Send a command; return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        message |= {} if session is None else {"sessionId": session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._messages.get(timeout=PATIENCE_S)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._keep(answer)

    def _keep(self, event):
        self._events.setdefault(event.get("sessionId"), []).append(event)

    def events(self, session):
        """Return what has happened in a session so far."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._keep(self._messages.get_nowait())
        return self._events.get(session, [])

    def open(self, url, width=1400, height=1000, dark=False):
        """Open a page in a tab of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._tabs.append(target)
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.send(f"{domain}.enable")
        tab.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        tab.send("Page.navigate", url=url)
        tab.wait_for("document.readyState === 'complete'")
        return tab

    def close_tabs(self):
        """Close all pages that are open: each has a process of its own."""
        while self._tabs:
            self.send("Target.closeTarget", targetId=self._tabs.pop())
        self._events.clear()


class Tab:
    """A page that is open."""

    def __init__(self, browser, session):
        self._browser = browser
        self._session = session

    def send(self, method, **params):
        """Send a command to the page; return its result."""
        return self._browser.send(method, self._session, **params)

    def resize(self, width, height, mobile=False):
        """Give the window a size, pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def run(self, expression):
        """Return the value of a JavaScript expression, which may be awaited."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, (f"never true: {condition}", self.problems()[0])
            time.sleep(0.05)

    def press(self, key, modifiers=0):
        """Press a key, such as ``Tab`` or ``Enter``."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, " ": 32}
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.send("Input.dispatchKeyEvent", type="keyDown", **shared, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def screenshot(self, whole=False):
        """Return the window, or the whole page, as PNG."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        return base64.b64decode(data)

    def pdf(self):
        """Return the page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"])

    def problems(self):
        """Return errors and warnings of the console, and the starts of the addresses that were asked for."""
        said, asked = [], []
        for event in self._browser.events(self._session):
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                said.append(params["exceptionDetails"])
            if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                said.append(params["args"])
            if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                said.append(params["entry"])
            if method == "Network.requestWillBeSent":
                asked.append(params["request"]["url"][:100])
        return said, asked
