"""Commands that are told of alerts: real children run them, with what the README promises them and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from duende_ublkd.carriers import MOST_JSON, Carriers, environment
from duende_ublkd.core.alertconfig import SinkConfig, SinkKind
from duende_ublkd.core.delivery import State
from duende_ublkd.kernel.children import Children, resolve_user
from duende_ublkd.report.objects import notice_object
from tests.test_alerting import an_alert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

    from duende_ublkd.report.alerts.answer import Answer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="runs commands as other users")

NOTICE = notice_object(an_alert(), State.RAISED, host="here", version="1", labels={})
PATIENCE = 30.0


def a_sink(*command: str, name: str = "tell", timeout: float = 20.0, user: str | None = None) -> SinkConfig:
    return SinkConfig(SinkKind.COMMAND, name, command=command, timeout=timeout, user=user)


def a_script(text: str, **changes: Any) -> SinkConfig:  # noqa: ANN401 - of a sink
    return a_sink("/bin/sh", "-c", text, **changes)


@contextlib.asynccontextmanager
async def carriers(*sinks: SinkConfig) -> AsyncIterator[Carriers]:
    """With children that are ready."""
    children = Children()
    children.start()
    users = {sink.user: resolve_user(sink.user) for sink in sinks if sink.user}
    carrying = Carriers(lambda: children, lambda: users, on_trouble=pytest.fail, spawn=children.spawn)
    carrying.configure(sinks)
    try:
        yield carrying
    finally:
        await carrying.close()
        children.close()


async def deliver(carrying: Carriers, sink: str = "tell", notice: dict[str, Any] | None = None) -> Answer:
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    carrying.deliver(sink, [notice or NOTICE], answer.set_result)
    async with asyncio.timeout(PATIENCE):
        return await answer


def told(story: Callable[[Carriers], Coroutine[Any, Any, None]], sinks: Sequence[SinkConfig]) -> None:
    async def main() -> None:
        async with carriers(*sinks) as carrying:
            await story(carrying)

    asyncio.run(main())


def test_a_command_gets_the_notice_in_its_environment_and_nothing_else_of_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def story(carrying: Carriers) -> None:
        answer = await deliver(carrying)
        assert (answer.ok, answer.detail) == (True, "said so")
        assert 0 < answer.seconds < PATIENCE

    script = f"cat /proc/self/environ > {out}; ls /proc/self/fd > {out}.fds; cat; echo said so"
    told(story, [a_script(script)])
    given = dict(each.split("=", 1) for each in out.read_text().rstrip("\0").split("\0"))
    mine = {key.removeprefix("DUENDE_UBLKD_ALERT_"): value for key, value in given.items() if "_ALERT_" in key}
    assert json.loads(mine.pop("JSON")) == NOTICE
    assert mine == {
        "STATE": "raised",
        "KIND": "pinned",
        "SEVERITY": "warning",
        "SUMMARY": "ublk3 is pinned",
        "KEY": "ublk3/4711/pinned",
        "ID": "3",
        "BLOCK_DEVICE": "/dev/ublkb3",
        "SINCE": "1970-01-01T00:16:40.500+00:00",
        "RUNBOOK": NOTICE["runbook_url"],
        "HOST": "here",
    }
    assert {key for key in given if "_ALERT_" not in key} <= {"PATH", "LANG", "PWD", "SHLVL", "_", "OLDPWD"}
    assert Path(f"{out}.fds").read_text().split() == ["0", "1", "2", "3"]  # the last is that of ls


def test_what_a_command_says_and_how_it_ended_is_in_the_answer() -> None:
    async def story(carrying: Carriers) -> None:
        failed = await deliver(carrying)
        assert (failed.ok, failed.permanent, failed.detail) == (False, False, "exited with 75; no route / \\x1b[2J")
        killed = await deliver(carrying, "killed")
        assert (killed.ok, killed.detail) == (False, "ended by signal 9")
        silent = await deliver(carrying, "silent")
        assert (silent.ok, silent.detail) == (True, "exited with 0")
        long = await deliver(carrying, "long")
        assert len(long.detail) <= 300

    told(
        story,
        [
            a_script("echo no route; printf '\\033[2J\\n'; exit 75"),
            a_script("kill -9 $$", name="killed"),
            a_script("exit 0", name="silent"),
            a_script("head -c 100000 /dev/zero | tr '\\0' x", name="long"),
        ],
    )


def test_a_command_that_never_ends_is_ended_with_all_that_it_has_started(tmp_path: Path) -> None:
    async def story(carrying: Carriers) -> None:
        began = time.monotonic()
        answer = await deliver(carrying)
        assert not answer.ok
        assert answer.detail.startswith("it has not ended within 1 s, and was ended")
        assert time.monotonic() - began < 15

    script = f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/own; sleep 300"
    told(story, [a_script(script, timeout=1.0)])
    for name in ("child", "own"):
        assert not Path(f"/proc/{(tmp_path / name).read_text().strip()}").exists()


def test_what_a_command_leaves_behind_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    async def story(carrying: Carriers) -> None:
        for _ in range(3):
            assert (await deliver(carrying)).ok

    told(story, [a_script(f"sleep 300 & echo $! >> {tmp_path}/left")])
    left = (tmp_path / "left").read_text().split()
    assert len(left) == 3
    assert [pid for pid in left if Path(f"/proc/{pid}").exists()] == []


def test_a_command_runs_as_the_user_that_it_is_for() -> None:
    async def story(carrying: Carriers) -> None:
        assert (await deliver(carrying)).detail == f"uid={pwd.getpwnam('nobody').pw_uid}"

    told(story, [a_script("echo uid=$(id -u)", user="nobody")])


def test_a_command_that_cannot_be_run_is_a_failure_that_says_why(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.write_text("#!/bin/sh\n")
    loose.chmod(0o777)

    async def story(carrying: Carriers) -> None:
        missing = await deliver(carrying)
        assert not missing.ok
        assert "the command of the sink tell cannot be run: No such file" in missing.detail
        doubtful = await deliver(carrying, "loose")
        assert not doubtful.ok
        assert f"{loose} can be written by others" in doubtful.detail

    told(story, [a_sink(f"{tmp_path}/missing"), a_sink(str(loose), name="loose")])


def test_two_commands_run_side_by_side_and_one_that_hangs_delays_nobody() -> None:
    async def story(carrying: Carriers) -> None:
        slow = asyncio.ensure_future(deliver(carrying, "slow"))
        await asyncio.sleep(0)
        for _ in range(3):
            assert (await deliver(carrying, "quick")).ok
        assert not slow.done()
        assert "not ended within 3 s" in (await slow).detail

    told(story, [a_script("sleep 300", name="slow", timeout=3.0), a_script("true", name="quick")])


def test_where_no_child_is_ready_none_is_made_for_it() -> None:
    async def main() -> None:
        children = Children()  # never started
        carrying = Carriers(lambda: children, dict, on_trouble=pytest.fail, spawn=children.spawn)
        carrying.configure([a_script("true")])
        answer = await deliver(carrying)
        assert (answer.ok, answer.permanent) == (False, False)
        assert "no child is ready" in answer.detail
        assert children.nursery_pid is None
        await carrying.close()

    asyncio.run(main())


def test_a_notice_that_is_too_long_for_a_variable_goes_without_its_facts() -> None:
    long = replace(an_alert(), facts={"stuck": ["x" * 10_000]})
    notice = notice_object(long, State.OVER, host="here", version="1", labels={})
    told_in = environment(notice)
    assert len(told_in["DUENDE_UBLKD_ALERT_JSON"]) <= MOST_JSON
    assert json.loads(told_in["DUENDE_UBLKD_ALERT_JSON"]) == {**notice, "facts": {}}


def test_an_alert_of_the_daemon_itself_names_no_device() -> None:
    notice = notice_object(an_alert(dev_id=None, instance=None), State.RAISED, host="h", version="1", labels={})
    given = environment(notice)
    assert (given["DUENDE_UBLKD_ALERT_ID"], given["DUENDE_UBLKD_ALERT_BLOCK_DEVICE"]) == ("", "")
