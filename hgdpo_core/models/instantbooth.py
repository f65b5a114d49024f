"""InstantBooth (arXiv:2304.03411) for Stable Diffusion 1.x: a person from images, in a frozen network, trained by us.

| paper                                    | here                                                                  |
|------------------------------------------|-----------------------------------------------------------------------|
| E_c, concept embedding at the token V    | `ConceptNetwork.embed`, of the image encoder's normed class token      |
| E_p, rich features f_p                   | `ConceptNetwork.tokens`, of all tokens of its last layer               |
| adapter, y + beta tanh(gamma) S([y, f_p])| `GatedAdapter`, in the slot between self- and cross-attention (`fuser`)|
| beta and alpha of balanced sampling      | `personaliser.strength` and `personaliser.token_strength`              |

Ours, as no code is public: S normalises first and reads f_p through a linear layer of each block's width; what E_c
gives is added to the text encoder's output at V, where the paper replaces that. Both begin at zero, so an untrained
adapter changes no bit. Guidance's unconditional branch is the target's own.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from hgdpo_core.built_in import find_personaliser, is_built_in
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, InputError, ModelError, first_line
from hgdpo_core.models.backbone import (
    DEFAULT_FAMILY,
    Backbone,
    Conditioning,
    Denoiser,
    TextConditioner,
    family_name,
)
from hgdpo_core.models.files import read_config
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.hub import find_or_download, quiet_transformers
from hgdpo_core.models.model import Model
from hgdpo_core.models.networks import check_finite, compare_shapes, component_files, empty_network, refuse_report
from hgdpo_core.models.personaliser import Adapter, ConceptEmbedding, Personaliser
from hgdpo_core.models.sd15 import ClipText, UnetDenoiser
from hgdpo_core.models.tokenizers import load_clip_tokenizer, single_token, word_reader
from hgdpo_core.models.weight_files import load_safetensors, read_header

NAME = "instantbooth"
STRENGTH = 0.3
CONFIG, WEIGHTS, ENCODER = "instantbooth.json", "instantbooth.safetensors", "image_encoder"
BLOCK = ".transformer_blocks."
STATES, POOLED, PLACES, STRENGTHS = "concept_states", "concept_pooled", "concept_places", "concept_strengths"
"""In `Conditioning.extra`: [B, T, W], [B, W], bool [B, L] where V is, and [B, 2], beta and alpha."""


@dataclass(frozen=True)
class NetworkShape:
    """What an adapter was made for: widths of image encoder and text, and each block's width and attention heads."""

    concept_word: str
    image_width: int
    text_width: int
    blocks: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, unet: Any, concept_word: str, image_width: int) -> Self:
        """That of a UNet, with storage or without."""
        blocks = {name: (block.attn1.to_q.out_features, block.attn1.heads) for name, block in transformer_blocks(unet)}
        return cls(concept_word, image_width, unet.config.cross_attention_dim, blocks)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From an adapter's folder; ModelError where its config is broken."""
        config = read_config(folder / CONFIG)
        try:
            blocks = {str(name): (int(width), int(heads)) for name, (width, heads) in config["blocks"].items()}
            return cls(str(config["concept_word"]), int(config["image_width"]), int(config["text_width"]), blocks)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{folder / CONFIG} is no config of an InstantBooth adapter ({error!r}): train it "
                             "again") from None


def transformer_blocks(unet: Any) -> Iterator[tuple[str, Any]]:
    """All blocks of self-attention, cross-attention and feed-forward, by name."""
    for name, module in unet.named_modules():
        if BLOCK in name and hasattr(module, "attn1"):
            yield name, module


class GatedAdapter(nn.Module):
    """y + beta tanh(gamma) S([y, f_p]), of y's own tokens: y `[B,N,D]`, f_p `[B,T,W]`, beta `[B,1,1]`."""

    def __init__(self, width: int, heads: int, token_width: int):
        super().__init__()
        self.heads = heads
        # No name is one of a LoRA's targets, which are chosen by suffix: an adapter has none.
        self.project, self.norm = nn.Linear(token_width, width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, y: torch.Tensor, concept: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        tokens, beta = concept
        joined = self.norm(torch.cat([y, self.project(tokens)], dim=1))
        query, (key, value) = self.query(joined[:, :y.shape[1]]), self.key_value(joined).chunk(2, dim=-1)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        seen = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        change = beta * torch.tanh(self.gamma) * self.output(seen)
        return y + change.to(y.dtype)  # trained in float32, in a network whose norms take their own precision


class ConceptNetwork(nn.Module):
    """All that is trained: E_c, E_p and an adapter for each block."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.shape = shape
        self.embed = nn.Linear(shape.image_width, shape.text_width)
        nn.init.zeros_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        self.tokens = nn.Linear(shape.image_width, shape.text_width)
        self.adapters = nn.ModuleDict({name.replace(".", "/"): GatedAdapter(width, heads, shape.text_width)
                                       for name, (width, heads) in shape.blocks.items()})

    def put_into(self, unet: Any) -> None:
        """Each adapter into its block's slot, between self- and cross-attention."""
        for name, block in transformer_blocks(unet):
            block.fuser = self.adapters[name.replace(".", "/")]
        unet.position_net = PassThrough()


class PassThrough(nn.Module):
    """In the place of diffusers' network of box positions: the blocks get what it is given."""

    denoiser: "tuple[InstantBoothDenoiser]"

    def forward(self, objs: Any) -> Any:
        return objs


class InstantBoothDenoiser(UnetDenoiser):
    """A UNet that reads a concept beside the text; without one, it computes as it did before."""

    def __init__(self, network: Any, concepts: ConceptNetwork, encoder: "ImageEncoder"):
        super().__init__(network)
        self.concepts, self.encoder = concepts, encoder
        concepts.put_into(network)
        network.position_net.denoiser = (self,)  # no submodule: it would be its own

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if STATES in conditioning.extra:
            pooled, places = conditioning.extra[POOLED], conditioning.extra[PLACES]
            alpha = conditioning.extra[STRENGTHS][:, 1, None, None]
            at = places[:, :, None].to(conditioning.embeds.dtype)
            embeds = conditioning.embeds + alpha * at * self.concepts.embed(pooled)[:, None]
            conditioning = replace(conditioning, embeds=embeds.to(conditioning.embeds.dtype))
        return super().forward(noisy, timesteps, conditioning)

    def adapter_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        if STATES not in conditioning.extra:
            return {}
        tokens = self.concepts.tokens(conditioning.extra[STATES])
        return {"cross_attention_kwargs": {"gligen": {"objs": (tokens, conditioning.extra[STRENGTHS][:, :1, None])}}}


def attached_adapter(denoiser: Denoiser) -> InstantBoothDenoiser:
    """What reads the adapter that was put into a denoiser's network."""
    return denoiser.network.position_net.denoiser[0]


class ImageEncoder:
    """A CLIP vision tower, frozen."""

    def __init__(self, network: CLIPVisionModel):
        self.network: Any = network.eval().requires_grad_(False)
        size: Any = network.config.image_size
        # A miniature's images are in [-1, 1]; CLIP's have the mean and deviation of its own data.
        plain: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if size <= SMALL_IMAGE else {}
        self.prepare = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                                             **plain)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """From its folder; ModelError, in one line, where it is broken."""
        try:
            with quiet_transformers():
                loaded: Any = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                              output_loading_info=True)
        except Exception as error:  # the libraries fail in many ways on files that are not what they are called
            raise ModelError(f"{folder} does not load as a CLIP image encoder: {first_line(error)}") from None
        network, report = loaded
        refuse_report(str(folder), report, UNREAD)
        check_finite(folder, {"image encoder": network})
        return cls(network)

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.network.config.hidden_size

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """What the network reads, float32 `[B,3,S,S]`."""
        return self.prepare([image.convert("RGB") for image in images], return_tensors="pt").pixel_values

    @torch.no_grad()
    def read(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of the last layer `[B,T,W]`, and the normed class token `[B,W]`."""
        seen = self.network(pixels.to(self.network.device, self.network.dtype))
        return seen.last_hidden_state, seen.pooler_output


SMALL_IMAGE = 64
UNREAD = ("text_model.", "text_projection", "visual_projection", "logit_scale")
"""Of a whole CLIP, beside its image encoder."""


def find_image_encoder(source: str | None) -> Path:
    """The folder of a CLIP image encoder, alone or in a whole CLIP: of this machine, a hub id, or built in.

    ModelError, in one line, where it is not there or is no CLIP; ConfigError for None.
    """
    if source is None:
        raise ConfigError("instantbooth.image_encoder is not given: expected a CLIP image encoder, a folder or a hub "
                          "id such as openai/clip-vit-large-patch14")
    if is_built_in(source):
        return find_personaliser() / ENCODER
    download = partial(snapshot_download, source, allow_patterns=["config.json", "*.safetensors"])
    folder = find_or_download("instantbooth.image_encoder", source, download, "a folder with config.json and "
                              "model.safetensors of a CLIP image encoder, or a hub id")
    kind = str(read_config(folder / "config.json").get("model_type"))
    if not kind.startswith("clip"):
        raise ModelError(f"{folder} holds a model of the type {kind}: expected a CLIP image encoder")
    component_files(folder)
    return folder


def encoder_fingerprint(folder: Path) -> str:
    """sha256 (64 hex digits) of what is read of an image encoder's folder: its config and its weights."""
    files = [folder / "config.json", *component_files(folder)]
    return content_hash([fingerprint_path(file) for file in files], length=64)


def check_trainable(model: Model, word: str) -> None:
    """ModelError, before anything loads, for a target of another family, or a concept word that is not one token."""
    if (family := family_name(model.path)) != DEFAULT_FAMILY:
        raise ModelError(f"{model.path} is a model of the family {family}: an InstantBooth adapter is one of Stable "
                         "Diffusion 1.x")
    single_token(load_clip_tokenizer((model.configs or model.path) / "tokenizer"), word)


# -- an adapter's folder


def save_instantbooth(concepts: ConceptNetwork, encoder: ImageEncoder, folder: Path) -> None:
    """Write an adapter, as float32 safetensors with its config, and the image encoder that it reads."""
    save_concepts(concepts, folder)
    with quiet_transformers():
        encoder.network.save_pretrained(folder / ENCODER)


def save_concepts(concepts: ConceptNetwork, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter without its image encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in concepts.state_dict().items()},
              folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(asdict(concepts.shape), indent=1) + "\n")


def load_concepts(folder: Path) -> ConceptNetwork:
    """The trained network of an adapter's folder, float32 on the CPU."""
    network = ConceptNetwork(NetworkShape.read(folder))
    state, _ = load_safetensors(folder / WEIGHTS)
    check_finite(folder / WEIGHTS, {"adapter": state})
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return network


class InstantBoothKind:
    """The kind as `PERSONALISERS` holds it."""

    default_strength = STRENGTH

    def recognises(self, path: Path) -> bool:
        return (path / CONFIG).is_file()

    def check(self, adapter: Adapter, model: Model) -> None:
        folder, shape = adapter.path, NetworkShape.read(adapter.path)
        configs = model.configs or model.path
        unet = empty_network(configs, "unet", read_config(configs / "unet" / "config.json"))
        own = NetworkShape.of(unet, shape.concept_word, shape.image_width)
        if own.text_width != shape.text_width or dict(own.blocks) != dict(shape.blocks):
            raise ModelError(f"{folder} is an InstantBooth adapter for text {shape.text_width} wide and "
                             f"{len(shape.blocks)} blocks of {_widths(shape)}, the target has {own.text_width} and "
                             f"{len(own.blocks)} of {_widths(own)}: use one that was trained on this target")
        component_files(folder / ENCODER)
        width = CLIPVisionConfig(**read_config(folder / ENCODER / "config.json")).hidden_size
        if width != shape.image_width:
            raise ModelError(f"{folder / ENCODER} has tokens {width} wide, the adapter reads {shape.image_width}: take "
                             "the image encoder that it was trained with")
        if not (folder / WEIGHTS).is_file():
            raise ModelError(f"{folder} lacks {WEIGHTS}: get the whole folder")
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in ConceptNetwork(shape).state_dict().items()}
        compare_shapes(folder / WEIGHTS, "InstantBooth",
                       {name: info.shape for name, info in read_header(folder / WEIGHTS).items()}, expected)

    def check_prompts(self, adapter: Adapter, model: Model, prompts: Sequence[str]) -> None:
        word = NetworkShape.read(adapter.path).concept_word
        has_word = word_reader(model.configs or model.path, model.prompt_syntax, word)
        lacking = [prompt for prompt in prompts if not has_word(prompt)]
        if lacking:
            raise InputError(f"{len(lacking)} of {len(prompts)} prompts have no word {word} that the text encoder "
                             f"reads, the first is {str(lacking[0])!r:.80}: expected it before the person and early "
                             f'enough, as in "a {word} woman, waving, in a park"')

    def load(self, adapter: Adapter) -> "InstantBooth":
        return InstantBooth(adapter)


def _widths(shape: NetworkShape) -> str:
    return "/".join(map(str, sorted({width for width, _ in shape.blocks.values()})))


class InstantBooth(Personaliser):
    """An adapter of ours, loaded."""

    name = NAME

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.encoder = ImageEncoder.load(adapter.path / ENCODER)
        self.word = NetworkShape.read(adapter.path).concept_word
        self._tokens = 0

    def attach(self, backbone: Backbone) -> Backbone:
        unet = backbone.denoiser.network
        concepts = load_concepts(self.adapter.path).to(unet.device, unet.dtype)
        self.encoder.network.to(unet.device)
        denoiser = InstantBoothDenoiser(unet, concepts, self.encoder)
        return replace(backbone, denoiser=denoiser.eval().requires_grad_(False))

    def encode(self, images: Sequence[Image.Image]) -> ConceptEmbedding:
        """Tokens of all images one after the other, and the mean of their class tokens."""
        states, pooled = self.encoder.read(self.encoder.pixels(images))
        self._tokens = states.shape[0] * states.shape[1]
        return {STATES: states.flatten(0, 1)[None], POOLED: pooled.mean(0, keepdim=True)}

    def conditioned(self, text: TextConditioner, prompts: Sequence[str],
                    concepts: Sequence[ConceptEmbedding]) -> list[Conditioning]:
        places = concept_places(text, prompts, self.word)
        strengths = [self.adapter.strength, self.adapter.config.token_strength]
        return [self._with(conditioning, concept, where[None], strengths) for conditioning, concept, where
                in zip(text.encode(prompts), concepts, places, strict=True)]

    def unconditioned(self, negative: Conditioning) -> Conditioning:
        assert self._tokens, "encode a concept first"
        width = self.encoder.width
        nothing = {STATES: torch.zeros(1, self._tokens, width), POOLED: torch.zeros(1, width)}
        return self._with(negative, nothing, torch.zeros(1, negative.length, dtype=torch.bool), [0.0, 0.0])

    @staticmethod
    def _with(conditioning: Conditioning, concept: ConceptEmbedding, places: torch.Tensor,
              strengths: list[float]) -> Conditioning:
        like = conditioning.embeds
        extra = {name: tensor.to(like) for name, tensor in concept.items()}
        extra |= {PLACES: places.to(like.device), STRENGTHS: torch.tensor([strengths]).to(like)}
        return replace(conditioning, extra={**conditioning.extra, **extra})


def concept_places(text: TextConditioner, prompts: Sequence[str], word: str) -> list[torch.Tensor]:
    """Where each prompt has the concept's word, bool [L]; ModelError for a prompt without it."""
    token = require_word(text, word)
    assert isinstance(text, ClipText)
    found = [torch.tensor([each == token for each in ids]) for ids in text.token_ids(prompts)]
    missing = next((prompt for prompt, where in zip(prompts, found, strict=True) if not where.any()), None)
    if missing is not None:
        raise ModelError(f"the prompt {str(missing)!r:.80} has no word {word}: expected it before the person, as in "
                         f'"a {word} woman, waving, in a park"')
    return found


def require_word(text: TextConditioner, word: str) -> int:
    """The token of a concept's word; ModelError where it is more than one token."""
    assert isinstance(text, ClipText), "an InstantBooth adapter is one of Stable Diffusion 1.x"
    return text.single_token(word)
