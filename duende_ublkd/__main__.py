"""The program's only exit: whatever happens below becomes an exit code and, for an error, two lines on stderr.

A reader who has seen enough (head, less) is no error, and changes no exit code; that `events` ends with its reader is its
good end. An output that cannot be written for another reason (a full disk) is one, unless there is a worse.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from duende_ublkd import cli
from duende_ublkd.core.errors import DuendeError, ExitCode
from duende_ublkd.core.text import printable

if TYPE_CHECKING:
    from typing import TextIO

_STDOUT, _STDERR = 1, 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """The console script."""
    output = _take_streams()
    try:
        code = _carry_out(output)
        output.is_endless = False
        sys.stdout.flush()
    except cli.LogHangsError as error:
        os._exit(error.args[0])  # the interpreter's own end would wait for the log's thread, and flush what it cannot
    if output.failure and not isinstance(output.failure, BrokenPipeError):
        _complain(f"the output cannot be written: {output.failure.strerror}")
        code = code or ExitCode.LEFT_OVER
    sys.exit(code)


def _carry_out(output: cli.Output) -> int:
    try:
        return cli.run(sys.argv[1:], output)
    except SystemExit as end:  # argparse's, after --help
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except DuendeError as error:
        _complain(*str(error).splitlines(), hint=error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return ExitCode.DONE if output.is_endless else ExitCode.LEFT_OVER
    except OSError as error:
        if error is not output.failure:
            raise
        return ExitCode.LEFT_OVER


def _take_streams() -> cli.Output:
    """Have both, whatever the shell has closed: a closed one's number would be the next file's that is opened."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(spare)
    output = cli.Output(_STDOUT)
    sys.stdout = _as_text(output, sys.stdout)
    sys.stderr = _as_text(io.FileIO(_STDERR, "w", closefd=False), sys.stderr)
    return output


def _as_text(raw: io.FileIO, was: TextIO | None) -> TextIO:
    """As the interpreter has made it; but a name that this locale cannot write is no reason to fail."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=was.encoding if was else "utf-8",
        errors="backslashreplace",
        line_buffering=raw.fileno() == _STDERR or raw.isatty(),
    )


def _complain(*lines: str, hint: str = "") -> None:
    try:
        for line in lines:
            print(f"duende-ublkd: {printable(line, 1000)}", file=sys.stderr)
        if hint:
            print(f"  try: {printable(hint, 1000)}", file=sys.stderr)
    except OSError:
        # Nobody can be told but by the exit code, which the interpreter would replace if it failed to write as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)


if __name__ == "__main__":
    main()
