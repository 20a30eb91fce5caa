"""duende-ublkd: cleans up after dead ublk servers."""

__version__ = "0.1.0"
