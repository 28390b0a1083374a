from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from replay_helpers import Clock, make_ipc, make_questions, make_settings

from rexrag.arrow import group_from_ipc
from rexrag.buffer.ledger import GroupState, Ledger
from rexrag.buffer.log import Damage, read_log
from rexrag.buffer.log_writer import LogWriter
from rexrag.buffer.recovery import accounting_from_log, books_from_log, check_questions, open_buffer
from rexrag.buffer.segments import segments
from rexrag.buffer.settings import ReplaySettings
from rexrag.buffer.state import ReplayState
from rexrag.errors import RunFolderError
from rexrag.types import GroupLease, WeightVersion

DISK_FULL_SCRIPT = Path(__file__).with_name("disk_full.py")


def begin(replay: ReplaySettings, *, resume_step: int | None = None) -> ReplayState:
    state, _ = open_buffer(replay, resume_step=resume_step, clock=Clock())
    state.publish(version_of(state, resume_step or 0))
    return state


def version_of(state: ReplayState, step: int) -> WeightVersion:
    return WeightVersion(incarnation=state.position().incarnation, step=step)


def produce(state: ReplayState, step: int, num: int) -> list[GroupLease]:
    leases = state.lease("a", num=num, held=version_of(state, step))
    for lease in leases:
        state.append("a", lease=lease.key, ipc=make_ipc(lease))
    return leases


def learn(state: ReplayState, step: int) -> list[str]:
    assert state.assign(step, rho=0.1)
    batch = state.take(step)
    state.outcome(step, applied=True)
    state.publish(version_of(state, step))
    return [group_from_ipc(ipc).group_id for ipc in batch.groups]


def fold(folder: Path) -> Ledger:
    ledger = Ledger()
    for item in read_log(folder):
        if not isinstance(item, Damage):
            ledger.apply(item)
    return ledger


def make_run(folder: Path, **changes: float) -> ReplaySettings:
    """Three steps of two groups, two groups finished, one leased."""
    replay = make_settings(folder, num_questions=7, segment_bytes=9000, **changes)
    state = begin(replay)
    for step in (1, 2, 3):
        produce(state, step - 1, 2)
        learn(state, step)
    produce(state, 3, 2)
    state.lease("a", num=1, held=version_of(state, 3))
    return replay


def test_a_resume_keeps_finished_groups_and_leases_unfinished_ones_again(tmp_path: Path) -> None:
    replay = make_run(tmp_path)
    state = begin(replay, resume_step=3)
    status = state.status()
    assert (status.waiting, status.finished, status.assigned) == (1, 2, 0)
    assert state.accounting() == {"issued": 9, "consumed": 6, "dropped": {}, "pending": 3, "given_up": 0}
    (lease,) = state.lease("a", num=1, held=version_of(state, 3))
    assert lease.group_id == "1-8"
    assert learn(state, 4) == ["1-6", "1-7"]


def test_what_the_checkpoint_lacks_is_lost_and_asked_again_as_the_same_attempt(tmp_path: Path) -> None:
    replay = make_run(tmp_path)
    before = fold(tmp_path)
    state = begin(replay, resume_step=1)
    counts = state.accounting()
    assert counts == {"issued": 9, "consumed": 2, "dropped": {"lost": 6}, "pending": 1, "given_up": 0}
    assert accounting_from_log(tmp_path) == counts
    leases = state.lease("a", num=5, held=version_of(state, 1))
    lost = [group for group in before.groups.values() if group.order in (2, 3, 4, 5)]
    assert leases[0].group_id == "1-8"
    assert [lease.question.key for lease in leases[1:]] == [group.question for group in lost]
    assert {lease.attempt for lease in leases} == {0}


def test_a_step_in_the_checkpoint_is_consumed_though_its_outcome_was_not_written(tmp_path: Path) -> None:
    replay = make_settings(tmp_path)
    state = begin(replay)
    produce(state, 0, 2)
    assert state.assign(1, rho=None)
    assert begin(replay, resume_step=1).accounting()["consumed"] == 2


def test_an_assigned_step_is_lost_when_the_checkpoint_lacks_it(tmp_path: Path) -> None:
    replay = make_settings(tmp_path)
    state = begin(replay)
    produce(state, 0, 2)
    assert state.assign(1, rho=None)
    state = begin(replay, resume_step=0)
    assert state.accounting()["dropped"] == {"lost": 2}
    produce(state, 0, 2)
    assert learn(state, 1) == ["2-0", "2-1"]


def test_every_question_of_an_epoch_is_consumed_once_over_crashes(tmp_path: Path) -> None:
    replay = make_settings(tmp_path, num_questions=6)
    state, step = begin(replay), 0
    for crash_at in (1, 3, 4, 99):
        while step < min(crash_at, 6):
            produce(state, step, 3)
            step += 1
            learn(state, step)
        if crash_at < 99:
            step -= 1
            state = begin(replay, resume_step=step)
    groups = fold(tmp_path).in_state(GroupState.CONSUMED).values()
    consumed = Counter((group.epoch, group.question) for group in groups)
    assert set(consumed.values()) == {1}
    assert sum(epoch == 0 for epoch, _ in consumed) == 6


def test_a_new_run_refuses_a_folder_with_a_log(tmp_path: Path) -> None:
    replay = make_run(tmp_path)
    with pytest.raises(RunFolderError, match="holds the replay log of a run already"):
        begin(replay)


def test_other_questions_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RunFolderError, match="is of 7 other questions than the 6 given"):
        begin(make_settings(tmp_path, num_questions=6), resume_step=3)


def test_other_questions_are_noticed_without_opening_the_log(tmp_path: Path) -> None:
    check_questions(tmp_path, make_questions(6))
    make_run(tmp_path)
    before = {path: path.read_bytes() for path in segments(tmp_path)}
    check_questions(tmp_path, make_questions(7))
    with pytest.raises(RunFolderError, match="is of 7 other questions than the 6 given"):
        check_questions(tmp_path, make_questions(6))
    assert before == {path: path.read_bytes() for path in segments(tmp_path)}


def test_a_damaged_group_is_corrupt_and_its_question_asked_again(tmp_path: Path) -> None:
    replay = make_run(tmp_path)
    group = fold(tmp_path).groups["1-7"]
    assert group.payload is not None
    payload = bytes(group.payload)
    for path in segments(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data.replace(payload, payload[:-9] + b"\x01" + payload[-8:]))
    state = begin(replay, resume_step=3)
    assert state.accounting()["dropped"] == {"corrupt": 1}
    damaged, dropped = state.position().damages
    assert "the bytes of group 1-7" in damaged
    assert dropped.startswith("1 group of the replay log that cannot be vouched for")
    waiting, again = state.lease("a", num=2, held=version_of(state, 3))
    assert waiting.group_id == "1-8"
    assert (again.question.key, again.attempt) == (group.question, 1)
    assert begin(replay, resume_step=3).accounting()["dropped"] == {"corrupt": 1}


def damage_header(folder: Path, text: bytes) -> None:
    """Flip a byte in the header of the one record that has `text` in it."""
    (path,) = [path for path in segments(folder) if text in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(text, text[:-1] + b"?"))


def test_a_group_whose_drop_is_damaged_gives_way_to_the_one_asked_again(tmp_path: Path) -> None:
    replay = make_settings(tmp_path, groups_per_step=1)
    state = begin(replay)
    (first,) = state.lease("a", num=1, held=version_of(state, 0))
    state.fail("a", lease=first.key, reason="env_error")
    (again,) = produce(state, 0, 1)
    assert again.question == first.question
    damage_header(tmp_path, b'"reason":"env_error"')
    state = begin(replay, resume_step=0)
    assert state.accounting() == {"issued": 2, "consumed": 0, "dropped": {"corrupt": 1}, "pending": 1, "given_up": 0}
    assert learn(state, 1) == [again.group_id]
    assert again.question not in [lease.question for lease in state.lease("a", num=2, held=version_of(state, 1))]


def test_a_group_whose_issue_is_damaged_is_counted_and_its_question_asked(tmp_path: Path) -> None:
    replay = make_settings(tmp_path, num_questions=3, groups_per_step=1)
    state = begin(replay)
    hidden, _, last = state.lease("a", num=3, held=version_of(state, 0))
    state.append("a", lease=last.key, ipc=make_ipc(last))
    damage_header(tmp_path, b'"type":"issue","group_id":"1-0"')
    state = begin(replay, resume_step=0)
    assert state.accounting() == {"issued": 3, "consumed": 0, "dropped": {"corrupt": 1}, "pending": 2, "given_up": 0}
    _, again = state.lease("a", num=2, held=version_of(state, 0))
    assert (again.question, again.epoch, again.attempt) == (hidden.question, 0, 0)


def test_a_segment_of_zeros_costs_no_balance_and_no_group_is_trained_on_twice(tmp_path: Path) -> None:
    for number in range(4):
        folder = tmp_path / str(number)
        replay = make_run(folder)
        paths = segments(folder)
        assert len(paths) > number
        trained = set(fold(folder).in_state(GroupState.CONSUMED))
        paths[number].write_bytes(bytes(paths[number].stat().st_size))
        state = begin(replay, resume_step=3)
        assert_goes_on(state, replay, step=3, trained=trained)


def test_missing_segments_are_told_and_no_group_is_trained_on_twice(tmp_path: Path) -> None:
    """Any run of segments, the last ones included."""
    make_run(tmp_path / "whole")
    num_segments = len(segments(tmp_path / "whole"))
    assert num_segments >= 4
    for first in range(num_segments):
        for last in range(first, num_segments):
            folder = tmp_path / f"{first}-{last}"
            shutil.copytree(tmp_path / "whole", folder)
            trained = set(fold(folder).in_state(GroupState.CONSUMED))
            for path in segments(folder)[first : last + 1]:
                path.unlink()
            replay = make_settings(folder, num_questions=7, segment_bytes=9000)
            state = begin(replay, resume_step=3)
            assert state.position().damages
            if (first, last) == (0, num_segments - 1):
                assert "is missing: which groups were trained on is not known" in state.position().damages[0]
                continue  # nothing is left to tell a group by
            assert_goes_on(state, replay, step=3, trained=trained)
            assert any("segment-000001" in told for told in books_from_log(folder)[1]) == (first == 0)


def test_the_loss_of_the_last_segment_is_told_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    """Though what it said was no step that is kept: without the note a new start would take its names for its own."""
    replay = make_settings(tmp_path, num_questions=9)
    begin(replay)
    state = begin(replay)
    lost = [lease.group_id for lease in produce(state, 0, 2)]
    segments(tmp_path)[-1].unlink()
    state = begin(replay)
    assert [path.name for path in segments(tmp_path)] == ["segment-000001.log", "segment-000003.log"]
    assert state.position().incarnation == "3"
    assert not set(lost) & {lease.group_id for lease in produce(state, 0, 2)}
    assert state.position().damages == (f"{tmp_path / 'segment-000002.log'} is missing",)
    assert books_from_log(tmp_path)[1] == state.position().damages


def test_many_missing_segments_are_told_in_one_sentence(tmp_path: Path) -> None:
    make_run(tmp_path)
    paths = segments(tmp_path)
    for path in paths[1:]:
        path.unlink()
    assert books_from_log(tmp_path)[1][0] == (
        f"{len(paths) - 1} segments of {tmp_path} are missing: {', '.join(path.name for path in paths[1:])}"
    )


def test_a_run_that_has_done_no_step_of_its_own_misses_no_log(tmp_path: Path) -> None:
    """One that began from the checkpoint of another: stopped before its log had a record, or a segment."""
    for name, has_segment in (("no folder", False), ("no record", True)):
        replay = make_settings(tmp_path / name, num_questions=9, first_step=4)
        if has_segment:
            LogWriter(replay.folder, segment_bytes=1 << 20).close()
        state = begin(replay, resume_step=4)
        assert state.position().damages == ()
        produce(state, 4, 2)
        learn(state, 5)
        assert begin(replay, resume_step=5).position().damages == ()
        assert books_from_log(replay.folder, first_step=4)[1] == ()
        shutil.rmtree(replay.folder)
        assert "is missing: which groups" in begin(replay, resume_step=5).position().damages[0]


def test_a_log_that_ends_before_the_checkpoint_is_told_and_no_group_is_trained_on_twice(tmp_path: Path) -> None:
    """As a copy of a live run leaves it: cut between two records, or within one."""
    make_run(tmp_path / "whole")
    whole = [path.read_bytes() for path in segments(tmp_path / "whole")]
    trained = set(fold(tmp_path / "whole").in_state(GroupState.CONSUMED))
    num_told = 0
    for number, data in enumerate(whole):
        for cut in [*(at for at in range(16, len(data)) if data.startswith(b"RX\xff\xfe", at)), len(data) - 3]:
            folder = tmp_path / f"{number}-{cut}"
            folder.mkdir()
            for kept in range(number + 1):
                content = whole[kept] if kept < number else data[:cut]
                (folder / f"segment-{kept + 1:06d}.log").write_bytes(content)
            replay = make_settings(folder, num_questions=7, segment_bytes=9000)
            knows_all = {1, 2, 3} <= {group.step for group in fold(folder).groups.values()}
            state = begin(replay, resume_step=3)
            told = " ".join(state.position().damages)
            assert knows_all or "does not say which groups step" in told or "is missing" in told
            num_told += not knows_all
            counts = state.accounting()
            assert counts["issued"] == counts["consumed"] + sum(counts["dropped"].values()) + counts["pending"]
            if not knows_all:
                assert counts["pending"] == 0
            assert_goes_on(state, replay, step=3, trained=set(trained))
    assert num_told > 10


def test_a_hole_costs_the_groups_of_its_time_once(tmp_path: Path) -> None:
    make_run(tmp_path)
    for path in segments(tmp_path)[-2:]:
        path.unlink()
    replay = make_settings(tmp_path, num_questions=7, segment_bytes=9000)
    state = begin(replay, resume_step=3)
    assert state.accounting()["pending"] == 0
    lost = state.accounting()["dropped"]
    produce(state, 3, 4)
    again = begin(replay, resume_step=3)
    assert again.accounting()["dropped"] == lost
    assert (again.accounting()["pending"], again.status().finished) == (4, 4)
    assert "does not say which groups" in " ".join(books_from_log(tmp_path)[1])


def test_a_batch_that_an_earlier_start_trained_on_is_missed_too(tmp_path: Path) -> None:
    """Where the snapshot after it is lost as well: else that one knows."""
    for with_snapshot in (True, False):
        folder = tmp_path / str(with_snapshot)
        replay = make_settings(folder, num_questions=9)
        state = begin(replay)
        produce(state, 0, 4)
        trained = learn(state, 1)
        state = begin(replay, resume_step=1)
        spoil(folder / "segment-000001.log", "assign", "outcome")
        if not with_snapshot:
            spoil(folder / "segment-000002.log", "snapshot")
        state = begin(replay, resume_step=1)
        assert "segment-000001.log is damaged" in state.position().damages[0]
        assert any("step 1 trained on" in told for told in state.position().damages) != with_snapshot
        assert state.status().finished == (2 if with_snapshot else 0)
        produce(state, 1, 4)
        assert not set(trained) & set(learn(state, 2))


def spoil(path: Path, *kinds: str) -> None:
    """Damage the records of some kinds."""
    data = path.read_bytes()
    for kind in kinds:
        whole = f'"type":"{kind}"'.encode()
        assert whole in data
        data = data.replace(whole, whole[:-2] + b'?"')
    path.write_bytes(data)


def test_a_lost_segment_costs_the_finished_groups_in_it(tmp_path: Path) -> None:
    """The head of the next one knows all the rest: what was trained on, and what is to be asked again."""
    replay = make_settings(tmp_path, num_questions=9)
    state = begin(replay)
    produce(state, 0, 4)
    trained = learn(state, 1)
    state = begin(replay, resume_step=1)
    (tmp_path / "segment-000001.log").unlink()
    state = begin(replay, resume_step=1)
    assert state.accounting() == {"issued": 4, "consumed": 2, "dropped": {"corrupt": 2}, "pending": 0, "given_up": 0}
    assert "segment-000001.log is missing" in state.position().damages[0]
    assert "2 groups of the replay log that cannot be vouched for" in state.position().damages[1]
    assert_goes_on(state, replay, step=1, trained=set(trained))


def test_settled_segments_are_deleted_and_nothing_is_missed(tmp_path: Path) -> None:
    """Many steps with a checkpoint every two: disk and memory stay flat, accounts and epochs are those of the whole."""
    replay = make_settings(tmp_path, num_questions=5, segment_bytes=9000)
    state, log = open_buffer(replay, resume_step=None, clock=Clock())
    state.publish(version_of(state, 0))
    sizes, known, asked = [], [], []
    for step in range(1, 61):
        asked += [(lease.epoch, lease.question.key) for lease in produce(state, step - 1, 2)]
        learn(state, step)
        if step % 2 == 0:
            log.sync()
            log.delete_before(state.settle(step - 2))
            sizes.append(len(segments(tmp_path)))
            known.append(len(state._ledger.groups))
    assert max(sizes[5:]) <= 5
    assert max(known[5:]) <= 8
    assert segments(tmp_path)[0].name > "segment-000010.log"
    counts = {"issued": 120, "consumed": 120, "dropped": {}, "pending": 0, "given_up": 0}
    assert state.accounting() == accounting_from_log(tmp_path) == counts
    assert books_from_log(tmp_path) == (counts, ())
    assert set(Counter(asked).values()) == {1}
    check_questions(tmp_path, replay.questions)
    with pytest.raises(RunFolderError, match="other question"):
        check_questions(tmp_path, replay.questions[1:])

    again = begin(replay, resume_step=59)  # of two kept checkpoints the older one
    assert again.position().damages == ()
    assert again.accounting() == {**counts, "consumed": 118, "dropped": {"lost": 2}}
    lost = {lease.question.key for lease in produce(again, 59, 2)}
    assert {(lease.epoch, lease.question.key) for lease in produce(again, 59, 2)} & set(asked) == set()
    assert lost == {key for _, key in asked[-2:]}


def test_a_resume_from_before_what_is_settled_is_told(tmp_path: Path) -> None:
    replay = make_settings(tmp_path, num_questions=9)
    state = begin(replay)
    for step in (1, 2, 3):
        produce(state, step - 1, 2)
        learn(state, step)
    state.settle(2)
    with pytest.raises(ValueError, match="step 4 is not over"):
        state.settle(4)
    state = begin(replay, resume_step=1)
    assert state.position().damages == (
        "the replay log was cut after the checkpoint that the run goes on from: the questions of step 2 are not "
        "asked again in their epoch",
    )
    assert_goes_on(state, replay, step=1, trained=set())


@given(at=st.integers(0, 10**6), junk=st.binary(min_size=1, max_size=400), segment=st.integers(0, 10))
@settings(deadline=None, max_examples=40)
def test_recovery_survives_any_damage(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes, segment: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    replay = make_run(folder)
    trained = set(fold(folder).in_state(GroupState.CONSUMED))
    path = segments(folder)[segment % len(segments(folder))]
    data = path.read_bytes()
    at %= len(data)
    path.write_bytes(data[:at] + junk + data[at + len(junk) :])
    state = begin(replay, resume_step=3)
    assert_goes_on(state, replay, step=3, trained=trained)
    shutil.rmtree(folder)


def assert_goes_on(state: ReplayState, replay: ReplaySettings, *, step: int, trained: set[str]) -> None:
    """Balanced, the same as its own log, able to work and to be recovered once more; no group trained on twice."""
    for next_step in (step + 1, step + 2):
        produce(state, next_step - 1, 4)
        taken = learn(state, next_step)
        assert not trained & set(taken)
        trained |= set(taken)
    counts = state.accounting()
    assert counts["issued"] == counts["consumed"] + sum(counts["dropped"].values()) + counts["pending"]
    assert accounting_from_log(replay.folder) == counts
    assert begin(replay, resume_step=step + 2).accounting() == counts


def test_a_full_disk_stops_appends_and_loses_nothing(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond a limit."""
    run = subprocess.run(
        [sys.executable, str(DISK_FULL_SCRIPT), str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert "File too large; free space and resume" in said["error"]
    assert said["retried"] == "accepted"
    ledger = fold(tmp_path / "log")
    assert sorted(ledger.in_state(GroupState.FINISHED)) == sorted(said["acknowledged"])
    assert not [item for item in read_log(tmp_path / "log") if isinstance(item, Damage)]


def test_an_append_takes_milliseconds(tmp_path: Path) -> None:
    state = begin(make_settings(tmp_path, num_questions=100, groups_per_step=30))
    leases = state.lease("a", num=50, held=version_of(state, 0))
    ipcs = [make_ipc(lease, num_rows=5, num_tokens=300) for lease in leases]
    took_s = []
    for lease, ipc in zip(leases, ipcs, strict=True):
        started = time.perf_counter()
        state.append("a", lease=lease.key, ipc=ipc)
        took_s.append(time.perf_counter() - started)
    assert sorted(took_s)[len(took_s) // 2] < 0.05, "but where a segment ends, which is synced"
