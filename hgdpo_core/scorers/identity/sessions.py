"""ONNX networks on the CPU, by onnxruntime, which is an optional part of the installation."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgdpo_core.errors import ConfigError, ModelError, first_line

GRAPH, NODE, OPERATION = 7, 1, 4
"""Field numbers of ONNX's ModelProto.graph, GraphProto.node and NodeProto.op_type."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Kinds of protobuf fields."""


def require_onnxruntime() -> Any:
    """The module; ConfigError, in one line, where it is not installed."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError:
        raise ConfigError("faces are found and compared by onnxruntime, which is not installed: pip install "
                          "'hgdpo[faces]'") from None


def open_session(path: Path) -> Any:
    """An inference session of one thread: images are prepared side by side. ModelError where it is no ONNX network."""
    onnxruntime = require_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own families of errors, one for each stage of loading
        raise ModelError(f"{path} does not load as an ONNX network: {first_line(error)}; get it again") from None


def first_operations(data: bytes, count: int) -> list[str]:
    """Types of the first nodes of an ONNX file's graph; [] where it has none. Only what leads there is parsed."""
    graph = next((value for field, value in _fields(data) if field == GRAPH), b"")
    names = []
    for field, value in _fields(graph):
        if field == NODE:
            names += [name.decode() for number, name in _fields(value) if number == OPERATION]
            if len(names) == count:
                break
    return names


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each protobuf field that holds bytes; others are skipped, as is what is cut off."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, kind = key >> 3, key & 7
        if kind == BYTES:
            length, position = _varint(data, position)
            yield field, data[position:position + length]
            position += length
        elif kind == VARINT:
            _, position = _varint(data, position)
        elif kind in (FIXED32, FIXED64):
            position += 4 if kind == FIXED32 else 8
        else:
            return


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        value, shift, position = value | (byte & 0x7F) << shift, shift + 7, position + 1
        if byte < 0x80:
            break
    return value, position
