"""HTTP on the daemon's own loop; the only file that imports aiohttp.

Everything is rendered from the last pass: no request reaches the ring or the kernel, and a slow client waits for itself
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from duende_ublkd.core.errors import UsageError
from duende_ublkd.report import present
from duende_ublkd.report.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from duende_ublkd.core.model import Judged

_BODY_LIMIT = 4096  # bytes; nothing here takes a body
_MOST_CLIENTS = 64  # connections at once; a further one is closed, so that no client can use up the descriptors
_GOODBYE = 1.0  # seconds for requests under way at the end


class Source(Protocol):
    """What the pages are made from."""

    @property
    def devices(self) -> Mapping[int, Judged]:
        """The devices of the last pass."""

    @property
    def is_ready(self) -> bool:
        """Whether a first full look is done, and the driver answered the last one."""


class WebServer:
    """Serves one address until `close()`."""

    def __init__(self, source: Source, metrics: Metrics) -> None:
        self._source = source
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> None:
        """Raises UsageError when the address cannot be had."""
        app = web.Application(client_max_size=_BODY_LIMIT)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/-/healthy", self._get_healthy)
        app.router.add_get("/-/ready", self._get_ready)
        app.router.add_get("/api/v1/devices", self._get_devices)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=_GOODBYE)
        await runner.setup()
        try:
            self._server = await asyncio.get_running_loop().create_server(lambda: _admit(runner), host, port)
        except OSError as error:
            await runner.cleanup()
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                hint='set another address, or none with "": [http] listen = "127.0.0.1:10117"',
            ) from error
        self._runner = runner

    async def close(self) -> None:
        """Stop listening; requests under way get a moment, and a client that does not read gets no more than that."""
        if self._server:
            self._server.close()
        if self._runner:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * _GOODBYE):
                    await self._runner.cleanup()
            self._runner = None

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": Metrics.content_type})

    async def _get_healthy(self, _: web.Request) -> web.Response:
        return web.Response(text="healthy\n")

    async def _get_ready(self, _: web.Request) -> web.Response:
        ready = self._source.is_ready
        return web.Response(text="ready\n" if ready else "not ready\n", status=200 if ready else 503)

    async def _get_devices(self, _: web.Request) -> web.Response:
        objects = [present.as_object(device) for device in self._source.devices.values()]
        return web.json_response(objects, dumps=lambda value: json.dumps(value, ensure_ascii=False))


class _Refusal(asyncio.Protocol):
    """Closes the connection at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _admit(runner: web.AppRunner) -> asyncio.Protocol:
    if runner.server is None or len(runner.server.connections) >= _MOST_CLIENTS:
        return _Refusal()
    return runner.server()
