"""The original key names of Stable Diffusion 1.x (CompVis' LDM), written here from the original architecture.

Independent of diffusers' own converter, which the tests hold it against. Block structure as in SD 1.5: four levels,
two layers each; any widths.
"""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

UNET_NAMES = (("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
              ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
              ("mid_block.resnets.0.", "middle_block.0."), ("mid_block.attentions.0.", "middle_block.1."),
              ("mid_block.resnets.1.", "middle_block.2."))
RESNET_NAMES = (("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
                ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection."))
VAE_NAMES = (("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
             ("mid_block.attentions.0.", "mid.attn_1."), ("group_norm.", "norm."), ("to_q.", "q."), ("to_k.", "k."),
             ("to_v.", "v."), ("to_out.0.", "proj_out."), ("conv_norm_out.", "norm_out."),
             ("conv_shortcut.", "nin_shortcut."))


def unet_key(name: str) -> str:
    """model.diffusion_model.* for a name of diffusers' UNet."""
    for ours, theirs in UNET_NAMES:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    if found:
        way, level, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        block = f"input_blocks.{3 * level + layer + 1}" if way == "down" else f"output_blocks.{3 * level + layer}"
        if kind == "downsamplers":
            name = f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":  # after the attention, where the level has one: all but the first
            name = f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
        else:
            name = f"{block}.{0 if kind == 'resnets' else 1}.{rest}"
    if "transformer_blocks" not in name:
        for ours, theirs in RESNET_NAMES:
            name = name.replace(ours, theirs)
    return f"model.diffusion_model.{name}"


def vae_key(name: str) -> str:
    """first_stage_model.* for a name of diffusers' AutoencoderKL."""
    for ours, theirs in VAE_NAMES:
        name = name.replace(ours, theirs)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample.", name)
    return f"first_stage_model.{name}"


def text_key(name: str) -> str:
    """cond_stage_model.* for a name of transformers' CLIPTextModel, wrapped or flat."""
    return f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"


def vae_state(vae: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The VAE's weights under their original names; its attention was made of 1x1 convolutions."""
    state = {vae_key(name): tensor for name, tensor in vae.state_dict().items()}
    return {name: tensor[..., None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) else tensor
            for name, tensor in state.items()}


def original_state(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights as a Civitai file holds them, with the position ids that such files carry."""
    state = {unet_key(name): tensor for name, tensor in pipeline.unet.state_dict().items()}
    state |= vae_state(pipeline.vae)
    text = pipeline.text_encoder
    state |= {text_key(name): tensor for name, tensor in text.state_dict().items()}
    positions = torch.arange(text.config.max_position_embeddings)[None]
    return state | {text_key("embeddings.position_ids"): positions}


def save_single_file(pipeline: StableDiffusionPipeline, path: Path) -> Path:
    """One .safetensors file under the original names."""
    save_file({name: tensor.contiguous() for name, tensor in original_state(pipeline).items()}, path)
    return path
