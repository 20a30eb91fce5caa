"""`duende-ublkd run` with a fault to inject: at SIGUSR2 its event loop stands still, and turns no more."""

import signal
import sys
import time

from duende_ublkd.__main__ import main


def stand_still(*_: object) -> None:
    """In the main thread, between two steps of the loop."""
    while True:
        time.sleep(1000)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, stand_still)
    sys.exit(main())  # type: ignore[func-returns-value]
