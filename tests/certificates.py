"""Certificates for tests, made by the openssl command: an authority, and those that it signs."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


_ELLIPTIC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


@dataclass(frozen=True)
class Authority:
    """Signs what it is asked to; its own certificate and key are in its directory."""

    directory: Path

    def __post_init__(self) -> None:
        subject = ("-subj", f"/CN={self.directory.name}", "-days", "2", "-nodes")
        usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")  # without it, Python 3.13 believes no authority
        _openssl("req", "-x509", *_ELLIPTIC, *subject, *usage, "-keyout", self.key, "-out", self.certificate)

    @property
    def certificate(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def key(self) -> Path:
        return self.directory / "ca.key"

    def issue(self, path: Path, *names: str, key: tuple[str, ...] = _ELLIPTIC) -> Path:
        """`path`.crt and `path`.key, for these names and addresses; returns the path of the first."""
        crt = path.with_suffix(".crt")
        sans = ",".join(f"IP:{name}" if name[0].isdigit() or ":" in name else f"DNS:{name}" for name in names)
        _openssl(
            *("req", "-x509", *key, "-nodes", "-days", "2", "-subj", f"/CN={names[0]}"),
            *("-CA", self.certificate, "-CAkey", self.key, "-addext", f"subjectAltName={sans}"),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "authorityKeyIdentifier=keyid"),
            *("-keyout", path.with_suffix(".key"), "-out", crt),
        )
        path.with_suffix(".key").chmod(0o600)
        return crt

    def client(self, shown: Path | None = None) -> ssl.SSLContext:
        """Of a client that trusts this authority, and shows this certificate."""
        context = ssl.create_default_context(cafile=self.certificate)
        if shown:
            context.load_cert_chain(shown, shown.with_suffix(".key"))
        return context
