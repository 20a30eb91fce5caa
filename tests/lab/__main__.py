"""`python -m tests.lab`: a guest with a real ublk driver, for tests and for people."""

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.lab import image, kernels, qemu
from tests.lab.errors import LabError
from tests.native import build as native

RESULTS = image.REPOSITORY / ".lab"
# A hung test says where it hangs and ends the guest, in good time before the guest's own limit.
HUNG_TEST_S = 600
# pytest would load hypothesis' plugin and rewrite every assertion in all of hypothesis: 30 s on an emulated CPU.
PYTEST_ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def main() -> int:
    parser = _parser()
    options, rest = parser.parse_known_args()
    options.rest = rest
    if rest and options.do not in (_pytest, _campaign):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # Whoever waits for us in vain asks with SIGTERM; a shell's background job does not even hear SIGINT.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status: int = options.do(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nlab: interrupted, the guest is gone", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fetch = commands.add_parser("fetch", help="fill the cache: kernels, their headers, the guest's base image")
    fetch.add_argument("--refresh", action="store_true", help="look for newer ones")
    fetch.set_defaults(do=_fetch)

    shell = commands.add_parser("shell", help="a root shell in a guest; `exit` or Ctrl-A x ends it")
    shell.set_defaults(do=_shell)

    run = commands.add_parser("run", help="one command in a guest")
    run.add_argument("command", nargs="+", metavar="CMD", help="put -- before it")
    run.set_defaults(do=_run)

    pytest = commands.add_parser(
        "pytest", allow_abbrev=False, help="tests/guest, or what more arguments to pytest say, in a guest"
    )
    pytest.set_defaults(do=_pytest)

    demo = commands.add_parser("demo", help="the demonstration")
    demo.set_defaults(do=_demo)

    campaign = commands.add_parser(
        "campaign",
        allow_abbrev=False,
        help="thousands of faults in guests: on every kernel of the matrix, or on those named; "
        "more arguments (--seed, --faults, --only, ...) are for: python -m tests.campaign --help",
    )
    campaign.add_argument("--kernel", nargs="+", default=kernels.names(), metavar="|".join(kernels.SOURCES))
    campaign.set_defaults(do=_campaign)

    for command in (shell, run, pytest, demo):
        command.add_argument("--kernel", default=kernels.names()[0], metavar="|".join(kernels.SOURCES))
    for command in (run, pytest, demo, campaign):
        command.add_argument(
            "--timeout", type=float, default=4800.0, metavar="SECONDS", help="for one guest's whole run"
        )
    return parser


def _fetch(options: argparse.Namespace) -> int:
    for name in kernels.names():
        kernel = kernels.fetch(name, refresh=options.refresh)
        print(f"kernel {name}: {kernel.version}, {qemu.accelerator(kernel)}")
    kernels.uapi_headers(refresh=options.refresh)
    native.guest_files()
    image.base()
    return 0


def _shell(options: argparse.Namespace) -> int:
    if not sys.stdin.isatty():
        raise LabError("a shell needs a terminal", "for one command: python -m tests.lab run -- CMD...")
    size = shutil.get_terminal_size()
    environment = {"TERM": os.environ.get("TERM", "linux"), "LINES": str(size.lines), "COLUMNS": str(size.columns)}
    command = ["sh", "-c", f"stty rows {size.lines} cols {size.columns}; exec sh -l"]
    kernel = kernels.fetch(options.kernel)
    return qemu.run_interactive(kernel, command, environment=environment, extras=native.guest_files())


def _run(options: argparse.Namespace) -> int:
    return _in_guest(options, options.command, f"run-{options.kernel}")


def _demo(options: argparse.Namespace) -> int:
    return _in_guest(options, ["python3", "-m", "tests.lab.demo"], "demo")


def _pytest(options: argparse.Namespace) -> int:
    arguments = options.rest
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = ["tests/guest", *arguments]
    hung = [f"-ofaulthandler_timeout={HUNG_TEST_S}", "-ofaulthandler_exit_on_timeout=true"]
    own = ["-p", "no:cacheprovider", *hung, "--junit-xml=/results/junit.xml"]
    command = ["python3", "-m", "pytest", *own, *arguments]
    return _in_guest(options, command, options.kernel, PYTEST_ENVIRONMENT)


def _campaign(options: argparse.Namespace) -> int:
    """One guest after the other; the worst exit status."""
    command = ["python3", "-m", "tests.campaign", *options.rest]
    status = 0
    for kernel in options.kernel:
        options.kernel = kernel
        status = max(status, _in_guest(options, command, f"campaign-{kernel}"))
    return status


def _in_guest(
    options: argparse.Namespace, command: list[str], name: str, environment: Mapping[str, str] | None = None
) -> int:
    kernel = kernels.fetch(options.kernel)
    results = RESULTS / name
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True, exist_ok=True)
    print(f"lab: booting {kernel.version} ({qemu.accelerator(kernel)})", flush=True)
    with (results / "console.log").open("w") as log:

        def on_output(text: str) -> None:
            log.write(text)
            log.flush()
            sys.stdout.write(text)
            sys.stdout.flush()

        result = qemu.run(
            kernel,
            command,
            timeout_s=options.timeout,
            on_output=on_output,
            environment=environment,
            extras=native.guest_files(),
        )
    _keep_files(result, results)
    for fault in result.kernel_faults:
        print(f"lab: KERNEL FAULT: {fault}")
    kept = results.relative_to(image.REPOSITORY)
    print(f"lab: exit status {result.exit_status} after {result.seconds:.0f} s, log and results in {kept}/")
    return result.exit_status or (qemu.NO_RESULT if result.kernel_faults else 0)


def _keep_files(result: qemu.GuestResult, results: Path) -> None:
    for name, content in result.files.items():
        target = results / name
        if not target.resolve().is_relative_to(results.resolve()):
            raise LabError(f"the guest left a file called {name}", "it leads out of the results directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
