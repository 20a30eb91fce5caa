"""What a real kernel refuses the daemon's ring, and what the daemon does without a directory that it can believe in."""

import asyncio
import errno
import json
import os

from duende_ublkd.kernel import abi, binding, ring
from duende_ublkd.kernel.control import Control
from duende_ublkd.kernel.ring import Completion, Ring
from tests.daemon_process import DaemonProcess, command

IORING_OP_OPENAT, IORING_OP_READ = 18, 22


def test_the_ring_carries_control_commands_and_nothing_else() -> None:
    async def body() -> None:
        subject = Ring(8)
        try:
            assert subject.is_confined
            for operation in (IORING_OP_OPENAT, IORING_OP_READ):
                number = next(subject._numbers)
                entry = abi.pack_sqe(operation, 0, number)
                assert await subject._perform(ring._Flight("ANY", None, number, entry), 5) == Completion(-errno.EACCES)
            assert await Control(subject).features()
        finally:
            await subject.close()

    asyncio.run(body())
    children = binding.WaitingRing()
    assert children.is_confined
    children.close()


def test_a_state_directory_that_others_can_write_stops_nothing_and_is_told() -> None:
    daemon = DaemonProcess('[http]\nlisten = ""\n')
    state = daemon.directory / "state"
    with daemon:
        daemon.wait_log("looks after")
        assert daemon.stop() == 0
        assert (state / "journal.sqlite").stat().st_mode & 0o777 == 0o600
        state.chmod(0o777)
        daemon.restart()
        daemon.wait_log(r"state can be written by others \(mode 0777\): chmod go-w /")
        ended = command("events", "--json", "--config", str(daemon.config_path))
        assert "looks after" in ended.stdout, ended
        assert daemon.stop() == 0


def test_a_configuration_that_others_can_write_is_not_taken() -> None:
    with DaemonProcess('[http]\nlisten = ""\n') as daemon:
        daemon.config_path.chmod(0o666)
        os.kill(daemon.process.pid, 1)
        daemon.wait_log("the old configuration stays: .*config.toml can be written by others .*; chmod go-w /")
        ended = command("check-config", "--json", "--config", str(daemon.config_path))
        assert ended.returncode == 2
        assert "can be written by others" in json.loads(ended.stdout)["problems"][0]["what"]
        assert daemon.stop() == 0
