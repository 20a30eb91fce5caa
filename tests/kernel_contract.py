"""What the tests believe of a ublk driver: every clause holds for the fake one and for the real one.

A clause is a plain function of a World. It leaves nothing behind that the world does not sweep up.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest

from duende_ublkd.core.errors import BusyError, CommandError, InterruptedCommandError, NoSuchDeviceError
from duende_ublkd.core.model import KernelState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractContextManager
    from typing import Any

    from duende_ublkd.core.model import Observation, Usage
    from duende_ublkd.deeds import Kernel

T = TypeVar("T")


class Actor(Protocol):
    """A server with one device; each step returns when it is done."""

    @property
    def dev_id(self) -> int:
        """The id it got."""

    def open(self) -> None:
        """Open the char device that was added."""

    def start(self) -> None:
        """Serve, from open to START_DEV."""

    def kill(self) -> None:
        """SIGKILL, and the process is gone."""


class World(Protocol):
    """A kernel and its inhabitants."""

    @property
    def kernel(self) -> Kernel:
        """What the daemon would ask."""

    def run(self, question: Coroutine[Any, Any, T]) -> T:
        """Ask the kernel."""

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Let time pass until it is so."""

    def add(self, *, dev_id: int = -1, recoverable: bool = False, unprivileged: bool = False) -> Actor:
        """A server that has done ADD_DEV and no more. CommandError: the kernel did not let it."""

    def recover(self, dev_id: int) -> Actor:
        """A second server that serves again what is QUIESCED."""

    def hold_open(self, dev_id: int) -> AbstractContextManager[None]:
        """Somebody has the disk open."""


def look(world: World, dev_id: int) -> Observation | None:
    seen = world.run(world.kernel.observe([dev_id]))
    return seen[0] if seen else None


def must_see(world: World, dev_id: int) -> Observation:
    seen = look(world, dev_id)
    assert seen is not None
    assert seen.info is not None, seen.trouble
    return seen


def users(world: World, seen: Observation) -> Usage:
    return world.run(world.kernel.look_for_users([seen], {}))[seen.dev_id]


def settle(world: World, dev_id: int, state: int) -> Observation:
    """Wait for a state."""
    name = KernelState.name(state)
    world.wait_until(lambda: must_see(world, dev_id).state_name == name, f"ublk{dev_id} is {name}")
    return must_see(world, dev_id)


def serve(world: World, *, recoverable: bool = False, unprivileged: bool = False) -> Actor:
    server = world.add(recoverable=recoverable, unprivileged=unprivileged)
    server.open()
    server.start()
    return server


def delete(world: World, seen: Observation) -> None:
    """Claim and delete, as soon as the kernel has let go of the file of who died."""

    async def act() -> bool:
        try:
            with world.kernel.claim(seen) as claim:
                again = await claim.look_again()
                assert again is not None
                assert again.info is not None
                assert again.identity == seen.identity
                with contextlib.suppress(InterruptedCommandError):  # deleted, and held
                    await claim.delete(again.info)
        except BusyError:
            return False
        return True

    world.wait_until(lambda: world.run(act()), f"ublk{seen.dev_id} can be claimed")


def wait_until_free(world: World, dev_id: int) -> None:
    world.wait_until(lambda: not world.run(world.kernel.observe([dev_id])), f"id {dev_id} is free")


# --- the clauses ------------------------------------------------------------------------------------------------------


def a_device_is_dead_and_without_a_disk_until_it_is_started_and_not_claimable_while_it_is_open(world: World) -> None:
    server = world.add()
    seen = must_see(world, server.dev_id)
    assert seen.info
    assert (seen.info.state, seen.info.server_pid, seen.disk) == (KernelState.DEAD, -1, None)
    assert seen.identity.sysfs_inode
    assert seen.char_device == f"/dev/ublkc{server.dev_id}"
    assert seen.age is not None
    assert users(world, seen).char_openers == ()

    server.open()
    seen = must_see(world, server.dev_id)
    assert seen.state_name == "DEAD"
    assert seen.disk is None
    assert len(users(world, seen).char_openers) == 1
    assert not _claimable(world, seen)

    server.start()
    seen = must_see(world, server.dev_id)
    assert seen.state_name == "LIVE"
    assert seen.disk is not None
    assert seen.server is not None
    assert seen.server.alive
    assert users(world, seen).char_openers
    assert not _claimable(world, seen)
    server.kill()


def a_dead_servers_device_stays_until_it_is_deleted_and_then_its_id_is_reused_by_another(world: World) -> None:
    server = serve(world)
    before = must_see(world, server.dev_id)
    server.kill()
    seen = settle(world, server.dev_id, KernelState.DEAD)
    assert seen.disk is None
    assert seen.identity == before.identity
    assert seen.char_device is not None
    assert users(world, seen).char_openers == ()
    assert world.run(world.kernel.observe([seen.dev_id]))

    delete(world, seen)
    wait_until_free(world, seen.dev_id)
    assert look(world, seen.dev_id) is None

    follower = world.add()
    assert follower.dev_id == seen.dev_id
    assert must_see(world, seen.dev_id).identity != seen.identity
    with pytest.raises(NoSuchDeviceError), world.kernel.claim(seen):
        pass
    follower.open()  # the refused claim has not taken it, not even for a moment
    follower.kill()


def a_claimed_device_can_be_neither_opened_nor_added_again(world: World) -> None:
    server = world.add(dev_id=5)
    seen = must_see(world, server.dev_id)
    with world.kernel.claim(seen):
        with pytest.raises(BusyError), world.kernel.claim(seen):
            pass
        with pytest.raises(CommandError):
            world.add(dev_id=seen.dev_id)
        with pytest.raises(CommandError):
            server.open()
    server.kill()


def a_recoverable_device_keeps_its_disk_and_goes_on_with_another_server(world: World) -> None:
    server = serve(world, recoverable=True)
    before = must_see(world, server.dev_id)
    server.kill()
    seen = settle(world, server.dev_id, KernelState.QUIESCED)
    assert seen.disk == before.disk
    assert seen.identity == before.identity

    second = world.recover(server.dev_id)
    seen = must_see(world, server.dev_id)
    assert seen.state_name == "LIVE"
    assert seen.disk == before.disk
    assert seen.server is not None
    assert before.server is not None
    assert seen.server.pid != before.server.pid
    assert not _claimable(world, seen)
    second.kill()


def a_held_device_keeps_its_id_after_its_deletion_until_the_holder_lets_go(world: World) -> None:
    server = serve(world)
    with world.hold_open(server.dev_id):
        alive = must_see(world, server.dev_id)
        assert users(world, alive).holders
        server.kill()
        seen = settle(world, server.dev_id, KernelState.DEAD)
        delete(world, seen)
        left = must_see(world, server.dev_id)
        assert left.state_name == "DEAD"
        assert (left.identity.sysfs_inode, left.char_device, left.disk) == (None, None, None)
        assert world.run(world.kernel.observe([server.dev_id]))
        with pytest.raises(NoSuchDeviceError), world.kernel.claim(seen):
            pass
        with pytest.raises(CommandError):
            world.add(dev_id=server.dev_id)
    wait_until_free(world, server.dev_id)


def an_unprivileged_device_is_deleted_too(world: World) -> None:
    server = serve(world, unprivileged=True)
    server.kill()
    seen = settle(world, server.dev_id, KernelState.DEAD)
    assert seen.info
    assert seen.info.unprivileged
    delete(world, seen)
    wait_until_free(world, server.dev_id)


def _claimable(world: World, seen: Observation) -> bool:
    try:
        with world.kernel.claim(seen):
            return True
    except BusyError:
        return False


CLAUSES: tuple[Callable[[World], None], ...] = (
    a_device_is_dead_and_without_a_disk_until_it_is_started_and_not_claimable_while_it_is_open,
    a_dead_servers_device_stays_until_it_is_deleted_and_then_its_id_is_reused_by_another,
    a_claimed_device_can_be_neither_opened_nor_added_again,
    a_recoverable_device_keeps_its_disk_and_goes_on_with_another_server,
    a_held_device_keeps_its_id_after_its_deletion_until_the_holder_lets_go,
    an_unprivileged_device_is_deleted_too,
)
