"""When to run a recovery command, when to wait, and when to give up and call a person.

Rules (`trail.py` keeps count):
1. An attempt counts from its beginning, whatever comes of it: a server that is brought back and dies again a moment later
   uses them up just as a command that fails does. What makes earlier attempts forgotten is `stable` seconds of service.
2. When the attempts are used up the breaker is open: nothing is run any more until the device was served long enough, by
   whomever, or a person says so (`release`).
3. A command is an argv, never a line for a shell: what is filled in came from processes that chose their own names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from duende_ublkd.core.model import feature_names

if TYPE_CHECKING:
    from duende_ublkd.core.config import Recovery
    from duende_ublkd.core.model import Observation, Server

LONGEST_BACKOFF = 300.0  # seconds
JITTER = 0.25  # of the pause, up or down: machines that lost their storage together do not ask for it together
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def pause_after(attempts: int, rule: Recovery, dice: float) -> float:
    """Seconds until the next attempt; `dice`: a random number from 0 to 1."""
    doubled: float = rule.backoff * 2.0 ** float(min(max(attempts - 1, 0), 20))
    pause = max(rule.backoff, min(doubled, LONGEST_BACKOFF))
    return pause * (1 + JITTER * (2 * dice - 1))


def asks_for_server(rule: Recovery | None) -> bool:
    """Whether the command needs the former server's program, so that it has to be known for certain while it serves."""
    return rule is not None and any("{server}" in part for part in rule.command)


def placeholders(seen: Observation, server: Server | None) -> dict[str, str | None]:
    """What `{...}` in a command stands for; None: not known. `server`: one that was seen to have the device open."""
    return {
        "id": str(seen.dev_id),
        "block_device": f"/dev/ublkb{seen.dev_id}",
        "char_device": f"/dev/ublkc{seen.dev_id}",
        "server": _program_of(server),
    }


def environment(seen: Observation, server: Server | None, attempt: int, rule: Recovery, reason: str) -> dict[str, str]:
    """The whole environment of a recovery command; README documents it."""
    known = {
        "DEV_ID": str(seen.dev_id),
        "BLOCK_DEVICE": f"/dev/ublkb{seen.dev_id}",
        "CHAR_DEVICE": f"/dev/ublkc{seen.dev_id}",
        "KERNEL_STATE": seen.state_name,
        "FLAGS": ",".join(feature_names(seen.info.flags)) if seen.info else "",
        "REASON": reason,
        "ATTEMPT": str(attempt),
        "ATTEMPTS": str(rule.attempts),
        "TIMEOUT_S": f"{rule.timeout:g}",
        "SERVER": _program_of(server) or "",
        "SERVER_PID": str(server.pid) if server else "",
        "SERVER_COMM": server.comm if server else "",
        "SERVER_UNIT": server.unit if server else "",
    }
    return {"PATH": PATH, "LANG": "C.UTF-8", **{f"DUENDE_UBLKD_{name}": value for name, value in known.items()}}


def _program_of(server: Server | None) -> str | None:
    """The former server's program, also after it was replaced on disk; None where its name was not fit to be shown."""
    if server is None:
        return None
    program = server.exe.removesuffix(" (deleted)")
    return program if program.startswith("/") and "\\" not in program and "…" not in program else None
