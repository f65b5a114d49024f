"""What the stages have in common that put images through a model's VAE."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from hgdpo_core.images import to_model_range
from hgdpo_core.models import Backbone, Conditioning, Model, load_backbone
from hgdpo_core.models.locations import model_locations
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.stages.base import Probe, Stage
from hgdpo_core.stages.probes import probe_encoding

POOLED = pa.field("pooled_embeds", pa.binary())
"""Of the folders of families whose texts have a pooled embedding."""


class EncodingStage(Stage):
    """A stage whose shards are made by the VAE of `model`; by default its folder holds latents."""

    model: Model

    @property
    def work(self) -> str:
        return "encode"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the images in pixels."""
        return self.folder.config["width"], self.folder.config["height"]

    @property
    def images_per_unit(self) -> int:
        return 1

    @property
    def flips(self) -> bool:
        """Whether its folder holds the latents of the mirrored images too."""
        return self.folder.config.get("flips", False)

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return model_locations(self.folder.store, self.model, copy_to_store=copy_to_store)

    def backbone(self, device: str) -> Backbone:
        """The loaded model, its VAE in float32."""
        return load_backbone(self.model, device, codec_dtype="float32")

    def probe(self) -> Probe | None:
        return probe_encoding(self.model, self.size)

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return size.latent_bytes(self.size, self.images_per_unit)


def latent_settings(stage: str, model: Model, size: tuple[int, int]) -> dict[str, Any]:
    """What decides latents and text embeddings of any images of (width, height) pixels."""
    return {"stage": stage, "fingerprint": model.fingerprint, "dtype": model.dtype, "clip_skip": model.clip_skip,
            "width": size[0], "height": size[1]}


def text_columns(texts: Conditioning) -> dict[str, list[bytes]]:
    """Columns of B texts of one length: `prompt_embeds`, and in families that have them `pooled_embeds`."""
    pooled = {} if texts.pooled is None else {POOLED.name: row_bytes(texts.pooled)}
    return {"prompt_embeds": row_bytes(texts.embeds), **pooled}


def with_pooled(schema: pa.Schema, backbone: Backbone) -> pa.Schema:
    """A schema, and the column of pooled embeddings in families that have them."""
    return schema.append(POOLED) if backbone.text.pooled_width else schema


def prompt_columns(backbone: Backbone, prompts: Sequence[str]) -> dict[str, list[bytes]]:
    """`text_columns` of prompts as the sampler is given them, each of its own length."""
    columns: dict[str, list[bytes]] = {"prompt_embeds": []} | ({POOLED.name: []} if backbone.text.pooled_width else {})
    for text in backbone.text.encode(prompts):
        for name, cells in text_columns(text).items():
            columns[name] += cells
    return columns


def stack_pixels(images: Iterable[Image.Image]) -> torch.Tensor:
    """float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack([to_model_range(image) for image in images]))


def row_bytes(rows: torch.Tensor) -> list[bytes]:
    """Each row of a tensor as bytes of float32, for a column."""
    return [row.numpy().tobytes() for row in rows.float().cpu()]
