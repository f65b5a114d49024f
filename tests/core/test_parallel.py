"""Batches side by side, and work ahead: in order, bounded, and nothing lost when one fails."""

import contextvars
import threading

import pytest
import torch

from hgdpo_core.parallel import MAX_THREADS, SMALL_PARAMETERS, ahead, count_threads, parallel_map, thread_map

setting = contextvars.ContextVar("setting", default="none")


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


def test_a_function_is_mapped_in_order_by_threads_and_few_items_are_begun_ahead(monkeypatch):
    monkeypatch.setattr("hgdpo_core.parallel.count_image_threads", lambda: 2)
    taken, names = [], set()

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    def double(number: int) -> int:
        names.add(threading.current_thread().name.rpartition("-")[0])
        return 2 * number

    results = thread_map(double, items())
    for number in range(50):
        assert next(results) == 2 * number
        assert len(taken) <= number + 4  # two for each thread
    assert list(results) == [] and names == {"images"}


def test_a_mapped_error_comes_in_its_place():
    results = thread_map(lambda number: 1 // number, [1, 1, 0, 1])
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_one_item_is_made_ahead_beside_the_caller():
    made, second = [], threading.Event()

    def items():
        for number in range(5):
            made.append(number)
            if number == 1:
                second.set()
            yield threading.current_thread(), number, setting.get()

    setting.set("the caller's")
    with ahead(items()) as results:
        for expected in range(5):
            thread, number, value = next(results)
            assert (thread is not threading.current_thread(), number, value) == (True, expected, "the caller's")
            assert second.wait(30)  # the second is made although only the first was asked for
            assert len(made) <= expected + 2
        assert list(results) == []


def test_leaving_the_block_closes_what_is_read_ahead():
    closed, threads = [], threading.active_count()

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(threading.current_thread())

    with pytest.raises(KeyError), ahead(items()) as results:
        assert next(results) == 0
        raise KeyError
    assert len(closed) == 1 and closed != [threading.current_thread()] and threading.active_count() == threads


def test_an_error_ahead_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("the second")

    with ahead(items()) as results:
        assert next(results) == 1
        with pytest.raises(ValueError, match="the second"):
            next(results)
