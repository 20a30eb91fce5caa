"""A webhook: each notice is the JSON body of one POST, signed if there is a secret.

The signature is HMAC-SHA256 with the contents of secret_file over `TIMESTAMP.BODY`, where TIMESTAMP is the text of the
header X-Duende-Ublkd-Timestamp and BODY are the bytes of the body as they came. With the timestamp in it, a receiver can
refuse what somebody has recorded and sends again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

from duende_ublkd.report.alerts.answer import Taken
from duende_ublkd.report.alerts.files import read_secret
from duende_ublkd.report.alerts.posting import Target, post

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TIMESTAMP = "X-Duende-Ublkd-Timestamp"
SIGNATURE = "X-Duende-Ublkd-Signature"


async def deliver(targets: Sequence[Target], notices: Sequence[Mapping[str, Any]]) -> Taken:
    """One after the other; the first that is not taken ends it, with UndeliveredError."""
    (target,) = targets
    secret = b""
    if path := target.sink.get("secret_file"):
        secret = await target.aside.run("secret_file is read, and its disk does not answer", lambda: _secret(path))
    for notice in notices:
        body = json.dumps({**notice, "labels": {**(notice.get("labels") or {}), **(target.sink.get("labels") or {})}})
        await post(target, body.encode(), signed(body.encode(), secret) if secret else {})
    return Taken(f"taken by {target.place}")


def _secret(path: str) -> bytes:
    return read_secret("secret_file", path)


def signed(body: bytes, secret: bytes, at: float | None = None) -> dict[str, str]:
    """The headers that say when this was sent, and that it was sent by who has the secret."""
    timestamp = str(int(time.time() if at is None else at))
    digest = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return {TIMESTAMP: timestamp, SIGNATURE: f"sha256={digest}"}
