"""The C server of tests/native as a process: quick to start, and not of the project's making."""

import subprocess
import time
from typing import Self


class NativeServer:
    """`mini_server` with the given arguments; announces `WORD ID` lines."""

    def __init__(self, *arguments: str, program: str = "mini_server") -> None:
        self._process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_for(self, word: str) -> int:
        """Read on until it says the word; returns the id that it says with it."""
        dev_id = self._read_until(word)
        if dev_id is None:
            raise AssertionError(f"mini_server ended with {self._process.wait()} before it said {word}")
        return dev_id

    def says(self, word: str) -> bool:
        """Read on until it says the word, or has ended without."""
        return self._read_until(word) is not None

    def _read_until(self, word: str) -> int | None:
        assert self._process.stdout
        for line in self._process.stdout:
            said, _, dev_id = line.partition(" ")
            if said == word:
                return int(dev_id)
        return None

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> float:
        """SIGKILL, and the moment of it (CLOCK_MONOTONIC)."""
        at = time.monotonic()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        return at
