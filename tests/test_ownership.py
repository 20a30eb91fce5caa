"""What others may change is not believed and not run: the configuration, the commands in it, and what leads to them."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from duende_ublkd.core.config import InvalidConfigError
from duende_ublkd.core.errors import DuendeError
from duende_ublkd.kernel.children import CommandOrder, Credentials
from duende_ublkd.kernel.ownership import Doubt, Trust
from duende_ublkd.parts import read_config
from tests.daemon_process import command
from tests.test_children import with_children

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from duende_ublkd.kernel.children import Children

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory, one in it, and a program in that."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    program = inner / "program"
    program.write_text("#!/bin/sh\necho ran\n")
    program.chmod(0o755)
    return program


def an_access_list(path: Path) -> None:
    """user::rw-, user:STRANGER:rw-, group::r--, mask::rw-, other::---, as acl(5) has it in the attribute."""
    none = 0xFFFFFFFF
    entries = ((1, 6, none), (2, 6, STRANGER), (4, 4, none), (16, 6, none), (32, 0, none))
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", listed)
    except OSError:
        pytest.skip("no access lists on this file system")


def let_a_group_write(path: Path) -> None:
    os.chown(path, 0, STRANGER)
    path.chmod(0o775)


def through_a_link_of_a_stranger(program: Path) -> None:
    moved = program.rename(program.with_name("moved"))
    program.symlink_to(moved)
    os.chown(program, STRANGER, -1, follow_symlinks=False)


def through_a_directory_of_a_stranger(program: Path) -> None:
    """The program itself is fine, and so is what the link says; but its way is not."""
    moved = program.rename(program.with_name("moved"))
    aside = program.parent.parent / "aside"
    aside.mkdir(mode=0o755)
    (aside / "link").symlink_to(moved)
    os.chown(aside, STRANGER, -1)
    program.symlink_to(aside / "link")


Spoil = pytest.mark.parametrize(
    ("spoil", "sentence", "hint"),
    [
        (lambda it: it.chmod(0o757), "program can be written by others (mode 0757)", "chmod go-w "),
        (let_a_group_write, "program can be written by others", "chmod go-w "),
        (lambda it: os.chown(it, STRANGER, -1), f"program belongs to uid {STRANGER}", "chown -h root "),
        (lambda it: it.parent.chmod(0o777), "inner can be written by others (mode 0777)", "chmod go-w "),
        (lambda it: os.chown(it.parent.parent, STRANGER, -1), f"outer belongs to uid {STRANGER}", "chown -h root "),
        (an_access_list, "program has an access list", "setfacl -b "),
        (through_a_link_of_a_stranger, f"program belongs to uid {STRANGER}", "chown -h root "),
        (through_a_directory_of_a_stranger, f"aside belongs to uid {STRANGER}", "chown -h root "),
    ],
)


@Spoil
def test_what_others_may_change_is_told_with_what_to_type(
    tree: Path, spoil: Callable[[Path], object], sentence: str, hint: str
) -> None:
    Trust().check(str(tree))
    spoil(tree)
    with pytest.raises(Doubt) as found:
        Trust().check(str(tree))
    assert sentence in str(found.value)
    assert found.value.hint.startswith(f"{hint}/")


def allow(it: Path) -> None:
    it.chmod(0o775)  # by root's own group


def put_into_a_sticky_directory(it: Path) -> None:
    it.parent.chmod(0o1777)


def lead_to_it_by_dots(it: Path) -> None:
    moved = it.rename(it.parent.parent / "moved")
    it.symlink_to(f"./.././inner/../{moved.name}")


@pytest.mark.parametrize("change", [allow, put_into_a_sticky_directory, lead_to_it_by_dots])
def test_what_nobody_else_can_change_is_believed(tree: Path, change: Callable[[Path], object]) -> None:
    change(tree)
    Trust().check(str(tree))


def test_a_path_is_followed_as_the_kernel_follows_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`link/..` is the parent of where the link leads to, not of where it lies."""
    (tree.parent.parent / "sub").mkdir()
    (tree.parent / "link").symlink_to("../sub")
    with pytest.raises(FileNotFoundError):
        Trust().check(str(tree.parent / "link" / ".." / "program"))
    monkeypatch.chdir(tree.parent)
    Trust().check("program")
    Trust().check("link/../inner/program")
    (tree.parent / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="symbolic links"):
        Trust().check("circle")


def test_a_file_of_whoever_called_sudo_is_believed_and_of_that_ones_own_group(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(tree, STRANGER, STRANGER)
    tree.chmod(0o775)
    monkeypatch.setenv("SUDO_UID", str(STRANGER))
    with pytest.raises(Doubt, match="written by others"):
        Trust().check(str(tree))
    monkeypatch.setenv("SUDO_GID", str(STRANGER))
    Trust().check(str(tree))
    for nonsense in ("", "-1", "x", "9" * 5000, "٣"):
        monkeypatch.setenv("SUDO_UID", nonsense)
        with pytest.raises(Doubt):
            Trust().check(str(tree))


def test_what_is_to_be_typed_is_nothing_that_a_name_has_chosen(tree: Path) -> None:
    evil = tree.rename(tree.with_name("a; reboot '$(x)'"))
    evil.chmod(0o777)
    with pytest.raises(Doubt) as found:
        Trust().check(str(evil))
    typed = found.value.hint.removeprefix("chmod go-w ")
    assert subprocess.run(["/bin/sh", "-c", f"printf %s {typed}"], capture_output=True, check=True).stdout == bytes(
        evil
    )


# --- the configuration


CONFIG = """
[policy]
unserved = "recover"
recover = {{ command = ["{}", "{{id}}"] }}
"""


def a_config(tree: Path, text: str = "") -> Path:
    path = tree.with_name("config.toml")
    path.write_text(text)
    return path


@Spoil
def test_a_configuration_that_others_may_change_is_refused(
    tree: Path, spoil: Callable[[Path], object], sentence: str, hint: str
) -> None:
    tree.write_text("")
    assert read_config(str(tree))
    spoil(tree)
    with pytest.raises(InvalidConfigError) as found:
        read_config(str(tree))
    assert sentence in str(found.value)
    assert str(found.value).startswith(f"{tree}: not believed: ")
    assert found.value.hint.startswith(hint)


@Spoil
def test_a_command_that_others_may_change_is_refused_with_its_line(
    tree: Path, spoil: Callable[[Path], object], sentence: str, hint: str
) -> None:
    config = tree.parent.parent.parent / "config.toml"
    config.write_text(CONFIG.format(tree))
    assert read_config(str(config)).policy.recover
    spoil(tree)
    with pytest.raises(InvalidConfigError) as found:
        read_config(str(config))
    assert str(found.value).startswith(f"{config}:4: policy.recover.command[0]: /")
    assert sentence in str(found.value)
    assert found.value.hint.startswith(hint)


def test_a_command_that_is_not_there_yet_is_for_when_it_is_run(tree: Path) -> None:
    read_config(str(a_config(tree, CONFIG.format("/not/there"))))
    read_config(str(a_config(tree, CONFIG.format("not-there-at-all"))))
    read_config(str(a_config(tree, CONFIG.format("{server}"))))


def test_a_bare_name_is_looked_for_as_when_it_is_run(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duende_ublkd.core.recovery.PATH", f"/nowhere:{tree.parent}:/usr/bin")
    config = a_config(tree, CONFIG.format("program"))
    read_config(str(config))
    tree.chmod(0o777)
    with pytest.raises(InvalidConfigError, match="program can be written by others"):
        read_config(str(config))


def test_a_program_of_the_user_that_it_runs_as_is_that_users_to_change(tree: Path) -> None:
    os.chown(tree, 65534, -1)
    with pytest.raises(InvalidConfigError, match="belongs to uid 65534"):
        read_config(str(a_config(tree, CONFIG.format(tree))))
    as_nobody = CONFIG.format(tree).replace("] }", '], user = "65534" }')
    assert read_config(str(a_config(tree, as_nobody)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (os.mkfifo, "it is no regular file"),
        (os.mkdir, "is a directory"),
        (lambda path: os.mknod(path, 0o020600, os.makedev(1, 5)), "it is no regular file"),  # /dev/zero
        (lambda path: path.write_bytes(b"#" * 2_000_000), "larger than 64 KiB"),
    ],
)
def test_what_is_no_configuration_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], sentence: str
) -> None:
    path = tmp_path / "config.toml"
    make(path)
    with pytest.raises(InvalidConfigError, match=sentence):
        read_config(str(path))


@pytest.mark.parametrize("mode", [0o020666, 0o060660, 0o140777])
def test_a_device_that_others_may_write_is_to_be_left_as_it_is(tree: Path, mode: int) -> None:
    special = tree.with_name("special")
    os.mknod(special, mode, os.makedev(1, 3))
    special.chmod(mode & 0o777)
    os.chown(special, STRANGER, STRANGER)
    config = a_config(tree, f'[[alert]]\nsink = "command"\ncommand = ["{special}"]\n')
    for path in (special, config):
        with pytest.raises(InvalidConfigError, match=f"{special} cannot be used: it is no regular file") as found:
            read_config(str(path))
        assert found.value.hint == f"name a regular file instead; what this one is, says: ls -l {special}"


def test_a_pipe_that_a_shell_names_is_there_and_no_regular_file() -> None:
    reader, writer = os.pipe()
    with pytest.raises(InvalidConfigError, match="it is no regular file"):
        read_config(f"/proc/self/fd/{reader}")
    os.close(reader)
    os.close(writer)


def test_the_daemon_does_not_start_with_it_and_check_config_says_why(tree: Path) -> None:
    config = a_config(tree)
    config.chmod(0o666)
    for name in ("run", "check-config", "list"):
        ended = command(name, "--config", str(config))
        assert ended.returncode == 2
        assert ended.stderr == (
            f"duende-ublkd: {config}: not believed: {config} can be written by others (mode 0666)\n"
            f"  try: chmod go-w {config}\n"
        )


def test_a_script_that_others_may_change_is_worth_a_warning(tree: Path) -> None:
    text = CONFIG.format("/bin/sh").replace('"{id}"', f'"{tree}", "{tree.parent}", "/not/there", "{{id}}"')
    config = a_config(tree, text)
    arguments = ("check-config", "--id", "3", "--config", str(config))
    assert "warning" not in command(*arguments).stdout
    tree.chmod(0o777)
    ended = command(*arguments)
    assert ended.returncode == 0
    (warning,) = [line for line in ended.stdout.splitlines() if line.startswith("warning: ")]
    assert warning == (
        f"warning: policy ({config}:2): recover.command[1]: {tree} can be written by others (mode 0777); "
        f"chmod go-w {tree}"
    )
    assert f"recover.command[1]: {tree} can be" in command(*arguments, "--json").stdout


# --- the moment that a command is run


def ran(order: CommandOrder) -> str:
    """Its output. DuendeError: it was not run."""
    outputs: list[str] = []

    async def body(children: Children) -> None:
        started = children.run(order)
        await started.started()
        outputs.append((await started.ended()).output)

    with_children(body)
    return outputs[0]


def an_order(*argv: str, uid: int | None = None, search: str = "/usr/bin:/bin") -> CommandOrder:
    user = None if uid is None else Credentials(uid, uid, (uid,))
    return CommandOrder(1, argv, {"PATH": search}, 60.0, user)


@Spoil
def test_what_others_may_change_since_it_was_configured_is_not_run(
    tree: Path, spoil: Callable[[Path], object], sentence: str, hint: str
) -> None:
    assert ran(an_order(str(tree))) == "ran"
    spoil(tree)
    for order in (an_order(str(tree)), an_order("program", search=f"/nowhere:{tree.parent}")):
        with pytest.raises(DuendeError) as found:
            ran(order)
        assert sentence in str(found.value)
        assert hint in str(found.value)


@pytest.fixture
def reachable(tree: Path) -> Iterator[Path]:
    """A program that any user may run."""
    place = Path(tempfile.mkdtemp(prefix="duende-"))
    place.chmod(0o755)
    shutil.copy(tree, place / "program")
    yield place / "program"
    shutil.rmtree(place)


def test_a_program_of_the_user_that_it_runs_as_is_run(reachable: Path) -> None:
    os.chown(reachable, 65534, -1)
    with pytest.raises(DuendeError, match="belongs to uid 65534"):
        ran(an_order(str(reachable)))
    assert ran(an_order(str(reachable), uid=65534)) == "ran"
    reachable.chmod(0o757)
    with pytest.raises(DuendeError, match="can be written by others"):
        ran(an_order(str(reachable), uid=65534))


def test_a_long_and_hostile_name_does_not_break_the_refusal(tree: Path) -> None:
    place = tree.parent
    for _ in range(12):
        place /= "\\\n\x1b\U0001f600" * 20
        place.mkdir()
    program = tree.rename(place / "\udcff")
    program.chmod(0o777)
    with pytest.raises(DuendeError, match="cannot be run: /") as found:
        ran(an_order(str(program)))
    assert str(found.value).isprintable()


def test_a_former_servers_program_that_an_ordinary_user_owns_is_not_run_as_root(tree: Path) -> None:
    """`{server}` is what a process chose to be."""
    os.chown(tree, STRANGER, STRANGER)
    with pytest.raises(DuendeError, match=f"belongs to uid {STRANGER}"):
        ran(an_order(str(tree), "recover"))
