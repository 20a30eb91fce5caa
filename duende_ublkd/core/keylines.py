"""The line of every key of a TOML document, which tomllib does not tell. It judges nothing and never raises."""

from __future__ import annotations

import re
import tomllib
from collections import deque
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

KeyPath: TypeAlias = tuple[str | int, ...]

_TOKEN = re.compile(
    r'''
    """ (?: \\. | [^\\] )*? """ "{0,2} | \'\'\' .*? \'\'\' \'{0,2}   # texts over several lines, which may end in quotes
    | " (?: \\. | [^"\\\n] )* " | ' [^'\n]* '
    | (?P<comment> \# [^\n]* ) | \n | [][{}=,.] | [^]\s"'\#[{}=,.]+
    ''',
    re.DOTALL | re.VERBOSE,
)
_DEPTH = 8  # deeper than any key of ours; what is below has the line of what is above


def key_lines(source: str) -> dict[KeyPath, int]:
    """Find the line of every key of a document that tomllib has accepted. It judges nothing and never raises."""
    return _Walk(source).lines


def _tokens(source: str) -> Iterator[tuple[str, int]]:
    line = 1
    for token in _TOKEN.finditer(source):
        if not token["comment"]:
            yield token[0], line
        line += token[0].count("\n")


class _Walk:
    def __init__(self, source: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._last: dict[KeyPath, int] = {}  # index of the newest table of each [[array]]
        self._left = deque(_tokens(source))
        table: KeyPath = ()
        while self._left:
            if self._next() == "[":
                table = self._header()
            elif self._next() == "\n":
                self._take()
            else:
                self._pair(table)

    def _next(self) -> str:
        return self._left[0][0] if self._left else ""

    def _take(self) -> tuple[str, int]:
        return self._left.popleft() if self._left else ("", 0)

    def _header(self) -> KeyPath:
        """`[a.b]` or `[[a.b]]`. Below the name of an array stands, in every path, the index of its newest table."""
        _, line = self._take()
        if self._next() != "[":
            return self._key((), "]")
        self._take()
        path = self._key((), "]")
        self._take()
        name = path[:-1] if path and isinstance(path[-1], int) else path
        self._last[name] = self._last.get(name, -1) + 1
        path = (*name, self._last[name])
        self.lines[path] = line
        return path

    def _key(self, table: KeyPath, end: str) -> KeyPath:
        """Read a dotted key up to and with the sign that ends it."""
        path = table
        while self._left:
            sign, line = self._take()
            if sign == end:
                break
            if sign not in (".", "\n") and len(path) < _DEPTH:
                path = (*path, _unquoted(sign))
                self.lines.setdefault(path, line)
                path += (self._last[path],) if path in self._last else ()
        return path

    def _pair(self, table: KeyPath) -> None:
        self._value(self._key(table, "="))

    def _value(self, path: KeyPath) -> None:
        sign, _ = self._take()
        if sign == "{":
            while self._inside("}"):
                self._pair(path)
        elif sign == "[":
            for index in count():
                if not self._inside("]"):
                    break
                item = (*path, index)[:_DEPTH]
                self.lines.setdefault(item, self._left[0][1])
                self._value(item)
        else:
            while self._next() not in ("", "\n", ",", "]", "}"):
                self._take()

    def _inside(self, end: str) -> bool:
        """Whether another entry follows; if none does, step over the end."""
        while self._next() in ("\n", ","):
            self._take()
        if self._next() in ("", end):
            self._take()
            return False
        return True


def _unquoted(sign: str) -> str:
    if sign[0] not in "\"'":
        return sign
    try:
        return str(tomllib.loads(f"key = {sign}")["key"])
    except tomllib.TOMLDecodeError:
        return sign
