"""The nouns: what was seen of a device, what it means, and what came of it.

Rules: every record is frozen. `None` means "not known", which is never the same as "no": whoever decides has to ask
whether a thing was seen, not only what was seen. Times are seconds of CLOCK_MONOTONIC; ids are the kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.trail import NO_TRAIL, Trail

if TYPE_CHECKING:
    from duende_ublkd.core.holds import Hold


class KernelState:
    """`state` of GET_DEV_INFO (UBLK_S_DEV_*). There is none for "added, not started": that is DEAD too."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3  # since 6.13
    NAMES = ("DEAD", "LIVE", "QUIESCED", "FAIL_IO")

    @classmethod
    def name(cls, state: int) -> str:
        """The kernel's name of a state, or `STATE_n` for one that this program does not know."""
        return cls.NAMES[state] if 0 <= state < len(cls.NAMES) else f"STATE_{state}"


class Feature(IntFlag):
    """UBLK_F_*: bits of a device's `flags` and of GET_FEATURES (include/uapi/linux/ublk_cmd.h, 7.3)."""

    SUPPORT_ZERO_COPY = 1 << 0
    URING_CMD_COMP_IN_TASK = 1 << 1
    NEED_GET_DATA = 1 << 2
    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    UNPRIVILEGED_DEV = 1 << 5
    CMD_IOCTL_ENCODE = 1 << 6
    USER_COPY = 1 << 7
    ZONED = 1 << 8
    USER_RECOVERY_FAIL_IO = 1 << 9
    UPDATE_SIZE = 1 << 10
    AUTO_BUF_REG = 1 << 11
    QUIESCE = 1 << 12
    PER_IO_DAEMON = 1 << 13
    BUF_REG_OFF_DAEMON = 1 << 14
    BATCH_IO = 1 << 15
    INTEGRITY = 1 << 16
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18
    SHMEM_ZC = 1 << 19
    IO_DESC_SIZE = 1 << 20


def feature_names(flags: int) -> tuple[str, ...]:
    """The names of the set bits, lowest first; a bit without a name is `BIT_n`."""
    known = {feature.value: feature.name for feature in Feature}
    return tuple(known.get(1 << bit) or f"BIT_{bit}" for bit in range(flags.bit_length()) if flags >> bit & 1)


@dataclass(frozen=True, slots=True)
class DevInfo:
    """struct ublksrv_ctrl_dev_info as GET_DEV_INFO returned it. `state` and `server_pid` may be mutually stale."""

    dev_id: int
    state: int
    server_pid: int  # ublksrv_pid: a hint. -1: none, or (since 7.0) invisible from here or gone
    flags: int
    queues: int
    queue_depth: int
    max_io_bytes: int = 0
    owner_uid: int = 0
    owner_gid: int = 0

    @property
    def recoverable(self) -> bool:
        """Its disk outlives its server."""
        return bool(self.flags & Feature.USER_RECOVERY)

    @property
    def unprivileged(self) -> bool:
        """Every command on it needs the node's path, and DEL_DEV_ASYNC is impossible."""
        return bool(self.flags & Feature.UNPRIVILEGED_DEV)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which instance of an id this is. The lowest free id is reused by the next ADD_DEV, dev_t and name with it.

    `sysfs_inode` is the kernfs inode of /sys/class/ublk-char/ublkcN (monotonic per boot); None once it is deleted.
    """

    sysfs_inode: int | None
    char_rdev: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    """/sys/block/ublkbN. `rdev` outlives the disk in whoever still holds it."""

    rdev: tuple[int, int]
    diskseq: int | None = None
    partitions: tuple[tuple[int, int], ...] = ()

    @property
    def rdevs(self) -> frozenset[tuple[int, int]]:
        """Its number and those of its partitions, as far as they could be read."""
        return frozenset(rdev for rdev in (self.rdev, *self.partitions) if any(rdev))


OPENING = "open"
"""What a child that is to stop a device does first, as the name of a command: nothing comes of it without its daemon."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process: its number names another one later. `start_time`: field 22 of /proc/PID/stat."""

    pid: int
    start_time: int


class Condition(Enum):
    """What keeps a process that exists from doing its work."""

    WELL = ""
    STOPPED = "stopped"  # by SIGSTOP, a terminal or a debugger
    DYING = "dying"  # killed, or at its end, and not able to get there


@dataclass(frozen=True, slots=True)
class Server:
    """A process that is, or was, behind a device. `alive` None: it cannot be told from here.

    `has_ring`: it has an io_uring open, as every server has until it registers and closes it; None: nobody looked.
    """

    pid: int
    alive: bool | None
    comm: str = ""
    exe: str = ""
    unit: str = ""
    start_time: int = 0  # field 22 of /proc/PID/stat; (pid, start_time) names one process
    condition: str = Condition.WELL.value
    has_ring: bool | None = None

    @property
    def may_serve(self) -> bool:
        """Nothing speaks against its answering I/O, now or when it goes on."""
        return self.alive is not False and self.condition != Condition.DYING.value and self.has_ring is not False

    def __str__(self) -> str:
        name = f" ({self.comm})" if self.comm else ""
        return f"{self.pid}{name}"


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who keeps a disk's kernel object alive.

    `kind`: mount | swap | open | dm | md | loop | holder, or who exports it: nvmet | lio | gadget | rnbd | xen.
    `what`: one line of printable text, such as `/srv/data (ext4)`, `/dev/ublkb3 (deleted)`, `pid 812 (dd)`.
    """

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind} {self.what}"


@dataclass(frozen=True, slots=True)
class Usage:
    """Who was found to use one device. Only as good as the look: `complete` False means that somebody may be missing."""

    char_openers: tuple[Server, ...] = ()
    holders: tuple[Holder, ...] = ()
    complete: bool = True
    blind: str = field(default="", compare=False)  # what could not be looked at first, such as `open files of pid 812`


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything seen of one id in one look."""

    dev_id: int
    at: float
    info: DevInfo | None  # None: GET_DEV_INFO gave no answer that can be used; `trouble` says why
    identity: Identity
    char_device: str | None = None  # path of the node, if there
    disk: Disk | None = None
    server: Server | None = None  # the process that `info.server_pid` names
    usage: Usage | None = None  # None: nobody looked
    age: float | None = None  # lower bound of the seconds since ADD_DEV, None: cannot be told
    trouble: str = ""
    had_disk: bool = False  # an event told that this instance had a disk: it was started
    overdue: str = ""  # the command of this look that missed its deadline

    @property
    def state_name(self) -> str:
        """The kernel's word for the state, or UNKNOWN."""
        return KernelState.name(self.info.state) if self.info else "UNKNOWN"


class VerdictKind(Enum):
    """What a device is; see README for each one's meaning."""

    LIVE = "live"
    STARTING = "starting"
    CLOSING = "closing"
    ORPHANED = "orphaned"
    UNSERVED = "unserved"
    RECOVERING = "recovering"
    PINNED = "pinned"
    WEDGED = "wedged"
    UNKNOWN = "unknown"


class Action(Enum):
    """What is to be done about a verdict."""

    NONE = "none"
    DELETE = "delete"  # of a device that is not DEAD: stop it, and then delete it
    RECOVER = "recover"  # run the recovery command
    ALERT = "alert"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and the sentence that justifies it. `look_again_in`: seconds until time alone could change it."""

    kind: VerdictKind
    reason: str
    action: Action = Action.NONE
    look_again_in: float | None = None
    rule: str = ""  # the name of the rule that fired; policy.WHAT_WOULD_CHANGE_IT has a sentence for each
    then: str = ""  # what happens when `look_again_in` is over and nothing else has changed


class Outcome(Enum):
    """What an action changed. Every member is a success; failure is an exception, or a Deed without an outcome."""

    DELETED = "deleted"
    DELETED_STILL_HELD = "deleted_still_held"  # the id frees itself when the holder lets go
    ALREADY_GONE = "already_gone"  # two cleaners stay friends: the goal was a missing device
    SPARED = "spared"  # looked again just before acting, and it was not to be touched
    WOULD_DELETE = "would_delete"  # dry run
    STOPPED = "stopped"  # its disk is gone, and it is an orphan now
    RECOVERED = "recovered"  # LIVE again, by the recovery command
    RECOVERED_BY_ANOTHER = "recovered_by_another"  # LIVE again, and the server is not of our command
    WOULD_RECOVER = "would_recover"  # dry run


@dataclass(frozen=True, slots=True)
class Judged:
    """One device after a look: what was seen, what it means, since when (CLOCK_MONOTONIC)."""

    seen: Observation
    verdict: Verdict
    since: float
    hold: Hold | None = None  # planned work: hands off
    trail: Trail = NO_TRAIL  # what was tried to recover it
    stuck: tuple[str, ...] = ()  # who sleeps in the kernel on some ublk device's account, where this one is wedged


@dataclass(frozen=True, slots=True)
class Deed:
    """One attempt to act. `took`: seconds of it; `reaction`: from the death seen to the id free or served again."""

    dev_id: int
    action: Action
    outcome: Outcome | None  # None: it failed, `detail` says how
    detail: str
    took: float
    reaction: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # JSON values for the journal


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """What the loaded ublk_drv says of itself. `features`: UBLK_F_* bits, 0 before 6.5; `slots_max`: ublks_max."""

    features: int = 0
    slots_max: int | None = None


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass over some or all devices, as journal, metrics and alerts get it."""

    at: float
    took: float
    full: bool
    changed: tuple[Judged, ...] = ()
    gone: tuple[Judged, ...] = ()
    deeds: tuple[Deed, ...] = ()
    devices: dict[int, Judged] = field(default_factory=dict)
    driver: DriverFacts | None = None  # as of this pass; None: not asked
    trouble: str = ""  # why the control device could not be asked at all
    hint: str = ""  # what to type then

    @property
    def is_deed(self) -> bool:
        """It tells of a deed that ended after its pass, and of nothing else."""
        return bool(self.deeds) and not self.changed


class EventKind(Enum):
    """What the journal records."""

    VERDICT = "verdict"  # a device is judged otherwise than before, or is gone
    ACTION = "action"  # before and after something is done to a device
    RECOVERY = "recovery"  # before and after a recovery command
    HOLD = "hold"  # set, released, expired
    ALERT = "alert"  # a person is needed
    DAEMON = "daemon"  # start, end, configuration, trouble of the daemon itself


class Level(Enum):
    """How much it matters. WARNING: the machine was changed, or a person is needed. ERROR: we could not."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the journal. `at`: seconds since the epoch. `facts`: JSON values, for programs; may be cut to fit."""

    at: float
    kind: EventKind
    level: Level
    text: str  # one printable line
    dev_id: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
