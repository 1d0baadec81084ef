"""Files of a checkpoint, each with its digest, and float32 tensors in them.

Tensors are in safetensors files, which other programs read. Here they are written without ever being in
memory as a whole, and a piece of one is read without the rest.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import xxhash

from rlhf_dist.errors import StorageError
from rlhf_dist.types import FileDigest

ITEM_BYTES = 4
"""Of a float32."""
HEADER_ALIGNMENT_BYTES = 8
"""What safetensors pads its header to."""
READ_BYTES = 8 * 1024 * 1024
"""Read at once to digest a file."""

Shapes = Mapping[str, tuple[int, ...]]


class FolderWriter:
    """Writes the files of a folder, digests them on the way, and has them on disk.

    After the first failure it writes nothing more, so that its rank still takes part in the collectives that
    the data come from; `finish` raises.
    """

    def __init__(self, folder: Path | None) -> None:
        """Write into an existing folder. None: on a rank that writes nothing."""
        self._folder = folder
        self._digests: dict[str, FileDigest] = {}
        self._error: OSError | None = None

    def write(self, name: str, pieces: Iterable[memoryview | bytes]) -> None:
        """A file from its bytes, piece by piece; the pieces are drawn to the end in any case."""
        drawn = iter(pieces)
        if self._folder is not None and self._error is None:
            try:
                with _synced(self._folder, name) as file:
                    hasher, num_bytes = xxhash.xxh3_128(), 0
                    for piece in drawn:
                        file.write(piece)
                        hasher.update(piece)
                        num_bytes += len(piece)
                self._digests[name] = FileDigest(num_bytes, hasher.hexdigest())
            except OSError as error:
                self._error = error
        for _ in drawn:
            pass

    def write_json(self, name: str, value: object) -> None:
        """A file with a JSON value."""
        self.write(name, [(json.dumps(value, indent=2) + "\n").encode()])

    def write_tensors(self, name: str, shapes: Shapes, flat: Iterable[torch.Tensor]) -> None:
        """A safetensors file of float32 tensors.

        Args:
            shapes: by name.
            flat: the elements of all of them in that order, float32, on the CPU, in pieces of any size.
        """
        self.write(name, _tensor_file(shapes, flat))

    def finish(self) -> dict[str, FileDigest]:
        """What was written, by the path in the folder.

        Raises:
            StorageError: a file could not be written.
        """
        if self._error is not None:
            raise StorageError(
                f"{self._error.filename or self._folder} cannot be written ({self._error.strerror})"
            ) from self._error
        return self._digests


class TensorFile:
    """A safetensors file of float32 tensors, of which pieces can be read."""

    def __init__(self, path: Path) -> None:
        """Read its header.

        Raises:
            OSError, ValueError: it is not there, or is no such file.
        """
        self._path = path
        with path.open("rb") as file:
            num_header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(num_header_bytes))
        header.pop("__metadata__", None)
        self._begin = {
            name: 8 + num_header_bytes + entry["data_offsets"][0] for name, entry in header.items()
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(entry["shape"]) for name, entry in header.items()
        }

    def read(self, name: str, start: int, length: int) -> torch.Tensor:
        """`length` elements of a flattened tensor, from `start` on.

        Raises:
            ValueError: the file ends before.
        """
        offset = self._begin[name] + start * ITEM_BYTES
        read = np.fromfile(self._path, dtype=np.float32, count=length, offset=offset)
        if len(read) != length:
            raise ValueError(f"{self._path} ends within tensor {name}")
        return torch.from_numpy(read)


def digest_of(path: Path) -> FileDigest:
    """Of a file as it is on disk."""
    hasher, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            hasher.update(piece)
            num_bytes += len(piece)
    return FileDigest(num_bytes, hasher.hexdigest())


def _tensor_file(shapes: Shapes, flat: Iterable[torch.Tensor]) -> Iterator[memoryview | bytes]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    yield len(text).to_bytes(8, "little") + text
    for piece in flat:
        yield memoryview(piece.numpy()).cast("B")


@contextmanager
def _synced(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A new file, in a new folder of the folder where its name has one; on disk when the block ends."""
    path = folder / name
    if path.parent != folder:
        path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
