"""The journal's daemon side: what happened, kept in memory at once and on disk as soon as the disk takes it.

Rules:
1. Nothing here waits for the disk: it is a child's (writer.py, kept as apart.py says), which may hang, die, or answer with
   trouble. This process never opens the journal's directory.
2. Everything is bounded: the tail that is kept for readers, what waits to be written, the state, and each event. What is
   lost is counted, told, and, when the disk takes writes again, itself an event.
3. An event's seq is microseconds since the epoch, made strictly increasing, so that it needs no disk to be given. It makes
   writing idempotent: a batch whose writer died unanswered is sent again, and what was written already stays as it is.
4. An acknowledged batch is on the disk. Of the state, the latest value of each key is, and is also kept here, so that a
   journal that had to be begun anew gets it back.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import json
import math
import sys
import time
from asyncio import FIRST_COMPLETED
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duende_ublkd.core.errors import DuendeError
from duende_ublkd.core.model import Event, EventKind, Level
from duende_ublkd.core.text import printable
from duende_ublkd.report.apart import LOOK_AT_THE_DEAD, Apart

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence

TAIL = 1000  # records for readers
MOST_WAITING = 5000  # events that are not written yet
MOST_WAITING_BYTES = 4 << 20
MOST_TEXT = 4096  # bytes of UTF-8
MOST_FACTS = 4096  # bytes of JSON
MOST_READ = 1000  # records of one read
MOST_STATE = 8 << 20  # bytes of all keys and values: a thousand devices are 800 KB, their holds 1.7 MB, alerts 2 MiB
MOST_VALUE = 48 << 10
MOST_UNSAVED = 5000  # keys

CUT = "_cut"
"""The fact that says which facts of an event were left out, and why."""

_LATEST = 253_402_300_799.0  # 9999-12-31T23:59:59Z: later, nobody can write it down
_BATCH = 100
_BATCH_BYTES = 60 << 10
_FRAME = 200  # bytes of a batch that are neither event nor state
_READS = 8  # unanswered ones; a hung disk would gather more without end
_LONGEST_PAUSE = 30.0
_PROGRAM = Path(__file__).with_name("writer.py")

NO_ANSWER = "the journal's disk does not answer"
ONLY_MEMORY = "these are only the latest events, from memory"


@dataclass(frozen=True, slots=True)
class Record:
    """An event in its place."""

    seq: int
    event: Event


@dataclass(slots=True)
class StoreStats:
    """`written`, `dropped`: events since the start. `trouble` "": all is well."""

    written: int
    dropped: int
    waiting: int
    trouble: str


@dataclass(frozen=True, slots=True)
class _Entry:
    record: Record
    row: str  # JSON, as it goes to the writer


@dataclass(slots=True)
class _Flight:
    """What the writer was asked and has not answered: to open (no `state`, no `count`), or to write."""

    number: int
    count: int = 0  # of the first entries that wait
    state: dict[str, str | None] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)  # of the answer, so far
    opens: bool = False


@dataclass(slots=True)
class _Asked:
    """A read under way."""

    answer: asyncio.Future[str]  # "", or what went wrong
    rows: list[list[Any]] = field(default_factory=list)


class Store:
    """The journal as the daemon has it. To be used in one event loop."""

    def __init__(
        self,
        directory: str,
        *,
        max_age: float,
        max_bytes: int,
        on_trouble: Callable[[str], None],
        on_recovered: Callable[[int], None],
        clock: Callable[[], float] = time.time,
        answer_within: float = 5.0,
        first_pause: float = 1.0,
        spawn: Callable[[Sequence[str], int], None] | None = None,
    ) -> None:
        """`answer_within`: seconds until a silent disk is trouble. `first_pause`: before the first try after trouble.

        `spawn(argv, stdin)`: starts every writer but the first, and never waits; OSError or DuendeError: it cannot.
        """
        self._on_trouble = on_trouble
        self._on_recovered = on_recovered
        self._clock = clock
        self._answer_within = answer_within
        self._first_pause = first_pause
        self._loop = asyncio.get_running_loop()
        self._writer = Apart(
            [sys.executable, "-I", "-S", str(_PROGRAM), directory, str(max_age), str(max_bytes)],
            on_packet=self._take,
            on_end=self._note_end,
            spawn=spawn,
            pause=first_pause,
        )
        self._opened = False
        self._tail: deque[Record] = deque(maxlen=TAIL)
        self._appended = 0
        self._not_in_memory = 0  # highest seq that is known to be older than the tail
        self._last_seq = 0
        self._waiting: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._state: dict[str, str] = {}
        self._state_bytes = 0
        self._unsaved: dict[str, str | None] = {}
        self._refused: dict[str, str] = {}
        self._state_read: asyncio.Future[None] = self._loop.create_future()
        self._refusal: asyncio.Future[None] = self._loop.create_future()  # the first: people have to do something
        self._has_been_open = False
        self._written = 0
        self._dropped = 0
        self._lost = 0  # dropped since the last time that all was well
        self._trouble = ""
        self._trouble_since = 0.0
        self._is_open = False
        self._flight: _Flight | None = None
        self._overdue = False
        self._reads: dict[int, _Asked] = {}
        self._numbers = itertools.count(1)
        self._pause = first_pause
        self._retry: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._pumping = False
        self._closing = False
        self._has_given_up = False  # the last try, while it closes, has failed or is over
        self._closed = False
        self._changed: set[asyncio.Event] = set()  # one for each that waits for anything to change

    @property
    def stats(self) -> StoreStats:
        """As of now."""
        trouble = self._trouble or next(iter(self._refused.values()), "")
        return StoreStats(self._written, self._dropped, len(self._waiting), trouble)

    @property
    def writer_pid(self) -> int | None:
        """The writer's, while there is one and, of one that was spawned, since its first message."""
        return self._writer.pid

    # --- the life of it ---------------------------------------------------------------------------------------------

    async def open(self, deadline: float = 3.0) -> dict[str, Any]:
        """Start the writer; the saved state, or {} with `stats.trouble` set when it cannot be read by the deadline.

        A directory or file that is refused is not waited for, unless the deadline is infinite.
        """
        self._opened = True
        self._pump()
        wanted = [self._state_read] if deadline == math.inf else [self._state_read, self._refusal]
        await asyncio.wait(wanted, timeout=None if deadline == math.inf else deadline, return_when=FIRST_COMPLETED)
        if self._state_read.done():
            return self._decoded_state()
        if not self._trouble:
            self._overdue = True
            self._say(NO_ANSWER)
        return {}

    def _decoded_state(self) -> dict[str, Any]:
        """Without what nobody can have saved here: the file may have been edited, or damaged where SQLite cannot tell."""
        found = {}
        for key, value in self._state.items():
            try:
                found[key] = json.loads(value)
            except (ValueError, TypeError, RecursionError):
                self._on_trouble(f"what the journal has kept as {printable(key, 60)} is not understood")
        return found

    async def close(self, deadline: float = 1.0) -> None:
        """Write what can be, then leave the writer to itself. What waits after the deadline is lost, or its to write."""
        if self._closed:
            return
        if self._opened:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline):
                    await self._finish()
        self._closed = True
        for timer in (self._retry, self._deadline):
            if timer:
                timer.cancel()
        self._forget_asked()
        self._writer.close()
        self._wake()

    async def _finish(self) -> None:
        self._closing = True
        if self._retry:
            self._retry.cancel()
            self._try_again()
        else:
            self._pump()
        changed = asyncio.Event()
        self._changed.add(changed)
        try:
            while self._has_work() and not self._has_given_up:
                changed.clear()
                await changed.wait()
            if not self._overdue:
                self._writer.finish()
            while self._writer.is_there:
                changed.clear()
                await changed.wait()
            while not self._writer.has_ended:  # noqa: ASYNC110 - it has closed its socket, so it ends
                await asyncio.sleep(LOOK_AT_THE_DEAD / 10)
        finally:
            self._changed.discard(changed)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._unsaved or self._flight or self._writer.has_unsent)

    def _wake(self) -> None:
        for each in self._changed:
            each.set()

    # --- what the daemon puts in ------------------------------------------------------------------------------------

    def append(self, event: Event) -> int:
        """Keep an event, made fit (printable text, JSON facts, bounded); its seq. Never waits, never raises for trouble."""
        now = self._clock()
        self._last_seq = max(self._last_seq + 1, int(now * 1_000_000))
        entry = _fit(self._last_seq, event, now)
        if len(self._tail) == TAIL:
            self._not_in_memory = max(self._not_in_memory, self._tail[0].seq)
        self._tail.append(entry.record)
        self._appended += 1
        self._waiting.append(entry)
        self._waiting_bytes += len(entry.row)
        self._drop_what_is_too_much()
        self._wake()
        self._pump_soon()
        return entry.record.seq

    def save(self, key: str, value: object | None) -> None:
        """Keep a small JSON value over restarts; None: no longer. The former value stays where a new one is too large."""
        encoded = None if value is None else json.dumps(value)
        before = self._state.get(key)
        if encoded is not None and encoded == before:
            self._accept(key)
            return
        if encoded is None and before is None and self._state_read.done():
            self._accept(key)
            return
        size = size_in_batch(key, encoded)
        total = self._state_bytes - size_in_batch(key, before) + size
        is_one_more = key not in self._unsaved and len(self._unsaved) >= MOST_UNSAVED
        if size > MOST_VALUE or total > MOST_STATE or is_one_more:
            self._refuse(key, size)
            return
        self._state_bytes = total
        self._unsaved[key] = encoded
        if encoded is None:
            self._state.pop(key, None)
        else:
            self._state[key] = encoded
        self._accept(key)
        self._pump_soon()

    def _accept(self, key: str) -> None:
        if self._refused.pop(key, "") and not self.stats.trouble:
            self._on_recovered(0)

    def _refuse(self, key: str, size: int) -> None:
        sentence = f"what is to be kept as {printable(key, 60)} over a restart is too large: {size} bytes"
        if key not in self._refused and len(self._refused) < _BATCH:
            self._refused[key] = sentence
            self._on_trouble(sentence)

    def _drop_what_is_too_much(self) -> None:
        """The oldest first, but not what the writer may be writing."""
        under_way = self._flight.count if self._flight else 0
        while len(self._waiting) > MOST_WAITING or self._waiting_bytes > MOST_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting[under_way].row)
            del self._waiting[under_way]
            self._dropped += 1
            self._lost += 1
            if not self._trouble:
                self._say("events come faster than the journal's disk takes them")

    # --- what readers get -------------------------------------------------------------------------------------------

    def tail(self, after: int = 0, limit: int = TAIL) -> list[Record]:
        """From memory, oldest first: the newest `limit` after `after`."""
        found = [record for record in self._tail if record.seq > after]
        return found[-limit:] if limit > 0 else []

    async def read(
        self,
        *,
        after: int = 0,
        limit: int = 200,
        dev_id: int | None = None,
        kinds: Collection[EventKind] = (),
        since: float | None = None,
        deadline: float = 2.0,
    ) -> tuple[list[Record], str]:
        """The newest `limit` that match (at most MOST_READ), oldest first, written or not; and "", or why it is not all."""
        limit = min(max(limit, 0), MOST_READ)
        found = {entry.record.seq: entry.record for entry in self._waiting}  # it may be written while we wait
        wanted: dict[str, Any] = {"after": after, "limit": limit, "dev_id": dev_id, "since": since}
        wanted |= {"kinds": [kind.value for kind in kinds], "deadline": deadline}
        rows, trouble = await self._ask(wanted, deadline)
        found |= {entry.record.seq: entry.record for entry in self._waiting}
        found |= {record.seq: record for record in self._tail}
        matching = [record for record in found.values() if _matches(record, after, dev_id, kinds, since)]
        records = {record.seq: record for record in (*records_of(rows), *matching)}
        newest = sorted(records)[-limit:] if limit else []
        return [records[seq] for seq in newest], f"{trouble}; {ONLY_MEMORY}" if trouble else ""

    async def follow(self, after: int) -> AsyncGenerator[Record, None]:
        """What is in memory after `after`, and then all that comes; ends when the store is closed.

        Where records are missing, because the follower was slow or `after` is older than the memory, a record that is
        nowhere else says so: kind daemon, level warning, the fact `missed` with their number or None.
        """
        changed = asyncio.Event()
        self._changed.add(changed)
        try:
            if 0 < after < self._not_in_memory:
                yield _gap(self._not_in_memory, None, self._clock())
            seqs = [record.seq for record in self._tail]
            place = self._appended - len(seqs) + bisect.bisect_right(seqs, after)
            while not self._closed:
                first = self._appended - len(self._tail)
                if place < first:
                    yield _gap(self._tail[0].seq - 1, first - place, self._clock())
                    place = first
                elif place < self._appended:
                    place += 1
                    yield self._tail[place - 1 - first]
                else:
                    changed.clear()
                    await changed.wait()
        finally:
            self._changed.discard(changed)

    async def _ask(self, wanted: dict[str, Any], deadline: float) -> tuple[list[list[Any]], str]:
        if not self._is_open or self._overdue or len(self._reads) >= _READS:
            return [], self._trouble or NO_ANSWER
        number = next(self._numbers)
        asked = self._reads[number] = _Asked(self._loop.create_future())
        self._send({"id": number, "do": "read", **wanted})
        try:
            async with asyncio.timeout(deadline):
                trouble = await asyncio.shield(asked.answer)
        except TimeoutError:
            if not asked.answer.done():  # after a stall, it may have come in the same turn
                return [], NO_ANSWER  # it stays among the unanswered ones: they are counted
            trouble = asked.answer.result()
        return ([], trouble) if trouble else (asked.rows, "")

    # --- the writer -------------------------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        """After this turn of the loop, so that what comes together is written together."""
        if not (self._pumping or self._flight or self._retry):
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Ask the writer for the next thing to be done, if there is any, and nothing else is under way."""
        self._pumping = False
        if self._flight or self._retry or self._has_given_up or self._closed or not self._opened:
            return
        if not self._writer.is_there and not self._start_writer():
            return
        if not self._is_open:
            self._ask_for(_Flight(next(self._numbers), opens=True), {"do": "open"})
            return
        flight = self._next_batch()
        if flight.count or flight.state:
            rows = [entry.row for entry in itertools.islice(self._waiting, flight.count)]
            state = json.dumps(list(flight.state.items()))
            text = f'{{"id": {flight.number}, "do": "write", "state": {state}, "events": [{", ".join(rows)}]}}'
            self._ask_for(flight, text)

    def _next_batch(self) -> _Flight:
        flight = _Flight(next(self._numbers))
        left = _BATCH_BYTES - _FRAME
        for key, value in self._unsaved.items():
            left -= len(json.dumps([key, value])) + 2
            if left < 0 and flight.state:
                return flight
            flight.state[key] = value
        for entry in itertools.islice(self._waiting, _BATCH):
            left -= len(entry.row) + 2
            if left < 0:
                break
            flight.count += 1
        return flight

    def _ask_for(self, flight: _Flight, request: dict[str, Any] | str) -> None:
        self._flight = flight
        self._deadline = self._loop.call_later(self._answer_within, self._note_overdue)
        self._send(request if isinstance(request, str) else {"id": flight.number, **request})

    def _start_writer(self) -> bool:
        if self._writer.is_ending:
            self._try_later()
            return False
        try:
            self._writer.start()
        except DuendeError as error:
            self._fail(f"the journal's writer {error}")
            return False
        return True

    def _send(self, request: dict[str, Any] | str) -> None:
        text = request if isinstance(request, str) else json.dumps(request)
        self._writer.send(text.encode())

    def _take(self, packet: bytes) -> None:
        try:
            answer = json.loads(packet)
            number = answer["id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            self._writer.kill()  # what it says cannot be understood: another one may be
            return
        if asked := self._reads.get(number):
            asked.rows += answer.get("rows", ())
            if not answer.get("more"):
                del self._reads[number]
                self._take_notes(answer)
                if not self._flight and not self._retry:
                    self._be_well()
                asked.answer.set_result(answer.get("error", ""))
        elif self._flight and self._flight.number == number:
            self._flight.rows += answer.get("rows", ())
            if not answer.get("more"):
                self._land(self._flight, answer)

    def _land(self, flight: _Flight, answer: dict[str, Any]) -> None:
        """What was under way is done, or has failed."""
        self._end_flight()
        if "last_seq" in answer:
            self._take_state(flight.rows, answer["last_seq"])  # it may be there though nothing can be written
        if answer.get("refused") and not self._refusal.done():
            self._refusal.set_result(None)
        if error := answer.get("error"):
            self._fail(error)
            return
        if flight.opens:
            self._is_open = self._has_been_open = True
        else:
            self._forget_written(flight)
        self._take_notes(answer)
        self._pause = self._first_pause
        if len(self._waiting) <= MOST_WAITING // 2:
            self._be_well()
        self._wake()
        self._pump()

    def _take_state(self, rows: Iterable[list[Any]], last_seq: int) -> None:
        """What is saved since is newer than what is read; once the file was open, so is everything that is in memory."""
        if self._has_been_open:
            found = dict(rows)
            lacking = {key: value for key, value in self._state.items() if found.get(key) != value}
            self._unsaved = {**lacking, **self._unsaved}
            rows = ()
        for key, value in rows:
            more = size_in_batch(key, value) - size_in_batch(key, self._state.get(key))
            if key not in self._unsaved and self._state_bytes + more <= MOST_STATE:
                self._state_bytes += more
                self._state[key] = value
        self._last_seq = max(self._last_seq, last_seq)
        if not self._tail or last_seq < self._tail[0].seq:
            self._not_in_memory = max(self._not_in_memory, last_seq)
        if not self._state_read.done():
            self._state_read.set_result(None)

    def _forget_written(self, flight: _Flight) -> None:
        for _ in range(flight.count):
            self._waiting_bytes -= len(self._waiting.popleft().row)
        self._written += flight.count
        for key, value in flight.state.items():
            if key in self._unsaved and self._unsaved[key] == value:
                del self._unsaved[key]

    def _take_notes(self, answer: dict[str, Any]) -> None:
        """What happened to the file is trouble that is over already. One that is new while it is in use gets the state."""
        if answer.get("new"):
            self._unsaved = {**self._state, **self._unsaved}
        if notes := answer.get("notes"):
            self._say(printable("; ".join(notes), MOST_TEXT // 2))

    # --- trouble ----------------------------------------------------------------------------------------------------

    def _say(self, sentence: str) -> None:
        if sentence == self._trouble:
            return
        if not self._trouble:
            self._trouble_since = self._clock()
        self._trouble = sentence
        self._on_trouble(sentence)

    def _be_well(self) -> None:
        if not self._trouble:
            return
        lost, self._lost = self._lost, 0
        reason, self._trouble = self._trouble, ""
        lasted = max(self._clock() - self._trouble_since, 0.0)
        text = f"the journal is written again after {lasted:.1f} s, {lost} events were lost: {reason}"
        facts = {"lost": lost, "lasted": round(lasted, 1)}
        self.append(Event(self._clock(), EventKind.DAEMON, Level.WARNING, text, facts=facts))
        self._on_recovered(lost)

    def _fail(self, sentence: str) -> None:
        """Say so, and try again after a pause, unless the store is closing."""
        self._say(printable(sentence, 500))
        self._try_later()

    def _try_later(self) -> None:
        if self._closing:
            self._has_given_up = True
        elif not self._retry and not self._closed:
            self._retry = self._loop.call_later(self._pause, self._try_again)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._wake()

    def _try_again(self) -> None:
        self._retry = None
        self._pump()

    def _note_overdue(self) -> None:
        """Leave it alone: it writes when the disk lets it, and then answers."""
        self._deadline = None
        self._overdue = True
        self._say(NO_ANSWER)

    def _end_flight(self) -> None:
        self._flight = None
        self._overdue = False
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _note_end(self) -> None:
        """The writer has ended. What it has not answered waits still, and is sent to the next one."""
        self._forget_asked()
        self._end_flight()
        if not self._closing:
            self._loop.call_later(LOOK_AT_THE_DEAD, self._tell_end)
        self._try_later()

    def _tell_end(self) -> None:
        if self._closed:
            return
        self._say(f"the journal's writer ended{self._writer.how_it_ended}; another one is started")

    def _forget_asked(self) -> None:
        self._is_open = False
        for asked in self._reads.values():
            if not asked.answer.done():
                asked.answer.set_result("the journal's writer ended")
        self._reads.clear()


# --- records and rows --------------------------------------------------------------------------------------------------


def records_of(rows: Iterable[list[Any]]) -> list[Record]:
    """What the file's rows mean; one that means nothing to this program is left out."""
    return [record for row in rows if (record := _record_of(row))]


def _record_of(row: list[Any]) -> Record | None:
    try:
        seq, at, kind, level, dev_id, text, facts = row
        known = EventKind(kind), Level(level)
        decoded = json.loads(facts) if facts else {}
        when = float(at)
    except (ValueError, TypeError, RecursionError):
        return None
    is_ours = isinstance(decoded, dict) and isinstance(text, str) and isinstance(dev_id, int | None)
    if not is_ours or not 0 <= when <= _LATEST:
        return None
    return Record(seq, Event(when, *known, printable(text, MOST_TEXT), dev_id, decoded))


def _fit(seq: int, event: Event, now: float) -> _Entry:
    at = event.at if math.isfinite(event.at) and 0 <= event.at <= _LATEST else now
    text = printable(event.text, MOST_TEXT)
    if len(text.encode()) > MOST_TEXT:
        text = text.encode()[: MOST_TEXT - 3].decode("utf-8", "ignore") + "…"
    encoded = _encoded_facts(event.facts) if event.facts else ""
    facts = json.loads(encoded) if encoded else {}  # a copy, and just what a reader of the file would get
    row = json.dumps([seq, at, event.kind.value, event.level.value, event.dev_id, text, encoded or None])
    return _Entry(Record(seq, replace(event, at=at, text=text, facts=facts)), row)


def _encoded_facts(facts: dict[str, Any]) -> str:
    """As JSON in ASCII, which carries any str; without what is no JSON, or too large together with the rest."""
    encoded = _json(facts)
    if encoded is not None and len(encoded) <= MOST_FACTS:
        return encoded
    kept: dict[str, Any] = {}
    left = MOST_FACTS - 300  # for the note
    names = []
    for name, value in itertools.islice(facts.items(), MOST_FACTS):
        encoded = _json({name: value})
        if encoded is None or len(encoded) > left:
            names.append(printable(str(name), 30))
            continue
        left -= len(encoded)
        kept[name] = value
    shown = printable(", ".join(names), 40)
    kept[CUT] = f"{len(facts) - len(kept)} facts are left out, too large or no JSON: {shown}"
    return json.dumps(kept)


def _json(value: object) -> str | None:
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return None


def size_in_batch(key: str, value: str | None) -> int:
    """Of a state's value in a batch: JSON in JSON."""
    return 0 if value is None else len(json.dumps([key, value]))


def _matches(record: Record, after: int, dev_id: int | None, kinds: Collection[EventKind], since: float | None) -> bool:
    event = record.event
    return (
        record.seq > after
        and (dev_id is None or event.dev_id == dev_id)
        and (not kinds or event.kind in kinds)
        and (since is None or event.at >= since)
    )


def _gap(seq: int, missed: int | None, now: float) -> Record:
    what = "records" if missed is None else f"{missed} records"
    text = f"{what} are missing here: they are no longer in memory, but may be in the journal"
    return Record(seq, Event(now, EventKind.DAEMON, Level.WARNING, text, facts={"missed": missed}))
