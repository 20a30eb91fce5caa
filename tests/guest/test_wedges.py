"""Every way in which a command can block, and that ends again: told, not made worse, survived, and noticed to be over.

What only a reboot ends is in test_zz_wedged_for_ever.py.
"""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duende_ublkd.core.model import Feature, KernelState
from duende_ublkd.core.policy import SETTLING
from duende_ublkd.kernel.abi import CHAR_DEVICE
from duende_ublkd.kernel.children import SPARES
from duende_ublkd.kernel.control import kernel_version
from tests.daemon_process import DaemonProcess, command
from tests.guest.wedges import (
    RING,
    Reader,
    borrowed,
    commands_sent,
    end,
    hanging,
    leaked_to_a_sleeper,
    processes,
    served,
    stack_of,
    stops_in_time,
    unanswered,
)
from tests.native_server import NativeServer
from tests.server.harness import (
    ServerProcess,
    block_device,
    device_info,
    drop_device,
    features,
    read_back,
    wait_for_state,
    wait_until,
    write_pattern,
)

KERNEL = kernel_version(os.uname().release)
NOTICES_AT_LAST_CLOSE = KERNEL >= (6, 15)
QUICK = """
[daemon]
command_deadline = "2s"
resync_interval = "10s"
[policy]
orphan_grace = "200ms"
setup_grace = "3s"
unserved = "alert"
recovery_deadline = "1s"
"""
PATIENT = f"""{QUICK}
[[device]]
match = {{ ids = "35" }}
unserved = "recover"
recovery_deadline = "0s"
recover = {{ command = ["mini_server", "--recover", "{{id}}"], timeout = "20s", attempts = 3, backoff = "1s" }}
"""
GIVING_UP = QUICK.replace('unserved = "alert"', 'unserved = "delete"')
DELETIONS = ("DEL_DEV", "DEL_DEV_ASYNC")
STUCK_RULES = ("overdue", "control-plane")
DATA = 1 << 20


@pytest.fixture(scope="module")
def running() -> Iterator[DaemonProcess]:
    with DaemonProcess(PATIENT) as daemon:
        yield daemon
        if daemon.process.poll() is None:
            stops_in_time(daemon)


@pytest.fixture
def daemon(running: DaemonProcess) -> DaemonProcess:
    """One for all: it lives on, or is started again, whatever has hung before."""
    if running.process.poll() is not None:
        running.restart()
    take_config(running, PATIENT)
    return running


def take_config(daemon: DaemonProcess, config: str) -> None:
    state = next(line for line in daemon.config_path.read_text().splitlines() if line.startswith("state_dir"))
    whole = config.replace("[daemon]", f"[daemon]\n{state}", 1)
    if whole == daemon.config_path.read_text():
        return
    daemon.config_path.write_text(whole)
    before = daemon.log.count("configuration read anew")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: daemon.log.count("configuration read anew") > before, 60, "the configuration is taken")


def is_free(dev_id: int) -> bool:
    return device_info(dev_id) is None


def state_of(dev_id: int) -> int | None:
    info = device_info(dev_id)
    return info.state if info else None


def test_a_control_plane_that_is_stuck_is_named_and_nothing_piles_up_behind_it(daemon: DaemonProcess) -> None:
    orphans = (31, 32, 33, 34)
    with contextlib.ExitStack() as stack:
        stack.callback(_end_server_of, 35)
        hung = stack.enter_context(served(30))
        servers = {dev_id: stack.enter_context(served(dev_id)) for dev_id in orphans}
        recoverable = stack.enter_context(served(35, "--recovery"))
        stack.enter_context(served(36))
        reader = stack.enter_context(Reader(36))
        daemon.wait_verdict(36, "live")
        with hanging("delete", 30, hung) as deleter:
            for dev_id in (31, 32):
                servers[dev_id].kill()
            for dev_id in (31, 32):
                assert daemon.wait_verdict(dev_id, "wedged")["rule"] == "overdue"
            assert daemon.metric("duende_ublkd_commands_overdue") == 2
            sent = commands_sent(daemon, *DELETIONS)
            for dev_id in (33, 34):
                servers[dev_id].kill()
            for dev_id in (33, 34):
                device = daemon.wait_verdict(dev_id, "wedged")
                assert device["rule"] == "control-plane"
                assert "the deletions of ublk31, ublk32 have not answered" in device["reason"]
            daemon.wait_log(r"ublk33 is wedged: .*what it takes: .*holds ublk_ctl_mutex: .*\(kill that server\)")
            daemon.wait_log(rf"asleep in the kernel: .*iou-wrk-{deleter} \(pid {deleter}\) in .*ublk_")
            recoverable.kill()
            daemon.wait_log("ublk35 recovered: served again")
            _expect_it_told(daemon, deleter)
            reader.goes_on()
            assert commands_sent(daemon, *DELETIONS) == sent
            assert daemon.metric("duende_ublkd_commands_overdue") == 2
            stops_in_time(daemon)
            alone = command("clean", "--config", str(daemon.config_path), deadline=60)
            assert alone.returncode == 1, alone.stdout + alone.stderr
            daemon.restart()
            for dev_id in orphans:
                assert daemon.wait_verdict(dev_id, "wedged")["rule"] in STUCK_RULES
            assert daemon.wait_verdict(36, "live")
            assert daemon.wait_verdict(35, "live")
        wait_until(lambda: all(map(is_free, (30, *orphans))), 60, "what was stuck is deleted")
        wait_until(lambda: daemon.metric("duende_ublkd_commands_overdue") == 0, 60, "all of them have answered")
        reader.goes_on()
        take_config(daemon, GIVING_UP)
        os.kill(daemon.wait_verdict(35, "live")["server"]["pid"], signal.SIGKILL)
        wait_until(lambda: is_free(35), 60, "nobody is to recover it any more")
    wait_until(lambda: is_free(36), 60, "it is deleted")


def _end_server_of(dev_id: int) -> None:
    """Should a test have failed: whom the daemon's recovery command has started."""
    info = device_info(dev_id)
    if info and info.state == KernelState.LIVE:
        os.kill(info.server_pid, signal.SIGKILL)


def _expect_it_told(daemon: DaemonProcess, deleter: int) -> None:
    """With what is stuck under them, commands for people answer, and say by whom it is."""
    explained = command("explain", "33", "--config", str(daemon.config_path), deadline=60).stdout
    assert "rule:         control-plane" in explained, explained
    assert f"iou-wrk-{deleter} (pid {deleter}) in " in explained, explained
    listed = json.loads(command("list", "--json", "--config", str(daemon.config_path), deadline=60).stdout)
    stuck = next(each["stuck"] for each in listed if each["dev_id"] == 33)
    assert any(f"iou-wrk-{deleter} (pid {deleter}) in " in each for each in stuck), listed
    assert len(set(stuck)) == len(stuck), "the daemon's own two workers are told of once"
    raised = [each for each in json.loads(daemon.get("/api/v1/events?limit=1000"))["events"] if each["kind"] == "alert"]
    for dev_id in (31, 32, 33, 34):
        texts = [each["text"] for each in raised if each["dev_id"] == dev_id and each["facts"]["state"] == "raised"]
        assert any("what it takes: " in text for text in texts), raised


def test_what_keeps_a_kernel_from_noticing_a_death_is_named_and_the_rest_goes_on(daemon: DaemonProcess) -> None:
    """Side by side, since each has to last: descriptors that leaked to a sleeper (40), to nowhere (41), to a sleeper with
    the ring (45); and somebody's STOP_DEV that hangs (42).
    """
    with contextlib.ExitStack() as stack:
        hung = {dev_id: stack.enter_context(served(dev_id)) for dev_id in (40, 42)}
        lost, doubled, orphan = (stack.enter_context(served(dev_id)) for dev_id in (41, 45, 44))
        stack.enter_context(served(43))
        reader = stack.enter_context(Reader(43))
        stopped_before = commands_sent(daemon, "STOP_DEV")
        daemon.wait_verdict(43, "live")
        stack.enter_context(unanswered(40, hung[40]))
        sleeper = leaked_to_a_sleeper(borrowed(hung[40].pid, CHAR_DEVICE.format(40)))
        stack.callback(end, sleeper)
        with_ring = leaked_to_a_sleeper(borrowed(doubled.pid, CHAR_DEVICE.format(45)), borrowed(doubled.pid, RING))
        stack.callback(end, with_ring)
        nowhere = stack.enter_context(_in_flight_to_nobody(borrowed(lost.pid, CHAR_DEVICE.format(41))))
        stopping = stack.enter_context(contextlib.ExitStack())
        stopping.enter_context(hanging("stop", 42, hung[42]))
        for server in (hung[40], lost, doubled):
            server.kill()
        began = time.monotonic()
        orphan.kill()
        wait_until(lambda: is_free(44), 60, "the orphan beside them is deleted")
        reader.goes_on()
        _expect_at_once(daemon, sleeper.pid, with_ring.pid)
        _expect_in_the_end(daemon, sleeper.pid)
        assert time.monotonic() - began > SETTLING or not NOTICES_AT_LAST_CLOSE
        reader.goes_on()
        assert commands_sent(daemon, "STOP_DEV") == stopped_before
        stops_in_time(daemon)
        daemon.restart()
        _expect_in_the_end(daemon, sleeper.pid, deadline=15)
        stopping.close()
        end(sleeper)
        end(with_ring)
        nowhere.close()
        wait_until(lambda: all(map(is_free, (40, 41, 42, 45))), 60, "all that is not held any more is deleted")
        assert daemon.wait_verdict(43, "live")
        reader.goes_on()
    wait_until(lambda: is_free(43), 60, "it is deleted")


@contextlib.contextmanager
def _in_flight_to_nobody(descriptor: int) -> Iterator[socket.socket]:
    """In a message that nobody takes; closing the socket that is yielded drops it."""
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(ours, [b"."], [descriptor])
        os.close(descriptor)
        ours.close()
        yield theirs


def _expect_at_once(daemon: DaemonProcess, sleeper: int, with_ring: int) -> None:
    """It might be a death that the kernel is about to notice; who has the char device open is told all the while."""
    device = daemon.wait_verdict(40, "closing")
    if NOTICES_AT_LAST_CLOSE:
        assert device["kernel_state"] == "LIVE"
        assert "the kernel has not noticed yet" in device["reason"]
    else:
        assert f"DEAD, not yet closed by {sleeper} (sleep)" in device["reason"]
    # With a ring, too, it is as a server that has forked.
    device = daemon.wait_verdict(45, "live")
    assert f"served by {with_ring} (sleep), which has its char device open" in device["reason"]


def _reason(daemon: DaemonProcess, dev_id: int) -> str:
    return str((daemon.device(dev_id) or {}).get("reason"))


def _expect_in_the_end(daemon: DaemonProcess, sleeper: int, deadline: float = SETTLING + 30) -> None:
    if NOTICES_AT_LAST_CLOSE:
        device = daemon.wait_verdict(40, "wedged", deadline)
        assert device["rule"] == "leaked-descriptor"
        assert f"{sleeper} (sleep) has its char device open" in device["reason"]
        assert daemon.wait_verdict(41, "wedged", deadline)["rule"] == "death-never-noticed"
    else:
        assert f"{sleeper} (sleep)" in daemon.wait_verdict(40, "closing")["reason"]
        wait_until(
            lambda: "somebody who cannot be seen has its char device open" in _reason(daemon, 41), 60, "it is spared"
        )
    if Path("/sys/block/ublkb42").exists():
        assert "which is stopped" in daemon.wait_verdict(42, "live")["reason"]
    else:  # what becomes of that takes its time, and is in test_zz_wedged_for_ever.py
        assert (daemon.device(42) or {}).get("rule") in ("being-stopped", "stop-stuck")


@contextlib.contextmanager
def waiting_for_a_server(dev_id: int, backing: Path) -> Iterator[str]:
    """A QUIESCED device with data on it; the digest of the data."""
    with served(dev_id, "--recovery", "--size", "8", "--backing", str(backing)) as server:
        digest = write_pattern(block_device(dev_id), DATA)
        server.kill()
        wait_for_state(dev_id, KernelState.QUIESCED)
        yield digest


def recovered(dev_id: int, backing: Path) -> NativeServer:
    server = NativeServer("--recover", str(dev_id), "--backing", str(backing))
    server.wait_for("RECOVERED")
    return server


def test_a_hand_that_comes_back_from_its_open_stops_nothing_that_is_served_by_then(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    """Somebody's look for partitions waits for the dead server with the disk's open_mutex held, and nobody sees who."""
    backing = tmp_path / "disk"
    with waiting_for_a_server(46, backing) as digest, contextlib.ExitStack() as stack:
        rereading = stack.enter_context(NativeServer("reread", "46", program="wedge"))
        server = stack.enter_context(contextlib.ExitStack())  # goes before, or nobody would answer
        stack.callback(_serve_if_needed, 46, backing, server)
        rereading.wait_for("REREADING")
        take_config(daemon, GIVING_UP)
        device = daemon.wait_verdict(46, "wedged")
        assert device["rule"] == "open-overdue"
        assert "open has not answered" in device["reason"]
        (hand,) = processes("ublkd-hand")
        assert "bdev" in stack_of(hand) or "blkdev" in stack_of(hand), stack_of(hand)
        daemon.wait_log(rf"ublk46 is wedged: .*ublkd-hand \(pid {hand}\) in ", 15)
        stops_in_time(daemon)
        daemon.restart()
        daemon.wait_verdict(46, "wedged")
        assert len(processes("ublkd-hand")) == 2, "one of each daemon"
        server.enter_context(recovered(46, backing))
        assert rereading.wait_for("ENDED") == 0
        wait_until(lambda: not processes("ublkd-hand"), 60, "the hands have ended")
        daemon.wait_verdict(46, "live")
        until = time.monotonic() + 4  # the time itself is what is tested
        while time.monotonic() < until:
            assert read_back(block_device(46), DATA) == digest
            assert state_of(46) == KernelState.LIVE
        assert daemon.metric("duende_ublkd_commands_overdue") == 0
        assert "ublk46 stopped" not in daemon.log
    wait_until(lambda: is_free(46), 60, "it is given up in the end")


def _serve_if_needed(dev_id: int, backing: Path, server: contextlib.ExitStack) -> None:
    """Whatever has failed, somebody has to answer before what hangs is waited for."""
    if state_of(dev_id) == KernelState.QUIESCED:
        server.enter_context(recovered(dev_id, backing))


@contextlib.contextmanager
def caught_hand(daemon: DaemonProcess, dev_id: int) -> Iterator[tuple[int, contextlib.ExitStack]]:
    """A hand of this daemon's, stopped right before it sends its first command; closing the stack lets it go on."""
    wait_until(lambda: len(processes("ublkd-spare")) == SPARES, 60, "the daemon's children are ready")
    spares = [str(pid) for pid in processes("ublkd-spare")]
    with contextlib.ExitStack() as catching:
        catcher = catching.enter_context(NativeServer("catch", *spares, program="wedge"))
        catcher.wait_for("WATCHING")
        take_config(daemon, GIVING_UP)
        hand = catcher.wait_for("CAUGHT")
        assert processes("ublkd-hand") == [hand]
        assert state_of(dev_id) == KernelState.QUIESCED
        yield hand, catching


def test_what_a_former_daemons_hand_was_about_to_do_is_known_to_the_next_and_not_done_twice(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    backing = tmp_path / "disk"
    with waiting_for_a_server(47, backing) as digest:
        with caught_hand(daemon, 47) as (hand, catching):
            stops_in_time(daemon)
            daemon.restart()
            assert "STOP_DEV has not answered" in daemon.wait_verdict(47, "wedged")["reason"]
            assert daemon.metric("duende_ublkd_commands_overdue") == 1
            take_config(daemon, PATIENT)
            os.kill(hand, signal.SIGKILL)
            catching.close()
        daemon.wait_verdict(47, "unserved")
        assert daemon.metric("duende_ublkd_commands_overdue") == 0
        with recovered(47, backing):
            daemon.wait_verdict(47, "live")
            assert read_back(block_device(47), DATA) == digest
        wait_for_state(47, KernelState.QUIESCED)
        with caught_hand(daemon, 47) as (hand, catching):
            daemon.kill()
            daemon.restart()
            daemon.wait_verdict(47, "wedged")
            time.sleep(4)  # longer than its deadline: the time itself is what is tested
            daemon.wait_verdict(47, "wedged")
            assert processes("ublkd-hand") == [hand]
            assert state_of(47) == KernelState.QUIESCED
            catching.close()
            wait_until(lambda: is_free(47), 60, "the hand has stopped it, and the daemon deleted it")
        assert commands_sent(daemon, "STOP_DEV", "TRY_STOP_DEV") == 0


def test_a_hand_whose_stop_hangs_is_known_to_the_next_daemon_and_ended_by_another_stop(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    """TRY_STOP_DEV takes open_mutex; to get there, somebody has to come between that and the hand's own open."""
    if not features() & Feature.SAFE_STOP_DEV:
        pytest.skip(
            "before TRY_STOP_DEV (7.0) the hand keeps the disk claimed until it is stopped: nobody comes between"
        )
    backing = tmp_path / "disk"
    with (
        waiting_for_a_server(48, backing),
        contextlib.ExitStack() as stack,
        caught_hand(daemon, 48) as (hand, catching),
    ):
        rereading = stack.enter_context(NativeServer("reread", "48", program="wedge"))
        stack.callback(drop_device, 48)
        rereading.wait_for("REREADING")
        catching.close()
        device = daemon.wait_verdict(48, "wedged")
        assert "STOP_DEV has not answered" in device["reason"]
        daemon.wait_log(rf"ublk48 is wedged: .*asleep in the kernel: .*iou-wrk-{hand} \(pid {hand}\) in ", 15)
        stops_in_time(daemon)
        daemon.restart()
        daemon.wait_verdict(48, "wedged")
        assert processes("ublkd-hand") == [hand]
        with NativeServer("stop", "48", program="wedge") as stopper:
            assert stopper.wait_for("ENDED") == 0
        wait_until(lambda: is_free(48), 60, "it is deleted")
        wait_until(lambda: not processes("ublkd-hand"), 60, "the hand has ended")


def test_a_deletion_that_waits_for_a_holder_is_bounded_told_and_over_when_the_holder_lets_go(
    daemon: DaemonProcess,
) -> None:
    """Of an unprivileged device DEL_DEV_ASYNC is impossible. Its id says nothing any more: not even GET_DEV_INFO works."""
    slow = PATIENT.replace('command_deadline = "2s"', 'command_deadline = "60s"')
    with contextlib.ExitStack() as stack:
        _leave_behind_held(50, daemon, stack)
        daemon.wait_log("ublk50 deleted, its id still held: ")
        take_config(daemon, slow)
        _leave_behind_held(51, daemon, stack)
        stops_in_time(daemon)
        daemon.restart()
        for dev_id in (50, 51):
            reason = daemon.wait_verdict(dev_id, "pinned")["reason"]
            assert re.search(rf"frees itself when open pid {os.getpid()} \(.*\) lets go", reason), reason
    for dev_id in (50, 51):
        daemon.wait_log(f"ublk{dev_id} is gone")


def _leave_behind_held(dev_id: int, daemon: DaemonProcess, stack: contextlib.ExitStack) -> None:
    """An unprivileged device whose server has died, with its disk open here until the stack is closed, being deleted."""
    server = ServerProcess.start(id=dev_id, target="null", unprivileged=True)
    stack.callback(server.close, delete=False)
    server.wait_for("after-start")
    daemon.wait_verdict(dev_id, "live")
    stack.callback(os.close, os.open(block_device(dev_id), os.O_RDONLY))
    server.kill()
    node = Path(f"/sys/class/ublk-char/ublkc{dev_id}")
    wait_until(lambda: not node.exists(), 60, "the deletion is under way")
