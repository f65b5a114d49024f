"""Scores by the ORIGINAL packages on random weights: what tests/core/scorers/test_scorers_golden.py holds ours against.

Run it in an environment of its own, with the originals' pins (Python 3.10):

    python3.10 -m venv originals
    originals/bin/pip install torch==1.12.1 torchvision==0.13.1 "numpy<2" transformers==4.27.4 diffusers==0.16.1 \\
        accelerate==0.16.0 huggingface-hub==0.13.4 datasets==2.11.0 "pyarrow<13" "setuptools<70" wheel \\
        image-reward==1.5 hpsv2==1.2.0 clip-anytorch==2.6.0
    originals/bin/python tests/golden/make_scorer_golden.py          # tiny models: writes scorers_tiny.json
    originals/bin/python tests/golden/make_scorer_golden.py --full   # the published sizes, 12 GB of memory, minutes

No network is used and nothing of the originals is changed but sizes and vocabularies: images go through their own
preprocessing, text through their own tokenizers (the first 512 merges of CLIP's vocabulary; a small one for BERT),
scores through their own `score`. hpsv2's wheel lacks CLIP's vocabulary, so the copy of the clip package is put there.
"""

import argparse
import functools
import gzip
import io
import json
import platform
import shutil
import sys
import tempfile
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.modules.setdefault("turtle", types.SimpleNamespace(forward=None))  # hpsv2 imports it, and with it a screen

import scorer_inputs as inputs  # noqa: E402

PACKAGES = ("torch", "torchvision", "transformers", "timm", "image-reward", "hpsv2", "clip-anytorch", "pillow", "ftfy")
MERGES = 512
TINY_HPS = {"embed_dim": 24, "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 4,
                                            "patch_size": 14},
            "text_cfg": {"context_length": 77, "vocab_size": 512 + MERGES + 2, "width": 64, "heads": 16, "layers": 2}}
TINY_CLIP = {"embed_dim": 48, "image_resolution": 64, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 16,
             "context_length": 77, "vocab_size": 512 + MERGES + 2, "transformer_width": 64, "transformer_heads": 1,
             "transformer_layers": 2}
FULL_CLIP = {"embed_dim": 768, "image_resolution": 224, "vision_layers": 24, "vision_width": 1024,
             "vision_patch_size": 14, "context_length": 77, "vocab_size": 49408, "transformer_width": 768,
             "transformer_heads": 12, "transformer_layers": 12}
TINY_BERT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
BERT = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True}
"""med_config.json of the ImageReward repository."""


def write_vocabularies(folder: Path) -> Path:
    """The small vocabularies, for transformers in tests/golden and for the originals in `folder`."""
    published = Path(find_spec("clip").submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    target = Path(find_spec("hpsv2").submodule_search_locations[0]) / "src" / "open_clip" / published.name
    if not target.exists():
        shutil.copy(published, target)
    lines = gzip.decompress(published.read_bytes()).decode().split("\n")[:MERGES + 1]
    small = folder / "merges.gz"
    small.write_bytes(gzip.compress("\n".join(lines).encode()))
    from clip.simple_tokenizer import SimpleTokenizer

    (HERE / "clip_vocabulary").mkdir(exist_ok=True)
    (HERE / "clip_vocabulary" / "merges.txt").write_text("\n".join(["#version: 0.2", *lines[1:]]) + "\n")
    (HERE / "clip_vocabulary" / "vocab.json").write_text(json.dumps(SimpleTokenizer(str(small)).encoder))
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters),
             "a", "woman", "man", "the", "in", "on", "of", "and", "with", "two", "people", "##ing", "##s", "red"]
    (HERE / "bert_vocabulary.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    return small


def fill(model: torch.nn.Module) -> dict:
    """Put the shared random weights into `model`; returns the shapes by name."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()
              if value.is_floating_point() and not name.endswith("attn_mask")}
    for name, value in model.state_dict().items():
        if name in shapes:
            value.copy_(torch.from_numpy(inputs.make_weights({name: shapes[name]})[name]))
    return shapes


def score_hps(full: bool, folder: Path, merges: Path, images, prompts) -> dict:
    import hpsv2.src.open_clip.tokenizer as tokenizer
    import hpsv2.src.open_clip.transform as transform
    from hpsv2 import img_score
    from hpsv2.src.open_clip import add_model_config, create_model_and_transforms

    tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(merges))
    (folder / "ViT-tiny-14.json").write_text(json.dumps(TINY_HPS))
    add_model_config(folder / "ViT-tiny-14.json")
    model, _, preprocess = create_model_and_transforms(  # as img_score.initialize_model, without its download
        "ViT-H-14" if full else "ViT-tiny-14", None, precision="amp", device="cpu", light_augmentation=True,
        aug_cfg={}, output_dict=True)
    shapes = fill(model)
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    img_score.torch = types.SimpleNamespace(**vars(torch))  # it reads the whole checkpoint again for every call
    img_score.torch.load = lambda *_, **__: {"state_dict": model.state_dict()}

    def run() -> list:
        # an RGBA image makes the original fail: it keeps the fourth channel
        return [float(img_score.score(item.convert("RGB"), prompt, cp="in memory")[0])
                for item, prompt in zip(images, prompts, strict=True)]

    result = {"shapes": shapes, "scores": run()}
    transform.F = types.SimpleNamespace(**vars(transform.F))
    transform.F.resize = functools.partial(transform.F.resize, antialias=True)  # torchvision's default from 0.17 on
    return {**result, "scores_with_antialias": run()}


def score_openai(full: bool, folder: Path, merges: Path, images, prompts) -> dict:
    import clip
    import clip.clip
    from clip.model import CLIP
    from ImageReward.models import AestheticScore, CLIPScore

    clip.clip._tokenizer = clip.clip._Tokenizer(str(merges))
    sizes = FULL_CLIP if full else TINY_CLIP
    model = CLIP(**sizes)
    shapes = fill(model)
    torch.save(model.state_dict(), folder / "clip.pt")
    del model
    load = clip.load
    clip.load = lambda name, device, **_: load(str(folder / "clip.pt"), device=device)
    module = sys.modules["ImageReward.models.AestheticScore"]
    published = module.MLP
    module.MLP = lambda _: published(sizes["embed_dim"])

    def as_file(item) -> io.BytesIO:
        buffer = io.BytesIO()
        item.save(buffer, format="png")
        return buffer

    scorer = CLIPScore(download_root=None)
    scores = {"clip": {"shapes": shapes, "scores": [scorer.score(prompt, as_file(item))
                                                    for item, prompt in zip(images, prompts, strict=True)]}}
    del scorer
    aesthetic = AestheticScore(download_root=None)
    head = fill(aesthetic.mlp)
    aesthetic.eval()
    return {**scores, "aesthetic": {"shapes": head, "scores": [aesthetic.score("", as_file(item))
                                                               for item in images]}}


def score_imagereward(full: bool, folder: Path, images, prompts) -> dict:
    import ImageReward.models.BLIP.blip as blip
    import ImageReward.models.BLIP.blip_pretrain as pretrain
    from transformers import BertTokenizer

    module = sys.modules["ImageReward.ImageReward"]  # the package has a class of that name too
    (folder / "vocab.txt").write_text((HERE / "bert_vocabulary.txt").read_text())
    read_vocabulary = BertTokenizer.from_pretrained
    blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: read_vocabulary(str(folder)))
    config = BERT if full else {**BERT, **TINY_BERT, "vocab_size": len(read_vocabulary(str(folder))) + 2}
    (folder / "med_config.json").write_text(json.dumps(config))
    if not full:
        small = blip.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=16)
        pretrain.create_vit = lambda *_: (small, 64)
        published = module.MLP
        module.MLP = lambda _: published(TINY_BERT["hidden_size"])
        transform = module._transform
        module._transform = lambda _: transform(64)
    model = module.ImageReward(med_config=str(folder / "med_config.json"))
    shapes = fill(model)
    model.eval()
    return {"shapes": shapes, "scores": [model.score(prompt, item)
                                         for item, prompt in zip(images, prompts, strict=True)]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="the published sizes, on three images")
    full = parser.parse_args().full
    torch.set_num_threads(1)
    count = 3 if full else len(inputs.PROMPTS)
    images, prompts = inputs.make_images()[:count], inputs.PROMPTS[:count]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merges = write_vocabularies(folder)
        scorers = {"hps": score_hps(full, folder, merges, images, prompts),
                   "imagereward": score_imagereward(full, folder, images, prompts),
                   **score_openai(full, folder, merges, images, prompts)}
    result = {"origin": "tests/golden/make_scorer_golden.py" + (" --full" if full else ""),
              "made_with": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
              "images": [inputs.image_hash(item) for item in images], "scorers": scorers}
    path = HERE / ("scorers_full.json" if full else "scorers_tiny.json")
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(path, {scorer: values["scores"] for scorer, values in scorers.items()})  # noqa: T201


if __name__ == "__main__":
    main()
