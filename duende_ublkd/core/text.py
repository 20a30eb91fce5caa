r"""Foreign text, made fit for one line of a journal, a table or an alert.

Names come from whoever chose them: a process may call itself anything in 15 bytes, a path is any bytes but NUL. What is
shown here can be read and cannot steer a terminal. A backslash stays as it is, since unit names are full of them
(`dev-disk-by\x2dlabel.swap`), so the result is for reading and cannot be turned back.
"""

from __future__ import annotations

_FIRST_RAW_BYTE = 0xDC80  # how surrogateescape carries the bytes 0x80 to 0xFF through a str
_LAST_RAW_BYTE = 0xDCFF


def printable(text: str | bytes, limit: int = 200) -> str:
    """One line of at most `limit` characters; what cannot be printed is escaped, what is too long ends in `…`."""
    if isinstance(text, bytes):
        text = text[: 4 * limit + 4].decode("utf-8", "surrogateescape")
    if len(text) <= limit and text.isprintable():
        return text
    pieces: list[str] = []
    left = limit
    for character in text[: limit + 1]:
        piece = _shown(character)
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            return _cut(pieces, limit)
    return "".join(pieces)


def _cut(pieces: list[str], limit: int) -> str:
    """Drop whole pieces, never half an escape, until the ellipsis fits."""
    length = sum(map(len, pieces))
    while pieces and length > limit - 1:
        length -= len(pieces.pop())
    return "".join(pieces) + "…"


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    if _FIRST_RAW_BYTE <= code <= _LAST_RAW_BYTE:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
