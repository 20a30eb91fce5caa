"""What `make demo` shows, inside the guest: a server dies, its device stays, the daemon frees the id."""

import subprocess
import sys
import textwrap
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
        say(f"2. kill -9 {server.pid}. The disk is gone; the id stays taken, and nobody gives it back.")
        server.kill()
        wait_until(lambda: (info := device_info(DEV_ID)) is not None and info.state == 0, 20, "the kernel has noticed")
        refused = ServerProcess.start(id=DEV_ID, target="null")
        print("   A new server for the same id gets", refused.wait_for("failed").details["error"])
        refused.close(delete=False)

        say("3. `duende-ublkd run` finds it, and frees the id. (Here with setup_grace = 5s, to be quick.)")
        with DaemonProcess('[policy]\nsetup_grace = "5s"\n') as daemon:
            wait_until(lambda: is_free(DEV_ID), 30, "the orphan's id is free")
            say("4. Another server on the same id, and kill -9 again.")
            with ServerProcess.start(id=DEV_ID, target="ram", size=8) as second:
                second.wait_for("after-start")
                daemon.wait_verdict(DEV_ID, "live")
                second.kill()
                died = time.monotonic()
                wait_until(lambda: is_free(DEV_ID), 20, "the id is free")
                took = time.monotonic() - died
            print(
                f"   Id {DEV_ID} is free {took:.1f} s after the kill; half a second of that is the server's own grace."
            )
            daemon.stop()
            print("   The daemon's log of both:")
            for line in daemon.log.splitlines():
                print(textwrap.fill(line, 110, initial_indent=" " * 5, subsequent_indent=" " * 9))
    show("list")


def is_free(dev_id: int) -> bool:
    return device_info(dev_id) is None


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
