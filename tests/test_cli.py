"""The commands as a person meets them on a machine without ublk: every error says what to type next."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
ANNOTATED = REPOSITORY / "config" / "duende-ublkd.toml"

without_ublk = pytest.mark.skipif(
    Path("/dev/ublk-control").exists(), reason="this machine has ublk: the guest's tests cover it"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "duende_ublkd", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "100"},
    )


def says(done: subprocess.CompletedProcess[str], code: int, *sentences: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr


def test_help_names_every_command_and_the_exit_codes() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("run", "list", "explain", "clean", "check-config", "Exit codes"):
        assert word in done.stdout


def test_no_command_is_wrong_use() -> None:
    says(run(), 2, "COMMAND", "try: duende-ublkd --help")


@pytest.mark.parametrize("text", ["three", "-1", "3x", "1048576", "", "/dev/sda", "٣"])
def test_an_id_that_is_not_a_number_says_what_an_id_looks_like(text: str) -> None:
    says(run("explain", "--", text), 2, "is not the id of a ublk device", "try: duende-ublkd list")


@without_ublk
@pytest.mark.parametrize("arguments", [("list",), ("explain", "/dev/ublkb3"), ("clean",), ("clean", "ublk3")])
def test_without_the_module_every_command_says_how_to_load_it(arguments: tuple[str, ...]) -> None:
    says(run(*arguments), 3, "/dev/ublk-control is missing", "try: modprobe ublk_drv")


@without_ublk
def test_without_the_module_the_daemon_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[http]\nlisten = ""\n')
    environment = {**os.environ, "RUNTIME_DIRECTORY": str(tmp_path / "duende-ublkd")}
    done = subprocess.run(
        [sys.executable, "-m", "duende_ublkd", "run", "--config", str(config)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    says(done, 3, "/dev/ublk-control is missing", "try: modprobe ublk_drv")


def test_now_without_an_id_says_that_it_wants_one() -> None:
    says(run("clean", "--now"), 2, "--now takes the ids", "try: duende-ublkd clean --now 3")


def test_the_annotated_configuration_is_right() -> None:
    done = run("check-config", str(ANNOTATED))
    assert done.returncode == 0, done.stderr
    assert "right" in done.stdout
    assert json.loads(run("check-config", "--json", str(ANNOTATED)).stdout)["ok"] is True


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (b"[policy]\norphan_grase = '1s'\n", ("config.toml:2: ", "orphan_grase", 'did you mean "orphan_grace"')),
        (b"[policy]\norphan_grace = 1\n", ("config.toml:2: ", 'did you mean "1s"')),
        (b"[policy]\norphan_grace = '1 parsec'\n", ("config.toml:2: ", "orphan_grace")),
        (b"[polcy]\n", ("config.toml:1: ", 'did you mean "policy"')),
        (b"[policy\n", ("config.toml:1: ",)),
        (b"# \xff\n", ("config.toml:1: ", "not UTF-8")),
    ],
)
def test_a_wrong_configuration_names_file_line_and_key(tmp_path: Path, text: bytes, sentences: tuple[str, ...]) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(text)
    says(run("check-config", str(config)), 2, *sentences, "try: ")


@pytest.mark.parametrize("command", [("run",), ("list",), ("explain", "3"), ("clean", "--dry-run")])
def test_no_command_works_with_a_wrong_configuration(tmp_path: Path, command: tuple[str, ...]) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[policy]\norphan_grase = '1s'\n")
    says(run(*command, "--config", str(config)), 2, "config.toml:2: ", 'did you mean "orphan_grace"')


def test_a_configuration_that_is_not_there_is_an_error_when_it_was_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"
    says(run("list", "--config", str(missing)), 2, "nowhere.toml: no such file", "try: ")
    says(run("check-config", str(tmp_path)), 2, "is a directory", "try: ")


def test_the_configuration_may_be_named_before_or_after_the_command(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.toml")
    for arguments in (("--config", missing, "list"), ("list", "--config", missing)):
        says(run(*arguments), 2, "nowhere.toml: no such file")


def test_a_reader_that_stops_reading_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m duende_ublkd --help | head -n 1",
        shell=True,
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def of_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("duende-ublkd ", f"{sys.executable} -m duende_ublkd ")
    shell = ["bash", "-o", "pipefail", "-c", line]
    return subprocess.run(shell, check=False, capture_output=True, text=True, cwd=REPOSITORY)


FULL = "duende-ublkd: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("duende-ublkd --help > /dev/full", 1, FULL),
        (f"duende-ublkd check-config --id 3 {ANNOTATED} > /dev/full", 1, FULL),
        (f"duende-ublkd check-config --id 3 {ANNOTATED} >&-", 0, ""),
        (f"duende-ublkd check-config --id 3 {ANNOTATED} <&- >&- 2>&-", 0, ""),
        (f"duende-ublkd check-config --id 3 {ANNOTATED} | true", 0, ""),
        ("duende-ublkd lst 2> /dev/full", 2, ""),
        ("duende-ublkd lst 2>&-", 2, ""),
        pytest.param("duende-ublkd doctor > /dev/full", 3, FULL, marks=without_ublk),
        pytest.param("duende-ublkd doctor --json | true", 3, "", marks=without_ublk),
    ],
)
def test_an_output_that_is_not_taken_changes_no_exit_code_but_that_of_success(line: str, code: int, told: str) -> None:
    done = of_a_shell(line)
    assert (done.returncode, done.stderr) == (code, told)


@pytest.mark.parametrize(
    ("arguments", "sentences"),
    [
        (("list", "3"), ("unrecognized arguments: 3", "try: duende-ublkd list --help")),
        (("run", "--json"), ("unrecognized arguments: --json", "try: duende-ublkd run --help")),
        (("--json", "list"), ("unrecognized arguments: --json", "try: duende-ublkd --help")),
        (("clean", "--n", "3"), ("unrecognized arguments: --n", "try: duende-ublkd clean --help")),
        (("lst",), ("'lst' is no command", 'try: did you mean "list"?')),
        (("x",), ("'x' is no command", "try: possible here: run, list")),
        (("list", "--config", ""), ('"": an empty name is no file\'s', "try: name a file")),
    ],
)
def test_wrong_use_names_the_command_whose_help_tells_more(
    arguments: tuple[str, ...], sentences: tuple[str, ...]
) -> None:
    says(run(*arguments), 2, *sentences)
