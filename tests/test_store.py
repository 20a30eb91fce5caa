"""The journal on real files, with the real writer: what survives what, and that nobody ever waits for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.model import Event, EventKind, Level
from duende_ublkd.kernel.children import Children
from duende_ublkd.report import store as store_module
from duende_ublkd.report import writer as writer_module
from duende_ublkd.report.alerts import book
from duende_ublkd.report.reader import read_file
from duende_ublkd.report.store import MOST_WAITING, TAIL, Record, Store, size_in_batch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

T = TypeVar("T")
NOBODY = 65534
AT_ONCE = 0.5  # seconds; far more than a call that waits for nothing takes, far less than any deadline here


@dataclasses.dataclass
class Heard:
    """What the daemon was told."""

    troubles: list[str] = dataclasses.field(default_factory=list)
    recovered: list[int] = dataclasses.field(default_factory=list)


def run(task: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(300):
            return await task

    return asyncio.run(bounded())


def a_store(directory: Path, heard: Heard | None = None, **changes: Any) -> Store:  # noqa: ANN401 - as Store() takes them
    heard = heard or Heard()
    settings: dict[str, Any] = {"max_age": 1e10, "max_bytes": 64 << 20, "first_pause": 0.05}
    return Store(
        str(directory),
        on_trouble=heard.troubles.append,
        on_recovered=heard.recovered.append,
        **(settings | changes),
    )


@contextlib.asynccontextmanager
async def opened(
    directory: Path,
    heard: Heard | None = None,
    *,
    within: float = 3.0,
    closes_within: float = 5.0,
    **changes: Any,  # noqa: ANN401 - as Store() takes them
) -> AsyncIterator[Store]:
    store = a_store(directory, heard, **changes | {"answer_within": 20.0})
    await store.open(within)
    store._answer_within = changes.get("answer_within", 5.0)  # silence is tried on an open journal, not on its start
    try:
        yield store
    finally:
        if pid := store.writer_pid:
            os.kill(pid, signal.SIGCONT)
        await store.close(closes_within)


def an_event(text: str = "ublk3 is orphaned", **changes: Any) -> Event:  # noqa: ANN401 - fields of Event
    event = Event(time.time(), EventKind.VERDICT, Level.INFO, text)
    return dataclasses.replace(event, **changes)


async def until(condition: Callable[[], object], deadline: float = 60) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        await asyncio.sleep(0.005)


async def refused(store: Store, why: str) -> None:
    """Until the writer has said so; a busy machine starts one late, which is told before."""
    await until(lambda: why in store.stats.trouble)


def refusals(heard: Heard) -> list[str]:
    return [each for each in heard.troubles if each != store_module.NO_ANSWER]


async def written(store: Store) -> None:
    await until(lambda: not store.stats.waiting and not store._unsaved and not store._flight)


def texts(records: list[Record]) -> list[str]:
    return [record.event.text for record in records]


def stop(store: Store) -> int:
    """Nothing of the writer runs any more, as if it were in an uninterruptible sleep."""
    assert store.writer_pid
    os.kill(store.writer_pid, signal.SIGSTOP)
    return store.writer_pid


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def bytes_on_disk(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0750", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_events_come_back_in_their_order_with_all_that_was_in_them(place: Path) -> None:
    async def write() -> list[Record]:
        async with opened(place) as store:
            for number in range(250):
                kind, level = list(EventKind)[number % 6], list(Level)[number % 3]
                facts = {"number": number, "nested": {"list": [1, None, "é"]}} if number % 2 else {}
                dev_id = None if number % 5 else number
                store.append(an_event(f"event {number}", kind=kind, level=level, dev_id=dev_id, facts=facts))
            return store.tail()

    async def read() -> tuple[list[Record], str]:
        async with opened(place) as store:
            assert store.tail() == []
            return await store.read(limit=1000)

    kept = run(write())
    assert texts(kept) == [f"event {number}" for number in range(250)]
    assert run(read()) == (kept, "")
    assert read_file(str(place), limit=1000) == kept


def test_a_read_gives_the_newest_that_match_oldest_first_written_or_not(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            for number in range(300):
                kind = EventKind.HOLD if number % 2 else EventKind.ALERT
                store.append(an_event(f"{number}", dev_id=number % 3, kind=kind, at=1000.0 + number))
            await written(store)
            middle = (await store.read(limit=300))[0][149].seq
            pid = stop(store)
            store.append(an_event("300", dev_id=0, kind=EventKind.ALERT, at=1300.0))
            asyncio.get_running_loop().call_later(0.2, os.kill, pid, signal.SIGCONT)
            assert texts((await store.read(limit=3))[0]) == ["298", "299", "300"]
            assert texts((await store.read(limit=2, dev_id=0))[0]) == ["297", "300"]
            assert texts((await store.read(limit=2, kinds={EventKind.HOLD}))[0]) == ["297", "299"]
            assert len((await store.read(limit=300, after=middle))[0]) == 151
            assert texts((await store.read(since=1299.0))[0]) == ["299", "300"]
            assert (await store.read(limit=0)) == ([], "")
        assert texts(read_file(str(place), limit=2, dev_id=0, kinds=[EventKind.ALERT], since=1000.0)) == ["294", "300"]

    run(scenario())


def saved(place: Path) -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        store = a_store(place)
        state = await store.open(60)
        await store.close(60)
        return state

    return run(read())


def test_state_survives_and_its_latest_value_wins(place: Path) -> None:
    async def write() -> None:
        async with opened(place) as store:
            store.save("gone", 1)
            store.save("holds", {"boot_id": "x", "holds": [{"dev_id": 3}]})
            await written(store)
            for number in range(1000):
                store.save("ages", {"3": number})
            store.save("gone", None)

    run(write())
    assert saved(place) == {"holds": {"boot_id": "x", "holds": [{"dev_id": 3}]}, "ages": {"3": 999}}


def test_much_state_comes_back_though_it_fits_no_single_message(place: Path) -> None:
    wanted = {f"key {number}": '"' * 10_000 for number in range(20)}

    async def scenario() -> dict[str, Any]:
        async with opened(place) as store:
            for key, value in wanted.items():
                store.save(key, value)
            await written(store)
        other = a_store(place)
        state = await other.open()
        await other.close()
        return state

    assert run(scenario()) == wanted


def test_a_thousand_devices_and_a_full_book_of_alerts_are_kept_beside_each_other(place: Path) -> None:
    heard = Heard()
    devices = {f"device/{number}": '"' * 260 for number in range(1000)}  # as large as records of devices are
    most = book.MOST_BYTES // 1000
    alerts = {f"alert/{number}": {"alert": "x" * (most - 40)} for number in range(1000)}
    wanted: dict[str, Any] = {**devices, **alerts}

    async def scenario() -> dict[str, Any]:
        async with opened(place, heard) as store:
            for key, value in wanted.items():
                store.save(key, value)
            assert store.stats.trouble == ""
            await written(store)
        other = a_store(place)
        state = await other.open()
        await other.close()
        return state

    sizes = [sum(size_in_batch(key, json.dumps(each[key])) for key in each) for each in (devices, alerts)]
    assert sizes[0] > 780_000
    assert sizes[1] > 0.98 * book.MOST_BYTES
    assert run(scenario()) == wanted
    assert heard.troubles == []


def test_state_that_is_too_large_is_refused_aloud_and_the_former_value_stays(place: Path) -> None:
    heard = Heard()

    async def scenario() -> dict[str, Any]:
        async with opened(place, heard) as store:
            store.save("holds", [1])
            store.save("holds", "x" * 100_000)
            store.save("holds", "x" * 100_000)
            assert "holds" in store.stats.trouble
            assert len(heard.troubles) == 1
            await written(store)
            stored = dict(store._state.items())
            store.save("holds", [1])
            assert store.stats.trouble == ""
            store.save("holds", "x" * 100_000)
            store.save("holds", [2])
            assert heard.recovered == [0, 0]
            return stored

    assert run(scenario()) == {"holds": "[1]"}


def test_a_seq_always_grows_though_the_clock_is_set_back_even_over_a_restart(place: Path) -> None:
    async def append(now: float) -> list[int]:
        async with opened(place, clock=lambda: now) as store:
            return [store.append(an_event()) for _ in range(3)]

    first = run(append(2000.0))
    second = run(append(1000.0))
    assert first == [2_000_000_000, 2_000_000_001, 2_000_000_002]
    assert second == [2_000_000_003, 2_000_000_004, 2_000_000_005]


def test_hostile_text_and_facts_are_made_printable_and_survive(place: Path) -> None:
    hostile = ["a\nb", "nul \0 here", "\udc80 \ud800", "\x1b[31mred", "é" * 4096, "\U0001f600" * 4096, "'; DROP TABLE"]
    facts = {"raw": "\0\n\udc80\ud800\x1b", 'quote"': ["é", 1.5, None]}

    async def scenario() -> list[Record]:
        async with opened(place) as store:
            for text in hostile:
                store.append(an_event(text, facts=facts))
            tail = store.tail()
            await written(store)
            assert (await store.read())[0] == tail
            return tail

    tail = run(scenario())
    assert read_file(str(place)) == tail
    assert all(text.isprintable() and len(text.encode()) <= 4096 for text in texts(tail))
    assert all(record.event.facts == facts for record in tail)
    assert texts(tail)[0] == "a\\nb"
    assert texts(tail)[-1] == "'; DROP TABLE"


def test_facts_that_do_not_fit_are_left_out_and_the_row_says_so(place: Path) -> None:
    circular: dict[str, Any] = {"small": 1}
    circular["self"] = circular
    odd: list[dict[str, Any]] = [
        {"small": 1, "large": "x" * 100_000},
        {"small": 1, "object": object()},
        {"small": 1, "nan": float("nan")},
        circular,
        {"small": 1} | {f"name{number}": "x" * 100 for number in range(500)},
    ]

    async def scenario() -> list[Record]:
        async with opened(place) as store:
            for facts in odd:
                store.append(an_event(facts=facts))
            return store.tail()

    tail = run(scenario())
    assert read_file(str(place)) == tail
    assert all(record.event.facts["small"] == 1 for record in tail)
    assert all("left out" in record.event.facts[store_module.CUT] for record in tail)
    assert "large" in tail[0].event.facts[store_module.CUT]


def test_an_event_of_no_finite_time_gets_the_time_of_its_arrival(place: Path) -> None:
    async def scenario() -> list[Record]:
        async with opened(place, clock=lambda: 77.0) as store:
            store.append(an_event(at=float("nan")))
            return store.tail()

    assert run(scenario())[0].event.at == 77.0
    assert read_file(str(place))[0].event.at == 77.0


# --- who may, and where ------------------------------------------------------------------------------------------------


def test_the_file_is_for_its_owner_alone_and_the_writer_is_a_process_like_any_other(place: Path) -> None:
    async def scenario() -> None:
        Path("/proc/self/oom_score_adj").write_text("100")
        try:
            async with opened(place) as store:
                process = Path(f"/proc/{store.writer_pid}")
                assert (process / "oom_score_adj").read_text().strip() == "0"
                links = {str(link.readlink()) for link in (process / "fd").iterdir()}
                ours = (str(place), "socket:", "/dev/null")
                assert all(link.startswith(ours) for link in links), links
                assert "VmLck:\t       0 kB" in (process / "status").read_text()
                assert [stat.st_mode & 0o777 for stat in map(Path.stat, place.iterdir())] == [0o600] * 3
        finally:
            Path("/proc/self/oom_score_adj").write_text("0")

    run(scenario())
    assert place.stat().st_mode & 0o777 == 0o700


def test_the_daemon_has_no_sqlite_and_the_writer_no_asyncio() -> None:
    daemon = "import sys; import duende_ublkd.report.store; sys.exit('sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", daemon], check=False).returncode == 0
    program = Path(writer_module.__file__).read_text()
    child = f"{program.replace('__main__', '')}\nsys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-S", "-c", child], check=False).returncode == 0


@pytest.mark.parametrize("which", ["file", "log"])
def test_a_symbolic_link_is_not_followed(place: Path, tmp_path: Path, which: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    place.mkdir(mode=0o750)
    (place / f"journal.sqlite{'' if which == 'file' else '-wal'}").symlink_to(target)
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard, within=0.3) as store:
            store.append(an_event())
            await refused(store, "symbolic link")

    run(scenario())
    assert len(refusals(heard)) == 1
    assert target.read_bytes() == b""


def test_a_directory_that_others_can_write_or_own_is_refused(place: Path) -> None:
    async def is_refused(why: str) -> None:
        store = a_store(place)
        assert await store.open(deadline=0.5) == {}
        await refused(store, why)
        await store.close()

    place.mkdir(mode=0o750)
    place.chmod(0o770)
    run(is_refused("can be written by others (mode 0770)"))
    place.chmod(0o750)
    os.chown(place, NOBODY, 0)
    run(is_refused(f"belongs to uid {NOBODY}"))
    assert list(place.iterdir()) == []


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


@pytest.mark.parametrize("which", ["journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.chmod(0o660), "can be written by others (mode 0660): chmod go-w "),
        (lambda path: os.chown(path, NOBODY, -1), f"belongs to uid {NOBODY}: chown 0 "),
        (lambda path: path.with_name("other").hardlink_to(path), "has another name somewhere"),
        (_replace_by_fifo, "is no regular file"),
        (_replace_by_link, "is a symbolic link"),
    ],
)
def test_a_file_that_others_may_change_is_refused_and_the_daemon_goes_on_in_memory(
    place: Path, which: str, spoil: Callable[[Path], object], why: str
) -> None:
    fill(place, 1)
    (place / which).touch()
    spoil(place / which)
    before = names(place)
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard, within=0.5) as store:
            store.append(an_event("kept in memory"))
            await refused(store, why)
            records, note = await store.read()
            assert texts(records) == ["kept in memory"]
            assert why in note

    run(scenario())
    assert names(place) == before
    assert len(refusals(heard)) == 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.parent.chmod(0o777), "outer can be written by others (mode 0777): chmod go-w "),
        (lambda path: os.chown(path.parent, NOBODY, -1), f"outer belongs to uid {NOBODY}"),
        (_replace_by_link, "is a symbolic link: write what it leads to as state_dir"),
        (_replace_by_file, "is no directory"),
    ],
)
def test_a_directory_that_is_not_where_it_seems_or_that_others_can_replace_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    state = tmp_path / "outer" / "state"
    state.parent.mkdir()
    heard = Heard()

    async def scenario(directory: str) -> None:
        async with opened(Path(directory), heard, within=0.5) as store:
            await refused(store, why)

    run(opened_and_closed(state))
    spoil(state)
    before = sorted(tmp_path.rglob("*"))
    run(scenario(f"{state}"))
    assert sorted(tmp_path.rglob("*")) == before


async def opened_and_closed(place: Path) -> None:
    async with opened(place, closes_within=60) as store:
        assert not store.stats.trouble


def test_a_slash_at_its_end_does_not_hide_a_link(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    database = writer_module.Database(f"{place}//", 0.0, 1 << 20)
    with pytest.raises(writer_module.RefusedError, match="is a symbolic link"):
        database.opened()
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("which", ["state", "journal.sqlite"])
def test_a_reader_believes_nothing_that_others_may_have_written(place: Path, which: str) -> None:
    fill(place, 1)
    path = place if which == "state" else place / which
    assert read_file(str(place))
    path.chmod(0o777)
    with pytest.raises(DuendeError, match=r"is not believed: it can be written by others \(mode 0777\)"):
        read_file(str(place))
    path.chmod(0o755)
    os.chown(path, NOBODY, -1)
    with pytest.raises(DuendeError, match=f"is not believed: it belongs to uid {NOBODY}"):
        read_file(str(place))


def test_a_reader_waits_for_no_fifo(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.mkfifo(place / "journal.sqlite")
    with pytest.raises(DuendeError, match="is no regular file"):
        read_file(str(place))


def test_a_file_of_a_newer_version_is_left_as_it_is(place: Path) -> None:
    place.mkdir(mode=0o750)
    with contextlib.closing(sqlite3.connect(place / "journal.sqlite")) as newer:
        newer.execute("CREATE TABLE other(x)")
        newer.execute("PRAGMA user_version = 2")
    before = (place / "journal.sqlite").read_bytes()
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard, within=0.3) as store:
            store.append(an_event("kept in memory"))
            await refused(store, "has version 2")
            records, why = await store.read()
            assert texts(records) == ["kept in memory"]
            assert "has version 2" in why

    run(scenario())
    assert (place / "journal.sqlite").read_bytes() == before
    assert names(place) == ["journal.sqlite"]
    with pytest.raises(DuendeError, match="newer duende-ublkd"):
        read_file(str(place))


# --- damage ------------------------------------------------------------------------------------------------------------


def fill(place: Path, count: int = 2000) -> None:
    """Until its writer has ended, which removes the log: with it, what a test puts in the log's place would go, too."""

    async def scenario() -> None:
        async with opened(place, closes_within=60) as store:
            store.save("ages", {"3": 1})
            for number in range(count):
                store.append(an_event(f"event {number}"))
                if number % 1000 == 0:
                    await written(store)
            await written(store)

    run(scenario())


def make_garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def make_torn(path: Path) -> None:
    """The header is sound, the pages are not."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))


def make_foreign(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as foreign:
        foreign.execute("CREATE TABLE events(something_else)")


@pytest.mark.parametrize("damage", [make_garbage, make_torn, make_foreign])
def test_a_damaged_file_is_put_aside_and_a_new_one_begun(place: Path, damage: Callable[[Path], None]) -> None:
    fill(place)
    damage(place / "journal.sqlite")
    before = (place / "journal.sqlite").read_bytes()
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard) as store:
            store.append(an_event("after"))
            await written(store)
            records, why = await store.read()
            assert why == ""
            assert texts(records)[1:] == ["after"]
            assert "journal.sqlite.corrupt-1" in records[0].event.text
            assert records[0].event.level is Level.WARNING

    run(scenario())
    assert (place / "journal.sqlite.corrupt-1").read_bytes() == before
    assert len(heard.troubles) == len(heard.recovered) == 1
    assert "damaged" in heard.troubles[0]


def test_only_the_last_damaged_files_are_kept(place: Path) -> None:
    for _ in range(4):
        fill(place, 1)
        make_garbage(place / "journal.sqlite")
    fill(place, 1)
    assert names(place) == ["journal.sqlite", "journal.sqlite.corrupt-3", "journal.sqlite.corrupt-4"]


def test_a_file_that_is_removed_under_the_writer_is_begun_anew_with_the_state(place: Path) -> None:
    heard = Heard()

    async def scenario() -> dict[str, Any]:
        async with opened(place, heard) as store:
            store.save("holds", [3])
            store.append(an_event("before"))
            await written(store)
            for path in place.iterdir():
                path.unlink()
            store.append(an_event("after"))
            await written(store)
        other = a_store(place)
        state = await other.open()
        await other.close()
        return state

    assert run(scenario()) == {"holds": [3]}
    assert "after" in texts(read_file(str(place)))
    assert "removed" in heard.troubles[0]


# --- a writer that dies ------------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_among_many_events_loses_none_and_doubles_none(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard) as store:
            for number in range(4000):
                store.append(an_event(f"event {number}"))
                if number % 1000 == 500:
                    before = store.stats.written
                    await until(lambda before=before: store.stats.written > before)  # type: ignore[misc]
                    assert store.writer_pid
                    os.kill(store.writer_pid, signal.SIGKILL)
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await written(store)
            assert store.stats.dropped == 0

    run(scenario())
    kept = texts(read_file(str(place), limit=10_000))
    assert [text for text in kept if text.startswith("event")] == [f"event {number}" for number in range(4000)]
    assert len(heard.recovered) == len(heard.troubles) >= 2
    assert all("killed by signal 9" in trouble for trouble in heard.troubles)


def test_what_was_acknowledged_is_there_after_the_writer_was_killed(place: Path) -> None:
    async def scenario() -> list[int]:
        async with opened(place, first_pause=60) as store:
            seqs = [store.append(an_event()) for _ in range(1000)]
            await until(lambda: store.stats.written >= 300)
            assert store.writer_pid
            os.kill(store.writer_pid, signal.SIGKILL)
            acknowledged = seqs[: store.stats.written]
            await until(lambda: store.writer_pid is None)
            found = [record.seq for record in read_file(str(place), limit=10_000)]
            assert found == seqs[: len(found)]
            assert len(found) >= len(acknowledged)
            return acknowledged

    assert len(run(scenario())) >= 300


def test_signals_to_the_whole_service_do_not_end_the_writer(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            pid = store.writer_pid
            assert pid
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
            store.append(an_event("after the signals"))
            await written(store)
            assert store.writer_pid == pid

    run(scenario())
    assert texts(read_file(str(place))) == ["after the signals"]


def test_a_daemon_that_is_killed_loses_nothing_that_the_writer_has(place: Path) -> None:
    program = f"""
        import asyncio, os, signal, time
        from duende_ublkd.core.model import Event, EventKind, Level
        from duende_ublkd.report.store import Store

        async def main():
            store = Store({str(place)!r}, max_age=1e9, max_bytes=64 << 20, on_trouble=print, on_recovered=print)
            await store.open()
            reading = asyncio.create_task(store.read())
            await asyncio.sleep(0)
            time.sleep(0.3)  # so that there is an answer that nobody takes
            os.kill(store.writer_pid, signal.SIGSTOP)
            for number in range(100):
                store.append(Event(time.time(), EventKind.ACTION, Level.WARNING, f"event {{number}}"))
            store._pump()
            assert store._flight
            print(store.writer_pid, flush=True)
            os._exit(0)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, check=True, timeout=30, capture_output=True)
    os.kill(int(done.stdout), signal.SIGCONT)

    async def scenario() -> None:
        await until(lambda: (place / "journal.sqlite").exists() and len(read_file(str(place))) == 100)

    run(scenario())


def test_a_writer_that_cannot_be_started_is_told_and_tried_again(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        store = a_store(place, heard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            assert await store.open(deadline=0.3) == {}
            store.append(an_event("kept"))
            assert "cannot be started: Too many open files" in store.stats.trouble
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await written(store)
        await store.close()

    run(scenario())
    assert texts(read_file(str(place)))[0] == "kept"
    assert len(heard.troubles) == 1
    assert heard.recovered == [0]


# --- a writer that somebody else starts --------------------------------------------------------------------------------


@contextlib.contextmanager
def a_nursery() -> Iterator[Children]:
    """The daemon's children, which start what the daemon itself must not."""
    children = Children()
    children.start()
    try:
        yield children
    finally:
        children.close()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def another_writer(store: Store, *, than: int) -> int:
    await until(lambda: store.writer_pid not in {None, than})
    assert store.writer_pid
    return store.writer_pid


def test_the_first_writer_is_a_child_of_ours_and_each_later_one_is_spawned(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        with a_nursery() as children:
            async with opened(place, heard, spawn=children.spawn) as store:
                pid = store.writer_pid
                assert pid
                assert parent_of(pid) == os.getpid()
                for number in range(3):
                    store.append(an_event(f"event {number}"))
                    await written(store)
                    os.kill(pid, signal.SIGKILL)
                    pid = await another_writer(store, than=pid)
                    assert parent_of(pid) == children.nursery_pid
                    await until(lambda number=number: len(heard.recovered) == number + 1)  # type: ignore[misc]
                links = {str(link.readlink()).split(":")[0] for link in Path(f"/proc/{pid}/fd").iterdir()}
                assert {"/dev/null", "socket"} <= links
                assert all(link in {"/dev/null", "socket"} or link.startswith(str(place)) for link in links)
        assert not Path(f"/proc/{pid}").exists()

    run(scenario())
    assert [text for text in texts(read_file(str(place))) if text.startswith("event")] == [
        f"event {number}" for number in range(3)
    ]
    assert "killed by signal 9" in heard.troubles[0]
    assert heard.troubles[1:] == ["the journal's writer ended; another one is started"] * 2


def can_be_leased(descriptor: int) -> bool:
    """From then on whoever opens the file waits, as for a disk that hangs. Not so while others have it open."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    return True


def test_a_disk_that_hangs_while_a_later_writer_is_executed_holds_up_nobody(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    heard = Heard()
    lags: list[float] = []

    async def tick() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - began)

    async def scenario() -> None:
        with a_nursery() as children:
            async with opened(place, heard, spawn=children.spawn, answer_within=0.2) as store:
                pid = store.writer_pid
                assert pid
                lease = os.open(program, os.O_RDONLY)
                await until(lambda: can_be_leased(lease))  # the nursery's shell may be reading it
                ticking = asyncio.ensure_future(tick())
                os.kill(pid, signal.SIGKILL)
                await until(lambda: store.stats.trouble == "the journal's disk does not answer")
                store.append(an_event("kept"))
                await asyncio.sleep(1)
                assert store.writer_pid is None
                ticking.cancel()
                os.close(lease)
                await until(lambda: heard.recovered)
                await written(store)

    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        run(scenario())
    finally:
        signal.signal(signal.SIGIO, before)
    assert "kept" in texts(read_file(str(place)))
    assert max(lags) < AT_ONCE


def test_a_writer_that_cannot_be_spawned_is_told_and_tried_again(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        children = Children()
        async with opened(place, heard, spawn=children.spawn) as store:
            pid = store.writer_pid
            assert pid
            os.kill(pid, signal.SIGKILL)
            await until(
                lambda: "cannot be started: no child took the order: the nursery is gone" in store.stats.trouble
            )
            children.start()
            await until(lambda: heard.recovered)
            assert await another_writer(store, than=pid)
        children.close()

    run(scenario())


def test_a_writer_that_ends_before_it_has_told_of_a_new_file_loses_no_state(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            store.save("ages", {"3": 1})
            await written(store)
            pid = stop(store)
            with contextlib.closing(sqlite3.connect(place / "journal.sqlite")) as file, file:
                file.execute("DELETE FROM state")  # as a new file, of which nobody has been told, has none
            os.kill(pid, signal.SIGKILL)
            assert await another_writer(store, than=pid)
            await written(store)

    run(scenario())
    assert saved(place) == {"ages": {"3": 1}}


def test_a_directory_that_is_refused_is_not_waited_for(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)

    async def scenario() -> None:
        store = a_store(place)
        began = time.monotonic()
        assert await store.open(60) == {}
        assert time.monotonic() - began < 30
        assert "chmod go-w" in store.stats.trouble
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await store.open(math.inf)
        place.chmod(0o700)
        assert await store.open(math.inf) == {}
        await store.close(20)

    run(scenario())


def test_what_was_too_large_is_no_trouble_any_more_when_it_is_no_longer_wanted(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard) as store:
            store.save("alerts", "x" * 100_000)
            assert "too large" in store.stats.trouble
            store.save("alerts", None)
            assert store.stats.trouble == ""
            assert heard.recovered == [0]

    run(scenario())


def test_an_answer_that_came_while_the_loop_stalled_is_an_answer(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            store.append(an_event("kept"))
            await written(store)
            reading = asyncio.ensure_future(store.read(deadline=0.2))
            await asyncio.sleep(0)
            time.sleep(0.6)  # the stall itself: the answer is there, and its deadline over
            records, note = await reading
            assert texts(records) == ["kept"]
            assert note == ""

    run(scenario())


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As with a thousand devices: the next descriptor is above what select() takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, max(hard, 2048)))
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_a_writer_whose_descriptors_are_high_numbers_is_replaced_as_any_other(place: Path) -> None:
    async def scenario() -> None:
        with a_nursery() as children:
            async with opened(place, spawn=children.spawn) as store:
                for _ in range(2):
                    pid = store.writer_pid
                    assert pid
                    os.kill(pid, signal.SIGKILL)
                    assert await another_writer(store, than=pid)
                store.append(an_event("kept"))
                await written(store)

    run(scenario())


A_LAGGARD = """
import os, socket, time
socket.socket(fileno=os.dup(0)).send(b'{"id": 0}')
os.closerange(0, 256)
time.sleep(100)
"""


def test_a_writer_that_takes_its_time_to_end_is_no_trouble_and_has_none_beside_it(place: Path) -> None:
    heard = Heard()
    slow = A_LAGGARD.replace("sleep(100)", "sleep(0.5)")
    started: list[subprocess.Popen[bytes]] = []

    def spawn(argv: Sequence[str], stdin: int) -> None:
        assert all(each.poll() is not None for each in started)
        started.append(subprocess.Popen(argv if started else [sys.executable, "-c", slow], stdin=stdin))

    async def scenario() -> None:
        async with opened(place, heard, spawn=spawn) as store:
            assert store.writer_pid
            os.kill(store.writer_pid, signal.SIGKILL)
            await until(lambda: len(started) == 2)
            await until(lambda: len(heard.recovered) == 1)

    try:
        run(scenario())
    finally:
        for each in started:
            each.kill()
            each.wait()
    assert not [each for each in heard.troubles if "hangs" in each]


A_SLOW_END = """
import os, runpy, sys, time
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
os.closerange(0, 256)
time.sleep(0.3)  # its socket is closed, and it runs still: what the loop is to stall in
"""


def test_a_loop_that_stalls_while_the_writer_ends_for_good_starts_no_other(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    script = tmp_path / "slow.py"
    script.write_text(A_SLOW_END)
    program.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    started: list[Sequence[str]] = []

    def spawn(argv: Sequence[str], stdin: int) -> None:
        started.append(argv)
        subprocess.Popen(argv, stdin=stdin)

    async def scenario() -> None:
        store = a_store(place, spawn=spawn)
        await store.open(20)
        store.append(an_event("kept"))
        closing = asyncio.ensure_future(store.close(20))
        await until(lambda: not store.writer_pid)
        store.append(an_event("too late"))
        time.sleep(0.6)  # the stall itself: the writer ends meanwhile, and the next try would be due
        await closing

    run(scenario())
    assert started == []
    assert texts(read_file(str(place))) == ["kept"]


def test_no_writer_is_spawned_beside_one_that_hangs_while_it_ends(place: Path) -> None:
    heard = Heard()
    laggards: list[subprocess.Popen[bytes]] = []

    def spawn(_: Sequence[str], stdin: int) -> None:
        laggards.append(subprocess.Popen([sys.executable, "-c", A_LAGGARD], stdin=stdin))

    async def scenario() -> None:
        async with opened(place, heard, spawn=spawn) as store:
            assert store.writer_pid
            os.kill(store.writer_pid, signal.SIGKILL)
            await until(lambda: "the journal's writer hangs while it ends" in heard.troubles)
            await asyncio.sleep(0.3)
            assert len(laggards) == 1
            laggards[0].kill()
            await until(lambda: len(laggards) == 2)

    try:
        run(scenario())
    finally:
        for each in laggards:
            each.kill()
            each.wait()


A_BABBLER = """
import socket, time
channel = socket.socket(fileno=0)
channel.send(b"nonsense")
time.sleep(100)
"""


def test_a_spawned_writer_that_cannot_be_understood_is_replaced(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        with a_nursery() as children:
            argvs = [[sys.executable, "-c", A_BABBLER]]

            def spawn(argv: Sequence[str], stdin: int) -> None:
                children.spawn(argvs.pop() if argvs else argv, stdin)

            async with opened(place, heard, spawn=spawn) as store:
                assert store.writer_pid
                os.kill(store.writer_pid, signal.SIGKILL)
                store.append(an_event("kept"))
                await until(lambda: heard.recovered)
                await written(store)
            assert argvs == []

    run(scenario())
    assert "kept" in texts(read_file(str(place)))


# --- a disk that is full, read-only, locked ----------------------------------------------------------------------------


def test_a_full_disk_delays_nothing_and_what_was_kept_is_written_afterwards(small_disk: Path) -> None:
    heard = Heard()
    place = small_disk / "state"
    filler = small_disk / "filler"
    slowest = 0.0

    async def scenario() -> None:
        nonlocal slowest
        async with opened(place, heard) as store:
            store.append(an_event("before"))
            await written(store)
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            for number in range(MOST_WAITING + 700):
                began = time.perf_counter()
                store.append(an_event(f"event {number}"))
                slowest = max(slowest, time.perf_counter() - began)
                if number % 500 == 0:
                    await asyncio.sleep(0.02)
            await until(lambda: store.stats.trouble)
            assert "full" in store.stats.trouble
            dropped = store.stats.dropped
            assert 0 < dropped <= 800
            assert len(store.tail()) == TAIL
            records, _ = await store.read(limit=2)
            assert texts(records)[-1] == f"event {MOST_WAITING + 699}"
            await asyncio.sleep(0.5)
            assert len(heard.troubles) == 1, heard.troubles
            assert heard.recovered == []
            filler.unlink()
            await until(lambda: heard.recovered)
            assert heard.recovered == [dropped]
            await written(store)

    run(scenario())
    kept = read_file(str(place), limit=10_000)
    assert texts(kept)[0] == "before"
    assert f"event {MOST_WAITING + 699}" in texts(kept)
    told = [record.event for record in kept if record.event.kind is EventKind.DAEMON]
    assert [(event.level, event.facts["lost"]) for event in told] == [(Level.WARNING, heard.recovered[0])]
    assert slowest < AT_ONCE


def test_a_read_only_disk_is_told_and_written_when_it_takes_writes_again(place: Path) -> None:
    fill(place, 3)
    heard = Heard()

    async def scenario() -> None:
        with read_only(place):
            store = a_store(place, heard)
            began = time.monotonic()
            assert await store.open() == {"ages": {"3": 1}}  # it can be read all the same
            assert time.monotonic() - began < AT_ONCE
            store.append(an_event("kept"))
            await until(lambda: store.stats.trouble)
            assert "ead-only" in store.stats.trouble
            assert texts((await store.read())[0]) == ["kept"]
        await until(lambda: heard.recovered)
        await written(store)
        await store.close()

    run(scenario())
    assert texts(read_file(str(place)))[:4] == ["event 0", "event 1", "event 2", "kept"]
    assert len(heard.troubles) == 1
    assert heard.recovered == [0]


def test_a_lock_of_somebody_else_is_waited_for_by_the_writer_alone(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard) as store:
            with contextlib.closing(sqlite3.connect(place / "journal.sqlite", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                store.append(an_event("kept"))
                await until(lambda: heard.troubles)
                assert "locked" in heard.troubles[0]
                other.execute("ROLLBACK")
            await until(lambda: heard.recovered)

    run(scenario())
    assert "kept" in texts(read_file(str(place)))


def test_the_state_before_a_crash_is_there_though_the_disk_is_read_only_afterwards(place: Path) -> None:
    crashed = place.with_name("crashed")

    async def crash() -> None:
        async with opened(place, first_pause=60) as store:
            store.save("holds", [1])
            await written(store)
            store.save("holds", [2])
            await written(store)
            await store.read()  # answered after the housekeeping that follows a write
            assert store.writer_pid
            os.kill(store.writer_pid, signal.SIGKILL)
            await until(lambda: store.writer_pid is None)
            place.rename(crashed)

    async def state() -> dict[str, Any]:
        store = a_store(crashed)
        with read_only(crashed):
            found = await store.open()
            assert "ead-only" in store.stats.trouble
            await store.close()
        return found

    run(crash())
    (crashed / "journal.sqlite-shm").unlink()
    assert run(state()) == {"holds": [2]}


# --- a disk that hangs -------------------------------------------------------------------------------------------------


def test_a_hung_writer_delays_nothing_and_writes_all_when_it_goes_on(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard, answer_within=0.3) as store:
            store.append(an_event("before"))
            await written(store)
            pid = stop(store)
            began = time.monotonic()
            for number in range(500):
                store.append(an_event(f"event {number}"))
            assert time.monotonic() - began < AT_ONCE
            began = time.monotonic()
            records, why = await store.read(limit=600, deadline=0.2)
            assert time.monotonic() - began < 0.2 + AT_ONCE
            assert len(records) == 501
            assert "does not answer" in why
            assert "from memory" in why
            await until(lambda: heard.troubles)
            began = time.monotonic()
            assert (await store.read(limit=600))[1].startswith(heard.troubles[0])
            assert time.monotonic() - began < AT_ONCE
            await asyncio.sleep(0.5)
            assert store.writer_pid == pid  # no other one beside it
            assert heard.troubles == ["the journal's disk does not answer"]
            os.kill(pid, signal.SIGCONT)
            await until(lambda: heard.recovered)
            assert heard.recovered == [0]
            assert store.writer_pid == pid

    run(scenario())
    assert texts(read_file(str(place), limit=1000))[:501] == ["before", *(f"event {number}" for number in range(500))]


def test_a_writer_that_hangs_from_the_start_keeps_nobody_from_starting(place: Path) -> None:
    fill(place, 1)
    heard = Heard()

    async def scenario() -> None:
        store = a_store(place, heard)
        opening = asyncio.ensure_future(store.open(deadline=0.4))
        await asyncio.sleep(0)
        pid = stop(store)
        began = time.monotonic()
        assert await opening == {}
        assert 0.3 < time.monotonic() - began < 0.4 + AT_ONCE
        assert heard.troubles == ["the journal's disk does not answer"]
        store.append(an_event("kept"))
        store.save("ages", {"3": 2})
        os.kill(pid, signal.SIGCONT)
        await until(lambda: heard.recovered)
        await written(store)
        await store.close()
        assert await state() == {"ages": {"3": 2}}

    async def state() -> dict[str, Any]:
        store = a_store(place)
        found = await store.open()
        await store.close()
        return found

    run(scenario())
    assert texts(read_file(str(place)))[:2] == ["event 0", "kept"]


def test_what_is_saved_before_the_disk_answers_is_what_counts_afterwards(place: Path) -> None:
    fill(place, 1)

    async def scenario() -> dict[str, Any]:
        store = a_store(place)
        opening = asyncio.ensure_future(store.open(deadline=0.1))
        await asyncio.sleep(0)
        pid = stop(store)
        assert await opening == {}
        store.save("ages", {"3": 2})
        os.kill(pid, signal.SIGCONT)
        await written(store)
        store.save("ages", {"3": 1})  # as the file had it first: a change all the same
        await store.close()
        other = a_store(place)
        state = await other.open()
        await other.close()
        return state

    assert run(scenario()) == {"ages": {"3": 1}}


def test_closing_does_not_wait_for_a_hung_writer_which_still_writes_what_it_was_given(place: Path) -> None:
    async def scenario() -> None:
        store = a_store(place)
        await store.open()
        pid = stop(store)
        for number in range(50):
            store.append(an_event(f"event {number}"))
        await asyncio.sleep(0)
        began = time.monotonic()
        await store.close(deadline=0.3)
        assert 0.2 < time.monotonic() - began < 0.3 + AT_ONCE
        assert store.stats.waiting == 50
        os.kill(pid, signal.SIGCONT)
        await until(lambda: len(read_file(str(place))) == 50)
        await until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))

    run(scenario())


def test_more_than_can_wait_is_bounded_counted_and_told(place: Path) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard) as store:
            pid = stop(store)
            for number in range(MOST_WAITING + 1000):
                store.append(an_event(f"event {number}"))
                if number == 10:
                    await asyncio.sleep(0)
            assert store.stats.waiting == MOST_WAITING
            assert store.stats.dropped == 1000
            await until(lambda: heard.troubles)
            os.kill(pid, signal.SIGCONT)
            await until(lambda: heard.recovered)
            await written(store)
            assert heard.recovered == [1000]
            assert store.stats.written == MOST_WAITING + 1

    run(scenario())
    kept = texts(read_file(str(place), limit=10_000))
    numbers = (*range(11), *range(1011, MOST_WAITING + 1000))  # the first eleven were under way: never dropped
    assert kept[:-1] == [f"event {number}" for number in numbers]
    assert "1000 events were lost" in kept[-1]


def test_large_events_that_wait_are_bounded_by_their_bytes(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            stop(store)
            for _ in range(3000):
                store.append(an_event("x" * 4096, facts={"x": "y" * 3000}))
            assert store._waiting_bytes <= store_module.MOST_WAITING_BYTES
            assert store.stats.waiting + store.stats.dropped == 3000
            assert store.stats.waiting > 500

    run(scenario())


def test_reads_of_a_hung_disk_do_not_pile_up(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            stop(store)
            answers = await asyncio.gather(*(store.read(deadline=0.2) for _ in range(100)))
            assert all("does not answer" in why for _, why in answers)
            assert len(store._reads) <= 8

    run(scenario())


# --- bounded -----------------------------------------------------------------------------------------------------------


def test_the_files_stay_below_their_limit_and_the_newest_are_kept(place: Path) -> None:
    limit = 2 << 20
    largest = 0

    async def scenario() -> None:
        nonlocal largest
        async with opened(place, max_bytes=limit) as store:
            store.save("ages", {"3": 1})
            for number in range(60_000):
                store.append(an_event(f"event {number} of very many, with a sentence", dev_id=number % 64))
                if number % 1000 == 0:
                    await until(lambda: store.stats.waiting < 1000)
                    largest = max(largest, bytes_on_disk(place))
            await written(store)
            assert store.stats.dropped == 0
            largest = max(largest, bytes_on_disk(place))

    run(scenario())
    kept = read_file(str(place), limit=1_000_000)
    assert largest <= limit
    assert largest > limit // 2  # what it is for: the space is used
    first = 60_000 - len(kept)
    assert len(kept) > 5000
    assert texts(kept) == [f"event {number} of very many, with a sentence" for number in range(first, 60_000)]
    with contextlib.closing(sqlite3.connect(place / "journal.sqlite")) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert file.execute("SELECT * FROM state").fetchall() == [("ages", '{"3": 1}')]


def test_a_smaller_limit_shrinks_the_file_that_is_there(place: Path) -> None:
    fill(place, 40_000)
    before = bytes_on_disk(place)

    async def scenario() -> None:
        async with opened(place, max_bytes=1 << 20) as store:
            store.append(an_event("the last"))
            await until(lambda: bytes_on_disk(place) <= 1 << 20)

    assert before > 1 << 20
    run(scenario())
    assert texts(read_file(str(place)))[-1] == "the last"


def test_a_reader_without_end_keeps_nobody_from_writing_until_the_log_is_at_its_limit(place: Path) -> None:
    limit = 2 << 20
    heard = Heard()

    async def scenario() -> None:
        async with opened(place, heard, max_bytes=limit) as store:
            store.append(an_event("first"))
            await written(store)
            with contextlib.closing(sqlite3.connect(place / "journal.sqlite", isolation_level=None)) as reader:
                reader.execute("BEGIN")
                assert reader.execute("SELECT count(*) FROM events").fetchone() == (1,)
                store.append(an_event("second"))
                await written(store)
                assert store.stats.trouble == ""
                for number in range(4000):
                    store.append(an_event(f"event {number} " + "x" * 400))
                await until(lambda: heard.troubles)
                assert "reads" in heard.troubles[0]
                assert bytes_on_disk(place) <= limit
            await until(lambda: heard.recovered)
            await written(store)
            assert heard.recovered == [0]

    run(scenario())


def test_what_is_too_old_is_deleted_and_nothing_else(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place, max_age=3600) as store:
            now = time.time()
            store.save("ages", {"3": 1})
            store.append(an_event("dated ahead by a wrong clock", at=now + 1e8))
            for number in range(1000):
                store.append(an_event(f"old {number}", at=now - 7200))
            store.append(an_event("young", at=now - 60))
            await written(store)
            await until(lambda: len(read_file(str(place), limit=5000)) == 2)

    run(scenario())
    assert texts(read_file(str(place))) == ["dated ahead by a wrong clock", "young"]


# --- followers ---------------------------------------------------------------------------------------------------------


def test_a_follower_gets_what_is_in_memory_and_then_all_that_comes(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            first = store.append(an_event("0"))
            store.append(an_event("1"))
            got: list[str] = []

            async def follow() -> None:
                async for record in store.follow(first):
                    got.append(record.event.text)  # noqa: PERF401 - each as it comes

            following = asyncio.ensure_future(follow())
            await until(lambda: got == ["1"])
            store.append(an_event("2"))
            store.append(an_event("3"))
            await until(lambda: got == ["1", "2", "3"])
            assert len(store._changed) == 1
            following.cancel()
            await asyncio.wait([following])
            assert not store._changed

    run(scenario())


def test_a_follower_ends_when_the_store_is_closed(place: Path) -> None:
    async def scenario() -> list[Record]:
        async with opened(place) as store:
            store.append(an_event("0"))
            following = asyncio.ensure_future(_all_of(store))
            await asyncio.sleep(0)
        return await following

    assert texts(run(scenario())) == ["0"]


async def _all_of(store: Store) -> list[Record]:
    return [record async for record in store.follow(0)]


def test_a_slow_follower_sees_how_much_it_has_missed(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            store.append(an_event("first"))
            async with contextlib.aclosing(store.follow(0)) as following:
                assert (await anext(following)).event.text == "first"
                for number in range(TAIL + 50):
                    store.append(an_event(f"{number}"))
                gap = await anext(following)
                assert gap.event.facts == {"missed": 50}
                assert gap.event.kind is EventKind.DAEMON
                after = await anext(following)
                assert after.event.text == "50"
                assert gap.seq < after.seq

    run(scenario())


def test_a_follower_from_before_a_restart_sees_that_memory_begins_later(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            seqs = [store.append(an_event(f"{number}")) for number in range(3)]
        async with opened(place) as store:
            store.append(an_event("new"))
            async with contextlib.aclosing(store.follow(seqs[0])) as following:
                assert (await anext(following)).event.facts == {"missed": None}
                assert (await anext(following)).event.text == "new"
            async with contextlib.aclosing(store.follow(seqs[2])) as following:
                assert (await anext(following)).event.text == "new"

    run(scenario())


def test_the_tail_is_the_newest_in_memory(place: Path) -> None:
    async def scenario() -> None:
        store = a_store(place)
        seqs = [store.append(an_event(f"{number}")) for number in range(TAIL + 10)]
        assert texts(store.tail())[0] == "10"
        assert texts(store.tail(seqs[-3])) == [f"{TAIL + 8}", f"{TAIL + 9}"]
        assert texts(store.tail(limit=1)) == [f"{TAIL + 9}"]
        assert store.tail(limit=0) == []
        await store.close()

    run(scenario())


# --- reading without a daemon ------------------------------------------------------------------------------------------


def test_a_reader_beside_the_writer_sees_what_is_acknowledged_and_delays_nothing(place: Path) -> None:
    async def scenario() -> None:
        async with opened(place) as store:
            for number in range(20):
                for _ in range(100):
                    store.append(an_event(f"round {number}"))
                await written(store)
                assert len(read_file(str(place), limit=10_000)) == 100 * (number + 1)
            assert store.stats.trouble == ""

    run(scenario())


def test_what_a_crash_left_can_be_read_where_nothing_can_be_written(place: Path) -> None:
    async def crash() -> None:
        async with opened(place, first_pause=60) as store:
            for number in range(10):
                store.append(an_event(f"{number}"))
            await written(store)
            assert store.writer_pid
            os.kill(store.writer_pid, signal.SIGKILL)
            await until(lambda: store.writer_pid is None)
            place.rename(crashed)
            place.mkdir(mode=0o750)

    crashed = place.with_name("crashed")
    run(crash())
    shutil.rmtree(place)
    crashed.rename(place)
    (place / "journal.sqlite-shm").unlink()
    assert (place / "journal.sqlite-wal").stat().st_size
    with read_only(place):
        assert texts(read_file(str(place))) == [f"{number}" for number in range(10)]


def test_a_reader_says_what_is_wrong_and_what_to_do(place: Path) -> None:
    with pytest.raises(DuendeError, match="there is no journal") as missing:
        read_file(str(place))
    assert "systemctl" in missing.value.hint
    fill(place, 1)
    place.parent.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(DuendeError, match="may not be read by this user") as forbidden:
            read_file(str(place))
    finally:
        os.seteuid(0)
    assert "sudo" in forbidden.value.hint
    make_garbage(place / "journal.sqlite")
    with pytest.raises(DuendeError, match="is no journal, or is damaged") as damaged:
        read_file(str(place))
    assert damaged.value.hint
    shutil.rmtree(place)
    place.mkdir()
    with contextlib.closing(sqlite3.connect(place / "journal.sqlite")) as empty:
        empty.execute("CREATE TABLE other(x)")
    with pytest.raises(DuendeError, match="is no journal, or is damaged"):
        read_file(str(place))
