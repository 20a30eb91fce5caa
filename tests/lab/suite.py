"""The guest's whole test suite as a background process: it boots while the host's own tests run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from xml.etree import ElementTree as ET

from tests.lab.errors import need_tool
from tests.lab.image import REPOSITORY

# An interrupted lab kills its QEMU and removes its scratch files at once.
GOODBYE_S = 10.0
FOLLOW_INTERVAL_S = 0.2
SHOWN_LINES = 25


@dataclass(frozen=True)
class Counts:
    run: int
    failed: int
    skipped: int
    seconds: float


@dataclass(frozen=True)
class GuestSuite:
    kernel: str
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, kernel: str) -> Self:
        results = REPOSITORY / ".lab"
        results.mkdir(exist_ok=True)
        log = results / f"{kernel}.log"
        command = [sys.executable, "-m", "tests.lab", "pytest", "--kernel", kernel]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [need_tool("setpriv"), "--pdeathsig", "TERM", *command],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(kernel, log, process)

    def follow(self) -> Iterator[str]:
        """The suite's output from its beginning to its end, as it comes; the lab keeps its own time limit."""
        with self.log.open(errors="replace") as log:
            while True:
                ended = self.process.poll() is not None
                text = log.read()
                if text:
                    yield text
                elif ended:
                    return
                else:
                    time.sleep(FOLLOW_INTERVAL_S)

    def counts(self) -> Counts | None:
        """What the guest's pytest counted, if it came so far."""
        report = REPOSITORY / ".lab" / self.kernel / "junit.xml"
        if self.process.poll() is None or not report.is_file():
            return None
        suite = ET.parse(report).getroot().find("testsuite")
        if suite is None:
            return None
        run, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
        return Counts(run, failures + errors, skipped, float(suite.get("time", 0)))

    def failures(self) -> list[str]:
        """Each failed test's name and the end of what it said: all that a truncated log may leave of it."""
        report = REPOSITORY / ".lab" / self.kernel / "junit.xml"
        if self.process.poll() is None or not report.is_file():
            return []
        told = []
        for case in ET.parse(report).getroot().iter("testcase"):
            for problem in (*case.findall("failure"), *case.findall("error")):
                last = "\n".join((problem.text or "").splitlines()[-SHOWN_LINES:])
                told.append(f"{self.kernel}: {case.get('classname')}::{case.get('name')}\n{last}")
        return told

    def faults(self) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith("lab: KERNEL")]

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(GOODBYE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
