"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from atsnn.data.images import Dataset, ImageSet, stored
from atsnn.errors import DatasetError

SPLITS = {"train": "train", "test": "t10k"}
LARGEST = 4 * 2**30
"""Bytes that one file may hold, whatever its header claims."""
_UNSIGNED_BYTE = 0x08


def find(folder: Path, split: str, what: str) -> Path | None:
    """The file of a split (`train`, `test`) with `images` or `labels`, if it is there."""
    rank = 3 if what == "images" else 1
    for stem in (
        f"{SPLITS[split]}-{what}-idx{rank}-ubyte",
        f"{SPLITS[split]}-{what}.idx{rank}-ubyte",
    ):
        for name in (stem, f"{stem}.gz"):
            if (folder / name).is_file():
                return folder / name
    return None


def read(path: Path, rank: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes with `rank` dimensions.

    Raises:
        DatasetError: truncated, damaged, of another type or rank, or with bytes left over.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * rank)
            shape = _shape(path, header, rank)
            size = math.prod(shape)
            data = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    if len(data) != size:
        found = "more" if len(data) > size else len(data)
        raise DatasetError(f"{path}: damaged: its header promises {size} bytes, it holds {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, rank: int) -> tuple[int, ...]:
    if len(header) < 4 or header[:2] != b"\0\0":
        raise DatasetError(f"{path}: not an IDX file (its first four bytes are {header[:4].hex()})")
    if header[2] != _UNSIGNED_BYTE or header[3] != rank:
        raise DatasetError(
            f"{path}: an IDX file of type {header[2]:#04x} with {header[3]} dimensions; "
            f"needs type 0x08 (unsigned bytes) with {rank}"
        )
    if len(header) < 4 + 4 * rank:
        raise DatasetError(f"{path}: damaged: ends after {len(header)} bytes")
    shape = struct.unpack(f">{rank}I", header[4:])
    if math.prod(shape) > LARGEST:
        raise DatasetError(f"{path}: damaged: claims {math.prod(shape)} bytes, more than {LARGEST}")
    if not all(shape[1:]):
        raise DatasetError(f"{path}: damaged: its header promises images of {list(shape[1:])}")
    return shape


def load(folder: Path) -> Dataset:
    """Read train and test images (one channel) of an IDX folder."""
    train, test = (_split(folder, split) for split in SPLITS)
    highest = int(max(train.labels.max(), test.labels.max()))
    names = tuple(str(label) for label in range(highest + 1))
    return Dataset("idx", str(folder), train, test, names)


def _split(folder: Path, split: str) -> ImageSet:
    images, labels = (_need(folder, split, what) for what in ("images", "labels"))
    return stored(read(images, 3)[:, None], read(labels, 1), images)


def _need(folder: Path, split: str, what: str) -> Path:
    path = find(folder, split, what)
    if path is None:
        rank = 3 if what == "images" else 1
        raise DatasetError(
            f"{folder}: {SPLITS[split]}-{what}-idx{rank}-ubyte(.gz) is missing; put the four files "
            f"train-images, train-labels, t10k-images, t10k-labels there"
        )
    return path
