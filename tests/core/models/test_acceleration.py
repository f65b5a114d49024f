"""Compiled sampling and kernels of attention: the same images up to rounding, in the id, refused where impossible."""

import os

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from hgdpo_core.config import PoolConfig, SamplerConfig, TargetConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.images import decode_image
from hgdpo_core.models import acceleration, find_model
from hgdpo_core.models.acceleration import attention_by, refuse_acceleration, share_compiled
from hgdpo_core.models.image_generator import ImageGenerator
from hgdpo_core.stages.pool import pool_settings

SAMPLER = SamplerConfig(width=32, height=32, steps=2, guidance_scale=2.0)
COMPILED = SAMPLER.model_copy(update={"compile": True})
POOL = PoolConfig(images_per_prompt=3, batch_size=4)
PROMPTS = ["a man", "a woman in a red top", "a boy runs on the beach"]  # 9 images: two batches and one image
LONG = " BREAK ".join(PROMPTS)
TOLERANCE = 1  # of 255: float32 sums in another order may round a pixel the other way


@pytest.fixture(autouse=True)
def _no_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # as if it were not set; it is restored after the test


@pytest.fixture
def model(target_folder):
    return find_model(TargetConfig(source=str(target_folder), dtype="float32", prompt_syntax="a1111"))


def pixels(generator, prompts=PROMPTS):
    return {(row["prompt"], row["index"]): np.asarray(decode_image(row["image"])).astype(int)
            for row in generator.generate(prompts)}


def difference(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(a[key] - b[key]).max() for key in a)


@pytest.fixture
def compiled(monkeypatch):
    """The shapes that compiled networks were given; nothing is compiled."""
    shapes = []

    def compile(call, **options):
        assert options == {"dynamic": False}

        def called(*args, **kwargs):
            states = kwargs.get("encoder_hidden_states")
            dynamic = () if states is None else tuple(states._dynamo_weak_dynamic_indices)
            shapes.append((type(call.__self__).__name__, tuple(args[0].shape), dynamic))
            return call(*args, **kwargs)

        return called

    monkeypatch.setattr(torch, "compile", compile)
    return shapes


def test_batches_are_filled_up_to_one_shape_and_the_surplus_is_dropped(model, monkeypatch, compiled):
    plain = pixels(ImageGenerator(model, SAMPLER, POOL, "cpu"), [*PROMPTS, LONG])
    assert compiled == []
    found = pixels(ImageGenerator(model, COMPILED, POOL, "cpu"), [*PROMPTS, LONG])
    assert len(found) == 12 and difference(plain, found) <= TOLERANCE
    # three batches of short prompts and one of the long one, two steps each; both halves of guidance together
    assert [shape for shape in compiled if shape[0] != "Decoder"] == [
        ("UNet2DConditionModel", (8, 4, 4, 4), (1,))] * 8
    assert [shape for shape in compiled if shape[0] == "Decoder"] == [("Decoder", (4, 4, 4, 4), ())] * 4


@pytest.mark.slow
def test_really_compiled(model, tmp_path, monkeypatch):
    """By the C++ compiler of this machine: one graph each for UNet and decoder, for texts of both lengths."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    try:
        refuse_acceleration(COMPILED, "float32", "cpu")
    except ConfigError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    counters.clear()
    plain = pixels(ImageGenerator(model, SAMPLER, POOL, "cpu"), [*PROMPTS, LONG])
    assert not counters["stats"]
    found = pixels(ImageGenerator(model, COMPILED, POOL, "cpu"), [*PROMPTS, LONG])
    assert difference(plain, found) <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_images_of_the_surplus_are_not_recorded(model, monkeypatch, compiled):
    generator = ImageGenerator(model, COMPILED, POOL, "cpu")
    decode = generator.backbone.codec.decode
    monkeypatch.setattr(generator.backbone.codec, "decode", lambda latents: decode(latents)._replace(in_float32=[0, 3]))
    prompt = generator.backbone.text.encode(PROMPTS[:1])[0]
    decoded = generator.sample(prompt, [5])
    assert decoded.pixels.shape == (1, 32, 32, 3) and decoded.in_float32 == [0]


def test_a_memory_format_and_a_reference_are_compiled_too(model, compiled, target_folder, tmp_path):
    import tiny

    lora = model.with_lora(tiny.save_random_lora(tmp_path / "lora", target_folder), 1.0)
    generator = ImageGenerator(lora, COMPILED.model_copy(update={"latent_normalisation": True}), POOL, "cpu")
    assert generator.threads == 1 and generator.reference.is_compiled
    convolution = generator.backbone.denoiser.network.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)


def test_they_are_part_of_the_id_where_they_are_on(model):
    def sampler(**settings):
        return pool_settings(model, SAMPLER.model_copy(update=settings), POOL)["sampler"]

    assert sampler().keys() == {"width", "height", "steps", "guidance_scale", "latent_normalisation"} - (
        set() if "latent_normalisation" in sampler() else {"latent_normalisation"})
    assert sampler(compile=True)["compile"] is True and sampler(attention="cudnn")["attention"] == "cudnn"
    assert SamplerConfig.model_validate(sampler(compile=True, attention="flash")).attention == "flash"


def test_a_kernel_is_tried_first():
    before = torch._C._get_sdp_priority_order()
    with attention_by("native"):
        assert torch._C._get_sdp_priority_order() == before
    for name, first in acceleration.KERNELS.items():
        with attention_by(name):
            assert torch._C._get_sdp_priority_order()[0] == int(first)
            assert torch.backends.cuda.math_sdp_enabled()  # for what no kernel takes
    assert torch._C._get_sdp_priority_order() == before
    assert acceleration.KERNELS["flash"] is SDPBackend.FLASH_ATTENTION


def test_a_generator_samples_and_decodes_by_the_kernel(model, monkeypatch):
    monkeypatch.setattr(acceleration, "_refuse_attention", lambda *_: None)
    generator = ImageGenerator(model, SAMPLER.model_copy(update={"attention": "cudnn"}), POOL, "cpu")
    seen = []
    for part in (generator.backbone.denoiser.network, generator.backbone.codec.vae.decoder):
        part.register_forward_hook(lambda *_: seen.append(torch._C._get_sdp_priority_order()[0]))
    pixels(generator, PROMPTS[:1])
    assert seen == [int(SDPBackend.CUDNN_ATTENTION)] * 3


def test_a_worker_that_has_no_such_kernel_refuses(model, monkeypatch):
    flash = SAMPLER.model_copy(update={"attention": "flash"})
    with pytest.raises(ConfigError, match="sampler.attention is flash, a kernel of NVIDIA GPUs, but this worker"):
        ImageGenerator(model, flash, POOL, "cpu")

    def none(*_):
        raise RuntimeError("No available kernel. Aborting execution.")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    monkeypatch.setattr(acceleration, "device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(acceleration, "scaled_dot_product_attention", lambda *_: None)
    refuse_acceleration(flash, "float16", "cuda")
    monkeypatch.setattr(acceleration, "scaled_dot_product_attention", none)
    with pytest.raises(ConfigError, match="flash, but Tesla T4 has no such kernel for float32 .No available kernel"):
        refuse_acceleration(flash, "float32", "cuda")


def test_a_worker_without_a_compiler_refuses(model, monkeypatch):
    from torch._inductor import cpp_builder, exc
    from torch.utils import _triton

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match="sampler.compile is on, but this worker has no C.. compiler .*: install it"):
        ImageGenerator(model, COMPILED, POOL, "cpu")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: None)
    for found, missing in ((False, "torch finds no Triton"), (True, "this worker has no C compiler")):
        monkeypatch.setattr(_triton, "has_triton", lambda found=found: found)
        with pytest.raises(ConfigError, match=f"sampler.compile is on, but {missing}"):
            refuse_acceleration(COMPILED, "bfloat16", "cuda")
    monkeypatch.setattr(acceleration.shutil, "which", lambda name: f"/usr/bin/{name}")
    refuse_acceleration(COMPILED, "bfloat16", "cuda")


def test_compiled_code_is_kept_by_kernel_unless_the_user_says_where(monkeypatch):
    for attention in ("native", "cudnn"):
        share_compiled(attention)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(acceleration.cache_folder("compiled") / attention)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/data/compiled")
    share_compiled("native")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/data/compiled"
