"""Weight files of any size that take no room: a header, and zeros that the disk does not hold."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_header(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """A .safetensors file of float16 tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path
