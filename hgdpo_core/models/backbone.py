"""The seam between the method and a family of models: what sampling, encoding and training need of a loaded model.

| part            | Stable Diffusion 1.5 (`sd15.py`)  | elsewhere, for example                          |
|-----------------|-----------------------------------|-------------------------------------------------|
| `Denoiser`      | UNet                              | another UNet, a diffusion transformer           |
| `NoiseSchedule` | DDPM chain, DPM-Solver++          | flow matching with its own solver               |
| `LatentCodec`   | AutoencoderKL                     | more channels, another scale                    |
| `TextEncoder`   | CLIP, weighted chunks             | two encoders; pooled embedding, sizes in `extra`|

`FAMILIES` holds one entry per family; `load_backbone` finds the family from the model's files. Nothing outside
`models/` names a network of a family, so a new family is its own file, an entry in `FAMILIES`, and a way to recognise
its files.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import nn

from hgdpo_core.config import PromptSyntax
from hgdpo_core.devices import refuse_precision, set_float32

if TYPE_CHECKING:
    from hgdpo_core.models.model import Model

Size = tuple[int, int]
"""Width and height in pixels."""


SIZES = "sizes"
"""In `Conditioning.extra`, float32 [B, 6], for denoisers that read it: height and width of an image before scaling and
cropping, top and left of the crop in the scaled image, height and width of the crop (SDXL, arXiv:2307.01952, 2.2).
Without it they are those of an image that is generated: its own size, no crop."""


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is conditioned on for B images: text embeddings [B, L, D], and whatever else its family reads.

    `mask`, bool [B, L], is True where an embedding is its prompt's own; None where none is padded. `pooled` [B, P] and
    the tensors of `extra`, [B, ...], are for families that have them.
    """

    embeds: torch.Tensor
    mask: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: slice) -> Self:
        return self._map(lambda tensor: tensor[rows])

    @property
    def length(self) -> int:
        """L, the tokens of a text."""
        return self.embeds.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same on a device, floating point tensors in `dtype`."""
        return self._map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def expand(self, count: int) -> Self:
        """One text's conditioning for `count` images."""
        return self._map(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def repeat(self, times: int) -> Self:
        """The B conditionings, all of them `times` times over."""
        return self._map(lambda tensor: torch.cat([tensor] * times))

    def replaced(self, rows: torch.Tensor, other: "Conditioning") -> Self:
        """The same with the text of `other`, which is one, in the rows where `rows`, bool [B], is True.

        What is in `extra` is not of the text, as the size of an image, and stays.
        """
        def choose(own: torch.Tensor, their: torch.Tensor) -> torch.Tensor:
            over = rows.to(own.device).reshape(-1, *[1] * (own.ndim - 1))
            return torch.where(over, their.to(own.device), own)

        of_text = replace(self, extra={})._map(choose, replace(other, extra={}))
        return replace(of_text, extra=self.extra)

    @classmethod
    def join(cls, parts: "Sequence[Conditioning]") -> "Conditioning":
        """Conditionings of equally long texts, one after the other."""
        first, *others = parts
        return first._map(lambda *tensors: torch.cat(tensors), *others)

    def _map(self, change: Callable[..., torch.Tensor], *others: "Conditioning") -> Self:
        def changed(value: Any, *their: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: change(tensor, *(other[name] for other in their)) for name, tensor in value.items()}
            return None if value is None else change(value, *their)

        return replace(self, **{f.name: changed(*(getattr(each, f.name) for each in (self, *others)))
                                for f in fields(self)})


class Denoiser(nn.Module, ABC):
    """A network as a function of noisy latents [B, C, h, w], timesteps ([B] or one for all) and a conditioning.

    `network` is a diffusers model, whose weights are what is trained and saved; `lora_targets` names its layers that a
    LoRA changes.
    """

    lora_targets: ClassVar[tuple[str, ...]]
    reads_sizes: ClassVar[bool] = False
    """Whether it reads SIZES."""
    original_names: ClassVar[bool] = False
    """Whether a LoRA for other tools names layers as the original network does, not as diffusers'."""
    is_compiled = False

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    @abstractmethod
    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The prediction [B, C, h, w], of what the noise schedule calls `prediction_target`."""

    @property
    def device(self) -> torch.device:
        return self.network.device

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass instead of holding them."""
        self.network.enable_gradient_checkpointing()

    def compile_for_sampling(self) -> None:
        """Compile the network for each shape of latents, for texts of any length: see `mark_length`."""
        self.network.to(memory_format=torch.channels_last).compile(dynamic=False)
        self.is_compiled = True

    def mark_length(self, conditioning: Conditioning) -> None:
        """Called with what the network is given: a compiled one is made for texts of any length."""
        if self.is_compiled:
            torch._dynamo.maybe_mark_dynamic(conditioning.embeds, 1)

    @contextmanager
    def training_attention(self, *, on_cpu: bool) -> Iterator[None]:
        """Inside, attention is computed in the way that trains fastest; the base class leaves it as it is."""
        yield


class NoiseSchedule(Protocol):
    """How noise is mixed into latents, what a network predicts of the mixture, and how sampling undoes it."""

    def require_trainable(self) -> None:
        """ModelError for a schedule that a model can be sampled with, but not trained."""
        ...

    def draw_timesteps(self, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """One timestep for each generator, [B] on the CPU."""
        ...

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The noisy latents [B, C, h, w] at `timesteps` [B]."""
        ...

    def prediction_target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict, [B, C, h, w]."""
        ...

    def statistic_matching(self, policy: torch.Tensor, reference: torch.Tensor,
                           timesteps: torch.Tensor) -> torch.Tensor:
        """The statistic matching loss of two predictions [B, C, h, w], float32 [B]."""
        ...

    def solver(self) -> Any:
        """A new solver for `sample_latents`: set_timesteps, scale_model_input, step, as diffusers' schedulers."""
        ...

    def differentiable_solver(self) -> Any:
        """A new solver for `sample_with_gradient`, whose step depends on its arguments alone."""
        ...


class Decoded(NamedTuple):
    """Decoded images: uint8 [B, H, W, 3], and the rows that only a codec in float32 could decode."""

    pixels: np.ndarray
    in_float32: list[int]


class LatentCodec(Protocol):
    """Images to latents and back."""

    @property
    def channels(self) -> int: ...

    @property
    def factor(self) -> int:
        """Pixels per side of one latent pixel."""
        ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled latents, float32 [B, C, h, w] on the CPU, of images [B, 3, H, W] in [-1, 1]."""
        ...

    def decode(self, latents: torch.Tensor) -> Decoded:
        """The images of scaled latents [B, C, h, w]; ModelError where latents, or an image in float32, are not finite.

        An image that is not finite in half precision is decoded again in float32.
        """
        ...

    def decode_with_gradient(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] of scaled latents [B, C, h, w], about -1 to 1, not clamped; its weights get no gradient.

        Computed again in the backward pass, block by block; never in float16.
        """
        ...

    def compile_for_sampling(self) -> None:
        """Compile the decoder, for each shape of latents."""
        ...

    def to(self, device: torch.device | str) -> object:
        """Move to a device, in place."""
        ...


class TextConditioner(Protocol):
    """Prompts to conditionings, under a target's settings: syntax, clip skip, negative prompt."""

    chunk_length: int
    """Tokens that are read at once."""
    width: int
    """Numbers of a token's embedding."""
    pooled_width: int | None
    """Numbers of a text's pooled embedding, in families that have one."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """One conditioning of one text per prompt, no shorter than the negative prompt's; ConfigError for clip_skip."""
        ...

    def negative(self, length: int) -> Conditioning:
        """The negative prompt's, as long as prompts of that length."""
        ...

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        """Of B captions together, read plainly and cut at `chunk_length`."""
        ...

    def dropped_caption(self) -> Conditioning:
        """What stands in training for a caption that is left out: the sampler's unconditional text, of one text."""
        ...

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than `chunk_length`."""
        ...

    def reading(self, syntax: PromptSyntax) -> "TextConditioner":
        """The same for prompts in another syntax."""
        ...


@dataclass(frozen=True)
class Backbone:
    """The parts of a loaded model that the method uses."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    codec: LatentCodec
    text: TextConditioner
    save: Callable[[Path], object]
    """Writes the whole model as a folder that `find_model` opens; its network goes to the CPU."""
    save_lora: Callable[[Path], object]
    """Writes the LoRA in training into a folder, as the family's users load it."""

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image."""
        return self.codec.channels, size[1] // self.codec.factor, size[0] // self.codec.factor

    def shapes(self, size: Size) -> dict[str, list[int]]:
        """Of one image's latents and of one chunk of a prompt's embedding, as a manifest records them.

        And of the pooled embedding, in families that have one.
        """
        pooled = {"pooled_shape": [self.text.pooled_width]} if self.text.pooled_width else {}
        return {"latent_shape": [*self.latent_shape(size)], "embeds_shape": [self.text.chunk_length, self.text.width],
                **pooled}


class Family(Protocol):
    """A family of models: how its files are recognised and checked, and how one is loaded.

    One that reads single files too is a `FileFamily`.
    """

    def recognises(self, path: Path) -> bool:
        """Whether a model's folder, or single file, is of this family, by its configs or its tensors' names."""
        ...

    def check_folder(self, path: Path, *, own_vae: bool) -> None:
        """Refuse, before anything loads, a folder that is not a whole model of the family; ModelError, in one line.

        `own_vae`: the folder's own VAE will be used, so it must be whole too.
        """
        ...

    def check_lora(self, model: "Model", path: Path) -> None:
        """Refuse, before anything loads, a LoRA that is broken or that this model cannot take as a whole."""
        ...

    def load(self, model: "Model", device: str, *, dtype: str | None, codec_dtype: str | None) -> Backbone:
        """The model in `dtype` (default: its own), its codec in `codec_dtype` (default: as the rest)."""
        ...


class FileFamily(Family, Protocol):
    """A family whose models come as single files as well, which hold neither configs nor tokenizers."""

    configs: Path
    """A diffusers folder with what a single file lacks."""

    def check_file(self, path: Path, configs: Path, *, own_vae: bool) -> None:
        """As `check_folder`, for a single file that is read with these configs."""
        ...

    def schedule_of_keys(self, path: Path) -> dict[str, Any]:
        """Settings of diffusers' scheduler that a single file states by its keys, `prediction_type` for example."""
        ...


FAMILIES: dict[str, Family] = {}
"""By name; `models/__init__.py` enters ours."""
DEFAULT_FAMILY = "sd15"


def find_family(path: Path) -> Family:
    """The family that recognises a model's files; else SD 1.5, which reads single files and names what is wrong."""
    return next((family for family in FAMILIES.values() if family.recognises(path)), FAMILIES[DEFAULT_FAMILY])


def family_name(path: Path) -> str:
    """The name of the family that a model's files are of."""
    found = find_family(path)
    return next(name for name, family in FAMILIES.items() if family is found)


def check_lora(model: "Model", path: Path) -> None:
    """Refuse, before anything loads, a LoRA that is broken or that this model cannot take as a whole."""
    find_family(model.path).check_lora(model, path)


def load_backbone(model: "Model", device: str = "cpu", *, dtype: str | None = None,
                  codec_dtype: str | None = None) -> Backbone:
    """The model, loaded by its family, with its LoRA merged and its personaliser attached; ModelError if it does not.

    `dtype`: "float32", "bfloat16" or "float16", by default the model's own; `codec_dtype`: that of its codec.
    ConfigError where the device cannot compute in the model's own, or should not (`refuse_precision`).
    """
    if dtype is None:
        refuse_precision("target.dtype", model.dtype, device, auto=model.auto_dtype)
    set_float32()
    backbone = find_family(model.path).load(model, device, dtype=dtype, codec_dtype=codec_dtype)
    if model.personaliser is None:
        return backbone
    from hgdpo_core.models.personaliser import personalise  # it builds on this module

    return personalise(backbone, model.personaliser)
