"""duende-ublkd: cleans up after dead ublk servers.

What a server calls for its own start-up is here, and documented in `interface`: UblkControl, detect_orphaned_devices(),
cleanup_orphaned_devices(), lock_memory(). Each name is imported when it is first asked for: the daemon's children import
this file too, and keep its memory locked.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing costs half a MiB
if TYPE_CHECKING:
    from duende_ublkd.core.errors import (
        BusyError,
        CommandError,
        CommandOverdueError,
        ConfigError,
        DuendeError,
        HeldError,
        KernelUnavailableError,
        NoSuchDeviceError,
        NotPermittedError,
        UsageError,
    )
    from duende_ublkd.core.model import DevInfo, Feature, KernelState, Outcome, VerdictKind
    from duende_ublkd.interface import (
        Cleanup,
        Finding,
        OnHoldError,
        UblkControl,
        cleanup_orphaned_devices,
        detect_orphaned_devices,
        lock_memory,
    )

__all__ = [
    "BusyError",
    "Cleanup",
    "CommandError",
    "CommandOverdueError",
    "ConfigError",
    "DevInfo",
    "DuendeError",
    "Feature",
    "Finding",
    "HeldError",
    "KernelState",
    "KernelUnavailableError",
    "NoSuchDeviceError",
    "NotPermittedError",
    "OnHoldError",
    "Outcome",
    "UblkControl",
    "UsageError",
    "VerdictKind",
    "cleanup_orphaned_devices",
    "detect_orphaned_devices",
    "lock_memory",
]

_OF_MODEL = ("DevInfo", "Feature", "KernelState", "Outcome", "VerdictKind")
_OF_INTERFACE = (
    *("Cleanup", "Finding", "OnHoldError", "UblkControl"),
    *("cleanup_orphaned_devices", "detect_orphaned_devices", "lock_memory"),
)

if not TYPE_CHECKING:  # a type checker would take it for a promise of every name there is

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = "interface" if name in _OF_INTERFACE else "core.model" if name in _OF_MODEL else "core.errors"
        from importlib import import_module  # noqa: PLC0415 - costs every start, and few ask

        value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
