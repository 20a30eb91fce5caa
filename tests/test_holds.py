"""Planned work: what is on hold, for whom, until when, and that a file which is not understood holds everything back."""

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duende_ublkd.core.errors import DuendeError, UsageError
from duende_ublkd.core.holds import MOST_HOLDS, MOST_TEXT, Hold, Holds, may_change
from duende_ublkd.kernel import holdfile

BOOT = "6f0f1a52-boot"
ALICE, BOB = 1000, 1001

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")


def a_hold(dev_id: int = 3, *, until: float = 700.0, uid: int = 0, why: str = "", instance: int | None = None) -> Hold:
    return Hold(dev_id, 100.0, until, uid, why, instance)


def a_record(**changed: object) -> dict[str, Any]:
    record = Holds([a_hold()]).to_record(BOOT)
    record["holds"][0].update(changed)
    return record


def test_a_hold_is_in_force_until_its_time_and_not_a_moment_longer() -> None:
    holds = Holds([a_hold(until=700)])
    assert holds.active(3, 1, 699.9)
    assert holds.active(3, 1, 700.0) is None
    assert holds.active(4, 1, 100.0) is None
    assert holds.expire(699.9) == ()
    assert [hold.dev_id for hold in holds.expire(700.0)] == [3]
    assert len(holds) == 0


def test_the_hold_of_root_is_on_the_id_and_that_of_another_ends_with_the_device() -> None:
    by_root, by_alice = a_hold(3), a_hold(4, uid=ALICE, instance=77)
    holds = Holds([by_root, by_alice])
    assert holds.active(3, 77, 200)
    assert holds.active(3, 78, 200)
    assert holds.active(4, 77, 200)
    assert holds.active(4, 78, 200) is None
    assert holds.active(4, None, 200) == by_alice  # deleted, and not another's yet
    assert holds.drop_of_others(3, 78) is None
    assert holds.drop_of_others(4, 77) is None
    assert holds.drop_of_others(4, 78) == by_alice
    assert holds.get(4) is None


def test_a_later_hold_replaces_an_earlier_one() -> None:
    holds = Holds([a_hold(until=700)])
    holds.set(a_hold(until=300))
    assert holds.all() == (a_hold(until=300),)
    assert holds.release(3) == a_hold(until=300)
    assert holds.release(3) is None


def test_there_are_never_more_holds_than_the_file_takes(tmp_path: Path) -> None:
    holds = Holds()
    for dev_id in range(MOST_HOLDS):
        holds.set(a_hold((1 << 20) - 1 - dev_id, why="\U0001f480" * MOST_TEXT, instance=1 << 63, uid=(1 << 32) - 2))
    with pytest.raises(UsageError, match="on hold already") as told:
        holds.set(a_hold(1))
    assert "duende-ublkd release" in told.value.hint
    holds.set(a_hold((1 << 20) - 1))  # another one for an id that has one
    holdfile.write(str(tmp_path), holds.to_record(holdfile.boot_id()))
    assert len(holdfile.load(str(tmp_path), 200.0)) == MOST_HOLDS


@pytest.mark.parametrize(
    ("uid", "hold", "owner", "may"),
    [
        (0, None, None, True),
        (0, a_hold(uid=ALICE), BOB, True),
        (ALICE, None, ALICE, True),
        (ALICE, a_hold(uid=ALICE), ALICE, True),
        (ALICE, a_hold(uid=0), ALICE, False),  # root has set it
        (ALICE, a_hold(uid=BOB), ALICE, False),
        (ALICE, None, BOB, False),
        (ALICE, None, 0, False),
        (ALICE, None, None, False),  # whose it is, nobody knows
        (ALICE, a_hold(uid=ALICE), BOB, False),  # it was hers; now the id is another's
    ],
)
def test_root_may_change_anything_and_an_owner_what_nobody_else_has_set(
    *, uid: int, hold: Hold | None, owner: int | None, may: bool
) -> None:
    assert may_change(uid, hold, owner) is may


def test_what_is_written_is_read_back_without_what_is_over(tmp_path: Path) -> None:
    holds = Holds([a_hold(3, until=700, why='new "kernel"\\', instance=9), a_hold(4, until=150), a_hold(5, uid=ALICE)])
    holdfile.write(str(tmp_path), holds.to_record(holdfile.boot_id()))
    assert holdfile.load(str(tmp_path), 200.0).all() == (holds.get(3), holds.get(5))
    assert oct((tmp_path / "holds.json").stat().st_mode) == "0o100644"
    assert [path.name for path in tmp_path.iterdir()] == ["holds.json"]


def test_the_umask_does_not_decide_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        holdfile.write(str(tmp_path), Holds().to_record(BOOT))
    finally:
        os.umask(before)
    assert oct((tmp_path / "holds.json").stat().st_mode) == "0o100644"


def test_the_holds_of_another_boot_are_over() -> None:
    assert len(Holds.from_record(a_record(), "another", 200.0)) == 0
    assert len(Holds.from_record(a_record(), BOOT, 200.0)) == 1


def test_the_time_that_is_left_survives_a_restart(tmp_path: Path) -> None:
    now = time.monotonic()
    holdfile.write(str(tmp_path), Holds([Hold(3, now, now + 60, 0)]).to_record(holdfile.boot_id()))
    hold = holdfile.load(str(tmp_path), now).active(3, 1, now + 59.9)
    assert hold
    assert hold.until == now + 60


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"boot_id": BOOT},
        {"boot_id": 7, "holds": []},
        {"boot_id": None, "holds": []},
        {"boot_id": BOOT, "holds": None},
        {"boot_id": BOOT, "holds": 3},
        {"boot_id": BOOT, "holds": ["x"]},
        {"boot_id": BOOT, "holds": [[]]},
        {"boot_id": BOOT, "holds": [{"dev_id": 3}]},
        a_record(dev_id="3"),
        a_record(dev_id=True),
        a_record(until=math.nan),
        a_record(until=math.inf),
        a_record(until=10**400),
        a_record(until=None),
        a_record(why=None),
        a_record(instance=1.5),
        a_record(more=1),
    ],
    ids=repr,
)
def test_a_record_that_is_not_understood_in_full_is_refused_in_full(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a record of holds"):
        Holds.from_record(record, BOOT, 200.0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    record=json_values
    | st.fixed_dictionaries({"boot_id": st.just(BOOT) | json_values, "holds": json_values})
    | st.builds(
        lambda key, value: a_record(**{key: value}),
        st.sampled_from(["dev_id", "since", "until", "uid", "why", "instance", "x"]),
        json_values,
    )
)
def test_whatever_a_record_is_it_is_taken_or_refused(record: Any) -> None:  # noqa: ANN401
    try:
        holds = Holds.from_record(record, BOOT, 200.0)
    except ValueError:
        return
    assert all(hold.until > 200.0 and isinstance(hold.dev_id, int) for hold in holds.all())


@given(
    st.lists(
        st.builds(
            Hold,
            st.integers(0, (1 << 20) - 1),
            st.floats(0, 1e6),
            st.floats(1, 1e6),
            st.integers(0, 1 << 32),
            st.text(max_size=20),
            st.none() | st.integers(0),
        ),
        max_size=5,
    )
)
def test_every_set_of_holds_survives_being_written(holds: list[Hold]) -> None:
    before = Holds(holds)
    record = json.loads(json.dumps(before.to_record(BOOT)))
    assert Holds.from_record(record, BOOT, 0.0).all() == before.all()


def test_without_a_file_nothing_is_on_hold(tmp_path: Path) -> None:
    assert holdfile.read(str(tmp_path)) is None
    assert len(holdfile.load(str(tmp_path), 0.0)) == 0
    assert len(holdfile.load(str(tmp_path / "nowhere"), 0.0)) == 0


def refused(directory: Path) -> str:
    with pytest.raises(DuendeError, match="nobody knows which devices are on hold") as told:
        holdfile.load(str(directory), 200.0)
    assert f"rm {directory}/holds.json" in told.value.hint
    return str(told.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty: it could not be written"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a record of holds"),
        (b"{}", "not a record of holds: 'boot_id'"),
        (b'{"boot_id": 7, "holds": []}', "not a record of holds"),
        (b" " * ((1 << 20) + 1), "is longer than"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_broken_file_is_an_error_and_not_an_empty_one(tmp_path: Path, data: bytes, sentence: str) -> None:
    (tmp_path / "holds.json").write_bytes(data)
    (tmp_path / "holds.json").chmod(0o644)
    assert sentence in refused(tmp_path)


def test_what_is_no_plain_file_is_not_believed(tmp_path: Path) -> None:
    place = tmp_path / "holds.json"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps(Holds().to_record(holdfile.boot_id())))
    place.symlink_to(elsewhere)
    assert "is a symbolic link" in refused(tmp_path)
    place.unlink()
    os.mkfifo(place)
    assert "is not a regular file" in refused(tmp_path)  # and did not wait for a writer
    place.unlink()
    place.mkdir()
    assert "is not a regular file" in refused(tmp_path)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_could_have_written_is_not_believed(tmp_path: Path, mode: int) -> None:
    holdfile.write(str(tmp_path), Holds().to_record(holdfile.boot_id()))
    (tmp_path / "holds.json").chmod(mode)
    assert f"may be written by others than its owner (mode {mode:o})" in refused(tmp_path)


@needs_root
def test_a_file_of_another_user_is_not_believed(tmp_path: Path) -> None:
    holdfile.write(str(tmp_path), Holds().to_record(holdfile.boot_id()))
    os.chown(tmp_path / "holds.json", ALICE, ALICE)
    assert f"belongs to uid {ALICE}, not to root" in refused(tmp_path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    holdfile.write(str(tmp_path), Holds([a_hold()]).to_record(BOOT))
    with pytest.raises(OSError, match="more than") as told:
        holdfile.write(str(tmp_path), {"boot_id": "x" * (1 << 20)})
    assert told.value.errno == errno.EFBIG
    (tmp_path / ".holds.json").mkdir()  # in the way of the new file
    with pytest.raises(OSError, match=r"\.holds\.json"):
        holdfile.write(str(tmp_path), Holds().to_record(BOOT))
    record = holdfile.read(str(tmp_path))
    assert record
    assert len(record["holds"]) == 1


def test_what_a_killed_daemon_began_to_write_is_in_nobodys_way(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".holds.json").symlink_to(victim)
    holdfile.write(str(tmp_path), Holds([a_hold()]).to_record(BOOT))
    assert victim.read_text() == "mine"
    record = holdfile.read(str(tmp_path))
    assert record
    assert record["boot_id"] == BOOT


def test_a_reason_that_is_no_text_for_a_file_can_be_kept_all_the_same(tmp_path: Path) -> None:
    holds = Holds([a_hold(why="\udc80")])
    holdfile.write(str(tmp_path), holds.to_record(holdfile.boot_id()))
    assert holdfile.load(str(tmp_path), 200.0).all() == holds.all()


def test_a_missing_directory_is_the_writers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        holdfile.write(str(tmp_path / "nowhere"), {})
