"""CIFAR-10 and CIFAR-100 in the files they are published in: binary batches or python batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atsnn.data import plain_pickle
from atsnn.data.images import Dataset, ImageSet, stored
from atsnn.errors import DatasetError

PIXELS = 3 * 32 * 32
_ROW = (3, 32, 32)


@dataclass(frozen=True)
class Layout:
    """File names and label fields of one published version.

    Attributes:
        folder: its name as unpacked. names: file with the class names, key of them in it.
        label: key of the labels (python), and byte of the label in a row of `label_bytes` (binary).
    """

    format: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    names_key: bytes
    label: bytes
    label_bytes: int
    classes: int

    @property
    def binary(self) -> bool:
        return self.test.endswith(".bin")


_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = (
    Layout("cifar10", "cifar-10-batches-py", _FIVE, "test_batch", "batches.meta", b"label_names",
           b"labels", 1, 10),
    Layout("cifar10", "cifar-10-batches-bin", tuple(f"{n}.bin" for n in _FIVE), "test_batch.bin",
           "batches.meta.txt", b"", b"", 1, 10),
    Layout("cifar100", "cifar-100-python", ("train",), "test", "meta", b"fine_label_names",
           b"fine_labels", 2, 100),
    Layout("cifar100", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", b"",
           b"", 2, 100),
)  # fmt: skip


def find(folder: Path, format: str | None = None) -> tuple[Layout, Path] | None:
    """The layout in `folder`, or in the folder inside it that has the published name."""
    for layout in LAYOUTS:
        for place in (folder, folder / layout.folder):
            if (place / layout.test).is_file() and format in (None, layout.format):
                return layout, place
    return None


def load(folder: Path, format: str) -> Dataset:
    """Read `cifar10` or `cifar100`, whichever of the published versions is there."""
    found = find(folder, format)
    if found is None:
        folders = " or ".join(x.folder for x in LAYOUTS if x.format == format)
        raise DatasetError(
            f"{folder}: no {format} there; unpack the published archive, so that it holds {folders}"
        )
    layout, place = found
    train = _join([_read(place / name, layout) for name in layout.train], place)
    test = _join([_read(place / layout.test, layout)], place / layout.test)
    return Dataset(format, str(place), train, test, _class_names(place, layout))


def _join(parts: list[tuple[np.ndarray, np.ndarray]], origin: Path) -> ImageSet:
    images = np.concatenate([images for images, _ in parts])
    return stored(images, np.concatenate([labels for _, labels in parts]), origin)


def _read(path: Path, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    data = _bytes(path)
    images, labels = _binary(path, data, layout) if layout.binary else _python(path, data, layout)
    if labels and not 0 <= min(labels) <= max(labels) < layout.classes:
        raise DatasetError(
            f"{path}: labels run from {min(labels)} to {max(labels)}; "
            f"{layout.format} has 0 to {layout.classes - 1}"
        )
    return images, np.array(labels, np.int64)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: unpack the published archive again") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None


def _binary(path: Path, data: bytes, layout: Layout) -> tuple[np.ndarray, list[int]]:
    row = layout.label_bytes + PIXELS
    if not data or len(data) % row:
        raise DatasetError(
            f"{path}: damaged: {len(data)} bytes are no whole number of {row}-byte rows"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, row)
    labels = rows[:, layout.label_bytes - 1].tolist()
    return rows[:, layout.label_bytes :].reshape(-1, *_ROW), labels


def _python(path: Path, data: bytes, layout: Layout) -> tuple[np.ndarray, list[int]]:
    values = _plain(path, data)
    images, labels = values.get(b"data"), values.get(layout.label)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != PIXELS:
        raise DatasetError(f"{path}: damaged: needs an array data of N x {PIXELS} bytes")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise DatasetError(f"{path}: damaged: needs a list {layout.label.decode()} of integers")
    if len(labels) != len(images):
        raise DatasetError(f"{path}: {len(images)} images but {len(labels)} labels")
    return images.reshape(-1, *_ROW), labels


def _plain(path: Path, data: bytes) -> dict[bytes, Any]:
    try:
        values = plain_pickle.loads(data)
    except plain_pickle.PlainPickleError as error:
        raise DatasetError(f"{path}: not a CIFAR batch: {error}") from None
    return {k.encode(errors="replace") if isinstance(k, str) else k: v for k, v in values.items()}


def _class_names(place: Path, layout: Layout) -> tuple[str, ...]:
    """Names from the meta file; class numbers where it is missing (it is not needed to train)."""
    path = place / layout.names
    if not path.is_file():
        return tuple(str(i) for i in range(layout.classes))
    if layout.binary:
        names = _bytes(path).decode("utf-8", "replace").split()
    else:
        names = _listed_names(_plain(path, _bytes(path)).get(layout.names_key))
    if len(names) != layout.classes:
        raise DatasetError(
            f"{path}: {len(names)} class names; {layout.format} has {layout.classes}"
        )
    return tuple(names)


def _listed_names(listed: Any) -> list[str]:
    names = listed if isinstance(listed, list) else []
    decoded = [n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names]
    return [name for name in decoded if isinstance(name, str)]
