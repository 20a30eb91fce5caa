"""The status page: what it says, that nothing in it can be made by somebody else, and what a real browser makes of it."""

import asyncio
import html.parser
import json
import re
import time
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duende_ublkd.core.model import Action, EventKind, Holder, Level, Server, VerdictKind
from duende_ublkd.core.policy import WHAT_WOULD_CHANGE_IT
from duende_ublkd.report import page as page_module
from duende_ublkd.report.glance import LATE, MISSED_LOOKS, Standing, State, look_at, standing_of
from duende_ublkd.report.metrics import Metrics
from duende_ublkd.report.page import EVENTS, MANY, Health, Page, Pages, View, render, status_object
from duende_ublkd.report.web import WebServer
from tests import sights
from tests.browser import Chromium, Tab
from tests.lab import tools
from tests.sights import a_crowd, a_device, a_record, a_sink, a_view, an_alert
from tests.test_web import ASource

PORT = 19131
HERE = f"http://127.0.0.1:{PORT}/"
HOSTILE = "<script>alert(1)</script>\"'&\u202etxt.exe\u2066\x1b[2J\n{{daemon}}\udc80"


class Reader(html.parser.HTMLParser):
    """What is in a page: its text, its elements with their attributes, and whether each is closed in its turn."""

    NEVER_CLOSED = frozenset({"meta", "link", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.NEVER_CLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open[-1] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(view: View, now: float | None = None) -> Reader:
    return Reader(render(view, now or time.time()).body.decode())


def sentence(view: View) -> str:
    return look_at(view, time.time()).sentence


# What it says


def test_with_nothing_wrong_it_says_so_plainly() -> None:
    assert sentence(a_view()) == "Nothing is wrong: no ublk devices"
    assert sentence(a_view(a_device(1))) == "Nothing is wrong: 1 device, served"
    assert sentence(sights.quiet()) == "Nothing is wrong: 3 devices, all served"
    setting_up = a_device(4, VerdictKind.STARTING, "DEAD, being set up by 7")
    assert sentence(a_view(a_device(1), setting_up)) == "Nothing is wrong: 2 devices, 1 served, 1 starting"
    assert look_at(sights.quiet(), time.time()).state is State.WELL


def test_a_device_that_needs_a_person_is_what_it_says_first() -> None:
    glance = look_at(sights.troubled(), time.time())
    assert glance.state is State.WRONG
    assert glance.sentence == "2 devices need a person, and alerts do not get out"
    assert [trouble.where for trouble in glance.troubles] == ["ublk2", "ublk3", "sinks", "undelivered"]
    assert glance.troubles[0].text.startswith("ublk2 is wedged: STOP_DEV has not answered for 11 s")


def test_what_is_taken_care_of_calls_nobody() -> None:
    recovering = a_device(3, VerdictKind.RECOVERING, "its recovery command runs", rule="recovery-runs")
    glance = look_at(a_view(recovering, a_device(1)), time.time())
    assert (glance.state, glance.sentence) == (State.TENDED, "Nobody is needed yet: ublk3 is recovering")
    orphan = a_device(5, VerdictKind.ORPHANED, "nobody has it open", Action.DELETE, rule="orphaned")
    told = sentence(a_view(recovering, orphan))
    assert told == "Nobody is needed yet: 2 devices are taken care of, 1 orphaned, 1 recovering"


def test_planned_work_calls_nobody_unless_the_verdict_does() -> None:
    hold = {"until": "2026-01-01T00:00:00+00:00", "uid": 0, "why": "upgrade"}
    pinned = {**a_device(3, VerdictKind.PINNED, "held; on hold for 5m more by root", rule="on-hold"), "hold": hold}
    assert standing_of(pinned) is Standing.ON_HOLD
    assert sentence(a_view(pinned)) == "Nothing is wrong: 1 device, 1 pinned, 1 on hold"
    wedged = {**a_device(3, VerdictKind.WEDGED, "overdue", Action.ALERT, rule="overdue"), "hold": hold}
    assert standing_of(wedged) is Standing.PERSON


@pytest.mark.parametrize(
    ("sick", "gist", "word"),
    [
        (
            {"trouble": "/dev/ublk-control is missing", "hint": "modprobe ublk_drv"},
            "The ublk driver cannot be asked",
            "modprobe ublk_drv",
        ),
        (
            {"health": Health(journal_trouble="the disk is full", journal_waiting=7)},
            "The journal is not written",
            "7 events wait",
        ),
        ({"health": Health(overdue=2)}, "The kernel does not answer everything", "past their deadline: 2"),
        ({"health": Health(lag=LATE)}, "The daemon is late", "late by 1.0 s"),
        ({"alerts": {"dropped": 4}}, "Alerts do not get out", "dropped: 4"),
        (
            {"alerts": {"alerts": [an_alert("daemon/memory", "memory is not locked", kind="degraded")]}},
            "The daemon is degraded",
            "memory is not locked",
        ),
    ],
)
def test_each_thing_that_can_be_wrong_is_said(sick: dict[str, Any], gist: str, word: str) -> None:
    view = a_view(a_device(1), **sick)
    glance = look_at(view, time.time())
    assert (glance.state, glance.sentence) == (State.WRONG, gist)
    assert word in read(view).text
    assert status_object(view, time.time())["state"] == "wrong"


def test_silence_is_not_health() -> None:
    now = time.time()
    assert "first look" in sentence(a_view(last_look_at=None))
    just_in_time = a_view(a_device(1), last_look_at=now - MISSED_LOOKS * 30 + 1)
    assert look_at(just_in_time, now).state is State.WELL
    glance = look_at(replace(just_in_time, last_look_at=now - MISSED_LOOKS * 30 - 1), now)
    assert (glance.state, glance.sentence) == (State.WRONG, "Nobody has looked at the devices for 2m")


def test_a_failing_sink_is_wrong_as_long_as_something_waits_for_it() -> None:
    failing = a_sink("mail", "mail", waiting=1, last_error="refused")
    assert sentence(a_view(alerts={"sinks": [failing]})) == "Alerts do not get out"
    assert look_at(a_view(alerts={"sinks": [{**failing, "waiting": 0}]}), time.time()).state is State.WELL
    told_already = an_alert("daemon/sink/mail", "alerts do not reach mail", kind="degraded")
    assert len(look_at(a_view(alerts={"sinks": [failing], "alerts": [told_already]}), time.time()).troubles) == 1


def test_whom_a_sink_did_not_reach_is_on_the_page_though_the_sink_is_well() -> None:
    view = a_view(alerts={"sinks": [a_sink("mail", "mail", last_ok_at=time.time(), missed="b@example.org <x>: 450")]})
    text = read(view).text
    assert "the last one did not reach b@example.org <x>: 450" in text
    assert "in part" in text
    assert look_at(view, time.time()).state is State.WELL


def test_what_was_given_up_is_wrong_until_its_sink_takes_something_again() -> None:
    def view(last_ok_at: float | None) -> View:
        lost = sights.troubled().alerts["undelivered"]
        return a_view(alerts={"sinks": [a_sink("chat", "command", last_ok_at=last_ok_at)], "undelivered": lost})

    assert sentence(view(None)) == sentence(view(time.time() - 90000)) == "Alerts do not get out"
    assert look_at(view(time.time()), time.time()).state is State.WELL
    assert "ublk9 is orphaned" in read(view(time.time())).text


def test_what_needs_a_person_comes_first_and_the_worst_of_it_foremost() -> None:
    glance = look_at(sights.troubled(), time.time())
    assert [device["dev_id"] for _, device in glance.devices] == [2, 3, 5, 4, 7, 0, 1]
    rows = [name for name in read(sights.troubled()).ids if re.fullmatch(r"ublk\d+", name)]
    assert rows == [f"ublk{dev_id}" for dev_id in (2, 3, 5, 4, 7, 0, 1)]


def test_the_page_shows_all_that_a_person_on_call_wants_in_one_look() -> None:
    text = read(sights.troubled()).text
    for word in (
        *("2 devices need a person, and alerts do not get out", "2 live", "1 starting", "0 orphaned", "1 wedged"),
        *("Asleep in the kernel", "iou-wrk-412 (pid 412) in blk_mq_freeze_queue_wait", "duende-ublkd explain 2"),
        *("What it takes", WHAT_WOULD_CHANGE_IT["overdue"]),
        "2 attempts to recover it; the last failed: exit status 1: no such backing file",
        *("mount /srv/backup (ext4)", "disk-7.service", "firmware of the shelf"),
        *("2 waiting, next try", "Connection refused", "12 delivered, 6 failed, 1 undeliverable", "ublk9 is orphaned"),
        *("ublk5 could not be recovered, attempt 2 of 3", "written", "47 MiB", "7 of 64", "USER_RECOVERY_REISSUE"),
        "duende-ublkd 0.1.0",
    ):
        assert word in text, word


def test_an_alert_that_somebody_has_not_heard_of_says_so() -> None:
    late = {**an_alert("ublk3/1/pinned", "ublk3 is pinned"), "waits_for": ["mail", "chat"]}
    over = {**late, "key": "ublk4/1/pinned", "over_at": "2026-01-01T00:00:00+00:00"}
    text = read(a_view(alerts={"alerts": [late, over]})).text
    assert text.count("not yet told to mail, chat") == 2
    assert text.count("It is over.") == 1
    assert status_object(a_view(alerts={"alerts": [late, over]}), time.time())["alerts"] == 1


def test_dry_run_cannot_be_overlooked() -> None:
    assert "Dry run." in read(a_view(dry_run=True)).text
    assert "Dry run." not in read(a_view()).text


def test_the_newest_events_come_first_and_no_more_than_are_wanted() -> None:
    view = a_view(events=[a_record(seq, f"event {seq}.") for seq in range(100)])
    found = re.findall(r"event (\d+)\.", read(view).text)
    assert [int(seq) for seq in found] == list(range(99, 99 - EVENTS, -1))


def test_the_calm_are_folded_away_where_there_are_many() -> None:
    few = read(a_view(*(a_device(dev_id) for dev_id in range(MANY))))
    many = read(a_view(*(a_device(dev_id) for dev_id in range(MANY + 1))))
    assert (len(few.all("details")), len(many.all("details"))) == (0, 1)
    crowd = read(a_crowd(60, wrong=2))
    assert crowd.ids.index("ublk58") < crowd.ids.index("calm") < crowd.ids.index("ublk0")
    assert len([name for name in crowd.ids if re.fullmatch(r"ublk\d+", name)]) == 60


def test_a_runbook_is_linked_only_where_there_is_an_address() -> None:
    def links(view: View) -> list[str | None]:
        return [link["href"] for link in read(view).all("a") if link.get("rel") == "noreferrer"]

    assert "https://docs.example/duende.html#alert-wedged" in links(sights.troubled())
    for nowhere in ("README.md", "javascript:alert(1)", "data:text/html,x"):
        view = replace(sights.troubled(), runbook=nowhere)
        assert links(view) == []
        assert f"runbook: {nowhere}#alert-wedged" in read(view).text
    assert "runbook: alert-wedged" in read(replace(sights.troubled(), runbook="")).text
    given_up = a_device(3, VerdictKind.UNSERVED, "3 of 3 attempts failed", Action.ALERT, rule="given-up")
    assert "runbook: alert-recovery-given-up" in read(a_view(given_up)).text


# What it is made of


VIEWS: list[Callable[[], View]] = [sights.nothing, sights.quiet, sights.troubled, lambda: a_crowd(60)]


@pytest.mark.parametrize("view", VIEWS)
def test_it_is_well_formed_and_says_what_is_what(view: Callable[[], View]) -> None:
    found = read(view())
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert [tag for tag, _ in found.elements if tag in ("header", "main", "nav", "footer", "h1")].count("main") == 1
    assert len(found.all("h1")) == len(found.all("header")) == len(found.all("nav")) == len(found.all("footer")) == 1
    assert all(section.get("aria-labelledby") in found.ids for section in found.all("section"))
    assert all(head.get("scope") in ("col", "row") for head in found.all("th"))
    targets = {link["href"] or "" for link in found.all("a")}
    assert {target[1:] for target in targets if target.startswith("#")} <= set(found.ids)
    assert found.all("html") == [{"lang": "en"}]
    roles = {"table": {"table"}, "tr": {"row"}, "td": {"cell"}, "th": {"columnheader", "rowheader"}}
    for tag, known in roles.items():  # which a browser may take away from what is laid out otherwise
        assert {element.get("role") for element in found.all(tag)} <= known, tag


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_in_it_needs_more_than_its_policy_allows(view: Callable[[], View]) -> None:
    page = render(view(), time.time())
    found = Reader(page.body.decode())
    for tag, attributes in found.elements:
        assert tag not in ("form", "iframe", "object", "embed", "img", "base"), tag
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc")], tag
    assert [link.get("rel") for link in found.all("link")] == ["icon"]
    assert "unsafe" not in page.policy
    assert "default-src 'none'" in page.policy
    assert "\n" not in page.policy


def test_without_scripts_it_comes_anew_by_itself() -> None:
    body = render(sights.quiet(), time.time()).body.decode()
    assert '<noscript><meta http-equiv="refresh" content="30"></noscript>' in body


def hostile_view(text: str) -> View:
    """With that text in every place that takes one."""
    device = a_device(
        3,
        VerdictKind.PINNED,
        text,
        Action.ALERT,
        rule=text,
        holders=[Holder(text, text)],
        server=Server(7, alive=True, comm=text, exe=text, unit=text),
        stuck=(text,),
    )
    recovery = {"attempts": 1, "running": False, "last_failure": text}
    alert = {**an_alert(text, text, kind=text, severity=text), "runbook": text, "waits_for": [text], "raised_at": text}
    sink = a_sink(text, text, waiting=1, last_error=text, next_try_at=text, last_ok_at=text)
    undelivered = {"key": text, "sink": text, "summary": text, "why": text, "at": text, "notice": text}
    return a_view(
        {**device, "recovery": recovery, "kernel_state": text, "since": text},
        version=text,
        host=text,
        holds=[{"dev_id": 3, "seconds_left": 5.0, "uid": 1000, "why": text}],
        events=[a_record(1, text, Level.ERROR, kind=EventKind.ALERT)],
        alerts={"alerts": [alert], "sinks": [sink], "undelivered": [undelivered]},
        health=Health(journal_trouble=text),
        trouble=text,
        hint=text,
        features=(text,),
        runbook=f"https://{text}",
    )


def shape_of(view: View) -> list[tuple[str, tuple[str, ...]]]:
    return [(tag, tuple(attributes)) for tag, attributes in read(view).elements]


def test_foreign_text_is_shown_and_does_nothing() -> None:
    page = render(hostile_view(HOSTILE), time.time())
    body = page.body.decode()
    assert body.count("<script") == body.count("</script>") == 1
    assert shape_of(hostile_view(HOSTILE)) == shape_of(hostile_view("harmless"))
    shown = Reader(body).text
    assert "<script>alert(1)</script>" in shown
    assert "\\u202etxt.exe\\u2066\\x1b[2J\\n{{daemon}}\\x80" in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b\u200e\u200f]", body)


@settings(max_examples=60)
@given(st.text(st.characters(), max_size=60))
def test_no_text_at_all_changes_what_the_page_is_made_of(text: str) -> None:
    view = hostile_view(f"a{text}")
    assert shape_of(view) == shape_of(hostile_view("a"))
    json.dumps(status_object(view, time.time()), ensure_ascii=False).encode("utf-8", "backslashreplace")


def test_endless_text_is_cut() -> None:
    crowd = hostile_view("x" * 100_000)
    assert len(render(crowd, time.time()).body) < 100_000


def test_every_part_of_the_view_is_covered_by_the_tag_or_counted_on_by_the_script() -> None:
    """What the tag leaves out is stale on a page that updates itself."""
    view, now = sights.troubled(), time.time()
    changed: dict[str, Any] = {
        "version": "9",
        "host": "other",
        "devices": [{**view.devices[0], "reason": "other"}, *view.devices[1:]],
        "holds": [{**view.holds[0], "why": "other"}],
        "events": [*view.events, a_record(99, "other")],
        "alerts": {},
        "health": replace(view.health, locked=1 << 20),
        "trouble": "other",
        "hint": "other",
        "features": (),
        "slots_max": 1,
        "dry_run": True,
        "runbook": "",
    }
    counted_on = {"started_at", "last_look_at", "look_every"}
    assert changed.keys() | counted_on == {each.name for each in fields(View)}
    before = status_object(view, now)["tag"]
    for name, value in changed.items():
        more: dict[str, Any] = {"trouble": "x"} if name == "hint" else {}
        base = status_object(replace(view, **more), now)["tag"]
        assert status_object(replace(view, **{**more, name: value}), now)["tag"] != base, name
    again = sights.troubled()
    assert (
        status_object(replace(view, started_at=0.0, last_look_at=now, devices=again.devices), now + 3)["tag"] == before
    )


def test_the_tag_is_the_same_on_the_page_and_in_the_status() -> None:
    view, now = sights.troubled(), time.time()
    (main,) = read(view, now).all("main")
    assert main["data-tag"] == status_object(view, now)["tag"]


def test_the_status_is_for_programs_too() -> None:
    status = json.loads(json.dumps(status_object(sights.troubled(), time.time())))
    assert status["state"] == "wrong"
    assert status["verdicts"] == {
        **dict.fromkeys((kind.value for kind in VerdictKind), 0),
        "live": 2,
        "starting": 1,
        "unserved": 2,
        "pinned": 1,
        "wedged": 1,
    }
    assert (status["holds"], status["alerts"], status["undelivered"], status["dry_run"]) == (1, 2, 1, False)
    assert status["health"]["journal"] == {"up": True, "trouble": "", "waiting_events": 0, "dropped_events": 0}
    assert status["driver"]["up"] is True
    assert len(json.dumps(status_object(a_crowd(500), time.time()))) < 2000


def test_five_hundred_devices_are_made_in_no_time() -> None:
    view = a_crowd(500)
    render(view, time.time())
    took = []
    for _ in range(5):
        began = time.process_time()
        page = render(view, time.time())
        took.append(time.process_time() - began)
    assert min(took) < 0.05
    assert len(page.body) < 600 << 10


def test_many_who_look_cost_no_more_than_one() -> None:
    made: list[float] = []
    now = 0.0

    def view() -> View:
        made.append(now)
        return sights.quiet()

    pages = Pages(view, clock=lambda: now)
    first = pages.page()
    assert pages.page() is first
    assert pages.status()["tag"].encode() in first.body
    assert len(made) == 1
    now = 0.99
    assert pages.page() is first
    now = 1.0
    assert pages.page() is not first
    assert len(made) == 2


def contrast(one: str, other: str) -> float:
    """WCAG's, of two #rrggbb."""

    def luminance(color: str) -> float:
        channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_text_can_be_read_in_light_and_in_dark() -> None:
    style = Path(page_module.__file__).with_name("page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("prefers-color-scheme: dark", 1)
    )
    dark = dict(list(dark.items())[: len(light)])
    assert light.keys() == dark.keys()
    written_on = {
        "text": ("back", "face", "calm-b", "good-b", "care-b", "bad-b"),
        "soft": ("back", "face"),
        "link": ("back", "face"),
        "good": ("face", "good-b", "calm-b"),
        "care": ("face", "care-b"),
        "bad": ("face", "bad-b"),
    }
    for scheme in (light, dark):
        for ink, papers in written_on.items():
            for paper in papers:
                assert contrast(scheme[ink], scheme[paper]) >= 4.5, (ink, paper, scheme[ink], scheme[paper])


# In a real browser


@dataclass
class AWatched(ASource):
    """The daemon as the page sees it: a view that a test changes."""

    view: View = field(default_factory=sights.quiet)
    asked_for_pages: int = 0

    def page(self) -> Page:  # type: ignore[override]
        self.asked_for_pages += 1
        return render(self.view, time.time())

    def status(self) -> dict[str, Any]:
        return status_object(self.view, time.time())


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    if not tools.is_possible("chromium"):
        pytest.skip("there is no Chromium here, and it can be fetched on Debian only")
    browser = Chromium.start()
    yield browser
    browser.close()


Look = Callable[[Tab, AWatched, WebServer], Awaitable[None]]


def show(chromium: Chromium, view: View, look: Look, *, width: int = 1280) -> None:
    """Serve the page by the daemon's own server, and look at it."""

    async def run() -> None:
        source = AWatched(view=view)
        server = WebServer(source, Metrics())
        await server.listen("127.0.0.1", PORT)
        try:
            async with chromium.page(width=width) as tab:
                await look(tab, source, server)
        finally:
            await server.close()

    asyncio.run(run())


async def update(tab: Tab) -> None:
    """Ask the daemon now, instead of in a few seconds: as when a person comes back to the tab."""
    await tab.run("document.dispatchEvent(new Event('visibilitychange'))")


def test_a_browser_has_nothing_to_complain_of(chromium: Chromium) -> None:
    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        for view in (sights.troubled(), hostile_view(HOSTILE)):
            source.view = view
            await tab.go(HERE)
            source.view = replace(view, dry_run=True)
            await update(tab)
            await tab.wait_for("document.getElementById('dry-run')")
        assert tab.complaints == []
        assert await tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(244, 246, 248)"

    show(chromium, sights.troubled(), look)


def test_what_the_policy_forbids_is_seen_by_these_tests(chromium: Chromium) -> None:
    async def look(tab: Tab, _: AWatched, __: WebServer) -> None:
        await tab.go(HERE)
        await tab.run("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">x</p>')")
        await tab.wait_for("true")
        assert any("Content Security Policy" in complaint for complaint in tab.complaints)

    show(chromium, sights.quiet(), look)


def test_it_updates_itself_when_something_changes_and_only_then(chromium: Chromium) -> None:
    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE)
        assert await tab.run("document.querySelector('h1').textContent") == "Nothing is wrong: 3 devices, all served"
        pages = source.asked_for_pages
        clock = await tab.run("document.getElementById('clock').textContent")
        await tab.wait_for(f"document.getElementById('clock').textContent !== '{clock}'")  # by itself
        assert source.asked_for_pages == pages
        source.view = sights.troubled()
        await update(tab)
        await tab.wait_for("document.querySelector('h1').textContent.startsWith('2 devices need a person')")
        assert source.asked_for_pages == pages + 1
        same = "new DOMParser().parseFromString(text, 'text/html').getElementById('live').textContent"
        shown = await tab.run("document.getElementById('live').textContent.replace(/\\d+s/g, '')")
        fresh = await tab.run(
            f"fetch('/').then((answer) => answer.text()).then((text) => {same}.replace(/\\d+s/g, ''))"
        )
        assert shown == fresh
        assert await tab.run("document.title") == "2 devices need a person, and alerts do not get out - db7.example"
        assert tab.complaints == []

    show(chromium, sights.quiet(), look)


def test_every_sight_becomes_every_other_by_updating(chromium: Chromium) -> None:
    views = [sights.nothing(), sights.quiet(), sights.troubled(), a_crowd(40), a_crowd(30, wrong=9), sights.nothing()]
    views += [
        a_view(*reversed(views[3].devices)),
        a_view(*views[3].devices[10:], events=views[1].events),
        sights.troubled(),
    ]

    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE)
        plain = "[...{}.querySelectorAll('*')].map((each) => each.id || each.nodeName + each.children.length).join()"
        for view in views:
            source.view = view
            tag = status_object(view, time.time())["tag"]
            await update(tab)
            await tab.wait_for(f"document.getElementById('live').dataset.tag === '{tag}'")
            shown = await tab.run(plain.format("document.getElementById('live')"))
            parsed = "new DOMParser().parseFromString(text, 'text/html').getElementById('live')"
            fresh = await tab.run(f"fetch('/').then((answer) => answer.text()).then((text) => {plain.format(parsed)})")
            assert shown == fresh
        assert tab.complaints == []

    show(chromium, views[0], look)


def test_an_update_keeps_scroll_focus_selection_and_what_is_unfolded(chromium: Chromium) -> None:
    crowd = a_crowd(120)

    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE)
        await tab.run(
            "document.getElementById('calm').open = true; document.querySelector('#ublk60 th').scrollIntoView()"
        )
        await tab.run("document.querySelector('#calm summary').focus({preventScroll: true})")
        await tab.run("getSelection().selectAllChildren(document.querySelector('#ublk61 p'))")
        before = await tab.run("document.getElementById('ublk60').getBoundingClientRect().top")
        wedged = [
            a_device(dev_id, VerdictKind.WEDGED, "overdue", Action.ALERT, rule="overdue") for dev_id in range(200, 206)
        ]
        source.view = a_view(*crowd.devices[3:40], *crowd.devices[50:], *wedged, events=[a_record(9, "changed")])
        await update(tab)
        await tab.wait_for("document.getElementById('ublk205')")
        after = await tab.run("document.getElementById('ublk60').getBoundingClientRect().top")
        assert abs(after - before) <= 1
        assert await tab.run("scrollY") > 1000
        assert await tab.run("document.activeElement.nodeName") == "SUMMARY"
        assert await tab.run("getSelection().toString()") == "served by 4061 (ublk.loop)"
        assert await tab.run("document.getElementById('calm').open") is True

    show(chromium, crowd, look)


def test_a_row_that_goes_down_moves_itself_and_not_all_that_come_before_it(chromium: Chromium) -> None:
    """A node that is moved loses its selection; so the others stay."""
    pinned = a_device(0, VerdictKind.PINNED, "held", Action.ALERT, rule="pinned")
    hold = {**a_device(9), "hold": {"until": "2026-01-01T00:00:00+00:00", "uid": 0, "why": ""}}
    others = [a_device(1, VerdictKind.RECOVERING, "it runs", rule="recovery-runs"), hold]

    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE)
        assert await tab.run("[...document.querySelectorAll('#first-rows tr')].map((row) => row.id)") == [
            "ublk0",
            "ublk1",
            "ublk9",
        ]
        await tab.run("getSelection().selectAllChildren(document.querySelector('#ublk1 p'))")
        source.view = a_view(a_device(0), *others)
        await update(tab)
        await tab.wait_for("document.querySelector('#first-rows tr:last-child').id === 'ublk0'")
        assert await tab.run("getSelection().toString()") == "it runs"

    show(chromium, a_view(pinned, *others), look)


def test_focus_goes_with_a_row_that_moves(chromium: Chromium) -> None:
    def view(*kinds: VerdictKind) -> View:
        devices = [a_device(place, kind, kind.value, Action.ALERT) for place, kind in enumerate(kinds)]
        return a_view(*devices, runbook="https://docs.example/")

    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE)
        await tab.run("document.querySelector('#ublk0 a').focus()")
        source.view = view(VerdictKind.PINNED, VerdictKind.WEDGED)
        await update(tab)
        await tab.wait_for("document.querySelector('#first-rows tr:last-child').id === 'ublk0'")
        assert await tab.run("document.activeElement.href") == "https://docs.example/#alert-pinned"

    show(chromium, view(VerdictKind.WEDGED, VerdictKind.WEDGED), look)


def test_the_filter_finds_by_text_and_verdict_and_outlives_an_update(chromium: Chromium) -> None:
    rows = "[...document.querySelectorAll('#devices tbody tr')]"
    visible = f"{rows}.filter((row) => row.checkVisibility()).map((row) => row.id)"

    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE)
        assert len(await tab.run(visible)) == 3  # the others are folded away
        await tab.run("document.getElementById('filter-text').focus()")
        await tab.type("TENANT-003 xfs")
        assert await tab.run(visible) == [f"ublk{dev_id}" for dev_id in range(30, 40)]
        assert await tab.run("document.getElementById('filter-count').value") == "10 of 200 devices"
        source.view = a_view(*a_crowd(35, wrong=0).devices)
        await update(tab)
        await tab.wait_for("document.getElementById('filter-count').value === '5 of 35 devices'")
        assert await tab.run("document.activeElement.id") == "filter-text"
        assert await tab.run("document.getElementById('filter-text').value") == "TENANT-003 xfs"
        assert await tab.run("location.search") == "?q=TENANT-003+xfs"
        source.view = a_crowd(200)
        await tab.go(f"{HERE}?verdict=pinned")
        assert await tab.run(visible) == ["ublk197", "ublk198", "ublk199"]
        await tab.click("#n-live a")
        assert len(await tab.run(visible)) == 197
        assert tab.complaints == []

    show(chromium, a_crowd(200), look)


def test_a_page_that_was_opened_with_a_name_and_a_password_in_its_address_updates_itself(chromium: Chromium) -> None:
    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.go(HERE.replace("://", "://oncall:secret@") + "?q=ublk")
        source.view = replace(source.view, dry_run=True)
        await update(tab)
        await tab.wait_for("document.getElementById('dry-run') || document.body.classList.contains('lost')")
        assert await tab.run("document.getElementById('silence').innerText") == ""
        assert tab.complaints == []

    show(chromium, sights.quiet(), look)


def test_a_daemon_that_does_not_answer_is_said_to_and_so_is_its_return(chromium: Chromium) -> None:
    async def look(tab: Tab, source: AWatched, server: WebServer) -> None:
        await tab.go(HERE)
        await update(tab)
        clock = await tab.run("document.getElementById('clock').textContent")
        await server.close()
        await update(tab)
        await tab.wait_for("document.body.classList.contains('lost')")
        told = await tab.run("document.getElementById('silence').innerText")
        assert re.match(rf"No answer since {clock[:4]}\S+\. What is below was so then", told)
        assert float(await tab.run("getComputedStyle(document.querySelector('main')).opacity")) < 1
        again = WebServer(source, Metrics())
        await again.listen("127.0.0.1", PORT)
        try:
            await tab.wait_for("!document.body.classList.contains('lost')")  # by itself
            assert await tab.run("document.getElementById('silence').innerText") == ""
        finally:
            await again.close()

    show(chromium, sights.quiet(), look)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280, 1920])
def test_nothing_sticks_out_at_any_width(chromium: Chromium, width: int, scheme: str) -> None:
    async def look(tab: Tab, source: AWatched, _: WebServer) -> None:
        await tab.prefer(scheme)
        for view in (sights.nothing(), sights.troubled(), hostile_view("W" * 300), a_crowd(40)):
            source.view = view
            await tab.go(HERE)
            assert await tab.run("document.documentElement.scrollWidth") <= width
        light = scheme == "light"
        assert await tab.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(244, 246, 248)" if light else "rgb(14, 17, 22)"
        )

    show(chromium, sights.quiet(), look, width=width)


def test_without_scripts_all_of_it_is_there(chromium: Chromium) -> None:
    async def look(tab: Tab, _: AWatched, __: WebServer) -> None:
        await tab.without_scripts()
        await tab.go(HERE)
        text = await tab.run("document.body.innerText")
        assert "2 devices need a person" in text
        assert "STOP_DEV has not answered for 11 s" in text
        assert await tab.run("document.getElementById('filter').checkVisibility()") is False

    show(chromium, sights.troubled(), look)


def test_the_keyboard_gets_everywhere(chromium: Chromium) -> None:
    async def look(tab: Tab, _: AWatched, __: WebServer) -> None:
        await tab.go(HERE)
        await tab.press("Tab")
        assert await tab.run("document.activeElement.className") == "skip"
        await tab.press("Enter")
        await tab.wait_for("location.hash === '#devices'")
        reached = set()
        for _number in range(12):
            await tab.press("Tab")
            reached.add(await tab.run("document.activeElement.id || document.activeElement.nodeName"))
        assert {"filter-text", "filter-verdict", "SUMMARY"} <= reached

    show(chromium, a_crowd(40), look)


def test_a_screen_reader_gets_tables_with_their_heads_on_a_phone_too(chromium: Chromium) -> None:
    async def look(tab: Tab, _: AWatched, __: WebServer) -> None:
        await tab.go(HERE)
        tree = await tab.ask("Accessibility.getFullAXTree")
        roles = [node["role"]["value"] for node in tree["nodes"] if not node.get("ignored")]
        assert {"banner", "navigation", "main", "contentinfo", "heading", "region"} <= set(roles)
        assert roles.count("table") >= 3
        assert roles.count("rowheader") >= 7
        assert roles.count("columnheader") >= 10

    show(chromium, sights.troubled(), look, width=360)


def test_the_wheel_has_all_that_the_page_is_made_of(tmp_path: Path) -> None:
    """The file list alone; a wheel that is installed and run is another test's."""
    from hatchling.builders.wheel import WheelBuilder  # noqa: PLC0415 - a tool of the build

    (wheel,) = WheelBuilder(str(Path(__file__).parents[1])).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("page.html", "page.css", "page.js"):
        assert f"duende_ublkd/report/{name}" in names
