"""DPO training against a plain implementation, its resume points, and the promises of the loop."""

import copy
import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tiny import SD15, tiny_unet, trainable
from training_cases import Pairs, config, plain_training, train, train_dpo, weights

from hgdpo_core.errors import ConfigError, InputError, ModelError, StoppedError, StorageError
from hgdpo_core.models.lora import reference_mode
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.statistics.checks import check_warm_up
from hgdpo_core.storage import Store
from hgdpo_core.training import loop as training_loop
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import PairBatch, epoch_order, sample_generator
from hgdpo_core.training.parts import resolve_precision

KEYS = ["step", "loss", "dpo_loss", "stat_loss", "margin", "implicit_accuracy", "winner_error", "loser_error",
        "reference_winner_error", "reference_loser_error", "grad_norm", "learning_rate"]


@pytest.fixture
def location(tmp_path) -> Checkpoints:
    return Checkpoints(Store(str(tmp_path)), "models/tiny/checkpoints")


@pytest.mark.parametrize(("settings", "kind"), [
    ({}, "epsilon"), ({"share_noise": False}, "epsilon"), ({"lambda_stat": 0.0, "max_grad_norm": 0.05}, "epsilon"),
    ({"gradient_checkpointing": True, "flip": True}, "v_prediction"),
])
def test_losses_gradients_and_weights_equal_a_plain_implementation(settings, kind):
    schedule = {**SD15, "prediction_type": kind}
    plain, losses, norms = plain_training(config(**settings), schedule)
    unet, result = train(config(**settings), schedule=schedule)
    assert [row["loss"] for row in result.log] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in result.log] == pytest.approx(norms, rel=2e-3)
    torch.testing.assert_close(weights(unet), weights(plain), rtol=2e-3, atol=2e-4)
    assert unet.is_gradient_checkpointing == config(**settings).gradient_checkpointing


def test_the_reference_never_changes_and_receives_no_gradient():
    unet = tiny_unet().eval()
    pairs = Pairs()
    frozen = copy.deepcopy(unet.state_dict())
    inputs = pairs.winners, torch.full((len(pairs),), 400), pairs.embeds
    with torch.no_grad():
        before = unet(*inputs).sample
    train_dpo(*trainable(unet, SD15), pairs, config())
    unet.cpu()
    with reference_mode(unet):
        assert torch.equal(unet(*inputs).sample, before)
    assert not torch.allclose(unet(*inputs).sample, before, atol=1e-3)
    after = {name.replace(".base_layer", ""): tensor for name, tensor in unet.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(p.grad is None for name, p in unet.named_parameters() if "lora_" not in name)


def test_the_log_starts_at_log_2_and_has_exactly_these_keys():
    seen, progress = [], []
    _, result = train(config(warmup_steps=2), on_log=seen.append,
                      progress=lambda done, total, unit: progress.append((done, total, unit)))
    first = result.log[0]
    assert list(first) == KEYS and seen == result.log
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["stat_loss"] == pytest.approx(0, abs=1e-10) and first["margin"] == pytest.approx(0, abs=1e-6)
    assert [row["step"] for row in result.log] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in result.log] == pytest.approx([0.005, 0.01, 0.01, 0.01])
    assert progress == [(step, 4, "steps") for step in range(5)]
    assert (result.steps, result.resumed_from) == (4, None)
    json.dumps(result.log, allow_nan=False)


def test_log_every_keeps_the_last_row():
    _, result = train(config(log_every=3))
    assert [row["step"] for row in result.log] == [3, 4]


def test_it_learns_to_prefer():
    class Shifted(Pairs):
        """Winners are brighter than losers in every channel: a toy preference anyone can learn."""

        def __init__(self):
            super().__init__(8)
            self.winners, self.losers = self.winners * 0.1 + 1, self.winners * 0.1 - 1

    _, result = train(config(batch_size=4, max_steps=30, lambda_stat=1.0, learning_rate=3e-3), Shifted())
    late = result.log[-10:]
    assert sum(row["loss"] for row in late) / 10 < 0.8 * math.log(2)
    assert sum(row["implicit_accuracy"] for row in late) / 10 > 0.7


def test_a_large_lambda_holds_the_statistics():
    _, free = train(config(lambda_stat=0.0, max_steps=8))
    _, held = train(config(lambda_stat=1e5, max_steps=8))
    assert free.log[-1]["stat_loss"] == 0.0  # not computed
    assert 0 < held.log[-1]["stat_loss"] < 1e-5


def test_accumulation_equals_the_larger_batch():
    whole, one = train(config(batch_size=4))
    split, two = train(config(batch_size=2, gradient_accumulation_steps=2))
    for name in ("loss", "margin", "winner_error", "stat_loss"):
        assert [row[name] for row in two.log] == pytest.approx([row[name] for row in one.log], rel=1e-3, abs=1e-6)
    torch.testing.assert_close(weights(split), weights(whole), rtol=2e-3, atol=2e-4)


def test_a_training_inside_its_warm_up_is_said(caplog):
    _, short = train(config(warmup_steps=4))
    assert "a training of 4 steps ends inside its warm-up of 4" in caplog.text
    caplog.clear()
    _, long = train(config(warmup_steps=2))
    assert "warm-up" not in caplog.text and check_warm_up(long.log) is None and check_warm_up(long.log[:1]) is None
    warning = check_warm_up(short.log)
    assert warning is not None and "ended at step 4, inside its warm-up, at a learning rate of 1" in warning.message


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(location, caplog):
    class Starved(Pairs):
        """From the third step on there is room for 2 pairs, and it ends when part of a gradient is there already."""

        calls, limit = 0, 8

        def batch(self, indices):
            self.calls += 1
            if self.calls >= 6 and len(indices) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().batch(indices)

    settings = config(batch_size=4, gradient_accumulation_steps=2, flip=True)
    whole, one = train(settings, Pairs(20))
    starved, two = train(settings, Starved(20), checkpoints=location)
    assert caplog.text.count("step 3 ran out of memory: a process now takes its samples 2 at a time") == 1
    assert "stays 8" in caplog.text and caplog.text.count("ran out of memory") == 1
    for name in ("loss", "margin", "winner_error", "stat_loss", "grad_norm"):
        assert [row[name] for row in two.log] == pytest.approx([row[name] for row in one.log], rel=1e-3, abs=1e-6)
    torch.testing.assert_close(weights(starved), weights(whole), rtol=2e-3, atol=2e-4)


def test_out_of_memory_with_one_pair_says_what_to_do(location):
    class Full(Pairs):
        def batch(self, indices):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with pytest.raises(ConfigError, match="out of memory at step 1 with one sample at a time: set "
                                          "dpo.gradient_checkpointing to true, use smaller images"):
        train(config(), Full())
    with pytest.raises(ConfigError, match="one sample at a time: use smaller images"):
        train(config(gradient_checkpointing=True), Full())


def test_other_errors_are_not_taken_for_memory():
    class Faulty(Pairs):
        def batch(self, indices):
            raise RuntimeError("the shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        train(config(), Faulty())


def test_flips_without_mirrored_latents_are_refused():
    class Plain(Pairs):
        def batch(self, indices):
            return PairBatch(self.winners[indices], self.losers[indices], self.embeds[indices])

    with pytest.raises(InputError, match="cache them with flips"):
        train(config(flip=True), Plain())
    assert train(config(max_steps=1), Plain())[1].log == train(config(max_steps=1))[1].log


def test_epochs_follow_each_other_without_a_short_batch():
    class Recording(Pairs):
        def __init__(self):
            super().__init__()
            self.seen = []

        def batch(self, indices):
            self.seen += list(indices)
            return super().batch(indices)

    pairs = Recording()
    _, result = train(config(max_steps=None, epochs=2), pairs)
    assert result.steps == 7  # ceil(2 epochs * 7 pairs / 2 a step)
    assert pairs.seen == epoch_order(7, 11, 0) + epoch_order(7, 11, 1)
    assert sorted(pairs.seen[:7]) == list(range(7)) and pairs.seen[:7] != pairs.seen[7:]


def test_samples_draw_the_same_noise_wherever_they_are():
    first, again, other = (torch.randn(9, generator=sample_generator(*at)) for at in ((1, 5), (1, 5), (1, 6)))
    assert torch.equal(first, again) and not torch.equal(first, other)


# -- resuming


def stop_after(steps: int):
    """A should_stop that lets `steps` steps pass."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


# rank 64 on 64-wide layers: tensors of 4096 elements, the least that bitsandbytes keeps in 8 bit
@pytest.mark.parametrize("settings", [{"optimizer": "adamw"}, {"optimizer": "adam8bit", "lora_rank": 64},
                                      {"optimizer": "adam8bit", "lora_rank": 64, "mixed_precision": "bf16"},
                                      {"optimizer": "adamw", "mixed_precision": "bf16", "autocast": False,
                                       "gradient_checkpointing": True}])
def test_a_resumed_training_is_bit_identical(settings, location):
    if settings["optimizer"] == "adam8bit":
        pytest.importorskip("bitsandbytes")
    settings = config(max_steps=6, warmup_steps=5, gradient_accumulation_steps=2, **settings)
    undisturbed, whole = train(settings)
    with pytest.raises(StoppedError, match="step 3 is kept"):
        train(settings, checkpoints=location, should_stop=stop_after(3))
    resumed, result = train(settings, checkpoints=location)
    assert result.resumed_from == 3 and result.log == whole.log
    assert torch.equal(weights(resumed), weights(undisturbed))


def test_a_killed_training_continues_from_its_last_checkpoint(location):
    class Killed(Exception):
        pass

    def kill_at_4(row):
        if row["step"] == 4:
            raise Killed

    settings = config(max_steps=6, checkpoint_every=2)
    with pytest.raises(Killed):
        train(settings, checkpoints=location, on_log=kill_at_4)
    resumed, result = train(settings, checkpoints=location)
    assert result.resumed_from == 2
    assert torch.equal(weights(resumed), weights(train(settings)[0]))


def test_a_checkpoint_beyond_the_last_step_ends_in_one_line(location, tmp_path):
    """It was trained on without end."""
    train(config(max_steps=2), checkpoints=location)
    beyond = tmp_path / location.key / "step-9"
    shutil.copytree(tmp_path / location.key / "step-2", beyond)
    complete = json.loads((beyond / "complete.json").read_text())
    (beyond / "complete.json").write_text(json.dumps(complete | {"step": 9}))
    with pytest.raises(StorageError, match="step 9 is beyond the last step 2 of this training: delete the folder"):
        train(config(max_steps=2), checkpoints=location, should_stop=stop_after(5))


def test_the_loss_scale_of_fp16_is_kept_in_checkpoints(location, monkeypatch):
    """Without a GPU, torch's scaler for CPUs stands in. Scales are powers of two: the weights do not show them."""
    scalers = []

    class Scaled(Accelerator):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
            scalers.append(self.scaler)

    monkeypatch.setattr(training_loop, "Accelerator", Scaled)
    settings = config(max_steps=5, max_grad_norm=1e9)
    undisturbed, whole = train(settings)
    with pytest.raises(StoppedError):
        train(settings, checkpoints=location, should_stop=stop_after(3))
    resumed, result = train(settings, checkpoints=location)
    ends = [scaler.state_dict() for scaler in scalers]
    assert [end["scale"] for end in ends] == [16.0, 8.0, 16.0] and ends[0] == ends[2]
    assert result.log == whole.log and torch.equal(weights(resumed), weights(undisturbed))


def test_a_training_that_began_in_another_precision_goes_on_in_fp16(location, monkeypatch):
    """mixed_precision auto, moved to another GPU."""
    with pytest.raises(StoppedError):
        train(config(), checkpoints=location, should_stop=stop_after(3))

    class Scaled(Accelerator):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    monkeypatch.setattr(training_loop, "Accelerator", Scaled)
    assert train(config(), checkpoints=location)[1].resumed_from == 3


def test_a_finished_training_is_only_loaded(location):
    done, first = train(config(), checkpoints=location)
    rows = []
    again, second = train(config(), checkpoints=location, on_log=rows.append)
    assert rows == [] and second.resumed_from == second.steps == 4 and second.log == first.log
    assert torch.equal(weights(again), weights(done))


def test_the_last_two_checkpoints_are_kept(location, tmp_path):
    train(config(max_steps=7, checkpoint_every=2), checkpoints=location)
    assert location.store.list_folders(location.key) == ["step-6", "step-7"]
    names = sorted(path.name for path in (tmp_path / location.key / "step-7").iterdir())
    assert names == ["complete.json", "state.pt", "weights.safetensors"]


def test_incomplete_damaged_and_foreign_checkpoints_are_skipped(location, tmp_path):
    folder = tmp_path / location.key
    settings = config(checkpoint_every=1, max_steps=4)
    train(settings, checkpoints=location)
    assert train(settings.model_copy(update={"beta": 21.0}), checkpoints=location)[1].resumed_from is None
    train(settings, checkpoints=location)  # the other config's steps 3 and 4 stood here: written again
    (folder / "step-4" / "complete.json").unlink()
    assert train(settings, checkpoints=location)[1].resumed_from == 3
    (folder / "step-4" / "weights.safetensors").write_bytes(b"cut")
    (folder / "step-3" / "complete.json").write_text("{")
    assert train(settings, checkpoints=location)[1].resumed_from is None


def test_numbers_that_are_not_finite_stop_the_training_and_leave_the_checkpoint(location):
    class Poisoned(Pairs):
        healthy_batches = 3

        def batch(self, indices):
            self.healthy_batches -= 1
            batch = super().batch(indices)
            if self.healthy_batches < 0:
                batch.winner_latents[0, 0, 0, 0] = math.nan
            return batch

    settings = config(checkpoint_every=2)
    with pytest.raises(ConfigError, match=r"step 4, before the weights changed: loss is nan.*learning_rate.*beta"):
        train(settings, Poisoned(), checkpoints=location)
    resumed, result = train(settings, checkpoints=location)
    assert result.resumed_from == 2
    assert torch.equal(weights(resumed), weights(train(settings)[0]))


# -- precision and mistakes


def test_bf16_stays_close_to_float32_and_trains_float32_weights():
    exact, one = train(config())
    mixed, two = train(config(mixed_precision="bf16"))
    assert {p.dtype for p in mixed.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in mixed.parameters() if not p.requires_grad} == {torch.bfloat16}
    for name in ("winner_error", "reference_loser_error"):
        assert two.log[0][name] == pytest.approx(one.log[0][name], rel=2e-2)
    assert torch.nn.functional.cosine_similarity(weights(mixed), weights(exact), dim=0) > 0.9


def test_the_caller_keeps_an_unwrapped_unet():
    unet, _ = train(config(max_steps=1, mixed_precision="bf16"))
    assert "forward" not in vars(unet) and not hasattr(unet, "_original_forward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is possible here")
def test_fp16_needs_a_gpu():
    with pytest.raises(ConfigError, match="fp16 needs a CUDA GPU"):
        resolve_precision("fp16")
    assert resolve_precision("auto") in ("no", "bf16")


def test_unfit_inputs_are_refused():
    class Broken(Pairs):
        def batch(self, indices):
            return PairBatch(self.winners[indices], self.losers[indices, :, :4], self.embeds[indices])

    class Half(Pairs):
        def batch(self, indices):
            return PairBatch(self.winners[indices].half(), self.losers[indices], self.embeds[indices])

    class Short(Pairs):
        def order(self, seed, epoch):
            return [0, 1]

    for source, words in ((Broken(), "of one size"), (Half(), "float32"), (Short(), "names 2 samples"),
                          (Pairs(0), "nothing to train on")):
        with pytest.raises(InputError, match=words):
            train(config(), source)
    with pytest.raises(ModelError, match="epsilon or v_prediction"):
        train(config(), schedule={**SD15, "prediction_type": "sample"})


@pytest.mark.parametrize(("sample_size", "kind"), [(8, AttnProcessor), (64, AttnProcessor2_0),
                                                    (None, AttnProcessor2_0)])
def test_a_cpu_holds_the_scores_of_small_attention_alone(sample_size, kind):
    """A pair of 704x1024 pixels would have 8 GiB of them."""
    unet = tiny_unet()
    unet.register_to_config(sample_size=sample_size)
    with UnetDenoiser(unet).training_attention(on_cpu=True):
        assert {type(processor) for processor in unet.attn_processors.values()} == {kind}
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
