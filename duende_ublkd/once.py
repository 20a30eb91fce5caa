"""One look, as whatever runs once has it: the one-shot commands, and the calls of the Python interface.

What a single look cannot tell, because it takes an unbroken time, is looked at again for a moment. What is on hold is read
anew before each look, and nothing is done where that cannot be told.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from duende_ublkd.client import DaemonClient, run_directory, socket_path
from duende_ublkd.core.errors import DuendeError, KernelUnavailableError
from duende_ublkd.core.model import Action, VerdictKind
from duende_ublkd.kernel import holdfile

if TYPE_CHECKING:
    from collections.abc import Callable

    from duende_ublkd.core.holds import Holds
    from duende_ublkd.core.model import Judged
    from duende_ublkd.reconcile import Agenda, Reconciler

SETTLE_FOR = 5.0
"""Seconds that a device has to make up its mind; a server's last I/O may take longer, and then it is left, and said."""
SHORT_WAIT = 2.0
"""Seconds of grace that are sat out; a longer one is a device's own business, and is reported."""
_AGAIN = 0.05  # seconds after something was done, or not done: what is it now?
_ONLY_LOOKS = (VerdictKind.CLOSING, VerdictKind.STARTING)
_LEFT_OVER = (
    VerdictKind.ORPHANED,
    VerdictKind.PINNED,
    VerdictKind.WEDGED,
    VerdictKind.UNKNOWN,
    VerdictKind.CLOSING,
)


class Core(Protocol):
    """What `settle` needs of a command's parts."""

    reconciler: Reconciler
    agenda: Agenda


def ask_daemon(reconciler: Reconciler) -> set[int]:
    """Go on from what a running daemon of root's remembers of earlier looks; the ids that it knows.

    Without one, or one that answers, a look stands alone, and `explain` says so.
    """
    try:
        records = DaemonClient(socket_path()).get("/api/v1/records", trusted=True)
    except DuendeError:
        return set()
    known = set()
    for entry in records:
        try:
            reconciler.ledger.remember(entry["dev_id"], entry["record"], has_ended=False)
        except ValueError:
            continue  # a daemon of another version
        known.add(entry["dev_id"])
    return known


async def settle(
    parts: Core,
    dev_ids: set[int] | None,
    *,
    act: bool,
    on_unknown_holds: Callable[[DuendeError], None] | None = None,
) -> None:
    """Look, and look again at whatever may change in a moment, until nothing does or SETTLE_FOR is over.

    KernelUnavailableError; DuendeError: nobody knows what is on hold. Who only looks may take note of that instead.
    """
    reconciler, wanted = parts.reconciler, dev_ids

    def load_holds() -> Holds:
        return holdfile.load(run_directory(), reconciler.clock())

    reconciler.read_holds = load_holds  # one that is set after the look counts, too
    until = reconciler.clock() + SETTLE_FOR
    while True:
        try:
            reconciler.holds = load_holds()
        except DuendeError as error:
            if act or on_unknown_holds is None:
                raise
            on_unknown_holds(error)
        report = await reconciler.run_pass(wanted, act=act, thorough=True)
        if report.trouble:
            raise KernelUnavailableError(report.trouble, hint=report.hint)
        acted = await reconciler.finish_deeds()
        parts.agenda.check()
        waits = dict.fromkeys(acted & reconciler.devices.keys(), _AGAIN)
        for device in reconciler.devices.values():
            if (wait := _wait_for(device, patient=act)) is not None:
                waits.setdefault(device.seen.dev_id, wait)
        if not waits or (not acted and reconciler.clock() > until):
            return  # whatever was done is looked at once more, however late it is
        await asyncio.sleep(min(waits.values()))
        wanted = set(waits)


def _wait_for(device: Judged, *, patient: bool) -> float | None:
    """Seconds until another look is worth it; None when it is not. `patient`: also for whoever has it open to close it."""
    verdict = device.verdict
    if device.seen.usage and device.seen.usage.char_openers and not patient:
        return None
    if verdict.look_again_in is None or verdict.look_again_in > SHORT_WAIT:
        return None
    return verdict.look_again_in if verdict.kind in _ONLY_LOOKS else None


def is_left(device: Judged, *, named: bool) -> bool:
    """Whether somebody who wanted this id cleaned has to be told. A DEAD one that was named, also while it starts."""
    kind = device.verdict.kind
    if kind in _LEFT_OVER or device.verdict.action is Action.DELETE:
        return True
    return named and kind is VerdictKind.STARTING
