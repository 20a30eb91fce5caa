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
