"""The journal as `duende-ublkd events` shows it."""

import json
from typing import Any

from tests.daemon_process import command


def events() -> list[dict[str, Any]]:
    """The latest thousand, by the running daemon."""
    done = command("events", "--json", "--limit", "1000")
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))
