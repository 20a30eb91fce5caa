"""A guest's network, for the one test that needs it: QEMU's own user network, with ports of the host's 127.0.0.1.

The host reaches the guest by forwarded ports; the guest reaches the host's 127.0.0.1 as HOST. The card is an e1000: one
module without needs, in every kernel that Debian builds.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.lab import kernels
from tests.lab.kernels import Kernel

HOST = "10.0.2.2"  # QEMU's own choice, as are the following
_OWN = "10.0.2.15/24"
_MODULE = "/lab/e1000.ko"


def hardware(forwarded: Mapping[int, int]) -> list[str]:
    """QEMU's arguments. `forwarded`: ports of the host, and what they are in the guest."""
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in forwarded.items())
    # Without romfile QEMU wants a boot ROM for the card, which is in a package of its own.
    return ["-netdev", f"user,id=net{forwards}", "-device", "e1000,netdev=net,romfile="]


def extras(kernel: Kernel) -> dict[str, Path]:
    """What the guest needs beside its base."""
    return {_MODULE: kernels.one_module(kernel, "e1000")}


def bring_up() -> None:
    """In the guest."""
    for command in (
        ["insmod", _MODULE],
        ["ip", "addr", "add", _OWN, "dev", "eth0"],
        ["ip", "link", "set", "eth0", "up"],
        ["ip", "route", "add", "default", "via", HOST],
    ):
        subprocess.run(command, check=True)
