"""The program's only exit: whatever happens below becomes an exit code and, for an error, two lines on stderr."""

from __future__ import annotations

import io
import os
import sys

from duende_ublkd import cli
from duende_ublkd.core.errors import DuendeError, ExitCode
from duende_ublkd.core.text import printable

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that this locale cannot write is no reason to fail
    try:
        code: int = cli.run(sys.argv[1:])
        sys.stdout.flush()
    except DuendeError as error:
        for line in str(error).splitlines():
            print(f"duende-ublkd: {printable(line, 1000)}", file=sys.stderr)
        if error.hint:
            print(f"  try: {printable(error.hint, 1000)}", file=sys.stderr)
        code = error.exit_code
    except cli.LogHangsError as error:
        os._exit(error.args[0])  # the interpreter's own end would wait for the log's thread, and flush what it cannot
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep the interpreter from failing again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.DONE
    sys.exit(code)


if __name__ == "__main__":
    main()
