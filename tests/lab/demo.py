"""What `make demo` shows, inside the guest: a server dies, its device stays, the daemon frees the id."""

import subprocess
import sys
import time

from tests.daemon_process import DaemonProcess
from tests.server.harness import ServerProcess, block_device, device_info, read_back, wait_until, write_pattern

DUENDE = [sys.executable, "-m", "duende_ublkd"]
DEV_ID = 3


def main() -> None:
    say("1. A ublk server starts, and serves a disk.")
    with ServerProcess.start(id=DEV_ID, target="ram", size=8) as server:
        server.wait_for("after-start")
        written = write_pattern(block_device(DEV_ID), 1 << 20)
        assert read_back(block_device(DEV_ID), 1 << 20) == written
        print(f"   1 MiB written to {block_device(DEV_ID)} and read back.")
        show("list")
        say(f"2. kill -9 {server.pid}. Nobody looks after it: the disk is gone, the id stays taken.")
        server.kill()
        wait_until(lambda: (info := device_info(DEV_ID)) is not None and info.state == 0, 20, "the kernel has noticed")
        show("list")
        refused = ServerProcess.start(id=DEV_ID, target="null")
        print("   a new server for the same id gets:", refused.wait_for("failed").details["error"])
        refused.close(delete=False)

    say("3. Now with the daemon: `duende-ublkd run`, and another server that dies.")
    with DaemonProcess() as daemon, ServerProcess.start(id=DEV_ID, target="ram", size=8) as server:
        server.wait_for("after-start")
        daemon.wait_verdict(DEV_ID, "live")
        server.kill()
        died = time.monotonic()
        wait_until(lambda: device_info(DEV_ID) is None, 20, "the id is free")
        took = time.monotonic() - died
        print("   its log:")
        for line in daemon.log.splitlines():
            print("    ", line)
        print(f"   id {DEV_ID} is free {took:.1f} s after the kill (half a second of that is the server's own grace).")
        daemon.stop()
    show("list")


def say(sentence: str) -> None:
    print(f"\n{sentence}", flush=True)


def show(*arguments: str) -> None:
    print(f"   $ duende-ublkd {' '.join(arguments)}")
    done = subprocess.run([*DUENDE, *arguments], check=False, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        print("    ", line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
