"""Debian's Chromium without a window, driven over its DevTools protocol.

One process for a whole test session; each page is opened in a context of its own, which knows nothing of the others, and
keeps what the browser complains of: `complaints` is what a person would see in red in the console.
"""

import asyncio
import base64
import contextlib
import itertools
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import aiohttp

from tests.lab import tools

START_S = 60.0
ANSWER_S = 30.0
# A command's answer has the whole page in it, or a picture.
LONGEST_MESSAGE = 64 << 20


class Chromium:
    """The process. `address`: of its DevTools."""

    def __init__(self, process: subprocess.Popen[bytes], home: tempfile.TemporaryDirectory[str], address: str) -> None:
        self._process = process
        self._home = home
        self.address = address

    @classmethod
    def start(cls) -> Self:
        home = tempfile.TemporaryDirectory(prefix="duende-browser-", ignore_cleanup_errors=True)
        command = [
            *(str(tools.path("chromium")), "--headless", f"--user-data-dir={home.name}", "--remote-debugging-port=0"),
            # Of root's it has no sandbox; what it is shown is our own.
            *(
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--force-color-profile=srgb",
            ),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--mute-audio"),
            "about:blank",
        ]
        process = subprocess.Popen(
            command,
            env={**os.environ, **tools.environment("chromium"), "HOME": home.name},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return cls(process, home, _address(process, Path(home.name, "DevToolsActivePort")))
        except BaseException:
            _end(process)
            home.cleanup()
            raise

    def close(self) -> None:
        _end(self._process)
        self._home.cleanup()

    @contextlib.asynccontextmanager
    async def page(self, *, width: int = 1280, height: int = 800, scale: float = 1.0) -> AsyncIterator["Tab"]:
        """An empty page of that size, in CSS pixels."""
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self.address, max_msg_size=LONGEST_MESSAGE) as channel,
        ):
            tab = Tab(channel)
            listening = asyncio.ensure_future(tab.listen())
            try:
                await tab.open(width, height, scale)
                yield tab
                await tab.close()
            finally:
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await listening


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with status {process.returncode} before it was asked anything")
        lines = file.read_text().split() if file.is_file() else []
        if len(lines) > 1:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise TimeoutError(f"Chromium has not told its DevTools' address within {START_S:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all of its own children, which are in its session and nobody else's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Tab:
    """One page. `complaints`: of scripts and of the policy, failed requests, and warnings, as the console has them."""

    def __init__(self, channel: aiohttp.ClientWebSocketResponse) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._events: dict[str, Callable[[dict[str, Any]], None]] = {
            "Runtime.exceptionThrown": lambda told: self.complaints.append(str(told["exceptionDetails"])),
            "Runtime.consoleAPICalled": lambda told: self.complaints.append(f"{told['type']}: {told['args']}"),
            "Log.entryAdded": lambda told: self.complaints.append(f"{told['entry']['level']}: {told['entry']['text']}"),
            "Audits.issueAdded": lambda told: self.complaints.append(str(told["issue"])),
            "Page.loadEventFired": lambda _: self._loaded.set(),
        }
        self._loaded = asyncio.Event()
        self._session = ""
        self._context = ""
        self.complaints: list[str] = []

    async def listen(self) -> None:
        async for message in self._channel:
            told = message.json()
            if answer := self._answers.pop(told.get("id", 0), None):
                answer.set_result(told)
            elif event := self._events.get(told.get("method", "")):
                event(told["params"])

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        session = {"sessionId": self._session} if self._session else {}
        await self._channel.send_json({"id": number, "method": method, "params": parameters, **session})
        async with asyncio.timeout(ANSWER_S):
            answer = await self._answers[number]
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, width: int, height: int, scale: float) -> None:
        self._context = (await self.ask("Target.createBrowserContext"))["browserContextId"]
        target = await self.ask("Target.createTarget", url="about:blank", browserContextId=self._context)
        attached = await self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Audits"):
            await self.ask(f"{domain}.enable")
        await self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 500,
        )

    async def close(self) -> None:
        self._session = ""
        await self.ask("Target.disposeBrowserContext", browserContextId=self._context)

    async def prefer(self, scheme: str) -> None:
        """`dark` or `light`."""
        await self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def without_scripts(self) -> None:
        await self.ask("Emulation.setScriptExecutionDisabled", value=True)

    async def go(self, address: str) -> None:
        self._loaded.clear()
        await self.ask("Page.navigate", url=address)
        async with asyncio.timeout(ANSWER_S):
            await self._loaded.wait()

    async def run(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """The value of a JavaScript expression, or of what it promises."""
        told = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def wait_for(self, expression: str, seconds: float = 30.0) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not await self.run(f"!!({expression})"):
            if time.monotonic() > until:
                raise TimeoutError(f"not within {seconds:g} s: {expression}")
            await asyncio.sleep(0.05)

    async def type(self, text: str) -> None:
        await self.ask("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of it."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        await self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        left, top = await self.run(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            await self.ask("Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", clickCount=1)

    async def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = "\r" if key == "Enter" else ""
        for kind in ("keyDown", "keyUp"):
            held = {"text": text} if text and kind == "keyDown" else {}
            await self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **held)

    async def picture(self, into: Path, *, whole: bool = True) -> None:
        shot = await self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        into.write_bytes(base64.b64decode(shot["data"]))
