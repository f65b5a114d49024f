"""A plan lists what a run will make and what exists, and makes nothing."""

import json
from pathlib import Path

import pytest
import torch
from faulty_s3 import served_bucket
from safetensors.torch import load_file, save_file
from tiny_run import run_tiny, tiny_parameters

from hgdpo_core import devices
from hgdpo_core.config import PoolConfig, RaceCut, SamplerConfig, ScorerConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.models import Model
from hgdpo_core.models.sizes import ModelSize, model_size
from hgdpo_core.plan import memory, plan_run, rates
from hgdpo_core.plan.rates import Rate
from hgdpo_core.plan.table import RunPlan, describe, readable_bytes, readable_time
from hgdpo_core.run import open_run
from hgdpo_core.stages import probes
from hgdpo_core.stages.base import Probe
from hgdpo_core.storage import DryStore, Store
from hgdpo_core.storage.shards import ShardFolder

STAGES = ["sft latents", "sft", "pool", "score", "triplets", "latent distances", "latents", "dpo",
          "evaluation images, target", "evaluation images, tuned", "pickscore, target", "pickscore, tuned"]


@pytest.fixture(scope="module")
def parameters(tmp_path_factory, target_folder, judge_folder):
    return tiny_parameters(tmp_path_factory.mktemp("user"), target_folder, judge_folder)


@pytest.fixture(scope="module")
def finished(parameters, tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "root"
    run_tiny(str(root), parameters)
    return root


def plan(root, parameters, **options) -> RunPlan:
    return plan_run(open_run(root=str(root), dry=True, **parameters), **options)


def by_name(run_plan):
    return {stage.stage: stage for stage in run_plan.stages}


def files(root):
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_plan_says_what_auto_became_without_a_gpu(parameters, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_fast_bfloat16", lambda: False)
    for dtype, said in (("auto", 1), ("float32", 0)):
        changed = parameters | {"images": None, "overrides": parameters["overrides"] | {"target.dtype": dtype}}
        notes = plan(tmp_path / "root", changed).notes
        assert sum("target.dtype is auto, which is float32 on this machine" in note for note in notes) == said


def test_memory_is_estimated_for_an_architecture_that_is_known(parameters, tmp_path, monkeypatch):
    assert not any(note.startswith("memory of") for note in plan(tmp_path / "root", parameters).notes)
    known = memory.ARCHITECTURES["sd15"]._replace(denoiser=model_size(Path(parameters["target"])).denoiser)
    monkeypatch.setitem(memory.ARCHITECTURES, "sd15", known)
    notes = [note for note in plan(tmp_path / "root", parameters).notes if note.startswith("memory of")]
    assert [note.partition(",")[0].removeprefix("memory of ") for note in notes] == [
        "latents of SFT", "SFT", "sampling", "latents of DPO", "DPO"]


def test_an_empty_root_is_planned_and_stays_empty(parameters, tmp_path):
    made = plan(tmp_path / "root", parameters | {"images": None})
    assert not (tmp_path / "root").exists()
    stages = by_name(made)
    assert list(stages) == STAGES[2:]
    assert (stages["pool"].total, stages["pool"].missing, stages["pool"].shards) == (18, 18, 2)
    assert (stages["score"].missing, stages["triplets"].missing, stages["latents"].missing) == (18, 6, 6)
    assert (stages["dpo"].missing, stages["dpo"].unit) == (2, "steps")
    assert stages["pool"].folder.startswith("pools/n3-") and stages["triplets"].folder.startswith("triplets/6-")
    assert stages["pickscore, target"].folder and not stages["pickscore, tuned"].folder
    assert "dpo is not finished" in stages["evaluation images, tuned"].note
    assert stages["evaluation images, tuned"].missing == 8
    assert all(stage.bytes_missing > 0 for stage in made.stages)
    assert {name for name, stage in stages.items() if stage.seconds is None} == set(stages) - {"triplets"}
    assert made.hours is None and any("not known" in note for note in made.notes)
    assert "length of training: 2 steps of DPO are 0.667 epochs. The paper names no length; its version 3 trains " \
        "some 16 epochs, here 48 steps: to try that set dpo.epochs=16 and dpo.max_steps=null" in made.notes
    assert any("bytes of images are assumed, 1.6 per pixel in png" in note for note in made.notes)


def test_after_sft_only_the_counts_are_known(parameters, tmp_path):
    stages = by_name(plan(tmp_path / "root", parameters))
    assert list(stages) == STAGES
    assert (stages["sft latents"].missing, stages["sft"].missing) == (4, 2)
    assert stages["pool"].folder == "" and stages["pool"].missing == 18 and stages["pool"].shards == 2
    assert "sft is not finished" in stages["pool"].note
    assert stages["evaluation images, target"].missing == 8 and not stages["evaluation images, target"].folder


def test_latent_normalisation_counts_twice(parameters, tmp_path):
    overrides = parameters["overrides"] | {"sampler.latent_normalisation": True}
    stages = by_name(plan(tmp_path / "root", parameters | {"images": None, "overrides": overrides}, with_probe=True))
    target, tuned = stages["evaluation images, target"], stages["evaluation images, tuned"]
    assert tuned.seconds == pytest.approx(2 * target.seconds)
    assert target.seconds / 8 == pytest.approx(stages["pool"].seconds / 18)


def test_a_finished_run_has_nothing_missing(parameters, finished):
    before = files(finished)
    made = plan(finished, parameters)
    assert files(finished) == before
    for stage in made.stages:
        assert (stage.missing, stage.missing_shards, stage.bytes_missing, stage.seconds) == (0, 0, 0, 0.0), stage
        assert stage.bytes_found > 0 and stage.note == "" and (finished / stage.folder).is_dir()
    assert made.hours == made.bytes_missing == 0


def test_missing_shards_are_planned_with_the_rates_of_existing_ones(parameters, finished, tmp_path):
    import shutil

    root = shutil.copytree(finished, tmp_path / "root")
    stages = by_name(plan(root, parameters))
    (root / stages["pool"].folder / "shard-00001.json").unlink()
    after = by_name(plan(root, parameters))
    for name, units in (("pool", 6), ("score", 6), ("triplets", 2), ("latents", 2)):
        assert (after[name].missing, after[name].missing_shards) == (units, 1), name
        manifest = ShardFolder.open(Store(str(root)), stages[name].folder).manifests()[0]
        assert after[name].basis == f"1 shards made on {manifest.device}"
        assert after[name].seconds == pytest.approx(units * manifest.seconds / manifest.rows)
        assert after[name].bytes_missing == pytest.approx(units * manifest.bytes / manifest.rows, abs=1)
    record = json.loads((root / stages["dpo"].folder / "model.json").read_bytes())
    assert after["dpo"].missing == 2 and record["steps"] == 2
    assert after["dpo"].seconds == pytest.approx(record["seconds"])
    assert after["dpo"].basis.startswith(f"the training of {stages['dpo'].folder.removeprefix('models/')} on")
    assert after["sft"].missing == 0 and after["evaluation images, target"].missing == 0
    assert after["evaluation images, tuned"].missing == 8
    assert "shards made on" in after["evaluation images, tuned"].basis    # the same sampler generated the pool


def test_on_s3_a_plan_only_reads(parameters):
    with served_bucket() as server:
        made = plan("s3://bucket/x", parameters | {"images": None})
        assert made.root == "s3://bucket/x" and by_name(made)["pool"].missing == 18
        assert {request.split()[0] for request in server.requests} <= {"GET", "HEAD"} and server.requests


def test_a_probe_times_every_kind_of_work_and_leaves_nothing(parameters, tmp_path):
    made = plan(tmp_path / "root", parameters, with_probe=True)
    assert not (tmp_path / "root").exists()
    stages = by_name(made)
    for name in set(STAGES) - {"triplets"}:
        assert "timed on cpu" in stages[name].basis and stages[name].seconds > 0, name
    assert stages["pool"].seconds / 18 == pytest.approx(stages["evaluation images, tuned"].seconds / 8)
    assert made.hours == pytest.approx(sum(stage.seconds for stage in made.stages) / 3600)
    assert not any("assumed" in note for note in made.notes)
    (length,) = (note for note in made.notes if note.startswith("length of training"))
    assert f"{readable_time(stages['dpo'].seconds)} and {readable_time(stages['dpo'].seconds * 48 / 2)}" in length
    assert 18 * 57 < stages["pool"].bytes_missing - 2 * rates.SHARD_BYTES < 18 * 5000   # PNGs of 32x32


def test_a_dry_store_reads_and_writes_nothing(tmp_path):
    Store(str(tmp_path)).write_bytes("a/x", b"1")
    store = DryStore(str(tmp_path))
    store.write_bytes("a/y", b"2")
    store.write_json("a/z", {})
    store.move("a/x", "b/x")
    store.delete("a/x")
    store.put_folder(tmp_path / "a", "c")
    store.check_writable()
    store.abort_upload("a", "1")
    assert [key for key, _, _ in store.walk()] == ["a/x"] and store.read_bytes("a/x") == b"1"
    assert isinstance(store.__reduce__()[0](store.root), DryStore)


# -- rates


def test_a_model_is_measured_by_its_headers(target_folder, tmp_path):
    size = model_size(target_folder)
    unet = load_file(target_folder / "unet/diffusion_pytorch_model.safetensors")
    assert size.denoiser == sum(tensor.numel() for tensor in unet.values())
    layers = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    attention = [name for name in unet if name.endswith(layers)]
    assert size.attention == sum(sum(unet[name].shape) for name in attention) > 0
    assert (size.latent_channels, size.scale_factor, size.text_numbers) == (4, 8, 24 * 32)
    assert size.latent_bytes((32, 32), 2) == 4 * (2 * 4 * 4 * 4 + 24 * 32)
    save_file({"model.diffusion_model.a": torch.zeros(3, 5), "first_stage_model.b": torch.zeros(7),
               "cond_stage_model.c": torch.zeros(2, 2)}, tmp_path / "one.safetensors")
    single = model_size(tmp_path / "one.safetensors")
    assert (single.denoiser, single.codec, single.text) == (15, 7, 4)
    assert single.latent_channels == 4 and single.text_numbers == 77 * 768
    (tmp_path / "bare").mkdir()
    (tmp_path / "one.ckpt").write_bytes(b"pickled")
    assert model_size(tmp_path / "bare") == model_size(tmp_path / "one.ckpt") == ModelSize()


def test_rates_of_this_device_come_before_those_of_others(tmp_path):
    import pyarrow as pa

    folder = ShardFolder.create(Store(str(tmp_path)), "pools/p", {})
    for index, (device, seconds) in enumerate([("cpu", 8.0), ("a GPU", 2.0), ("a GPU", 4.0), ("a GPU", 0.0)]):
        folder.commit(index, pa.table({"seed": [1, 2]}), device=device, seconds=seconds)
    manifests = folder.manifests().values()
    assert rates.measured(manifests, "a GPU") == Rate(1.5, "2 shards made on a GPU")
    assert rates.measured(manifests, "another") == Rate(14 / 6, "3 shards made on a GPU, cpu")
    assert rates.measured([], "cpu") is None


def test_generation_is_extrapolated_from_few_steps(monkeypatch):
    """On a clock where an image costs 0.5 s beside 2 s a step, in a batch of 4 in parallel."""
    class Clocked:
        generated = []

        def __init__(self, model, sampler, pool, device):
            pass

        def generate(self, prompts):
            self.generated.append((self.pool.images_per_prompt, self.sampler.steps))
            return [{"image": b"x" * self.sampler.steps}]

    monkeypatch.setattr(probes, "ImageGenerator", Clocked)
    monkeypatch.setattr(probes, "_timed", lambda work: (work(), 0.5 + 2.0 * Clocked.generated[-1][1])[1])
    sampler, pool = SamplerConfig(steps=50), PoolConfig(batch_size=4)
    model = Model(None, "0", "float32")
    probe = probes.probe_generation(model, sampler, pool, "a man")
    assert probe.seconds == pytest.approx((0.5 + 2.0 * 50) / 4) and probe.bytes is None
    assert probe.decoding == pytest.approx(0.5 / 4)
    assert Clocked.generated == [(1, 1), (1, 1), (4, 1), (4, 3)]    # a whole image would take 125 of 60 seconds
    Clocked.generated.clear()
    monkeypatch.setattr(probes, "MAX_SECONDS", 25.0)     # of which a batch of 4 would take more
    probes.probe_generation(model, sampler, pool, "a man")
    assert Clocked.generated[-1] == (2, 3)
    assert probes.probe_generation(model, sampler.model_copy(update={"steps": 10}), pool, "a man").bytes == 10
    assert Clocked.generated[-1] == (1, 10)


def test_a_raced_candidate_is_charged_for_what_the_cuts_cost(monkeypatch):
    """Two cuts of 20 candidates in 10 steps, where a step costs 2 s, an image 3 s and a score 0.5 s."""
    monkeypatch.setattr(probes, "probe_generation", lambda *_: Probe(seconds=23.0, bytes=7, decoding=3.0))
    monkeypatch.setattr(probes, "probe_scoring", lambda *_: Probe(seconds=0.5))
    pool = PoolConfig(images_per_prompt=20, race=(RaceCut(after=4, keep=10), RaceCut(after=7, keep=4)))
    probe = probes.probe_race(Model(None, "0", "float32"), SamplerConfig(steps=10), pool, ScorerConfig(), "a")
    steps, predicted = 20 * 4 + 10 * 3 + 4 * 3, 20 + 10
    assert probe.seconds == pytest.approx((2.0 * steps + 3.0 * (predicted + 4) + 0.5 * predicted) / 20)
    assert probe.bytes == 7


def test_a_gpu_is_asked_which_sampling_is_faster(monkeypatch):
    """On a clock where a step costs 2 s, by cuDNN 1.5 s, compiled half of that; the GPU has no flash attention."""
    class Clocked:
        made, generated = [], []

        def __init__(self, model, sampler, pool, device):
            if sampler.attention == "flash":
                raise ConfigError("no such kernel")
            self.made.append((sampler.attention, sampler.compile))
            self.cost = (1.5 if sampler.attention == "cudnn" else 2.0) / (1 + sampler.compile)

        def generate(self, prompts):
            self.generated.append(self.cost * self.sampler.steps)
            return [{"image": b"x"}]

    monkeypatch.setattr(probes, "ImageGenerator", Clocked)
    monkeypatch.setattr(probes, "_timed", lambda work: (work(), Clocked.generated[-1])[1])
    monkeypatch.setattr(probes, "default_device", lambda: "cuda")
    monkeypatch.setattr(probes, "device_name", lambda device: "a GPU")
    probe = probes.probe_generation(Model(None, "0", "float32"), SamplerConfig(steps=4), PoolConfig(batch_size=1),
                                    "a man")
    assert Clocked.made == [("native", False), ("cudnn", False), ("efficient", False), ("cudnn", True)]
    assert probe.seconds == 8.0 and probe.advice.startswith(
        "seconds an image on a GPU: sampler.attention=cudnn sampler.compile=true 3, "
        "sampler.attention=cudnn sampler.compile=false 6, ")


def test_scoring_is_timed_by_the_image(judge_folder):
    scorer = ScorerConfig(source=str(judge_folder), batch_size=5)
    assert probes.probe_scoring(scorer, (32, 32), "a man").seconds > 0


# -- the printed table


def test_the_table_reads_well(parameters, tmp_path):
    text = describe(plan(tmp_path / "root", parameters))
    lines = text.splitlines()
    assert lines[0].startswith("Plan of figures-") and lines[0].endswith("(nothing was made)")
    pool = next(line for line in lines if line.startswith("pool "))
    assert "18 images" in pool and "2 of 2" in pool and " ? " in pool
    assert len([line for line in lines if "sft is not finished" in line]) == 1
    assert max(map(len, lines[2:16])) <= 120
    assert RunPlan.model_validate(plan(tmp_path / "root", parameters).model_dump(mode="json")).stages[0].total == 4


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "?"), (0, "0 s"), (0.41, "0.4 s"), (89.4, "89 s"), (120, "2 min"), (5399, "90 min"), (5400, "1.5 h"),
    (1280 * 3600, "1,280 h")])
def test_readable_times(seconds, text):
    assert readable_time(seconds) == text


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (12_345_678, "12 MB"), (2.3e12, "2.3 TB"), (4.2e15, "4,200 TB")])
def test_readable_sizes(count, text):
    assert readable_bytes(count) == text
