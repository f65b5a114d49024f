"""Memory of AlignProp, counted on tensors without numbers: it does not grow with the live steps."""

import pytest

from benchmarks import alignprop_memory


@pytest.mark.slow
def test_memory_is_that_of_one_step_however_many_the_gradient_goes_through():
    counted = {}
    for live_steps in (1, 6):
        counted[live_steps] = alignprop_memory.step_bytes((64, 96), 1, live_steps, gradient_checkpointing=False,
                                                          narrow=True)
    (weights, one), (same, six) = counted[1], counted[6]
    assert weights == same and weights < one <= six < weights + 1.2 * (one - weights)


def test_it_prints_a_row_for_each_size_and_number_of_steps(capsys):
    alignprop_memory.main(["--narrow", "--sizes", "64x64", "--live-steps", "1", "--checkpoints", "steps"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 64x64 | 1 | 1 | steps |")
