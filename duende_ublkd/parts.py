"""What every command that talks to the kernel is built from; light enough for a command that runs once.

The daemon adds hints, pages and metrics to it. A one-shot command would pay for their imports with its start-up time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from duende_ublkd.core import config as configuration
from duende_ublkd.core import recovery
from duende_ublkd.core.errors import UsageError
from duende_ublkd.core.text import printable
from duende_ublkd.core.webconfig import MOST_FILE_BYTES
from duende_ublkd.kernel import ownership
from duende_ublkd.kernel.children import Children, Credentials, resolve_user
from duende_ublkd.kernel.control import Control
from duende_ublkd.kernel.devices import UblkKernel
from duende_ublkd.kernel.holders import Sweeper
from duende_ublkd.kernel.ring import Ring
from duende_ublkd.reconcile import Agenda, Reconciler

if TYPE_CHECKING:
    from collections.abc import Callable

    from duende_ublkd.core.config import Config, Recovery, SinkConfig
    from duende_ublkd.core.holds import Hold
    from duende_ublkd.core.model import Judged, PassReport
    from duende_ublkd.core.webconfig import WebConfig
    from duende_ublkd.deeds import Reporter

DEFAULT_PATH = "/etc/duende-ublkd/config.toml"
FINISH_FOR = 1.5  # seconds for deeds under way when told to stop; what is left is the kernel's to finish


def read_config(path: str | None, *, with_web: bool = False, dry_run: bool = False) -> Config:
    """The configuration at `path`; None: the default place, or the built-in defaults where that does not exist.

    Refused, as a ConfigError: what others may change, the commands in it included. It may wait for disks.
    `with_web`: and who is let in by HTTP, which is nothing to a command that serves nobody. `dry_run`: whatever it says.
    """
    if path == "":
        raise configuration.refused('""', "an empty name is no file's", f"name a file: --config {DEFAULT_PATH}")
    where = DEFAULT_PATH if path is None else path
    config = _read(where, is_optional=path is None)
    if with_web and config.http.web_config_file:
        try:
            config = replace(config, web=read_web(config.http.web_config_file))
        except configuration.InvalidConfigError as error:
            raise configuration.InvalidConfigError(*error.problems, named_by=printable(where)) from error
    return replace(config, daemon=replace(config.daemon, dry_run=True)) if dry_run else config


def _read(where: str, *, is_optional: bool) -> Config:
    try:
        return configuration.load(_read_trusted(where), where, check=_check_rule)
    except ownership.Doubt as doubt:
        what = printable(str(doubt), 1000)
        raise configuration.refused(where, f"not believed: {what}", doubt.hint) from doubt
    except FileNotFoundError as error:
        if is_optional:
            return configuration.Config()
        raise configuration.unreadable(where, error) from error
    except OSError as error:
        raise configuration.unreadable(where, error) from error


def read_web(where: str) -> WebConfig:
    """The web configuration file and the files that it names. ConfigError; it may wait for disks."""
    from duende_ublkd.report import access, webfile  # noqa: PLC0415 - what they import is for those alone who serve with it

    def read(name: str, is_secret: bool) -> bytes:  # noqa: FBT001 - as it is asked
        path = str(Path(where).parent / name)
        try:
            found = _read_trusted(path, most=MOST_FILE_BYTES, is_secret=is_secret)
        except ownership.Doubt as doubt:
            raise configuration.WrongValueError(printable(str(doubt), 1000), hint=doubt.hint) from doubt
        except OSError as error:
            shown = printable(path)
            what = f"{shown} cannot be read: {error.strerror or error}"
            raise configuration.WrongValueError(what, hint=f"see what is wrong with it: ls -l {shown}") from error
        if len(found) > MOST_FILE_BYTES:
            what = f"{printable(path)} is larger than {MOST_FILE_BYTES // 1024} KiB"
            raise configuration.WrongValueError(what, hint="name a file in PEM, without what nobody needs")
        return found

    try:
        text = _read_trusted(where)
        config = webfile.load(text, where, read)
        if config.users:
            ownership.check_secret(where, Path(where).stat())
        access.check(config, where)
    except ownership.Doubt as doubt:
        raise configuration.refused(where, f"not believed: {printable(str(doubt), 1000)}", doubt.hint) from doubt
    except FileNotFoundError as error:
        hint = "[http] web_config_file names it: write it, or take the key away"
        raise configuration.refused(where, "no such file", hint) from error
    except OSError as error:
        raise configuration.unreadable(where, error) from error
    return config


def _read_trusted(where: str, *, most: int = configuration.MAX_BYTES, is_secret: bool = False) -> bytes:
    """At most one byte more than it may have. Doubt: others may change it, or read what is secret; OSError."""
    try:
        ownership.Trust().check(where)
    except FileNotFoundError:
        # What a shell's <(...) names is a link of /proc to a pipe: the kernel opens it, and its target is no path.
        ownership.check_kind(where, Path(where).stat())
        raise
    # O_NONBLOCK: of a FIFO nobody may ever open the other end.
    file = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with open(file, "rb") as reader:
        mode = os.fstat(file).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        ownership.check_kind(where, os.fstat(file))
        if is_secret:
            ownership.check_secret(where, os.fstat(file))
        return reader.read(most + 1)


def _check_rule(rule: Recovery | SinkConfig) -> None:
    """WrongValueError: others may change the program, or there is no such user.

    A program that is not there, or not known yet, is for when it is run. Users are looked up now: an act must not wait
    for whoever knows them, who may be unreachable when a disk is.
    """
    if rule.user:
        try:
            _known_users[rule.user] = resolve_user(rule.user)
        except UsageError as error:
            raise configuration.WrongValueError(str(error), hint=error.hint, part="user") from error
    try:
        (program,) = _filled(rule, rule.command[:1])
        trust = _trust_of(rule)
        trust.check(ownership.find(program, recovery.PATH))
    except configuration.UnfilledError:
        return
    except ownership.Doubt as doubt:
        raise configuration.WrongValueError(printable(str(doubt), 1000), hint=doubt.hint, part=0) from doubt
    except OSError:
        return  # it may be there later: on a disk that is not mounted yet, or not by this user's leave


def _filled(rule: Recovery | SinkConfig, parts: tuple[str, ...]) -> tuple[str, ...]:
    """As far as they are known before there is a device; nothing is filled into what a sink runs. UnfilledError."""
    return parts if isinstance(rule, configuration.SinkConfig) else configuration.fill(parts, {})


def _trust_of(rule: Recovery | SinkConfig) -> ownership.Trust:
    """Who may change what this rule runs."""
    known = _known_users.get(rule.user) if rule.user else None
    return ownership.Trust(known.uid) if known else ownership.Trust()


def doubtful_arguments(rule: Recovery | SinkConfig) -> list[tuple[int, str]]:
    """The arguments that name a file which others may change, perhaps a script: which, and what to do about it."""
    found = []
    for index, part in enumerate(rule.command[1:], 1):
        try:
            (path,) = _filled(rule, (part,))
            if path.startswith("/") and stat.S_ISREG(Path(path).stat().st_mode):
                _trust_of(rule).check(path)
        except ownership.Doubt as doubt:
            found.append((index, f"{printable(str(doubt), 1000)}; {printable(doubt.hint, 1000)}"))
        except (configuration.UnfilledError, OSError, ValueError):
            continue
    return found


_known_users: dict[str, Credentials] = {}
"""Of every configuration that this process has read."""


def known_users() -> dict[str, Credentials]:
    """Who the commands of the configurations that were read run as."""
    return dict(_known_users)


class Parts:
    """What every command that talks to the kernel is built from."""

    def __init__(
        self,
        config: Config,
        reporters: tuple[Reporter, ...],
        *,
        on_command: Callable[[str, str, float], None] | None = None,
        on_trouble: Callable[[str], None] | None = None,
        on_hold_ended: Callable[[Hold, str], None] | None = None,
        named: tuple[int, ...] = (),
        without_grace: tuple[int, ...] = (),
        one_shot: bool = False,
    ) -> None:
        """`on_trouble(sentence)`: something is amiss with the children. `one_shot`: it watches no deadline."""
        self.ring = Ring(on_late=self._on_late)
        self.control = Control(self.ring, deadline=config.daemon.command_deadline, on_command=on_command)
        self.sweeper = Sweeper()
        self.children = Children(
            on_late=self._on_late_child, on_trouble=on_trouble, lock_memory=config.daemon.lock_memory and not one_shot
        )
        self.kernel = UblkKernel(self.control, self.sweeper, self.children)
        self.agenda = Agenda()
        self.reconciler = Reconciler(
            self.kernel,
            config,
            Reporters(*reporters),
            self.agenda,
            named=named,
            without_grace=without_grace,
            only_orphans=one_shot,
            on_hold_ended=on_hold_ended,
        )
        self.take(config)

    def take(self, config: Config) -> None:
        """Go on with this configuration. Who the users in it are was looked up when it was read."""
        self.kernel.users = known_users()
        self.reconciler.config = config
        self.control.deadline = config.daemon.command_deadline

    def _on_late(self, name: str, dev_id: int | None, _result: int) -> None:
        if dev_id is not None:
            self.kernel.note_answer(name, dev_id)
            self.reconciler.note_answer(dev_id, name)

    def _on_late_child(self, name: str, dev_id: int, _result: int) -> None:
        self.reconciler.note_answer(dev_id, name)

    async def close(self) -> frozenset[int]:
        """Let deletions under way finish, leave recovery commands to themselves, then give everything back.

        Returns the ids whose deletion is not over.
        """
        self.reconciler.leave_recoveries()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.reconciler.finish_deeds(), FINISH_FOR)
        left = self.reconciler.under_way
        self.sweeper.close()
        self.children.close()
        await self.ring.close()
        self.kernel.close()
        return left


class Reporters:
    """Several reporters as one."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def intends(self, device: Judged) -> None:
        """Before a destructive action."""
        for reporter in self._reporters:
            reporter.intends(device)

    def passed(self, report: PassReport) -> None:
        """After a pass or a deed."""
        for reporter in self._reporters:
            reporter.passed(report)
