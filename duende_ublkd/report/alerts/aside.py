"""What may hang, in a thread of its own: looking up a name, reading a file, talking to a mail server.

Such a call cannot be given up; who waits for it can go. So each target of a sink has one place for it: the next call waits
until the one in there is over, and nobody else has to wait. The threads are as many as there are targets.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class UndeliveredError(Exception):
    """It did not arrive. `str()` says why and what to do; `is_permanent`: trying again changes nothing."""

    def __init__(self, why: str, *, is_permanent: bool = False) -> None:
        super().__init__(why)
        self.is_permanent = is_permanent


class Aside:
    """One call at a time; `under_way` says which, as a sentence for whoever gives up waiting."""

    def __init__(self) -> None:
        self.under_way = ""
        self._next: asyncio.Event | None = None  # set when the one that is under way is over

    async def run(self, what: str, call: Callable[[], T]) -> T:
        """What the call returns or raises, when the ones before it are over."""
        while self._next:
            await self._next.wait()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                outcome: tuple[T] | BaseException = (call(),)
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                outcome = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._settle, answer, outcome)

        threading.Thread(target=work, name=what, daemon=True).start()
        self.under_way, self._next = what, asyncio.Event()
        return await answer

    def _settle(self, answer: asyncio.Future[T], outcome: tuple[T] | BaseException) -> None:
        if self._next:
            self._next.set()
        self.under_way, self._next = "", None
        if answer.done():
            return
        if isinstance(outcome, BaseException):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome[0])
