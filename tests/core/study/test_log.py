"""No acknowledged vote is lost and none is doubled, whatever ends the server."""

import asyncio
import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from study_cases import answers, joined, make_study, one_answer

from hgdpo_core.errors import InputError, StorageError
from hgdpo_core.study import log as log_module
from hgdpo_core.study.log import VoteLog, read_segments, segments
from hgdpo_core.study.session import ChangedMeanwhileError, FullStudyError, StudySession, UnknownTrialError
from hgdpo_core.study.votes import VOTES, delete_participant, list_participants, participant_of, read_votes

# -- the log


def test_what_is_appended_is_there_after_a_restart(tmp_path):
    log = VoteLog(tmp_path)
    for number in range(5):
        log.append({"number": number}).result(10)
    log.close()
    again = VoteLog(tmp_path)
    assert [record["number"] for record in again.recovered] == list(range(5)) and again.writer == log.writer
    again.append({"number": 5}).result(10)
    again.close()
    assert [record["number"] for record in read_segments(segments(tmp_path))] == list(range(6))


def test_votes_that_come_together_share_an_fsync(tmp_path, monkeypatch):
    log, synced = VoteLog(tmp_path), []
    monkeypatch.setattr(log_module.os, "fsync", lambda file: (synced.append(file), time.sleep(0.02)))
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda number: log.append({"number": number}).result(10), range(200)))
    log.close()
    assert len(synced) < 100
    assert sorted(record["number"] for record in read_segments(segments(tmp_path))) == list(range(200))


def test_a_line_that_was_cut_off_is_left_out_and_a_broken_one_is_named(tmp_path):
    log = VoteLog(tmp_path)
    log.append({"number": 1}).result(10)
    log.close()
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes() + b'{"numb')
    again = VoteLog(tmp_path)
    assert again.recovered == [{"number": 1}]
    again.append({"number": 2}).result(10)
    again.close()
    assert [record["number"] for record in read_segments(segments(tmp_path))] == [1, 2]
    path.write_bytes(b'{"numb\n' + path.read_bytes())
    with pytest.raises(StorageError, match="is damaged in line 1"):
        VoteLog(tmp_path)


def test_a_full_disk_is_no_acknowledgement_and_the_next_vote_is_whole(tmp_path, monkeypatch):
    log, real = VoteLog(tmp_path), os.write
    log.append({"number": 1}).result(10)
    half = iter([True])

    def fail(file, data):
        if next(half, False):
            return real(file, bytes(data)[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log_module.os, "write", fail)
    with pytest.raises(StorageError, match="cannot keep votes in .*No space left.*--log"):
        log.append({"number": 2}).result(10)
    monkeypatch.setattr(log_module.os, "write", real)
    log.append({"number": 3}).result(10)
    log.close()
    assert [record["number"] for record in read_segments(segments(tmp_path))] == [1, 3]


def test_one_process_at_a_time(tmp_path):
    log = VoteLog(tmp_path)
    with pytest.raises(InputError, match="another process serves this study"):
        VoteLog(tmp_path)
    log.close()
    VoteLog(tmp_path).close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep votes in .*file"):
        VoteLog(tmp_path / "file")


def test_closed_segments_are_those_before_the_present_one(tmp_path):
    log = VoteLog(tmp_path)
    assert log.rotate() == []
    log.append({"number": 1}).result(10)
    closed = log.rotate()
    log.append({"number": 2}).result(10)
    assert [record["number"] for record in read_segments(closed)] == [1]
    log.delete(closed)
    assert [record["number"] for record in read_segments(log.rotate())] == [2]
    log.close()


# -- the session


@pytest.fixture
def study(tmp_path):
    return make_study(str(tmp_path / "root"))


def test_votes_reach_the_store_with_their_columns(study, tmp_path):
    session = StudySession(study, tmp_path / "log")
    participant, code = joined(session)
    answers(session, participant, 14)
    assert participant.finished and session.move() == 1 and session.move() == 0
    table = read_votes(study.store, study.id)
    assert table.schema == VOTES and table.num_rows == 14
    assert set(table["participant"].to_pylist()) == {participant_of(study.id, code)}
    kinds = table["kind"].to_pylist()
    assert (kinds.count("question"), kinds.count("repeat"), kinds.count("check")) == (12, 1, 1)
    for row in table.to_pylist():
        assert {row["left"], row["right"]} == (
            {"picture", "noise"} if row["kind"] == "check" else {"target", "tuned"})
    assert [path for path in segments(tmp_path / "log") if path.stat().st_size] == [], "nothing is kept twice"
    session.close()


def test_a_restart_goes_on_from_the_log_and_from_the_store(study, tmp_path):
    session = StudySession(study, tmp_path / "log")
    (first, first_code), (second, second_code) = joined(session), joined(session)
    answers(session, first, 5)
    session.move()
    answers(session, first, 2)
    answers(session, second, 3)
    session.log.close()  # as after kill -9: nothing was moved
    assert read_votes(study.store, study.id).num_rows == 5
    again = StudySession(study, tmp_path / "log")
    assert [again.find(code).done for code in (first_code, second_code)] == [7, 3]
    assert {again.find(code).number for code in (first_code, second_code)} == {0, 1}
    again.close()
    assert read_votes(study.store, study.id).num_rows == 10


def test_a_kill_between_storing_and_deleting_doubles_nothing(study, tmp_path, monkeypatch):
    session = StudySession(study, tmp_path / "log")
    participant, code = joined(session)
    answers(session, participant, 4)
    one_answer(session, participant, 3, "right", 1)
    monkeypatch.setattr(session.log, "delete", lambda closed: None)
    session.move()
    session.log.close()
    again = StudySession(study, tmp_path / "log")
    assert again.find(code).done == 4 and again.find(code).votes[3].choice == "right"
    again.close()
    assert read_votes(study.store, study.id)["choice"].to_pylist() == ["left", "left", "left", "right"]


def test_repeated_and_corrected_answers(study, tmp_path):
    session = StudySession(study, tmp_path / "log")
    participant, _ = joined(session)
    assert one_answer(session, participant, 0, "left", 0)
    assert not one_answer(session, participant, 0, "left", 0) and not one_answer(session, participant, 0, "right", 0)
    assert participant.votes[0].choice == "left"
    assert one_answer(session, participant, 0, "tie", 1) and not one_answer(session, participant, 0, "left", 1)
    assert one_answer(session, participant, 1, "right", 0)
    for position, revision in ((0, 2), (2, 1), (1, 2)):
        with pytest.raises(ChangedMeanwhileError):
            one_answer(session, participant, position, "right", revision)
    with pytest.raises(UnknownTrialError):
        one_answer(session, participant, 4, "right", 0)
    session.close()
    assert read_votes(study.store, study.id)["choice"].to_pylist() == ["tie", "right"]


def test_the_same_answer_many_times_at_once_is_one(study, tmp_path):
    session = StudySession(study, tmp_path / "log")
    participant, _ = joined(session)
    trial = session.trial_id(participant, 0)

    async def hammer():
        return await asyncio.gather(*(session.answer(participant, trial, choice, 0, 5)
                                      for choice in ["left", "right"] * 20))

    assert sum(asyncio.run(hammer())) == 1
    session.close()
    assert read_votes(study.store, study.id)["choice"].to_pylist() == ["left"]


def test_a_store_that_fails_keeps_the_log(study, tmp_path, monkeypatch):
    session = StudySession(study, tmp_path / "log")
    participant, _ = joined(session)
    answers(session, participant, 2)

    def fail(*given):
        raise StorageError("the bucket is away")

    with monkeypatch.context() as patch:
        patch.setattr("hgdpo_core.study.session.write_table", fail)
        with pytest.raises(StorageError):
            session.move()
    assert session.move() == 1 and read_votes(study.store, study.id).num_rows == 2
    session.close()


def test_places_are_given_again_when_they_are_left(tmp_path, monkeypatch):
    study = make_study(str(tmp_path / "root"), people=2)
    session, now = StudySession(study, tmp_path / "log"), time.time()
    (first, _), (second, _) = joined(session), joined(session)
    assert (first.number, second.number) == (0, 1)
    with pytest.raises(FullStudyError):
        joined(session)
    answers(session, first, 14)
    answers(session, second, 3)
    monkeypatch.setattr("hgdpo_core.study.session.time.time", lambda: now + 3600)
    with pytest.raises(FullStudyError):
        joined(session)
    monkeypatch.setattr("hgdpo_core.study.session.time.time", lambda: now + 100_000)
    third, _ = joined(session)
    assert third.number == 1, "the second person stopped on the way, a day ago"
    monkeypatch.setattr("hgdpo_core.study.session.time.time", lambda: now + 100_700)
    assert joined(session)[0].number == 1, "the third one answered nothing"
    answers(session, second, 1)
    session.close()


def test_a_participant_who_withdraws_leaves_nothing(study, tmp_path):
    session = StudySession(study, tmp_path / "log")
    (first, first_code), (second, _) = joined(session), joined(session)
    for participant in (first, second):
        answers(session, participant, 3)
    session.move()
    answers(session, first, 1)
    session.withdraw(first)
    assert session.find(first_code) is None and list_participants(study.store, study.id) == [second.id]
    session.move()
    session.close()
    assert set(read_votes(study.store, study.id)["participant"].to_pylist()) == {second.id}
    left = [key for key, _, _ in study.store.walk(study.key) if first.id in key]
    assert left == [] and not any(first.id in path.read_text() for path in segments(tmp_path / "log"))
    StudySession(study, tmp_path / "log").close()


def test_a_participant_whom_another_process_deletes_is_gone_with_the_next_move(study, tmp_path):
    session = StudySession(study, tmp_path / "log")
    participant, code = joined(session)
    answers(session, participant, 3)
    session.move()
    assert delete_participant(study.store, study.id, participant.id) == 1
    answers(session, participant, 1)
    session.move()
    assert session.find(code) is None and study.store.list(f"{study.key}/votes") == {}
    session.close()


def test_a_damaged_participant_is_named(study, tmp_path):
    study.store.write_bytes(f"{study.key}/participants/abc.json", b"{}")
    with pytest.raises(StorageError, match="abc.json is damaged"):
        StudySession(study, tmp_path / "log")
    VoteLog(tmp_path / "log").close()
