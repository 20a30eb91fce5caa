"""Whatever others write, nobody sees a traceback: configuration, records, journal, kernel texts, events, command output.

The same examples on every machine; `HYPOTHESIS_PROFILE=search` goes looking for new ones. What was found once stands as an
@example. HTTP has a file of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from duende_ublkd import parts
from duende_ublkd.core import config as configuration
from duende_ublkd.core.config import InvalidConfigError
from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.holds import Hold, Holds
from duende_ublkd.core.model import Event, EventKind, Level
from duende_ublkd.kernel import children, holders, holdfile, nursery, runfile, servers, stuck, udev
from duende_ublkd.kernel.holders import Node
from duende_ublkd.report import objects, web, writer
from duende_ublkd.report.reader import read_file
from duende_ublkd.report.store import Record, records_of
from tests.test_config import loads_or_explains
from tests.test_holders import CHAR, DISK, FIRST_NS, Machine
from tests.test_ledger import QUIESCED, a_former_ledger, remembering, written
from tests.test_store import a_store, fill, opened, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEARCHES = os.environ.get("HYPOTHESIS_PROFILE") == "search"
LONGEST = 2.0  # seconds of CPU for one example, on the slowest of test machines
ANNOTATED = (Path(__file__).parent.parent / "config" / "duende-ublkd.toml").read_text()
BOOT = holdfile.boot_id()


def fuzzed(examples: int) -> settings:
    """So many, a hundred times as many in a search."""
    return settings(
        max_examples=examples * (100 if SEARCHES else 1),
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@contextlib.contextmanager
def in_bounded_time() -> Iterator[None]:
    before = time.process_time()
    yield
    assert time.process_time() - before < LONGEST


def error_of(do: Callable[[], object]) -> DuendeError | None:
    """What it raises, which nothing but an error for people may be."""
    try:
        do()
    except DuendeError as error:
        return error
    return None


def is_fit(text: str) -> bool:
    """For one line of a log, a table or a terminal."""
    return text.isprintable()


# --- mutations -------------------------------------------------------------------------------------------------------

# What parsers stumble over: signs of their own, numbers at their ends, bytes that are no text, and much of anything.
TRICKS = st.sampled_from(
    [
        *(bytes([sign]) for sign in b"\0\n\r \t\\\"'{}[]=.,:/-#"),
        *(
            b"\xff",
            b"\xed\xa0\x80",
            b"\xc0\xaf",
            b"\xe2\x80\xae",
            b"\x1b[2J",
            b"\\012",
            b"\\777",
            b"\xd9\xa3",
            b"\xef\xbb\xbf",
        ),
        *(
            b"0",
            b"-1",
            b"4294967295",
            b"18446744073709551616",
            b"9" * 5000,
            b"1e999",
            b"nan",
            b"0x",
            b"(deleted)",
            b") Z ",
        ),
        *(b"A" * 5000, b"[" * 3000, b"{" * 3000, b"((((", b"ublkb3", b"ublkc3", b"{server}", b"{{", b'"""', b"%s"),
    ]
)
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), TRICKS | st.binary(max_size=8) | st.just(b"")),
    min_size=1,
    max_size=5,
)


def changed(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """At so much of the way through it, so many bytes are replaced by others."""
    for place, drop, piece in changes:
        at = int(place * len(data))
        data = data[:at] + piece + data[at + drop :]
    return data


# --- the configuration


LINES = ANNOTATED.split("\n")
VALUES = st.sampled_from(
    [
        *('""', '"x"', "0", "-1", "1.5", "true", "[]", "{}", '["a"]', "[[1]]", "1979-05-27", "nan", '"30s"', '"9999d"'),
        *(
            '["{server}"]',
            '["/bin/sh", "{id}"]',
            '{ command = ["x"] }',
            '"\\u0000"',
            '"\\u202E\\n"',
            '"[::1]:1"',
            "[1, [2",
        ),
    ]
)
# Drop, double, move or uncomment a line, or give its key another value.
LINE_CHANGES = st.lists(
    st.tuples(st.sampled_from(["drop", "double", "move", "uncomment", "value"]), st.integers(0, len(LINES)), VALUES),
    min_size=1,
    max_size=12,
)


def with_changed_lines(changes: list[tuple[str, int, str]]) -> bytes:
    lines = list(LINES)
    for what, number, value in changes:
        at = number % len(lines)
        line = lines[at]
        if what == "drop":
            del lines[at]
        elif what == "double":
            lines.insert(at, line)
        elif what == "move":
            lines.append(lines.pop(at))
        elif what == "uncomment":
            lines[at] = line.removeprefix("#")
        else:
            lines[at] = f"{line.removeprefix('#').partition('=')[0]}= {value}"
    return "\n".join(lines).encode()


@fuzzed(400)
@given(LINE_CHANGES, CHANGES | st.just([]))
def test_the_annotated_configuration_however_it_is_changed_loads_or_is_explained(
    lines: list[tuple[str, int, str]], changes: list[tuple[float, int, bytes]]
) -> None:
    with in_bounded_time():
        loads_or_explains(changed(with_changed_lines(lines), changes))


@fuzzed(40)
@given(st.binary(max_size=200), st.integers(1, 64 * 1024))
def test_a_file_full_of_anything_is_read_in_bounded_time(piece: bytes, size: int) -> None:
    with in_bounded_time():
        loads_or_explains((piece * (size // max(len(piece), 1) + 1))[:size])


@fuzzed(40)
@given(LINE_CHANGES, CHANGES)
def test_a_configuration_file_is_read_or_refused_with_a_hint(
    lines: list[tuple[str, int, str]], changes: list[tuple[float, int, bytes]]
) -> None:
    """With all that is asked about its commands and its users."""
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/config.toml"
        Path(path).write_bytes(changed(with_changed_lines(lines), changes))
        refused = error_of(lambda: parts.read_config(path))
        assert refused is None or (refused.hint and refused.exit_code == 2)


@fuzzed(100)
@given(st.text(max_size=60), st.text(max_size=60))
@example("\0", "\ud800")
@example("\ud800", "\0")
def test_no_program_and_no_argument_makes_the_look_at_them_fail(program: str, argument: str) -> None:
    rule = configuration.Recovery((f"/{program}".replace("{", "").replace("}", ""), argument, f"/{argument}"))
    with contextlib.suppress(configuration.WrongValueError):
        parts._check_rule(rule)
    for _, sentence in parts.doubtful_arguments(rule):
        assert is_fit(sentence)


# --- records in the run directory


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
A_RECORD = written(a_former_ledger())
HOLDS = Holds([Hold(3, 1.0, 1e9, 0, "why", None), Hold(4, 1.0, 1e9, 1000, "", 77)]).to_record(BOOT)


def broken(value: Any, place: float, other: Any) -> Any:  # noqa: ANN401 - JSON
    """A copy with another value somewhere inside."""
    if isinstance(value, dict) and value:
        keys = list(value)
        key = keys[int(place * len(keys)) % len(keys)]
        return {**value, key: broken(value[key], place * len(keys) % 1, other)}
    if isinstance(value, list) and value:
        at = int(place * len(value)) % len(value)
        return [*value[:at], broken(value[at], place * len(value) % 1, other), *value[at + 1 :]]
    return other


@fuzzed(300)
@given(st.binary(max_size=80) | CHANGES.map(lambda changes: changed(json.dumps(HOLDS).encode(), changes)))
def test_whatever_the_file_of_holds_holds_it_is_understood_or_nobody_acts(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place, holdfile.NAME).write_bytes(data)
        refused = error_of(lambda: holdfile.load(place, 5.0))
        assert refused is None or (refused.hint and is_fit(str(refused)))


@fuzzed(300)
@given(st.floats(0, 0.999), JSON)
def test_holds_with_another_value_in_them_are_understood_or_refused(place: float, value: Any) -> None:  # noqa: ANN401
    with contextlib.suppress(ValueError):
        Holds.from_record(broken(HOLDS, place, value), BOOT, 5.0)


@fuzzed(100)
@given(
    st.dictionaries(
        st.sampled_from(["3.json", "4.json", "0003.json", "99999999999999.json", "x.json", ".3.json", "3"]),
        st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()),
        max_size=4,
    )
)
def test_whatever_lies_among_the_records_they_are_read_or_doubted(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as place:
        runfile.save_record(place, 5, {"a": 1})
        for name, data in files.items():
            Path(place, runfile.RECORDS, name).write_bytes(data)
        found, doubts = runfile.load_records(place)
        assert found[5] == {"a": 1}
        assert all(isinstance(record, dict) for record in found.values())
        assert len(found) + len(doubts) <= len(files) + 1


@fuzzed(400)
@given(JSON | st.builds(broken, st.just(A_RECORD), st.floats(0, 0.999), JSON))
def test_a_device_that_a_record_tells_of_is_understood_or_refused(record: Any) -> None:  # noqa: ANN401
    with contextlib.suppress(ValueError):
        remembering(record, QUIESCED)


# --- the kernel's texts


STAT = b"812 (ublk) S 1 812 812 0 -1 4194560 " + b"0 " * 12 + b"4242 " + b"0 " * 29 + b"0\n"
MOUNTINFO = (
    b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
    b"40 22 259:0 / /srv/da\\040ta rw,relatime - ext4 /dev/ublkb3 rw\n"
    b"41 22 0:52 / /mnt rw - btrfs /dev/ublkb3p1 rw\n42 22 0:4 mnt:[4026532999] /run/ns rw - nsfs nsfs rw\n"
)
SWAPS = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/ublkb3\\040(deleted)  partition\t8\t0\t-2\n"
CGROUP = b"4:memory:/x.service\n1:name=systemd:/system.slice/a.service\n0::/system.slice/ublk@3.service\n"
FDINFO = b"pos:\t0\nflags:\t0100002\nmnt_id:\t24\nino:\t7\n"
STATUS = b"Name:\tublk\nState:\tS (sleeping)\nCapEff:\t000001ffffffffff\nVmLck:\t       0 kB\n"


@fuzzed(500)
@given(st.sampled_from([STAT, MOUNTINFO, SWAPS, CGROUP, FDINFO, STATUS]), CHANGES)
def test_no_text_of_the_kernel_fails_a_parser_and_what_is_taken_from_it_is_bounded(
    text: bytes, changes: list[tuple[float, int, bytes]]
) -> None:
    text = changed(text, changes)
    with in_bounded_time():
        unit = servers.unit_of(text)
        assert is_fit(unit)
        assert len(unit) <= 200
        assert servers.start_time_of(text) >= 0
        servers.condition_of(text)
        holders.rdev_of(text)
        for path in (*holders.swap_paths(text), holders.unescape(text), text.decode("utf-8", "surrogateescape")):
            holders.disk_id(path)
            holders.char_id(path)
            nursery._named_by(path)
        for line in text.split(b"\n"):
            holders.mount_of(line)


LINKS = ["/dev/ublkc3", "/dev/ublkb3", "/dev/x", "/tmp/ublk", "mnt:[4026532999]", "/dev/ublkb3 (deleted)"]


def a_machine(root: Path, text_of: Callable[[bytes], bytes], link: str) -> Machine:
    machine = Machine(root)
    machine.nodes = dict.fromkeys([*LINKS, link], Node(stat.S_IFBLK, DISK)) | {"/dev/ublkc3": Node(stat.S_IFCHR, CHAR)}
    process = machine.process(812, ns=FIRST_NS, links={str(n): each for n, each in enumerate([*LINKS, link])})
    texts = {"stat": STAT, "cgroup": CGROUP, "mountinfo": MOUNTINFO, "comm": b"ublk\n", "fdinfo/0": FDINFO}
    for name, text in texts.items():
        (process / name).write_bytes(text_of(text))
    (machine.proc / "swaps").write_bytes(text_of(SWAPS))
    (machine.proc / "self" / "status").write_bytes(text_of(STATUS))
    disk = machine.disk("ublkb3", DISK)
    (disk / "dev").write_bytes(text_of(b"259:0\n"))
    loop = machine.disk("loop7", (7, 7))
    (loop / "loop").mkdir()
    (loop / "loop" / "backing_file").write_bytes(text_of(b"/dev/ublkb3\n"))
    return machine


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1, max_size=80).filter(
    lambda name: name.isprintable() or not name.strip("/").startswith("..")
)


@fuzzed(60)  # each one makes a tree of files
@given(CHANGES, st.lists(st.booleans(), min_size=8, max_size=8), NAMES)
def test_no_process_and_no_mount_breaks_a_look_or_a_line(
    changes: list[tuple[float, int, bytes]], chosen: list[bool], link: str
) -> None:
    left = list(chosen)
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(UnicodeEncodeError):
        machine = a_machine(Path(place), lambda text: changed(text, changes) if left and left.pop() else text, link)
        usage = machine.look()
        stuck.look(machine.proc)
        lines = [*map(str, usage.holders), *map(str, usage.char_openers), usage.blind]
        lines += [each.unit for each in usage.char_openers] + [each.exe for each in usage.char_openers]
        assert all(is_fit(line) and len(line) <= 300 for line in lines)


@fuzzed(200)
@given(st.binary(max_size=300), st.booleans())
def test_whatever_a_command_says_is_a_few_printable_lines(output: bytes, many: bool) -> None:  # noqa: FBT001
    shown = children._shown((output * (200 if many else 1)).decode("latin-1"))
    assert len(shown.split("\n")) <= children.MOST_LINES
    assert all(is_fit(line) for line in shown.split("\n"))


# --- uevents


class ADevice:
    """As pyudev hands it out: accessors that fail at what is no UTF-8 or is missing."""

    def __init__(self, **words: bytes | None) -> None:
        self._words = words

    def __getattr__(self, name: str) -> str | None:
        word = self._words[name]
        if word is None and name == "sys_name":
            raise AttributeError("'NoneType' object has no attribute 'decode'")
        return None if word is None else word.decode()


class Hints:
    def __init__(self) -> None:
        self.heard: list[tuple[str, str, int | None]] = []

    def on_uevent(self, subsystem: str, action: str, dev_id: int) -> None:
        self.heard.append((subsystem, action, dev_id))

    def on_driver(self, action: str) -> None:
        self.heard.append(("misc", action, None))

    def on_overflow(self) -> None:
        raise AssertionError("nothing was lost")

    def on_node(self, dev_id: int, *, opened: bool) -> None:
        raise AssertionError((dev_id, opened))


WORDS = st.none() | st.binary(max_size=12) | TRICKS
NAMES_OF_DEVICES = WORDS | st.sampled_from([b"ublkb3", b"ublkb3p1", b"ublkc3", b"ublk-control", b"ublkb" + b"9" * 30])
SUBSYSTEMS = WORDS | st.sampled_from([b"block", b"ublk-char", b"misc", b"bdi"])
ACTIONS = WORDS | st.sampled_from([b"add", b"remove", b"change"])


@fuzzed(400)
@given(SUBSYSTEMS, ACTIONS, NAMES_OF_DEVICES)
@example(b"block", b"add", b"ublkb3")
@example(b"misc", b"\xff", b"ublk-control")
@example(b"bdi", b"add", b"ublkb3")
def test_a_message_of_the_kernel_is_a_hint_about_ublk_or_nothing(
    subsystem: bytes | None, action: bytes | None, name: bytes | None
) -> None:
    hints = Hints()
    listening = object.__new__(udev.Uevents)
    listening._listener = hints
    listening._had_disk = set()
    listening._tell(ADevice(subsystem=subsystem, action=action, sys_name=name))
    for heard_subsystem, heard_action, dev_id in hints.heard:
        assert heard_subsystem in ("block", "ublk-char", "misc")
        assert heard_action in udev._ACTIONS | {"other"}
        assert dev_id is None or 0 <= dev_id < 10_000_000
    assert listening._had_disk <= {dev_id for _, _, dev_id in hints.heard}
    if (subsystem, action, name) == (b"block", b"add", b"ublkb3"):
        assert hints.heard == [("block", "add", 3)]


# --- the journal


@pytest.fixture(scope="module")
def a_journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "state"
    fill(place, 200)
    return place


def asked(database: writer.Database, **request: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
    answers = list(writer.answers(database, {"id": 1, **request}))
    json.dumps(answers)
    assert not answers[-1].get("more")
    assert is_fit(str(answers[-1].get("error", "")))
    return answers


@fuzzed(60)
@given(CHANGES, st.sampled_from(["", "", "-wal"]))
def test_a_damaged_journal_is_read_put_aside_or_told_of_and_the_next_one_is_written(
    a_journal: Path, changes: list[tuple[float, int, bytes]], suffix: str
) -> None:
    with tempfile.TemporaryDirectory() as root:
        place = Path(root, "state")
        shutil.copytree(a_journal, place)
        file = place / f"journal.sqlite{suffix}"
        file.write_bytes(changed(file.read_bytes() if file.exists() else bytes(4096), changes))
        with contextlib.suppress(DuendeError):
            read_file(str(place))
        database = writer.Database(str(place), 1e10, 64 << 20)
        event = [2**60, 1.0, "daemon", "info", None, "new", None]
        asked(database, do="open")
        asked(database, do="read", deadline=2.0, limit=50)
        asked(database, do="write", events=[event], state=[["k", "1"]])
        asked(database, do="write", events=[event], state=[["k", "1"]])  # damage that was met in writing
        (*_, last) = asked(database, do="read", deadline=2.0, limit=50)
        database.close()
        assert not last.get("error"), last


ODD = st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20)
ROWS = st.lists(st.tuples(ODD, ODD, ODD, ODD, ODD, ODD), min_size=1, max_size=5)
WELL_KNOWN = (1.0, "verdict", "info", 3, "text", '{"a": 1}')


@fuzzed(30)
@given(ROWS, st.integers(0, 63), st.dictionaries(st.text(max_size=10), st.text(max_size=10) | st.binary(), max_size=3))
@example([(float("inf"), *WELL_KNOWN[1:])], 0, {})
@example([(-1.0, *WELL_KNOWN[1:])], 0, {})
@example([(*WELL_KNOWN[:3], "three", "text", b"\xff")], 0, {"k": b"\xff"})
@example([(*WELL_KNOWN[:4], 5, "[" * 5000)], 0, {"k": "{"})
def test_a_journal_that_somebody_has_edited_stops_neither_the_daemon_nor_a_reader(
    a_journal: Path, rows: list[tuple[Any, ...]], kept: int, state: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        place = Path(root, "state")
        shutil.copytree(a_journal, place)
        with contextlib.closing(sqlite3.connect(place / "journal.sqlite", isolation_level=None)) as edited:
            for number, row in enumerate(rows):
                values = [
                    known if kept >> n & 1 else odd for n, (known, odd) in enumerate(zip(WELL_KNOWN, row, strict=True))
                ]
                with contextlib.suppress(sqlite3.IntegrityError, UnicodeEncodeError):
                    edited.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", [2**60 + number, *values])
            for key, value in state.items():
                with contextlib.suppress(UnicodeEncodeError):
                    edited.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", [key, value])
        for record in read_file(str(place)):
            web._dumps(objects.event_object(record))
        database = writer.Database(str(place), 1e10, 64 << 20)
        rows_of = [
            row for answer in asked(database, do="read", deadline=2.0, limit=9) for row in answer.get("rows", ())
        ]
        assert all(isinstance(record, Record) for record in records_of(rows_of))
        asked(database, do="open")
        database.close()


@fuzzed(200)
@given(st.text(), st.floats(), JSON, st.none() | st.integers())
def test_whatever_is_to_be_kept_of_an_event_is_fit_to_be_written_and_read(
    text: str,
    at: float,
    fact: Any,  # noqa: ANN401 - JSON
    dev_id: int | None,
) -> None:
    async def scenario() -> None:
        store = a_store(Path("/nowhere"))
        store.append(Event(at, EventKind.DAEMON, Level.INFO, text, dev_id, {"fact": fact, text: 1}))
        (record,) = store.tail()
        assert is_fit(record.event.text)
        json.loads(web._dumps(objects.event_object(record)))

    asyncio.run(scenario())


def test_a_state_that_nobody_has_saved_is_told_of_and_left_out(a_journal: Path, tmp_path: Path) -> None:
    place = tmp_path / "state"
    shutil.copytree(a_journal, place)
    with contextlib.closing(sqlite3.connect(place / "journal.sqlite", isolation_level=None)) as edited:
        for key, value in (("bad", "{"), ("deep", "[" * 40_000), ("raw", b"\xff"), ("good", "1")):
            edited.execute("INSERT INTO state VALUES (?, ?)", [key, value])

    async def scenario() -> dict[str, Any]:
        store = a_store(place)
        try:
            return await store.open(20)
        finally:
            await store.close(5)

    assert asyncio.run(scenario()) == {"ages": {"3": 1}, "good": 1}


def test_an_event_with_a_lone_surrogate_reaches_readers(tmp_path: Path) -> None:
    """Somebody has put it into the file as an escape, which JSON allows."""
    place = tmp_path / "state"
    fill(place, 1)
    with contextlib.closing(sqlite3.connect(place / "journal.sqlite", isolation_level=None)) as edited:
        row = [2**60, 1.0, "verdict", "info", 3, "text", '{"a": "\\ud800"}']
        edited.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    async def scenario() -> None:
        async with opened(place) as store:
            records, _ = await store.read()
            assert texts(records)[-1] == "text"
            assert json.loads(web._dumps(objects.event_object(records[-1])))["facts"] == {"a": "\ud800"}

    asyncio.run(scenario())


def test_an_error_of_the_configuration_is_one_that_check_config_shows(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b'[policy]\nx = "\x1b[2J"\n')
    with pytest.raises(InvalidConfigError) as found:
        parts.read_config(str(path))
    assert is_fit(str(found.value))
