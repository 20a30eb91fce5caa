"""The text of a web configuration file: YAML, with the line of each key. The only file that imports yaml.

Rules:
1. The document is composed and not constructed: no tag makes an object, and every scalar is the text that stands there, as
   Go takes it for a text. What it means is core.webconfig's to say.
2. An alias is refused, as a few lines of them stand for more than any memory holds; so is a key that stands there twice.

yaml and what it needs take 0.9 MiB of locked memory, so that it is imported by whoever has such a file, and by no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from duende_ublkd.core.config import MAX_BYTES, InvalidConfigError, Problem, refused
from duende_ublkd.core.text import printable
from duende_ublkd.core.webconfig import WebConfig, read_web_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from duende_ublkd.core.keylines import KeyPath

_DEEPEST = 8  # deeper than any key of ours
_NULL = "tag:yaml.org,2002:null"
_KNOWN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "bool", "float", "null", "timestamp", "map", "seq", "merge", "value")
)


def load(text: bytes, name: str, read: Callable[[str, bool], bytes]) -> WebConfig:
    """The file's configuration. `read(path, secret)`: what is in a file that it names. InvalidConfigError."""
    if len(text) > MAX_BYTES:
        raise refused(name, f"larger than {MAX_BYTES // 1024} KiB", "name a web configuration file")
    try:
        _check_depth(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        raise _problem(name, mark.line + 1 if mark else 0, f"is no YAML: {what}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise _problem(name, 0, f"is no YAML: {error}") from None
    reading = _Reading(name)
    data = reading.value(root, ()) if root else None
    return read_web_config(data, reading.lines, name, read)


_DEEPER = (
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
)
_LESS_DEEP = (yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken, yaml.BlockEndToken)


def _check_depth(text: bytes, name: str) -> None:
    """Before anything recurses; yaml's time grows with the depth, too."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        depth += isinstance(token, _DEEPER) - isinstance(token, _LESS_DEEP)
        if depth > _DEEPEST:
            raise _problem(name, token.start_mark.line + 1, "is nested too deeply")


def _problem(name: str, line: int, what: str) -> InvalidConfigError:
    hint = "see prometheus.io: Documentation, HTTPS and authentication"
    return InvalidConfigError(Problem(printable(name), line, "", printable(" ".join(what.split()), 300), hint))


class _Reading:
    """One document, and the line of each of its keys."""

    def __init__(self, name: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._name = name
        self._seen: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:  # noqa: ANN401 - a tree
        """Mappings, sequences, texts and None."""
        line = node.start_mark.line + 1
        if id(node) in self._seen:
            raise _problem(self._name, line, "an alias (*) is not supported: write it out")
        self._seen.add(id(node))
        if node.tag not in _KNOWN_TAGS:
            raise _problem(self._name, line, f"the tag {node.tag} is not supported: remove it")
        match node:
            case yaml.MappingNode():
                return self._mapping(node, path)
            case yaml.SequenceNode():
                return [self.value(each, (*path, index)) for index, each in enumerate(node.value)]
            case _:
                return None if node.tag == _NULL else str(node.value)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _problem(self._name, line, "has a key that is no text")
            name = str(key.value)
            if name in found:
                raise _problem(self._name, line, f"has the key {printable(name)} twice")
            here = (*path, name)
            self.lines[here] = line
            found[name] = self.value(value, here)
        return found
