"""What came of a delivery."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """A sink's, or why there is none. `permanent`: trying the same again changes nothing."""

    ok: bool
    permanent: bool
    detail: str  # printable, of at most 300 characters
    seconds: float
    missed: str = ""  # which parts of the sink have not got it, though others have


@dataclass(frozen=True, slots=True)
class Taken:
    """What there is to say of a delivery that went well. `missed`: the names of those that have not got it."""

    detail: str
    missed: str = ""
