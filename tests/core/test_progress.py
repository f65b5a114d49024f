"""Which stages took how long, and which had nothing to make."""

from contextlib import contextmanager

import pytest

from hgdpo_core.progress import StageTimes


def test_a_stage_without_a_report_is_cached():
    opened, reported, times = [], [], StageTimes()

    @contextmanager
    def stages(name):
        opened.append(name)
        yield lambda *report: reported.append(report)

    ticks = iter([0.0, 1.5, 2.0, 2.25, 3.0, 3.0])
    watched = times.watch(stages)
    with times.stage("pool", clock=ticks.__next__), watched("images") as progress:
        progress(1, 2, "images")
    with times.stage("score", clock=ticks.__next__), watched("scores"):
        pass
    with times.stage("prepare", makes=False, clock=ticks.__next__):
        pass
    assert times.seconds == {"pool": 1.5, "score": 0.25, "prepare": 0.0} and times.cached == ["score"]
    assert opened == ["images", "scores"] and reported == [(1, 2, "images")]


def test_a_stage_that_fails_is_not_recorded():
    times = StageTimes()
    with pytest.raises(ValueError), times.stage("pool"):
        raise ValueError
    assert times.seconds == {} and times.cached == []
