"""What of the daemon can be tried without a driver; the rest is for the guest's tests."""

import asyncio
import time

from duende_ublkd.daemon import Daemon


def test_a_look_that_hangs_is_given_up_when_it_is_told_to_stop() -> None:
    async def stop_while_it_looks() -> bool:
        daemon = Daemon.__new__(Daemon)
        daemon._stop = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, daemon._stop.set)
        return await daemon._unless_stopped(asyncio.sleep(60))

    began = time.monotonic()
    assert asyncio.run(stop_while_it_looks())
    assert time.monotonic() - began < 10


def test_a_look_that_ends_is_followed_by_the_next() -> None:
    async def look() -> bool:
        daemon = Daemon.__new__(Daemon)
        daemon._stop = asyncio.Event()
        return await daemon._unless_stopped(asyncio.sleep(0))

    assert not asyncio.run(look())
