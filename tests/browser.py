"""A headless Chromium for tests and pictures, driven over the DevTools protocol; needs no package of its own."""

import asyncio
import base64
import itertools
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
EXECUTABLE = next(filter(None, map(shutil.which, NAMES)), None)
MISSING = f"needs a Chromium (on Debian: apt-get install chromium); found none of {', '.join(NAMES)}"
OPTIONS = (
    "--headless", "--remote-debugging-port=0", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--mute-audio",
)  # fmt: skip
SECONDS = 30  # for any one answer


class Browser:
    """One process and one connection; `open` loads a page in a tab of its own."""

    def __init__(self, profile: Path):
        self._loop = asyncio.new_event_loop()
        command = [EXECUTABLE, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._numbers, self._messages = itertools.count(1), []
        said = "DevTools listening on "
        address = next((line.removeprefix(said) for line in self._process.stderr if line.startswith(said)), None)
        if address is None:
            raise RuntimeError(f"{EXECUTABLE} does not start: exit code {self._process.wait()}")
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # a full pipe would stop it
        self._wait(self._connect(address.strip()))

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def _wait(self, awaitable):
        return self._loop.run_until_complete(asyncio.wait_for(awaitable, SECONDS))

    def call(self, method: str, tab: str | None = None, **parameters) -> dict:
        """The answer to one command of the protocol; RuntimeError with the browser's words where it fails."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": tab} if tab else {})
        self._wait(self._socket.send_json(message))
        answer = self._receive(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, is_wanted) -> dict:
        while not is_wanted(message := self._wait(self._socket.receive_json())):
            self._messages.append(message)
        return message

    def wait_for(self, tab: str, method: str, count: int) -> None:
        """Until `count` events of this kind have come from a tab."""
        while len(self.events(tab, method)) < count:
            self._messages.append(self._wait(self._socket.receive_json()))

    def events(self, tab: str, method: str) -> list[dict]:
        """The parameters of all events of a kind that have come from a tab."""
        return [m["params"] for m in self._messages if m.get("sessionId") == tab and m.get("method") == method]

    def open(self, address: str, width: int = 1280, height: int = 900, is_dark: bool = False, scripts: bool = True):
        """A `Page` of this size, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", tab)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", tab, features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", tab, **size)
        self.call("Emulation.setScriptExecutionDisabled", tab, value=not scripts)
        page = Page(self, target, tab)
        page.load("Page.navigate", url=address)
        return page

    def close(self) -> None:
        self.call("Browser.close")
        self._wait(self._session.close())
        self._process.communicate(timeout=SECONDS)
        self._loop.close()


class Page:
    """A tab; pixels are those of the viewport."""

    def __init__(self, browser: Browser, target: str, tab: str):
        self.browser, self.target, self.tab = browser, target, tab

    def call(self, method: str, **parameters) -> dict:
        return self.browser.call(method, self.tab, **parameters)

    def load(self, command: str, **parameters) -> None:
        count = len(self.browser.events(self.tab, "Page.loadEventFired"))
        self.call(command, **parameters)
        self.browser.wait_for(self.tab, "Page.loadEventFired", count + 1)

    def reload(self) -> None:
        self.load("Page.reload")

    def run(self, script: str):
        """The JSON-able value of a JavaScript expression; RuntimeError where it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "exception"))
        return answer["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of the first match, after it was scrolled into sight."""
        script = f"""(() => {{ const each = document.querySelector({selector!r});
            each.scrollIntoView({{ block: "center", inline: "nearest" }});
            const {{ x, y, width, height }} = each.getBoundingClientRect(); return [x, y, width, height]; }})()"""
        return tuple(self.run(script))

    def mouse(self, kind: str, x: float, y: float, clicks: int = 0) -> None:
        """`kind`: Moved, Pressed or Released."""
        button = "left" if kind != "Moved" or clicks else "none"
        held = int(button == "left" and kind != "Released")
        where = {"x": x, "y": y, "button": button, "buttons": held, "clickCount": clicks}
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **where)

    def click(self, selector: str, clicks: int = 1) -> None:
        left, top, width, height = self.box(selector)
        for count in range(1, clicks + 1):
            for kind in ("Pressed", "Released"):
                self.mouse(kind, left + width / 2, top + height / 2, count)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("Pressed", *start, 1)
        for share in (0.5, 1):
            self.mouse("Moved", *(a + (b - a) * share for a, b in zip(start, end, strict=True)), 1)
        self.mouse("Released", *end, 1)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def settle(self) -> None:
        """Until the page has drawn what was asked of it."""
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")

    def problems(self) -> list[str]:
        """What the console would show in red: exceptions, errors, and what the security policy refused."""
        self.settle()
        thrown = self.browser.events(self.tab, "Runtime.exceptionThrown")
        logged = self.browser.events(self.tab, "Log.entryAdded")
        said = self.browser.events(self.tab, "Runtime.consoleAPICalled")
        return [str(each) for each in (*thrown, *logged, *said)]

    def requests(self) -> list[str]:
        """Addresses of all that the page has loaded."""
        return [each["request"]["url"] for each in self.browser.events(self.tab, "Network.requestWillBeSent")]

    def screenshot(self, file: Path, until: str = "body", scale: float = 1.0) -> None:
        """The page down to the end of the first match of a selector, as PNG."""
        width, height = self.run(f"[innerWidth, document.querySelector({until!r}).getBoundingClientRect().bottom]")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)


@contextmanager
def headless(profile: Path) -> Iterator[Browser]:
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
