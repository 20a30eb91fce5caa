"""What every command that talks to the kernel is built from; light enough for a command that runs once.

The daemon adds hints, pages and metrics to it. A one-shot command would pay for their imports with its start-up time.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from duende_ublkd.core import config as configuration
from duende_ublkd.kernel.control import Control
from duende_ublkd.kernel.devices import UblkKernel
from duende_ublkd.kernel.holders import Sweeper
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.reconcile import Agenda, Reconciler

if TYPE_CHECKING:
    from collections.abc import Callable

    from duende_ublkd.core.config import Config
    from duende_ublkd.core.model import Judged, PassReport
    from duende_ublkd.reconcile import Reporter

DEFAULT_PATH = "/etc/duende-ublkd/config.toml"
FINISH_FOR = 3.0  # seconds for deeds under way when told to stop; what is left is the kernel's to finish


def read_config(path: str | None) -> Config:
    """The configuration at `path`; None: the default place, or the built-in defaults where that does not exist."""
    where = path or DEFAULT_PATH
    try:
        with open(where, "rb") as file:
            return configuration.load(file.read(configuration.MAX_BYTES + 1), where)
    except FileNotFoundError as error:
        if path is None:
            return configuration.Config()
        raise configuration.unreadable(where, error) from error
    except OSError as error:
        raise configuration.unreadable(where, error) from error


class Parts:
    """What every command that talks to the kernel is built from."""

    def __init__(
        self,
        config: Config,
        reporters: tuple[Reporter, ...],
        *,
        on_command: Callable[[str, str, float], None] | None = None,
        without_grace: tuple[int, ...] = (),
    ) -> None:
        self.ring = Ring(on_late=self._on_late)
        self.control = Control(self.ring, deadline=config.daemon.command_deadline, on_command=on_command)
        self.sweeper = Sweeper()
        self.kernel = UblkKernel(self.control, self.sweeper)
        self.agenda = Agenda()
        self.reconciler = Reconciler(
            self.kernel, config, Reporters(*reporters), self.agenda, without_grace=without_grace
        )

    def _on_late(self, name: str, dev_id: int | None, _result: int) -> None:
        if dev_id is not None:
            self.reconciler.note_answer(dev_id, name)

    async def close(self) -> None:
        """Let deeds under way finish, then give everything back."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.reconciler.finish_deeds(), FINISH_FOR)
        self.sweeper.close()
        await self.ring.close()


class Reporters:
    """Several reporters as one."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def intends(self, device: Judged) -> None:
        """Before a destructive action."""
        for reporter in self._reporters:
            reporter.intends(device)

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed."""
        for reporter in self._reporters:
            reporter.passed(report)
