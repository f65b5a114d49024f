"""The original key names of Stable Diffusion 1.x (CompVis' LDM), written here from the original architecture.

Independent of diffusers' own converter, which the tests hold it against. Block structure as in SD 1.5: four levels,
two layers each; any widths.
"""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
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


# -- Stable Diffusion XL

SDXL_UNET = (("add_embedding.linear_1.", "label_emb.0.0."), ("add_embedding.linear_2.", "label_emb.0.2."))
OPEN_CLIP = (("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), ("self_attn.out_proj.", "attn.out_proj."),
             ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."))


def sdxl_unet_key(name: str) -> str:
    """As `unet_key`; the lowest level has attention, so its upsampler is the third of its entry."""
    for ours, theirs in SDXL_UNET:
        if name.startswith(ours):
            return f"model.diffusion_model.{theirs}{name.removeprefix(ours)}"
    return unet_key(name).replace("output_blocks.2.1.conv", "output_blocks.2.2.conv")


def open_clip_state(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The second text encoder's weights as OpenCLIP has them: query, key and value in one, the projection turned."""
    given = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    state = {"token_embedding.weight": given["embeddings.token_embedding.weight"],
             "positional_embedding": given["embeddings.position_embedding.weight"],
             "ln_final.weight": given["final_layer_norm.weight"], "ln_final.bias": given["final_layer_norm.bias"],
             "text_projection": given["text_projection.weight"].T, "logit_scale": torch.zeros(())}
    for name, tensor in given.items():
        found = re.match(r"encoder\.layers\.(\d+)\.(.*)", name)
        if found is None or found[2].startswith(("self_attn.q", "self_attn.k", "self_attn.v")):
            continue
        rest = found[2]
        for ours, theirs in OPEN_CLIP:
            rest = rest.replace(ours, theirs)
        state[f"transformer.resblocks.{found[1]}.{rest}"] = tensor
    for layer in range(encoder.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [given[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in state.items()}


def sdxl_state(unet: torch.nn.Module, vae: torch.nn.Module, text_encoder: torch.nn.Module,
               text_encoder_2: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights as a Civitai file holds them."""
    state = {sdxl_unet_key(name): tensor for name, tensor in unet.state_dict().items()}
    state |= vae_state(vae) | open_clip_state(text_encoder_2)
    return state | {f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": tensor
                    for name, tensor in text_encoder.state_dict().items()}


def save_sdxl_file(pipeline: StableDiffusionXLPipeline, path: Path, *marks: str) -> Path:
    """One .safetensors file under the original names; `marks`: further keys, such as v_pred."""
    state = sdxl_state(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    state |= {mark: torch.zeros(0) for mark in marks}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def save_single_file(pipeline: StableDiffusionPipeline, path: Path) -> Path:
    """One .safetensors file under the original names."""
    save_file({name: tensor.contiguous() for name, tensor in original_state(pipeline).items()}, path)
    return path
