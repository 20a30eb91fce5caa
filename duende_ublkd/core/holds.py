"""Planned work: for how long, and by whom, the daemon's hands are to be off a device.

Rules:
1. root's hold is on an id: a server that is upgraded may delete its device and add it again. Anybody else's is on the
   instance that was theirs, and ends with it: the next device of that id may be another user's.
2. A hold ends by itself. Its time is CLOCK_MONOTONIC: setting the clock ends nothing early. A reboot ends it: every
   device is another one then.
3. A later hold replaces an earlier one of the same id; only root may replace or release what root has set.
4. A record that is not understood in full is refused in full: whoever wanted to know what is on hold holds back then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from duende_ublkd.core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SHORTEST_TIME = 1.0  # seconds
DEFAULT_TIME = 600.0
LONGEST_TIME = 30 * 86_400.0
MOST_TEXT = 200  # characters of a reason
MOST_HOLDS = 1024  # so that what is written of them stays below a megabyte


class NotAllowedError(UsageError):
    """This user may not change this."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Hands off `dev_id` until `until`. `instance`: the sysfs inode that it is bound to, None: whatever has the id."""

    dev_id: int
    since: float
    until: float
    uid: int
    why: str = ""  # one printable line
    instance: int | None = None

    def covers(self, instance: int | None) -> bool:
        """Whether it is about this instance of its id; one that is deleted (None) is still the one that it was."""
        return self.instance is None or instance is None or self.instance == instance


class Released(NamedTuple):
    """What a person's `release` ended. `attempts`: to recover, forgotten. `overdue`: the command of a former daemon that
    is believed to be over; empty: none.
    """

    hold: Hold | None
    attempts: int
    overdue: str


class Holds:
    """The holds of one machine, at most one for each id."""

    def __init__(self, holds: Iterable[Hold] = ()) -> None:
        self._holds = {hold.dev_id: hold for hold in holds}

    def __len__(self) -> int:
        return len(self._holds)

    def all(self) -> tuple[Hold, ...]:
        """Every hold, by id; also one whose time is over and that nobody has expired yet."""
        return tuple(self._holds[dev_id] for dev_id in sorted(self._holds))

    def set(self, hold: Hold) -> None:
        """Set or replace. UsageError: there are too many already."""
        if hold.dev_id not in self._holds and len(self._holds) >= MOST_HOLDS:
            raise UsageError(
                f"{MOST_HOLDS} devices are on hold already, and more cannot be",
                hint="duende-ublkd hold  # shows them; duende-ublkd release ID ends one",
            )
        self._holds[hold.dev_id] = hold

    def get(self, dev_id: int) -> Hold | None:
        """The hold on an id."""
        return self._holds.get(dev_id)

    def active(self, dev_id: int, instance: int | None, now: float) -> Hold | None:
        """The hold that keeps hands off this device now."""
        hold = self._holds.get(dev_id)
        return hold if hold and now < hold.until and hold.covers(instance) else None

    def release(self, dev_id: int) -> Hold | None:
        """End the hold on an id."""
        return self._holds.pop(dev_id, None)

    def expire(self, now: float) -> tuple[Hold, ...]:
        """Drop what is over, and return it."""
        over = tuple(hold for hold in self.all() if hold.until <= now)
        for hold in over:
            del self._holds[hold.dev_id]
        return over

    def drop_of_others(self, dev_id: int, instance: int) -> Hold | None:
        """Another device has the id: drop a hold that was bound to the former one, and return it."""
        hold = self._holds.get(dev_id)
        return None if hold is None or hold.covers(instance) else self._holds.pop(dev_id)

    def to_record(self, boot_id: str) -> dict[str, Any]:
        """JSON values that `from_record` understands."""
        return {"boot_id": boot_id, "holds": [_to_record(hold) for hold in self.all()]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], boot_id: str, now: float) -> Holds:
        """What is left of a record; nothing of another boot's. ValueError: it is not a record."""
        try:
            if _boot_of(record) != boot_id:
                return cls()
            holds = [Hold(**_checked(entry)) for entry in record["holds"]]
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise ValueError(f"not a record of holds: {error}") from error
        return cls(hold for hold in holds if hold.until > now)


def _boot_of(record: Mapping[str, Any]) -> str:
    boot_id = record["boot_id"]
    if not isinstance(boot_id, str):
        raise TypeError("boot_id is not a text")
    return boot_id


_KINDS: dict[str, tuple[type, ...]] = {
    "dev_id": (int,),
    "since": (int, float),
    "until": (int, float),
    "uid": (int,),
    "why": (str,),
    "instance": (int, type(None)),
}


def _to_record(hold: Hold) -> dict[str, Any]:
    return {name: getattr(hold, name) for name in _KINDS}


def _checked(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(entry)
    if missing := _KINDS.keys() - values.keys():
        raise TypeError(f"{min(missing)} is missing")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
            raise TypeError(f"{name} is {type(value).__name__}")
    if not (math.isfinite(values["since"]) and math.isfinite(values["until"])):
        raise ValueError("a time is not finite")
    return values


def may_change(uid: int, hold: Hold | None, device_owner: int | None) -> bool:
    """Whether this user may hold or release a device. `device_owner` None: not known, or there is no such device."""
    if uid == 0:
        return True
    if hold and hold.uid != uid:
        return False
    return device_owner is not None and device_owner == uid
