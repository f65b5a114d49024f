"""A study whose root is a bucket."""

import pytest
from faulty_s3 import served_bucket
from study_cases import answers, joined, make_study

from hgdpo_core.study.session import StudySession
from hgdpo_core.study.study import log_folder
from hgdpo_core.study.votes import delete_participant, read_votes


@pytest.fixture(scope="module", autouse=True)
def bucket():
    with served_bucket():
        yield


def test_on_s3_the_log_is_in_the_users_cache_and_two_machines_lose_nothing(tmp_path):
    study = make_study(f"s3://bucket/{tmp_path.name}")
    assert "hgdpo" in str(log_folder(study)) and log_folder(study).name == study.id
    first = StudySession(study, tmp_path / "one")
    participant, code = joined(first)
    answers(first, participant, 3)
    first.move()
    second = StudySession(study, tmp_path / "two")
    answers(second, second.find(code), 2, "right")
    answers(first, participant, 1)
    first.close()
    second.close()
    votes = read_votes(study.store, study.id)
    assert len(study.store.list(f"{study.key}/votes")) == 2
    assert votes.num_rows == 5 and len(set(votes["trial"].to_pylist())) == 5
    assert delete_participant(study.store, study.id, participant.id) == 2
    assert read_votes(study.store, study.id).num_rows == 0
