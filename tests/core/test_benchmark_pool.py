"""The pool benchmarks at their tiny size: they run, print their tables, and notice images that differ."""

import re

import pytest
import torch

from benchmarks import pool, shard_wait
from benchmarks.targets import open_target
from hgdpo_core.models.image_generator import ImageGenerator

TINY = ["--size", "tiny", "--dtype", "float32", "--threads", "1", "--prompts", "2", "--images-per-prompt", "2"]


def table(text):
    """Cells of the rows below a table's head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_both_sides_draw_the_same_images(capsys, monkeypatch):
    """A batch of four does not fit here; the trial is compared too."""
    draw = ImageGenerator.sample

    def small_memory(self, prompt_embeds, seeds):
        if len(seeds) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, prompt_embeds, seeds)

    monkeypatch.setattr(ImageGenerator, "sample", small_memory)
    options = [*TINY, "--batches", "4", "3", "--loop-batches", "2", "--repeats", "1", "--clock", "cpu"]
    assert pool.main([*options, "--trials", "channels_last"]) == 0
    printed = capsys.readouterr()
    assert "ours, shards committed: a batch of 4 does not fit" in printed.err
    assert "tiny, cpu, float32, 1 threads, cpu clock" in printed.out
    rows = table(printed.out)
    assert [(row[0], row[1]) for row in rows] == [
        ("loop of pipe(), images saved", "2"), ("the same, not saved", "2"), ("ours, shards committed", "3"),
        ("trial: ours, channels_last", "3")]
    assert all(float(row[2]) > 0 and re.fullmatch(r"\d+\.\d\dx", row[3]) and int(row[5]) <= 1 for row in rows)
    monkeypatch.setattr(pool, "LARGEST_IN_FLOAT32", -1)
    assert not pool.within_tolerance(0, 0.0, "float32")


@pytest.mark.slow
def test_operations_are_counted_on_shapes(tmp_path):
    """Twice the steps is twice the denoising; guidance doubles it; the products with the weights are counted whole."""
    model, config = open_target("tiny", tmp_path, "float32")
    counts = {}
    for steps, scale in ((1, 5.0), (2, 5.0), (3, 5.0), (2, 1.0)):
        sampler = config.sampler.model_copy(update={"steps": steps, "guidance_scale": scale})
        generator = ImageGenerator(model, sampler, config.pool, "cpu")
        counts[steps, scale] = pool.flops_per_image(generator)
    step = counts[2, 5.0] - counts[1, 5.0]
    decoding = counts[1, 5.0] - step
    assert counts[3, 5.0] == decoding + 3 * step
    assert counts[2, 1.0] == decoding + step
    linear = generator.backbone.denoiser.network.mid_block.attentions[0].transformer_blocks[0].ff.net[2]
    assert step > 2 * linear.weight.numel() and decoding > 0


def test_waiting_is_measured_apart_from_generating(capsys):
    assert shard_wait.main([*TINY, "--prompts-per-shard", "1", "--batch", "2", "--slow", "0.2"]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["local disk", "0.2 s a write", "0.2 s a write, written in line"]
    assert float(rows[2][3]) >= 0.4  # the first shard's data and manifest, before the second was generated
    with pytest.raises(SystemExit):
        shard_wait.main([*TINY, "--clock", "cpu"])
