"""ImageReward (Xu et al. 2023, arXiv:2304.05977): BLIP reads prompt and image together; a head rates what it read.

Image and text meet in every layer of BLIP's text encoder, so a prompt's text cannot be encoded once for its images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from hgdpo_core.devices import Float32, in_own_float32
from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.tokenizers import check_tokenizer
from hgdpo_core.scorers import weights
from hgdpo_core.scorers.heads import linear_head
from hgdpo_core.scorers.pixels import Images, Prepared, check_counts, crop_pixels, normalise_pixels
from hgdpo_core.scorers.weights import count_blocks, freeze

NAME, TITLE = "imagereward", "ImageReward"
REPOSITORY, NAMES = "THUDM/ImageReward", ("ImageReward.safetensors", "ImageReward.pt")
BERT, TOKENIZER_FILES = "google-bert/bert-base-uncased", (("tokenizer.json",), ("vocab.txt",))
VISION_HEADS, TEXT_HEADS = 16, 12  # BLIP-large; other sizes are read from the tensors
MAX_TOKENS = 35
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
VISION_RENAMES = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
                  "patch_embed.proj.": "embeddings.patch_embedding.", "norm.": "post_layernorm.",
                  "blocks.": "encoder.layers."}
IN_A_BLOCK = {".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2.", ".attn.qkv.": ".self_attn.qkv.",
              ".attn.proj.": ".self_attn.projection."}


class ImageReward:
    """A loaded ImageReward."""

    name = NAME
    float32: Float32 = "ieee"

    def __init__(self, vision: Any, text: Any, head: torch.nn.Module, tokenizer: BertTokenizer, fingerprint: str):
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer, self.fingerprint = tokenizer, fingerprint

    def prepare(self, image: Image.Image) -> Prepared:
        """What the vision tower sees of an image, before it is normalised."""
        return Prepared(crop_pixels([image], self.vision.config.image_size)[0].numpy())

    @torch.no_grad()
    @in_own_float32
    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Rewards, float32 [B] on the CPU, of mean 0 and deviation 1 over the data it was trained on."""
        check_counts(images, prompts)
        device = self.vision.device
        pixels = normalise_pixels(crop_pixels(images, self.vision.config.image_size).to(device), self.vision.dtype)
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS,
                                return_tensors="pt").to(device)
        read = self.text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
                         encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state)
        return ((self.head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / DEVIATION).cpu()


def locate(source: str | None) -> tuple[Path, list[Path], str]:
    """Weights, tokenizer files, fingerprint. Downloads what is not there."""
    path = weights.find_weights(source, NAMES, REPOSITORY)
    tokenizer = weights.find_files("BERT's vocabulary", source, path, TOKENIZER_FILES, BERT)
    return path, tokenizer, weights.fingerprint(NAME, [path, *tokenizer])


def load(*, source: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ImageReward:
    """ImageReward from the hub (None), a hub id, a folder or a file; BLIP runs in `dtype`, the head in float32."""
    path, tokenizer_files, fingerprint = locate(source)
    tensors = weights.read_tensors(path)
    vision_config, text_config = _configs_of(path, tensors)
    vision = weights.build(path, BlipVisionModel, vision_config, _vision_tensors(tensors), dtype)
    text = weights.build(path, BlipTextModel, text_config, _text_tensors(tensors), dtype, attention="eager",
                         add_pooling_layer=False)
    head = linear_head(path, tensors, HEAD)
    return ImageReward(freeze(vision, device), freeze(text, device), freeze(head, device),
                       _load_tokenizer(tokenizer_files, text_config.vocab_size), fingerprint)


def check(source: str | None) -> None:
    """ModelError where header and tokenizer show that the file is not a whole ImageReward; no network is loaded."""
    path, tokenizer_files, _ = locate(source)
    tensors = weights.read_empty_tensors(path)
    vision_config, text_config = _configs_of(path, tensors)
    weights.check_build(path, BlipVisionModel, vision_config, _vision_tensors(tensors))
    weights.check_build(path, BlipTextModel, text_config, _text_tensors(tensors), add_pooling_layer=False)
    linear_head(path, tensors, HEAD)
    _load_tokenizer(tokenizer_files, text_config.vocab_size)


def _configs_of(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    with weights.sizes_read_from(path, NAMES[-1]):
        return _read_configs(tensors)


def _load_tokenizer(files: Sequence[Path], vocabulary: int) -> BertTokenizer:
    try:
        with quiet_transformers():
            tokenizer = (BertTokenizer.from_pretrained(files[0].parent, local_files_only=True)
                         if files[0].suffix == ".json" else BertTokenizer(vocab=str(files[0])))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{files[0]} is not a BERT vocabulary: {first_line(error)}") from None
    check_tokenizer(files[0], lambda text: tokenizer(text).input_ids, vocabulary)
    return tokenizer


def _read_configs(tensors: Mapping[str, torch.Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    width, _, patch, _ = tensors[f"{VISION}patch_embed.proj.weight"].shape
    grid = round((tensors[f"{VISION}pos_embed"].shape[1] - 1) ** 0.5)
    vision = BlipVisionConfig(
        hidden_size=width, patch_size=patch, image_size=grid * patch, num_attention_heads=VISION_HEADS,
        intermediate_size=len(tensors[f"{VISION}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=count_blocks(tensors, f"{VISION}blocks."), hidden_act="gelu", layer_norm_eps=1e-6)
    vocabulary, text_width = tensors[f"{TEXT}embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary, hidden_size=text_width, encoder_hidden_size=width, num_attention_heads=TEXT_HEADS,
        intermediate_size=len(tensors[f"{TEXT}encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=count_blocks(tensors, f"{TEXT}encoder.layer."),
        max_position_embeddings=len(tensors[f"{TEXT}embeddings.position_embeddings.weight"]),
        hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True, bos_token_id=None, eos_token_id=None,
        sep_token_id=None)  # is_decoder gives the layers that attend to the image
    return vision, text


def _vision_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {weights.renamed(name.removeprefix(VISION), VISION_RENAMES, IN_A_BLOCK): value
            for name, value in tensors.items() if name.startswith(VISION)}


def _text_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(TEXT): value for name, value in tensors.items()
            if name.startswith(TEXT) and not name.endswith("position_ids")}
