"""What a daemon leaves to the next one about a stop that is under way: real files, a real journal, real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from duende_ublkd import lasting
from duende_ublkd.core.alertconfig import SinkConfig, SinkKind
from duende_ublkd.core.config import Config, DaemonConfig
from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.holds import MOST_HOLDS, Holds, NotAllowedError
from duende_ublkd.kernel import holdfile
from duende_ublkd.kernel.children import Children, _process_named
from duende_ublkd.lasting import Lasting
from duende_ublkd.reconcile import Agenda, Reconciler
from duende_ublkd.report.alerts.answer import Answer
from tests.bench import Recorder
from tests.fake_kernel import FakeKernel
from tests.test_ledger import QUIESCED, TRIED, live

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
    from pathlib import Path

    from duende_ublkd.core.ledger import History
    from duende_ublkd.core.model import Process

PATIENCE = 10.0
SINK = SinkConfig(SinkKind.WEBHOOK, "hook", url="http://127.0.0.1:1")
DEV_ID = 3


class Post:
    """Who brings alerts to sinks that take everything."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def configure(self, sinks: Sequence[SinkConfig]) -> None:
        self.sinks = sinks

    def deliver(self, _sink: str, notices: Sequence[Mapping[str, Any]], done: Callable[[Answer], None]) -> None:
        self.told += [(notice["key"], notice["state"]) for notice in notices]
        asyncio.get_running_loop().call_soon(done, Answer(ok=True, permanent=False, detail="", seconds=0.0))


class Daemon:
    """As much of one as remembers."""

    def __init__(self, place: Path) -> None:
        loop = asyncio.get_running_loop()
        self.post = Post()
        config = Config(daemon=DaemonConfig(state_dir=str(place / "state")), alerts=(SINK,))
        self.children = Children(on_late=lambda name, dev_id, _: self.reconciler.note_answer(dev_id, name))
        self.reconciler = Reconciler(FakeKernel(loop), config, Recorder(), Agenda(), clock=loop.time)
        self.lasting = Lasting(config, str(place / "run"), _no_other_writer, self.children.watch_former, self.post)
        self.ledger = self.reconciler.ledger

    def look(self) -> History:
        """At the device, which waits for a server."""
        return self.ledger.record(replace(QUIESCED, at=50))


def _no_other_writer(_argv: Sequence[str], _stdin: int) -> None:
    raise OSError("the first writer is the only one")


@contextlib.asynccontextmanager
async def a_daemon(place: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(place)
    try:
        await daemon.lasting.restore(daemon.reconciler)
        yield daemon
    finally:
        daemon.children.close()
        await daemon.lasting.store.close(PATIENCE)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir(mode=0o755)
    return tmp_path


@pytest.fixture
def hand() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def record_in(place: Path) -> Any:  # noqa: ANN401 - JSON
    return json.loads((place / "run" / "devices" / f"{DEV_ID}.json").read_text())["device"]


async def begin_stop(place: Path, hand: Process, *, overdue: bool = False) -> None:
    """A daemon that ends with a stop under way."""
    async with a_daemon(place) as daemon:
        daemon.ledger.record(live(10))
        daemon.look()
        daemon.ledger.note_trail(DEV_ID, TRIED)
        daemon.ledger.note_hand(DEV_ID, hand)
        assert record_in(place)["hand"] == [hand.pid, hand.start_time]  # before anything is sent
        if overdue:
            daemon.ledger.note_overdue(DEV_ID, "STOP_DEV", 25, of_look=False)


def forget_run_directory(place: Path) -> None:
    shutil.rmtree(place / "run" / "devices")


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


@pytest.mark.parametrize("loses", [lambda _: None, forget_run_directory], ids=["run directory", "journal"])
@pytest.mark.parametrize("overdue", [False, True])
def test_a_stop_whose_child_has_outlived_its_daemon_is_waited_for_until_that_one_ends(
    place: Path, hand: subprocess.Popen[bytes], loses: Callable[[Path], None], *, overdue: bool
) -> None:
    async def story() -> None:
        await begin_stop(place, _process_named(hand.pid), overdue=overdue)
        loses(place)
        async with a_daemon(place) as daemon:
            history = daemon.look()
            assert history.overdue
            assert (history.overdue.command, history.overdue.of_former) == ("STOP_DEV", True)
            assert daemon.children.overdue == 1
            hand.kill()
            async with asyncio.timeout(PATIENCE):
                while daemon.children.overdue:
                    await asyncio.sleep(0.005)
            history = daemon.look()
            assert (history.overdue, history.hand) == (None, None)
            assert history.trail == TRIED  # and everything else is still known

    run(story())


def test_a_stop_whose_child_ends_before_the_first_look_is_over(place: Path, hand: subprocess.Popen[bytes]) -> None:
    async def story() -> None:
        await begin_stop(place, _process_named(hand.pid))
        async with a_daemon(place) as daemon:
            hand.kill()
            async with asyncio.timeout(PATIENCE):
                while daemon.children.overdue:
                    await asyncio.sleep(0.005)
            assert daemon.look().overdue is None

    run(story())


@pytest.mark.parametrize("which", ["ended", "another one's number"])
def test_a_stop_whose_child_is_gone_is_forgotten_and_nothing_else_of_the_device_is(
    place: Path, hand: subprocess.Popen[bytes], which: str
) -> None:
    async def story() -> None:
        former = _process_named(hand.pid)
        if which == "ended":
            hand.kill()
            hand.wait()
        else:
            former = replace(former, start_time=former.start_time - 1)
        await begin_stop(place, former, overdue=True)
        async with a_daemon(place) as daemon:
            assert daemon.children.overdue == 0
            history = daemon.look()
            assert (history.overdue, history.hand) == (None, None)
            assert (history.trail, history.was_live) == (TRIED, True)

    run(story())


def test_a_deletion_that_has_not_answered_is_over_with_its_daemon(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            daemon.ledger.record(live(10))
            daemon.look()
            daemon.ledger.note_overdue(DEV_ID, "DEL_DEV_ASYNC", 25, of_look=False)
            daemon.ledger.note_hand(DEV_ID, None)  # which has it kept
            assert record_in(place)["overdue"] == "DEL_DEV_ASYNC"
        async with a_daemon(place) as daemon:
            history = daemon.look()
            assert history.overdue is None
            assert history.was_live
            assert daemon.ledger.stuck_deletions() == ()

    run(story())


def test_a_stop_that_has_answered_leaves_nothing_to_the_next_daemon(place: Path, hand: subprocess.Popen[bytes]) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            daemon.ledger.record(live(10))
            daemon.look()
            daemon.ledger.note_hand(DEV_ID, _process_named(hand.pid))
            daemon.ledger.note_hand(DEV_ID, None)
            assert record_in(place)["hand"] is None
        async with a_daemon(place) as daemon:
            assert daemon.look().overdue is None
            assert daemon.children.overdue == 0

    run(story())


# --- alerts -----------------------------------------------------------------------------------------------------------


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def degrade(daemon: Daemon) -> None:
    daemon.lasting.desk.degraded("memory", "memory cannot be locked")


def test_what_was_told_is_not_told_again_by_the_next_daemon(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            degrade(daemon)
            await until(lambda: daemon.post.told == [("daemon/memory", "raised")])
        async with a_daemon(place) as daemon:
            degrade(daemon)
            await asyncio.sleep(0.1)
            assert daemon.post.told == []
            assert [alert.key for alert in daemon.lasting.desk.alerts] == ["daemon/memory"]

    run(story())


def test_with_a_silent_disk_it_is_told_again_and_what_the_disk_knows_is_gone_on_with(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            degrade(daemon)
            daemon.lasting.desk.degraded("holds", "the holds cannot be written")
            await until(lambda: len(daemon.post.told) == 2)
        daemon = Daemon(place)
        restoring = asyncio.ensure_future(daemon.lasting.restore(daemon.reconciler))
        await until(lambda: daemon.lasting.store.writer_pid)
        pid = daemon.lasting.store.writer_pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        await restoring
        degrade(daemon)

        def keys() -> list[str]:
            return sorted(alert.key for alert in daemon.lasting.desk.alerts)

        assert keys() == ["daemon/journal", "daemon/memory"]
        os.kill(pid, signal.SIGCONT)
        await until(lambda: keys() == ["daemon/holds", "daemon/journal", "daemon/memory"])
        assert sorted(daemon.post.told) == [("daemon/journal", "raised"), ("daemon/memory", "raised")]
        daemon.children.close()
        await daemon.lasting.close(PATIENCE)

    run(story())


def test_a_run_directory_that_cannot_be_written_is_an_alert_until_it_can(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            (place / "run").rename(place / "elsewhere")
            (place / "run").touch()
            daemon.ledger.record(live(10))
            daemon.ledger.note_hand(DEV_ID, None)
            assert [alert.key for alert in daemon.lasting.desk.alerts] == ["daemon/run-directory"]
            (place / "run").unlink()
            (place / "elsewhere").rename(place / "run")
            daemon.ledger.note_hand(DEV_ID, None)
            case = daemon.lasting.desk._book.open("daemon/run-directory")
            assert case
            assert case.gone_since is not None

    run(story())


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many holds were written to the run directory, each time."""
    counts: list[int] = []
    really = holdfile.write

    def write(directory: str, record: dict[str, Any]) -> None:
        counts.append(len(record["holds"]))
        really(directory, record)

    monkeypatch.setattr(holdfile, "write", write)
    return counts


def test_as_many_holds_as_there_can_be_are_in_the_journal_and_end_together_with_one_write(
    place: Path, writes: list[int]
) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            for dev_id in range(MOST_HOLDS):
                daemon.lasting.hold(dev_id, 600, "the kernel is upgraded", 0)
            assert daemon.lasting.store.stats.trouble == ""
        (place / "run" / holdfile.NAME).unlink()
        async with a_daemon(place) as daemon:
            assert len(daemon.lasting.holds) == MOST_HOLDS
            writes.clear()
            for hold in daemon.reconciler.holds.expire(math.inf):
                daemon.lasting.on_hold_ended(hold, "its time is over")
            await until(lambda: writes)
            assert writes == [0]
        (place / "run" / holdfile.NAME).unlink()
        async with a_daemon(place) as daemon:
            assert daemon.reconciler.holds.all() == ()

    run(story())


def test_the_run_directory_knows_best_what_is_on_hold(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            daemon.lasting.hold(DEV_ID, 600, "", 0)
            daemon.lasting.hold(4, 600, "", 0)
            alone = Holds([hold for hold in daemon.lasting.holds if hold.dev_id == DEV_ID])
        holdfile.write(str(place / "run"), alone.to_record(holdfile.boot_id()))
        async with a_daemon(place) as daemon:
            assert [hold.dev_id for hold in daemon.lasting.holds] == [DEV_ID]
        (place / "run" / holdfile.NAME).unlink()
        async with a_daemon(place) as daemon:
            assert [hold.dev_id for hold in daemon.lasting.holds] == [DEV_ID]

    run(story())


def test_a_hold_of_the_journal_that_is_not_understood_keeps_every_hand_still(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            daemon.lasting.store.save("hold/3", {"boot_id": holdfile.boot_id(), "holds": [{"dev_id": "three"}]})
        with pytest.raises(DuendeError, match="the holds in the journal are not understood"):
            async with a_daemon(place):
                pass

    run(story())


def test_a_run_directory_that_is_full_takes_nothing_old_for_true(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacles = [place / "run" / ".holds.json", place / "run" / "devices" / f".{DEV_ID}.json"]

    def on_hold() -> list[int]:
        return [hold.dev_id for hold in holdfile.load(str(place / "run"), 0.0).all()]

    async def story() -> None:
        async with a_daemon(place) as daemon:
            daemon.lasting.hold(4, 600, "", 0)
            daemon.ledger.record(live(10))
            daemon.look()
            daemon.ledger.note_hand(DEV_ID, None)
            for each in obstacles:
                each.mkdir()
            daemon.lasting.hold(5, 600, "", 0)
            daemon.ledger.note_trail(DEV_ID, TRIED)
            daemon.ledger.keep(DEV_ID)
            with pytest.raises(DuendeError, match="is empty: it could not be written"):
                on_hold()
        for each in obstacles:
            each.rmdir()
        async with a_daemon(place) as daemon:
            assert [hold.dev_id for hold in daemon.lasting.holds] == on_hold() == [4, 5]
            assert daemon.look().trail.attempts == TRIED.attempts
            monkeypatch.setattr(lasting, "_AGAIN", 0.05)
            obstacles[0].mkdir()
            daemon.lasting.release(5, 0)
            obstacles[0].rmdir()
            await until((place / "run" / holdfile.NAME).read_text)
            assert on_hold() == [4]

    run(story())


def test_where_neither_the_run_directory_nor_the_journal_knows_the_holds_no_daemon_starts(place: Path) -> None:
    (place / "run" / holdfile.NAME).touch(mode=0o644)
    (place / "state").mkdir()
    (place / "state").chmod(0o777)

    async def story() -> None:
        with pytest.raises(DuendeError, match="is empty: it could not be written"):
            async with a_daemon(place):
                pass

    run(story())


def test_holds_that_only_the_journal_has_are_written_to_the_run_directory(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            daemon.lasting.hold(DEV_ID, 600, "", 0)
        (place / "run" / holdfile.NAME).unlink()
        async with a_daemon(place):
            assert len(holdfile.load(str(place / "run"), 0.0)) == 1

    run(story())


def test_who_may_not_release_is_told_how_to_and_not_how_to_hold(place: Path) -> None:
    async def story() -> None:
        async with a_daemon(place) as daemon:
            with pytest.raises(NotAllowedError) as told:
                daemon.lasting.release(DEV_ID, 65534)
            assert told.value.hint == f"sudo duende-ublkd release {DEV_ID}"
            with pytest.raises(NotAllowedError) as told:
                daemon.lasting.hold(DEV_ID, 60, "", 65534)
            assert told.value.hint == f"sudo duende-ublkd hold {DEV_ID}"

    run(story())
