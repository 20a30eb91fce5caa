"""As much of a daemon as alerts need, to be killed: a real journal, real children and a real courier, on the fake kernel.

`python -m tests.desk_process DIRECTORY CONFIG WISH`: says `ready` when the first look is done and `saved` when what it has
raised is on the disk. WISH `pinned`: a device is held when its server dies; `nothing`: there is no device.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from duende_ublkd.carriers import Carriers
from duende_ublkd.kernel.children import Children
from duende_ublkd.lasting import Lasting
from duende_ublkd.parts import Reporters, known_users, read_config
from tests.bench import MOUNT, Bench

if TYPE_CHECKING:
    from tests.fake_kernel import Instance

PAUSE = 0.02


class Subject:
    """The bench's daemon, with what it remembers and whom it tells."""

    def __init__(self, directory: str, config_path: str) -> None:
        config = read_config(config_path)
        self.children = Children()
        self.carriers = Carriers(lambda: self.children, known_users, on_trouble=say, spawn=self.children.spawn)
        self.lasting = Lasting(config, directory, self.children.spawn, lambda _dev_id, _hand: False, self.carriers)
        self.bench = Bench(config)

    async def start(self) -> None:
        self.children.start()
        reconciler = self.bench.reconciler
        await self.lasting.restore(reconciler)
        self.carriers.courier.start()
        both = Reporters(self.bench.recorder, self.lasting)
        reconciler._reporter = both
        reconciler._deeds._reporter = both
        await self.look()
        say("ready")

    async def look(self) -> None:
        await self.bench.reconciler.run_pass(None)

    async def until_saved(self) -> None:
        """What is saved is on the disk."""
        store = self.lasting.store
        while store._has_work():
            await asyncio.sleep(PAUSE)
        say("saved")

    async def a_pinned_device(self) -> Instance:
        instance = await self.bench.a_live_device()
        self.bench.kernel.hold(instance, MOUNT)
        self.bench.kernel.kill(instance.openers[0])
        while not self.lasting.desk.alerts:
            await self.bench.wait(PAUSE)
        return instance


def say(text: str) -> None:
    print(text, flush=True)


async def main(directory: str, config_path: str, wish: str) -> None:
    subject = Subject(directory, config_path)
    await subject.start()
    if wish == "pinned":
        await subject.a_pinned_device()
        await subject.until_saved()
    while True:
        await subject.look()
        await asyncio.sleep(1.0)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(mode=0o755, exist_ok=True)
    asyncio.run(main(*sys.argv[1:]))
