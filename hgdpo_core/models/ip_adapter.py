"""IP-Adapters for Stable Diffusion 1.5 (arXiv:2308.06721), unchanged, through diffusers' own loading.

| file (h94/IP-Adapter, models/)               | layout of `image_proj`  | image tokens | reads of the encoder      |
|----------------------------------------------|-------------------------|--------------|---------------------------|
| ip-adapter_sd15, _light                      | `proj`                  | 4            | projected embedding       |
| ip-adapter-plus_sd15, ip-adapter-plus-face   | `latents` (a resampler) | 16           | last hidden state but one |
| ip-adapter-full-face_sd15                    | `proj.0`, `proj.3`      | 257          | last hidden state but one |

FaceID variants read another face network's embeddings and bring a LoRA of their own: they are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.backbone import Backbone, Conditioning, TextConditioner
from hgdpo_core.models.files import read_config
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.model import Model
from hgdpo_core.models.networks import check_finite, compare_shapes, component_files, empty_network, refuse_report
from hgdpo_core.models.personaliser import Adapter, ConceptEmbedding, Personaliser
from hgdpo_core.models.sd15 import UnetDenoiser
from hgdpo_core.models.weight_files import TensorInfo, load_safetensors, read_tensor_infos

NAME = "ip_adapter"
STRENGTH = 0.6
IMAGE, ATTENTION = "image_proj.", "ip_adapter."
SDXL_WIDTH = 2048
EMBEDS = "image_embeds"


class IpAdapterKind:
    """The kind as `PERSONALISERS` holds it."""

    default_strength = STRENGTH

    def recognises(self, path: Path) -> bool:
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        return any(name.startswith((IMAGE, ATTENTION)) for name in read_tensor_infos(path))

    def check(self, adapter: Adapter, model: Model) -> None:
        infos = read_tensor_infos(adapter.path)
        _check_attention(adapter.path, infos, model)
        width, reads_tokens = _image_layout(adapter.path, infos)
        _check_encoder(adapter, width, reads_tokens)

    def check_prompts(self, adapter: Adapter, model: Model, prompts: Sequence[str]) -> None:
        """Any prompt will do."""

    def load(self, adapter: Adapter) -> "IpAdapter":
        return IpAdapter(adapter)


def _check_attention(path: Path, infos: Mapping[str, TensorInfo], model: Model) -> None:
    """Compare the adapter's keys and values with the UNet's cross-attention layers, by names and shapes."""
    configs = model.configs or model.path
    unet: Any = empty_network(configs, "unet", read_config(configs / "unet" / "config.json"))
    given = {name: info.shape for name, info in infos.items() if name.startswith(ATTENTION)}
    width = next((shape[-1] for name, shape in given.items() if name.endswith("to_k_ip.weight")), None)
    wanted = unet.config.cross_attention_dim
    if any("lora" in name for name in given):
        raise ModelError(f"{path} is an IP-Adapter FaceID, which reads embeddings of another face network: use "
                         "ip-adapter-plus-face_sd15.safetensors")
    if width != wanted:
        kind = "of SDXL" if width == SDXL_WIDTH else f"{width or 'without keys'} wide"
        raise ModelError(f"{path} is an IP-Adapter {kind}, the target's text embeddings are {wanted} wide: use one for "
                         "SD 1.5, such as ip-adapter-plus-face_sd15.safetensors")
    expected = {}
    for number, name in enumerate(unet.attn_processors):
        if not name.endswith("attn1.processor"):  # diffusers numbers all attention layers, odd ones are cross-attention
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            expected |= {f"{ATTENTION}{number}.to_{part}_ip.weight": (hidden, wanted) for part in "kv"}
    compare_shapes(path, "IP-Adapter", given, expected)


def _image_layout(path: Path, infos: Mapping[str, TensorInfo]) -> tuple[int, bool]:
    """Width of what the adapter reads of an image encoder, and whether that is its tokens, not its embedding."""
    shapes = {name.removeprefix(IMAGE): info.shape for name, info in infos.items() if name.startswith(IMAGE)}
    if "proj.weight" in shapes:
        return shapes["proj.weight"][-1], False
    if "proj.3.weight" in shapes:
        return shapes["proj.0.weight"][-1], True
    if "latents" in shapes and "proj_in.weight" in shapes:
        return shapes["proj_in.weight"][-1], True
    raise ModelError(f"{path} has an image projection of an unknown layout ({', '.join(sorted(shapes)[:3]) or 'none'}):"
                     " expected a plain, plus, plus-face or full-face IP-Adapter")


def _check_encoder(adapter: Adapter, width: int, reads_tokens: bool) -> None:
    folder = adapter.image_encoder
    if folder is None:
        raise ModelError(f"{adapter.path} needs the CLIP image encoder that it was trained with: put its folder "
                         "image_encoder (h94/IP-Adapter, models/image_encoder) beside it, or set "
                         "concepts.personaliser.image_encoder")
    config = CLIPVisionConfig(**read_config(folder / "config.json"))
    component_files(folder)
    given = config.hidden_size if reads_tokens else config.projection_dim
    if given != width:
        raise ModelError(f"{folder} is an image encoder whose {'tokens' if reads_tokens else 'embeddings'} are {given} "
                         f"wide, {adapter.path.name} reads {width}: take the image_encoder of the same repository")


class IpAdapterDenoiser(UnetDenoiser):
    """A UNet that reads image embeddings beside the text."""

    def adapter_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        return {"added_cond_kwargs": {EMBEDS: [conditioning.extra[EMBEDS]]}}


class IpAdapter(Personaliser):
    """An IP-Adapter and its image encoder; a pipeline of diffusers without text encoder and VAE does the work."""

    name = NAME

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self._pipeline: Any = None
        self._negative: torch.Tensor | None = None

    def attach(self, backbone: Backbone) -> Backbone:
        unet = backbone.denoiser.network
        parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker"))
        encoder, processor = _load_encoder(self.adapter, unet.dtype)
        self._pipeline = StableDiffusionPipeline(**parts, unet=unet, image_encoder=encoder.to(unet.device),
                                                 feature_extractor=processor, requires_safety_checker=False)
        try:
            with quiet_transformers():
                self._pipeline.load_ip_adapter(_read_adapter(self.adapter.path), subfolder="", weight_name="")
        except (RuntimeError, ValueError, KeyError) as error:  # names and shapes that only the loader knows
            raise ModelError(f"{self.adapter.path} does not load as an IP-Adapter: {first_line(error)}; get it "
                             "again") from None
        self._pipeline.set_ip_adapter_scale(self.adapter.strength)
        unet.eval().requires_grad_(False)
        return replace(backbone, denoiser=IpAdapterDenoiser(unet))

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> ConceptEmbedding:
        both = self._pipeline.prepare_ip_adapter_image_embeds([list(images)], None, self._pipeline.unet.device, 1, True)
        self._negative, embeds = both[0].chunk(2)  # the zero image's, the same for every concept
        return {EMBEDS: embeds}

    def conditioned(self, text: TextConditioner, prompts: Sequence[str],
                    concepts: Sequence[ConceptEmbedding]) -> list[Conditioning]:
        return [replace(conditioning, extra={**conditioning.extra, **concept})
                for conditioning, concept in zip(text.encode(prompts), concepts, strict=True)]

    def unconditioned(self, negative: Conditioning) -> Conditioning:
        assert self._negative is not None, "encode a concept first"
        return replace(negative, extra={**negative.extra, EMBEDS: self._negative})


def _read_adapter(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors as diffusers takes them from memory, which is what it makes of a file."""
    state, _ = load_safetensors(path)
    check_finite(path, {"adapter": state})
    return {prefix[:-1]: {name.removeprefix(prefix): tensor for name, tensor in state.items()
                          if name.startswith(prefix)} for prefix in (IMAGE, ATTENTION)}


def _load_encoder(adapter: Adapter, dtype: torch.dtype) -> tuple[Any, Any]:
    """The image encoder, and its preparation of images: that of CLIP, as diffusers makes it for IP-Adapters."""
    folder = adapter.image_encoder
    assert folder is not None
    try:
        with quiet_transformers():
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except Exception as error:  # the libraries fail in many ways on files that are not what they are called
        raise ModelError(f"{folder} does not load as a CLIP image encoder: {first_line(error)}") from None
    encoder, report = loaded
    refuse_report(str(folder), report)
    check_finite(folder, {"image encoder": encoder})
    size = encoder.config.image_size
    return encoder.eval().requires_grad_(False), CLIPImageProcessorPil(size={"shortest_edge": size},
                                                                      crop_size={"height": size, "width": size})
