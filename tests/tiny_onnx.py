"""ONNX files of a few nodes, written by hand: protobuf needs no library for that."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FLOAT, INT64 = 1, 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _attribute(name: str, value: int | float | Sequence[int]) -> bytes:
    if isinstance(value, int):
        return _bytes(1, name) + _number(3, value) + _number(20, 2)
    if isinstance(value, float):
        return _bytes(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)
    return _bytes(1, name) + b"".join(_number(8, item) for item in value) + _number(20, 7)


def node(operation: str, inputs: Sequence[str], output: str, **values: int | float | Sequence[int]) -> bytes:
    """A NodeProto with attributes that are whole numbers, lists of these, or fractions."""
    attributes = b"".join(_bytes(5, _attribute(name, value)) for name, value in values.items())
    return b"".join(_bytes(1, name) for name in inputs) + _bytes(2, output) + _bytes(4, operation) + attributes


def _tensor(name: str, array: np.ndarray) -> bytes:
    kind = FLOAT if array.dtype == np.float32 else INT64
    return (b"".join(_number(1, side) for side in array.shape) + _number(2, kind) + _bytes(8, name)
            + _bytes(9, array.tobytes()))


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    sides = b"".join(_bytes(1, _number(1, side) if isinstance(side, int) else _bytes(2, side)) for side in shape)
    return _bytes(1, name) + _bytes(2, _bytes(1, _number(1, FLOAT) + _bytes(2, sides)))


def save_graph(path: Path, nodes: Sequence[bytes], constants: dict[str, np.ndarray], shape: Sequence[int | str],
               outputs: int) -> Path:
    """A network from "data" of this shape to "fc1" [., outputs]."""
    graph = (b"".join(_bytes(1, each) for each in nodes) + _bytes(2, "g")
             + b"".join(_bytes(5, _tensor(name, array)) for name, array in constants.items())
             + _bytes(11, _value("data", shape)) + _bytes(12, _value("fc1", (shape[0], outputs))))
    path.write_bytes(_number(1, 8) + _bytes(7, graph) + _bytes(8, _bytes(1, "") + _number(2, 13)))
    return path


def save_recogniser(path: Path, *, outputs: int = 8, scales: bool = False, batch: int | str = "N",
                    seed: int = 0) -> np.ndarray:
    """A linear map of faces, with or without the scaling of pixels before it; returns the map [3 * 112 * 112, D]."""
    weight = np.random.default_rng(seed).normal(size=(3 * 112 * 112, outputs)).astype(np.float32)
    constants = {"weight": weight, "mean": np.float32([127.5]), "factor": np.float32([1 / 127.5])}
    scaling = [node("Sub", ["data", "mean"], "centred"), node("Mul", ["centred", "factor"], "scaled")] if scales else []
    nodes = [*scaling, node("Flatten", ["scaled" if scales else "data"], "flat", axis=1),
             node("MatMul", ["flat", "weight"], "fc1")]
    save_graph(path, nodes, constants if scales else {"weight": weight}, (batch, 3, 112, 112), outputs)
    return weight
