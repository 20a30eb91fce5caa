"""Who may change a file: the configuration, a command, a directory of the daemon's.

A file is changed by its owner, by whom its mode lets, and by whoever may put another one in its place: so the same is asked
of every directory on the way to it and of every symbolic link, as the kernel follows them. Facts:
- In a sticky directory (/tmp) anybody may add an entry, but an entry is removed by its owner and the directory's alone.
- The group's bits of a file with an access list are the list's mask: they may stand for any user.
- sudo tells who called it. Whoever may run this as root through it may have written what it is to run, too; that is how a
  daemon is tried from somebody's own clone. A group counts as one user's alone when it has that user's number.

What it cannot see: a descriptor that was opened when the mode was another one, and what a network's server allows.

The nursery loads this file and keeps its memory locked, so it imports next to nothing. An lstat() may wait for a disk.
"""

# Called for each component of a path, in a process that is to stay small: plain strings and os, no Path objects.
# ruff: noqa: PTH109, PTH113, PTH115, PTH118, PTH120

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False  # typing costs half a MiB
if TYPE_CHECKING:
    from collections.abc import Collection

_MOST_LINKS = 40  # as the kernel's
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_ACCESS_LIST = "system.posix_acl_access"
_LONGEST_UID = 10  # digits
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-+,:=@%")
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Doubt(Exception):  # noqa: N818 - a finding; whoever asked decides whether it is an error
    """Others may change it. `str()` is the sentence, `hint` what to type."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class Trust:
    """Who is no stranger: root, this process's user, whoever called sudo, and these users."""

    def __init__(self, *users: int) -> None:
        own = os.geteuid()
        self.users: Collection[int] = {0, own, *users}
        self.groups: Collection[int] = {0, own} & {0, os.getegid()}
        caller = os.environ.get("SUDO_UID", "")
        if own == 0 and caller.isascii() and caller.isdigit() and len(caller) <= _LONGEST_UID:
            self.users |= {int(caller)}
            self.groups |= {int(caller)} if os.environ.get("SUDO_GID") == caller else set()

    def check(self, path: str) -> None:
        """Follow a path to its end. Doubt: others may change what is there; OSError: it cannot be looked at."""
        if not _is_path(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        left = os.path.join(os.getcwd(), path).split("/")[::-1]
        place, links = "/", 0
        self._check_one(place, os.lstat(place))
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                place = os.path.dirname(place)
                continue
            here = f"{place.rstrip('/')}/{name}"
            status = os.lstat(here)
            self._check_one(here, status)
            if not stat.S_ISLNK(status.st_mode):
                place = here
                continue
            links += 1
            if links > _MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(here)
            place = "/" if target.startswith("/") else place
            left += target.split("/")[::-1]

    def _check_one(self, path: str, status: os.stat_result) -> None:
        check_kind(path, status)
        if status.st_uid not in self.users:
            raise Doubt(f"{path} belongs to uid {status.st_uid}", f"chown -h root {_typed(path)}")
        mode = status.st_mode
        if stat.S_ISLNK(mode) or (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
            return
        if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and status.st_gid not in self.groups):
            raise Doubt(
                f"{path} can be written by others (mode {stat.S_IMODE(mode):04o})", f"chmod go-w {_typed(path)}"
            )
        if mode & stat.S_IWGRP and has_access_list(path):
            raise Doubt(
                f"{path} has an access list that may let others write it",
                f"setfacl -b {_typed(path)}; chmod g-w {_typed(path)}",
            )


def check_kind(path: str, status: os.stat_result) -> None:
    """Doubt: it is a device, a FIFO or a socket. Whose it is and who may write it is as it has to be."""
    if not any(kind(status.st_mode) for kind in (stat.S_ISREG, stat.S_ISDIR, stat.S_ISLNK)):
        raise Doubt(
            f"{path} cannot be used: it is no regular file",
            f"name a regular file instead; what this one is, says: ls -l {_typed(path)}",
        )


def _is_path(text: str) -> bool:
    """Whether the kernel can be given it at all."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def has_access_list(path: str) -> bool:
    """Whether the mode is not all that says who may write."""
    try:
        os.getxattr(path, _ACCESS_LIST, follow_symlinks=False)
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.ENOTSUP)
    return True


def find(program: str, search: str) -> str:
    """Where execvp(3) would find a program, `search` being the PATH. FileNotFoundError."""
    if "/" in program:
        return program
    for directory in search.split(":"):
        path = f"{directory or '.'}/{program}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def open_directory(path: str, dir_fd: int | None = None) -> int:
    """A descriptor of a directory that nobody but root and this process's user can write. Doubt; OSError.

    What leads to the directory is `Trust.check`'s to judge.
    """
    try:
        there = os.open(path.rstrip("/") or "/", _OPEN_DIRECTORY, dir_fd=dir_fd)
    except NotADirectoryError:
        if stat.S_ISLNK(os.lstat(path.rstrip("/"), dir_fd=dir_fd).st_mode):
            raise Doubt(f"{path} is a symbolic link", f"ls -l {_typed(path)}") from None
        raise
    try:
        check_owner(path, os.fstat(there))
    except BaseException:
        os.close(there)
        raise
    return there


def check_owner(path: str, status: os.stat_result) -> None:
    """Doubt: it is not root's or our own alone to write; also a file that has another name somewhere."""
    if status.st_uid not in (0, os.geteuid()):
        raise Doubt(f"{path} belongs to uid {status.st_uid}", f"chown -h root {_typed(path)}")
    if status.st_mode & _WRITABLE:
        raise Doubt(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})", f"chmod go-w {_typed(path)}"
        )
    if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
        raise Doubt(f"{path} has another name somewhere", f"rm {_typed(path)}")


def check_secret(path: str, status: os.stat_result) -> None:
    """Doubt: everybody can read it. Its group may: that is how a secret is shared with those who renew it."""
    if status.st_mode & stat.S_IROTH:
        raise Doubt(
            f"{path} can be read by everybody (mode {stat.S_IMODE(status.st_mode):04o})", f"chmod o-r {_typed(path)}"
        )


def _typed(path: str) -> str:
    """As a shell takes it: who chose the name may have hoped that somebody types it."""
    return path if _PLAIN.issuperset(path) else "'" + path.replace("'", "'\"'\"'") + "'"
