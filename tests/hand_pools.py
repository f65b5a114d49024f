"""Pools made by hand, and a judge that is a table: its score of an image follows from the image's location in the pool.

So every ranking is known, and nothing needs a model.
"""

import io
from types import SimpleNamespace

import pyarrow as pa
import torch
from PIL import Image

from hgdpo_core.errors import ModelError
from hgdpo_core.prompts import prompt_id
from hgdpo_core.stages.pool import SCHEMA
from hgdpo_core.storage.shards import ShardFolder

PROMPTS = ["a woman <b>|</b>", "a man", "a girl", "a boy"]      # two shards of two
HELD_OUT = ["a king", "a queen", "a nun"]
TABLE = {   # version -> prompt -> scores of its four candidates
    "one": {prompt: [1, 2, 3, 4] for prompt in PROMPTS},
    "two": {PROMPTS[0]: [1, 2, 4, 3], PROMPTS[1]: [4, 3, 2, 1], PROMPTS[2]: [1, 2, 3, 4], PROMPTS[3]: [7, 7, 7, 7]},
}
RATES = {   # version -> (target, tuned) scores of the held-out prompts
    "one": [(1, 2), (3, 2), (1, 3)], "two": [(1, 0), (3, 2), (2, 2)]}


class Judge:
    """Scores by the table; the image's red is its location in the pool, its green the model that drew it."""

    name = "pickscore"

    def __init__(self, version):
        self.version, self.fingerprint = version, f"fingerprint of {version}"

    def score(self, images, prompts):
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            red, green, _ = image.getpixel((0, 0))
            found.append(TABLE[self.version][prompt][red] if prompt in PROMPTS
                         else RATES[self.version][HELD_OUT.index(prompt)][green])
        return torch.tensor(found, dtype=torch.float32)


def table_judge(loaded):
    """A scorer's module: the source is a version of the table. `loaded` takes the versions that were loaded."""
    def load(*, source, device, dtype):
        loaded.append(source)
        return Judge(source)

    def locate(source):
        if source not in TABLE:
            raise ModelError(f"scorer pickscore: {source} does not exist")
        return (f"fingerprint of {source}",)

    return SimpleNamespace(locate=locate, load=load, check=lambda source: None)


def image_bytes(location, model=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (location, model, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def draw(store, pool_id, prompts, candidates, *, model=0, shards=None, expected=None):
    """A hand-made pool with two prompts a shard; only `shards` of it are committed."""
    chunks = [prompts[i:i + 2] for i in range(0, len(prompts), 2)]
    folder = ShardFolder.create(store, f"pools/{pool_id}", {
        "stage": "pool", "images_per_prompt": candidates, "prompts_per_shard": 2, "expected": expected or {
            "shards": len(chunks), "rows": candidates * len(prompts)},
        "model": {"fingerprint": f"model {model}", "negative_prompt": "", "clip_skip": None, "lora": None}})
    for index in range(len(chunks)) if shards is None else shards:
        rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt, "index": j, "seed": j,
                 "image": image_bytes(j, model), "width": 4, "height": 4}
                for prompt in chunks[index] for j in range(candidates)]
        folder.commit(index, pa.Table.from_pylist(rows, schema=SCHEMA),
                      details={"prompt_ids": [prompt_id(prompt) for prompt in chunks[index]]})
    return folder
