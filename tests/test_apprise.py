"""The recipe for Apprise: a command of a sink, run as the daemon runs it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from duende_ublkd.carriers import environment
from tests.receivers import a_notice, listening

RECIPE = Path(__file__).parents[1] / "deploy" / "apprise" / "duende-ublkd-apprise"
APPRISE = shutil.which("apprise")
RECORD = """#!{python}
import json, os, sys
open({place!r}, "w").write(json.dumps(sys.argv[1:]))
sys.exit(3)
"""


def recorded(tmp_path: Path, **changes: Any) -> tuple[int, list[str]]:  # noqa: ANN401 - fields of a notice
    """Exit status, and what Apprise would get."""
    place, program = tmp_path / "arguments", tmp_path / "apprise"
    program.write_text(RECORD.format(python=sys.executable, place=str(place)))
    program.chmod(0o755)
    done = subprocess.run(
        [RECIPE, "/etc/x.conf", program], env=environment(a_notice(**changes)), check=False, stdin=subprocess.DEVNULL
    )
    return done.returncode, json.loads(place.read_text())


def test_the_recipe_gives_apprise_one_argument_for_each_text_and_returns_its_status(tmp_path: Path) -> None:
    status, arguments = recorded(tmp_path)
    body = [a_notice()["summary"], "since 2026-01-02T03:04:05.678+00:00", "https://example.org/README.md#alert-pinned"]
    assert status == 3
    assert arguments == [
        "--config=/etc/x.conf",
        "--notification-type=warning",
        "--input-format=text",
        "--title=node7: pinned",
        "--body=" + "\n".join(body),
    ]


@pytest.mark.parametrize(
    ("state", "severity", "kind", "title"),
    [
        ("raised", "critical", "failure", "node7: pinned"),
        ("raised", "info", "info", "node7: pinned"),
        ("reminder", "critical", "failure", "node7: still: pinned"),
        ("reminder", "warning", "warning", "node7: still: pinned"),
        ("over", "critical", "success", "node7: over: pinned"),
        ("test", "info", "info", "node7: test: pinned"),
    ],
)
def test_what_matters_how_much_is_seen_in_apprise(
    tmp_path: Path, state: str, severity: str, kind: str, title: str
) -> None:
    _, arguments = recorded(tmp_path, state=state, severity=severity)
    assert f"--notification-type={kind}" in arguments
    assert f"--title={title}" in arguments


@pytest.mark.parametrize("text", ['"; touch /tmp/x; "', "$(reboot)", "`id`", "--body=x", "-h", "*", "a b  c\\n"])
def test_no_text_is_anything_but_text(tmp_path: Path, text: str) -> None:
    _, arguments = recorded(tmp_path, summary=text, host=text, kind=text)
    assert len(arguments) == 5
    assert arguments[3] == f"--title={text}: {text}"
    assert arguments[4].startswith(f"--body={text}\nsince ")


def test_without_a_configuration_it_says_how_it_is_used() -> None:
    done = subprocess.run([RECIPE], check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: duende-ublkd-apprise" in done.stderr


@pytest.mark.skipif(APPRISE is None, reason="Apprise is not installed here")
def test_a_real_apprise_tells_a_service_and_says_when_it_could_not(tmp_path: Path) -> None:
    async def status_of(config: Path) -> int:
        notice = environment(a_notice(summary='ublk3: "ünïcode" $(reboot)'))
        process = await asyncio.create_subprocess_exec(RECIPE, config, str(APPRISE), env=notice, cwd="/")
        async with asyncio.timeout(60):
            return await process.wait()

    async def both() -> None:
        config = tmp_path / "apprise.conf"
        async with listening() as receiver:
            config.write_text(f"json://127.0.0.1:{receiver.port}/\n")
            assert await status_of(config) == 0
            told = receiver.requests[0].json
            assert told["title"] == "node7: pinned"
            assert told["type"] == "warning"
            assert told["message"].startswith('ublk3: "ünïcode" $(reboot)\nsince 2026-')
        assert await status_of(config) != 0  # nobody listens any more

    assert os.access(RECIPE, os.X_OK)
    asyncio.run(both())
