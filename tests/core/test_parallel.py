"""Batches side by side: in order, one thread each, and nothing lost when one fails."""

import threading

import pytest
import torch

from hgdpo_core.parallel import MAX_THREADS, SMALL_PARAMETERS, count_threads, parallel_map


def test_results_keep_the_order_of_the_jobs():
    first_may_end = threading.Event()

    def slow() -> int:
        assert first_may_end.wait(30)
        return 0

    def quick() -> int:
        first_may_end.set()
        return 1

    assert list(parallel_map([slow, quick, lambda: 2, lambda: 3], 2)) == [0, 1, 2, 3]  # slow alone would never end


def test_each_lane_has_one_thread_and_the_caller_keeps_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(parallel_map([torch.get_num_threads] * 6, 2)) == {1}
        assert torch.get_num_threads() == 2
        assert list(parallel_map([torch.get_num_threads], 1)) == [2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_through_and_no_further_job_starts(threads):
    started = []

    def job(number: int):
        def run() -> int:
            started.append(number)
            if number == 1:
                raise ValueError("the second")
            return number
        return run

    results = parallel_map((job(number) for number in range(50)), threads)
    assert next(results) == 0
    with pytest.raises(ValueError, match="the second"):
        list(results)
    assert len(started) <= 1 + 2 * threads


def test_jobs_are_taken_as_lanes_become_free():
    taken = []

    def jobs():
        for number in range(20):
            taken.append(number)
            yield int

    results = parallel_map(jobs(), 2)
    next(results)
    assert len(taken) <= 3
    results.close()


def test_only_small_models_on_a_cpu_have_several(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    small, large = torch.nn.Linear(8, 8, device="meta"), torch.nn.Linear(1, SMALL_PARAMETERS, device="meta")
    assert count_threads(small, "cpu") == MAX_THREADS
    assert count_threads(large, "cpu") == count_threads(small, "cuda") == 1
