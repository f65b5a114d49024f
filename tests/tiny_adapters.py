"""IP-Adapters of the public layouts with random weights, for any UNet; image encoders; people, who are coloured
gradients, and a judge who knows them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from hgdpo_core.scorers.identity import JUDGES, JudgeSource
from hgdpo_core.scorers.identity.judges import Cut, IdentityJudge, normalise

Shapes = dict[str, tuple[int, ...]]
LAYOUTS = ("plain", "plus-face", "full-face")
ENCODER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
           "image_size": 32, "patch_size": 2, "projection_dim": 24}


def save_encoder(folder: Path, **changes: int) -> Path:
    """A CLIP image encoder with projection: 257 tokens as ViT-H/14's, all else tiny."""
    torch.manual_seed(3)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**{**ENCODER, **changes})).save_pretrained(folder)
    return folder


def image_shapes(layout: str, width: int, embedding: int, tokens: int) -> Shapes:
    """Of `image_proj`, as h94/IP-Adapter has it: width of the text, of the encoder's embedding and of its tokens."""
    if layout == "plain":
        return {"proj.weight": (4 * width, embedding), "proj.bias": (4 * width,), **_norm("norm", width)}
    if layout == "full-face":
        return {"proj.0.weight": (tokens, tokens), "proj.0.bias": (tokens,), "proj.2.weight": (width, tokens),
                "proj.2.bias": (width,), **_norm("proj.3", width)}
    inner = max(width, 64)  # heads of 64
    shapes: Shapes = {"latents": (1, 16, width), "proj_in.weight": (width, tokens), "proj_in.bias": (width,),
                      "proj_out.weight": (width, width), "proj_out.bias": (width,), **_norm("norm_out", width)}
    for layer in range(4):
        name = f"layers.{layer}"
        shapes |= {**_norm(f"{name}.0.norm1", width), **_norm(f"{name}.0.norm2", width),
                   f"{name}.0.to_q.weight": (inner, width), f"{name}.0.to_kv.weight": (2 * inner, width),
                   f"{name}.0.to_out.weight": (width, inner), **_norm(f"{name}.1.0", width),
                   f"{name}.1.1.weight": (4 * width, width), f"{name}.1.3.weight": (width, 4 * width)}
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attention_shapes(unet: UNet2DConditionModel) -> Shapes:
    """Of `ip_adapter`: keys and values of each cross-attention layer, counted as the public files count them."""
    shapes, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            shapes |= {f"{number}.to_{part}_ip.weight": (width, unet.config.cross_attention_dim) for part in "kv"}
            number += 2
    return shapes


def save_ip_adapter(path: Path, unet: Any, layout: str, *, embedding: int = ENCODER["projection_dim"],
                    tokens: int = ENCODER["hidden_size"], dtype: torch.dtype = torch.float32,
                    scale: float = 0.2) -> Path:
    """An IP-Adapter as a file of the public layout."""
    generator = torch.Generator().manual_seed(5)
    shapes = {**{f"image_proj.{name}": shape for name, shape in image_shapes(
        layout, unet.config.cross_attention_dim, embedding, tokens).items()},
        **{f"ip_adapter.{name}": shape for name, shape in attention_shapes(unet).items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: (scale * torch.randn(shape, generator=generator)).to(dtype) if scale else
               torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, path)
    return path


def picture(seed: int, size: int = 48) -> Image.Image:
    """Smooth random colours."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((size, size), Image.Resampling.BICUBIC)


def save_people(folder: Path, count: int) -> Path:
    """A folder of concepts: one picture per person."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"person-{number}.png")
    return folder


class ColourJudge(IdentityJudge):
    """A person is the mean colour of their image; no face is in an image that is nearly black."""

    name = "figures"

    def cut(self, image: Image.Image) -> Cut:
        pixels = np.asarray(image.convert("RGB").resize((4, 4)))
        return Cut(pixels, 1) if pixels.max() > 8 else Cut(None, 0)

    def embed(self, faces: Sequence[np.ndarray]) -> np.ndarray:
        return normalise(np.stack([face.mean(axis=(0, 1)) - 128 for face in faces]).astype(np.float32))


def colour_judge(monkeypatch: Any, folder: Path) -> str:
    """A judge without weights of its own, beside the real ones; returns what names it in settings."""
    (folder / "colours.txt").write_text("1")
    monkeypatch.setitem(JUDGES, "figures", JudgeSource(
        "Colours", "nowhere", ("colours.txt",), None, lambda path, detector: ColourJudge(), finds_faces=False))
    return f"figures={folder / 'colours.txt'}"
