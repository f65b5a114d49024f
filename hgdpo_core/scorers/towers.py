"""CLIP's two towers as a transformers CLIPModel, also from weights that carry the names of open_clip and OpenAI."""

import html
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from hgdpo_core.devices import Float32, in_own_float32
from hgdpo_core.errors import ModelError, first_line
from hgdpo_core.models.hub import quiet_transformers
from hgdpo_core.models.networks import check_finite, component_infos, refuse_report
from hgdpo_core.models.tokenizers import check_tokenizer, load_clip_tokenizer
from hgdpo_core.scorers import weights
from hgdpo_core.scorers.pixels import CLIP_MEAN, CLIP_STD, Images, Prepared, check_counts, normalise_pixels
from hgdpo_core.scorers.texts import TextCache

OPENAI_CLIP = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
MODEL_FILES = (("config.json", "model.safetensors"),)
TEXT_TOWER = ("text_model.", "text_projection.", "logit_scale")
SETTINGS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # OpenAI's files hold them as tensors

RENAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.", "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
IN_A_BLOCK = {".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.", ".mlp.c_fc.": ".mlp.fc1.",
              ".mlp.c_proj.": ".mlp.fc2.", ".attn.out_proj.": ".self_attn.out_proj."}


class ClipScorer:
    """A loaded CLIP as a scorer. A prompt that repeats is embedded once.

    `pixels(images, size)`: what it sees of images, as `crop_pixels` or `letterbox_pixels` give it.
    """

    float32: Float32 = "ieee"
    mean: Sequence[float] = CLIP_MEAN
    deviation: Sequence[float] = CLIP_STD

    def __init__(self, name: str, model: Any, tokenizer: CLIPTokenizer, pixels: Callable[[Images, int], torch.Tensor],
                 fingerprint: str):
        self.name, self.model, self.tokenizer, self.fingerprint = name, model, tokenizer, fingerprint
        self.pixels = pixels
        self.max_tokens: int = model.config.text_config.max_position_embeddings
        self.image_size: int = model.config.vision_config.image_size
        own = weakref.proxy(self)  # a circle would keep the weights until the garbage collector runs
        self.texts = TextCache(lambda prompts: own.embed_texts(prompts))

    def score(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Cosines, float32 [B] on the CPU: about 0.15 to 0.35 for OpenAI's weights, 0.2 to 0.35 for HPS v2's."""
        return self.cosines(images, prompts).cpu()

    def cosines(self, images: Images, prompts: Sequence[str]) -> torch.Tensor:
        """Cosine of each image with its prompt, float32 [B] on the model's device."""
        check_counts(images, prompts)
        return (self.texts(prompts) * self.embed_images(images)).sum(dim=-1)

    def prepare(self, image: Image.Image) -> Prepared:
        """What the vision tower sees of an image, before it is normalised."""
        return Prepared(self.pixels([image], self.image_size)[0].numpy())

    @torch.no_grad()
    @in_own_float32
    def embed_images(self, images: Images) -> torch.Tensor:
        """L2-normalised float32 [B, D]."""
        pixels = self.pixels(images, self.image_size).to(self.model.device)
        values = normalise_pixels(pixels, self.model.dtype, mean=self.mean, deviation=self.deviation)
        return normalise(self.model.get_image_features(pixel_values=values).pooler_output)

    @torch.no_grad()
    @in_own_float32
    def embed_texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """L2-normalised float32 [B, D]; texts are cut at what the model's positions allow."""
        tokens = self.tokenizer([clean_text(prompt) for prompt in prompts], padding=True, truncation=True,
                                max_length=self.max_tokens, return_tensors="pt")
        # without a mask: attention is causal, so what follows the end of a text cannot change it
        ids = tokens["input_ids"].to(self.model.device)
        return normalise(self.model.get_text_features(input_ids=ids).pooler_output)


def normalise(embeds: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, float32."""
    return torch.nn.functional.normalize(embeds.float(), dim=-1)


def clean_text(text: str) -> str:
    """`text` as CLIP's own tokenizers clean it: mojibake and curly quotes mended, entities resolved, one space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def load_tokenizer(files: Sequence[Path]) -> CLIPTokenizer:
    """The tokenizer in `files`, one of the choices of TOKENIZER_FILES."""
    if len(files) == 1:
        return load_clip_tokenizer(files[0].parent)
    try:
        with quiet_transformers():
            return CLIPTokenizer(vocab=str(files[0]), merges=str(files[1]))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{files[0].parent} holds no CLIP tokenizer: {first_line(error)}") from None


def check_texts(path: Path, tokenizer: CLIPTokenizer, text: Any) -> None:
    """ModelError where two texts are one to a CLIP: the same ids, or pooled before they begin to differ.

    `text` is the config of its text tower, which pools at the end token.
    """
    def read(words: str) -> list[int]:
        ids: list[int] = tokenizer(words).input_ids
        end = max(ids) if text.eos_token_id == 2 else text.eos_token_id  # 2: what old configs hold, whatever the end is
        return ids[:ids.index(end) + 1] if end in ids else ids[:1]

    check_tokenizer(path, read, text.vocab_size)


def convert(path: Path, tokenizer: CLIPTokenizer, *, act: str, heads: int | None = None, dtype: torch.dtype) -> Any:
    """The CLIPModel in a file of tensors named as in open_clip and OpenAI's CLIP; ModelError as `check_convert`.

    Sizes are read from the tensors, heads are 64 wide unless numbered; `act` is "gelu" (open_clip) or "quick_gelu"
    (OpenAI), which no tensor shows.
    """
    config, converted = _converted(path, weights.read_tensors(path), tokenizer, act, heads)
    model = weights.build(path, CLIPModel, config, converted, dtype)
    check_texts(path, tokenizer, config.text_config)
    return model


def check_convert(path: Path, tokenizer: CLIPTokenizer, *, act: str, heads: int | None = None) -> None:
    """ModelError, from the file's header alone, where `convert` would refuse it, or where two texts would be one."""
    config, converted = _converted(path, weights.read_empty_tensors(path), tokenizer, act, heads)
    weights.check_build(path, CLIPModel, config, converted)
    check_texts(path, tokenizer, config.text_config)


def _converted(path: Path, tensors: Mapping[str, torch.Tensor], tokenizer: CLIPTokenizer, act: str,
               heads: int | None) -> tuple[CLIPConfig, dict[str, torch.Tensor]]:
    with weights.sizes_read_from(path, "a CLIP with the names of open_clip"):
        return _read_config(tensors, tokenizer, act, heads), rename_tensors(tensors)


def check_folder(folder: Path, kind: Any = CLIPModel) -> CLIPConfig:
    """The config of a transformers CLIPModel folder that holds all weights of it, or with `kind` of one of its towers.

    ModelError, from the headers alone, for any other.
    """
    try:
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        infos = component_infos(folder)
    except ModelError:
        raise
    except Exception as error:  # any value of any setting may be wrong, and each fails in its own way
        raise ModelError(f"{folder} does not load as a CLIP model: {first_line(error)}") from None
    tensors = {name: torch.empty(info.shape, device="meta") for name, info in infos.items()
               if kind is CLIPModel or not name.startswith(TEXT_TOWER)}
    weights.check_build(folder, kind, config if kind is CLIPModel else config.vision_config, tensors)
    return config


def load_folder(folder: Path, dtype: torch.dtype, kind: Any = CLIPModel) -> Any:
    """The transformers CLIPModel of a folder, or with `kind` one of its towers."""
    check_folder(folder, kind)
    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True,
                                                 output_loading_info=True)
    except Exception as error:  # what passed the check may still fail in any way
        raise ModelError(f"{folder} does not load as a CLIP model: {first_line(error)}") from None
    refuse_report(str(folder), report, () if kind is CLIPModel else TEXT_TOWER)
    check_finite(folder, {"the CLIP": model}, "it is broken, get it again")
    return model


def rename_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors under transformers' names; attention's joint input projection is cut in three."""
    found: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if name in SETTINGS:
            continue
        new = weights.renamed(name, RENAMES, IN_A_BLOCK)
        if ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                found[f"{stem}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            found[new] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    return found


def _read_config(tensors: Mapping[str, torch.Tensor], tokenizer: CLIPTokenizer, act: str,
                 heads: int | None) -> CLIPConfig:
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    shared = {"projection_dim": tensors["visual.proj"].shape[1], "hidden_act": act}
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    vocabulary, text_width = tensors["token_embedding.weight"].shape
    vision = {"hidden_size": width, "patch_size": patch, "image_size": grid * patch,
              "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
              "num_hidden_layers": weights.count_blocks(tensors, "visual.transformer.resblocks."),
              "num_attention_heads": heads or width // 64, **shared}
    text = {"hidden_size": text_width, "vocab_size": vocabulary,
            "max_position_embeddings": len(tensors["positional_embedding"]),
            "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": weights.count_blocks(tensors, "transformer.resblocks."),
            "num_attention_heads": heads or text_width // 64, **shared,
            # the text is pooled at its end: with another id every caption would be the same
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=shared["projection_dim"])
