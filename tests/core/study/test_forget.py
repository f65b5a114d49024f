"""One participant's answers are deleted from every file of the study and the server's log, and no others."""

import io

import pyarrow.parquet as pq
import pytest
from study_votes import STUDY, make_check, make_pair, make_vote, write_study

from flows.cli import main
from hgdpo_core.errors import InputError
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import read_table
from hgdpo_core.study.forget import forget_participant
from hgdpo_core.study.log import VoteLog, read_segments, segments
from hgdpo_core.study.results import write_results
from hgdpo_core.study.votes import read_votes

PAIRS = [make_pair(f"p{i}") for i in range(3)]
VOTES = [make_vote(who, f"p{i}", "tuned") for who in ("ann", "bob", "eve") for i in range(3)] + [
    make_check("eve", passed=False)]


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def hashes(store):
    return write_study(store, PAIRS, VOTES)


def holds(store, participant):
    """Keys below the study whose names or contents have the hash; columns of Parquet files are compressed."""
    found = []
    for key, _, _ in store.walk(f"studies/{STUDY}"):
        data = store.read_bytes(key)
        text = str(pq.read_table(io.BytesIO(data)).to_pylist()) if key.endswith(".parquet") else data.decode()
        if participant in key + text:
            found.append(key)
    return found


@pytest.mark.parametrize("who", ["hash", "code of eve", "http://127.0.0.1:8321/#code of eve", "  code of eve\n"])
def test_everything_of_one_participant_goes(store, hashes, who):
    write_results(store, half_width=0.1)
    assert len(holds(store, hashes["eve"])) == 5  # participant, votes, and the three files of results
    done = forget_participant(store, None, hashes["eve"] if who == "hash" else who)
    assert (done.votes, done.participant, done.rewritten) == (4, hashes["eve"], True)
    assert holds(store, hashes["eve"]) == []
    assert sorted(set(read_votes(store, STUDY)["participant"].to_pylist())) == sorted([hashes["ann"], hashes["bob"]])
    results = store.read_json(f"studies/{STUDY}/results.json")
    assert results["votes"]["read"] == 6 and results["half_width"] == 0.1
    assert read_table(store, f"studies/{STUDY}/votes.parquet").num_rows == 6


def test_without_results_none_are_written(store, hashes):
    assert not forget_participant(store, STUDY, hashes["ann"]).rewritten
    assert not store.exists(f"studies/{STUDY}/results.json") and holds(store, hashes["ann"]) == []


def test_votes_that_are_still_in_the_log(store, hashes, tmp_path):
    """A server that was killed left votes in its log, one of them in the store already; a cut line was never a vote."""
    folder = tmp_path / "studies" / STUDY / "log"
    log = VoteLog(folder)
    stored = read_votes(store, STUDY).to_pylist()
    known = next(row for row in stored if row["participant"] == hashes["eve"])["trial"]
    for participant, trial in ((hashes["eve"], known), (hashes["eve"], "new"), (hashes["ann"], "other")):
        log.append({"participant": participant, "trial": trial, "revision": 0}).result()
    log.close()
    with segments(folder)[0].open("ab") as file:
        file.write(b'{"participant": "cut')
    assert forget_participant(store, STUDY, hashes["eve"]).votes == 5
    assert [row["participant"] for row in read_segments(segments(folder))] == [hashes["ann"]]
    assert holds(store, hashes["eve"]) == []
    VoteLog(folder).close()  # a server goes on with it


def test_a_log_elsewhere(store, hashes, tmp_path):
    log = VoteLog(tmp_path / "log")
    log.append({"participant": hashes["eve"], "trial": "new", "revision": 0}).result()
    log.close()
    assert forget_participant(store, STUDY, hashes["eve"], log=tmp_path / "log").votes == 5
    assert list(read_segments(segments(tmp_path / "log"))) == []


def test_the_log_of_a_running_server_is_left_to_it(store, hashes, tmp_path):
    folder = tmp_path / "studies" / STUDY / "log"
    log = VoteLog(folder)
    log.append({"participant": hashes["eve"], "trial": "new", "revision": 0}).result()
    before = segments(folder)[0].read_bytes()
    forget_participant(store, STUDY, hashes["eve"])
    assert segments(folder)[0].read_bytes() == before
    log.close()


def test_a_deletion_that_broke_off_is_finished(store, hashes):
    store.delete(f"studies/{STUDY}/participants/{hashes['bob']}.json")
    assert forget_participant(store, STUDY, "code of bob").votes == 3
    assert holds(store, hashes["bob"]) == []


def test_somebody_unknown(store, hashes):
    with pytest.raises(InputError, match="none of the 3 participants .* has this code or hash: give the code"):
        forget_participant(store, STUDY, "code of no participant")
    forget_participant(store, STUDY, "code of ann")
    with pytest.raises(InputError, match="none of the 2 participants"):
        forget_participant(store, STUDY, "code of ann")


def test_the_command(store, hashes, tmp_path, capsys):
    write_results(store)
    assert main(["study", "forget", "code of eve", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"Deleted 4 answers of participant {hashes['eve']}" in shown and "written again" in shown
    assert main(["study", "forget", "code of eve", "--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
