"""Training runs that take about a second, and data files in their published formats."""

from __future__ import annotations

import gzip
import pickle
import struct
import subprocess
import sys
import zipfile
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from atsnn.config import RunConfig, merged, parse
from atsnn.data import Dataset, StoredImages
from atsnn.training import train

TINY: dict[str, Any] = {
    "model": {
        "in_channels": 1,
        "image_size": [8, 8],
        "classes": 3,
        "steps": 2,
        "blocks": 1,
        "dim": 8,
        "heads": 1,
        "halting": {"enabled": True, "learn": True},
    },
    "augment": {"shift": 1, "flip": True, "mixup": 0.5},
    "train": {
        "epochs": 2,
        "batch": 8,
        "lr": 0.003,
        "warmup_epochs": 0.5,
        "checkpoint_steps": 2,
        "gate_weight": 0.1,
        "threads": 1,
    },
}
STEPS_PER_EPOCH = 5


def tiny_config(**changes: Any) -> RunConfig:
    """`TINY` with nested changes."""
    return parse(RunConfig, merged(TINY, changes), "tiny")


def tiny_dataset(size: int = 8, images: int = 8 * STEPS_PER_EPOCH, seed: int = 0) -> Dataset:
    """Three classes that differ in which third of the image is bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, images)
    pixels = rng.integers(0, 60, (images, 1, size, size), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[0, :, label * size // 3 : (label + 1) * size // 3] += 190
    split = StoredImages(torch.from_numpy(pixels), torch.from_numpy(labels))
    return Dataset("tiny", "memory", split, split.first(16), ("left", "middle", "right"))


def run_tiny(folder: Path, config: RunConfig | None = None, **options: Any) -> Path:
    """Train the tiny configuration on the tiny data set, silently."""
    quiet = Console(file=StringIO())
    return train(config or tiny_config(), tiny_dataset(), folder, console=quiet, **options)


def run_python(script: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess:
    """Run a script in an interpreter of its own, with the test builders importable."""
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r})\n{script}"]
        + [str(a) for a in arguments],
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


def idx_bytes(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, train: int = 6, test: int = 4, size: int = 8) -> None:
    """An IDX folder; pixel values and labels count up."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        images = np.arange(count * size * size).reshape(count, size, size) % 256
        labels = np.arange(count) % 3
        packed = gzip.compress(idx_bytes(images))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(packed)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))


def cifar_rows(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 3072]."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_cifar10_python(folder: Path, count: int = 4, protocol: int = 2) -> None:
    """The python version of CIFAR-10 as published, with `count` images per batch."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {
            b"batch_label": b"training batch",
            b"labels": [int(i) % 10 for i in range(count)],
            b"data": cifar_rows(count, index),
            b"filenames": [f"image_{i}.png".encode() for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    names = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))


def write_cifar10_binary(folder: Path, count: int = 4) -> None:
    """The binary version of CIFAR-10 as published."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.arange(count, dtype=np.uint8)[:, None] % 10
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = np.concatenate([labels, cifar_rows(count, index)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def png(value: int, size: int = 8, mode: str = "RGB") -> bytes:
    """A square image of one colour."""
    stream = BytesIO()
    Image.new(mode, (size, size), value if mode == "L" else (value, value, value)).save(
        stream, "PNG"
    )
    return stream.getvalue()


def class_folder_files(size: int = 8) -> dict[str, bytes]:
    """`train/<class>` and `test/<class>` with two classes; the colour tells the image."""
    return {
        "train/cat/1.png": png(10, size),
        "train/cat/2.png": png(20, size),
        "train/dog/1.png": png(30, size),
        "test/cat/1.png": png(40, size),
        "test/dog/1.png": png(50, size),
    }


def tiny_imagenet_files() -> dict[str, bytes]:
    """TinyImageNet's own layout with two classes."""
    return {
        "wnids.txt": b"n02\nn01\n",
        "train/n01/images/n01_0.JPEG": png(10),
        "train/n01/n01_boxes.txt": b"n01_0.JPEG\t0\t0\t7\t7\n",
        "train/n02/images/n02_0.JPEG": png(20),
        "val/images/val_0.JPEG": png(30),
        "val/images/val_1.JPEG": png(40),
        "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t7\t7\nval_1.JPEG\tn01\t0\t0\t7\t7\n",
        "test/images/test_0.JPEG": png(99),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Files below a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes], top: str = "") -> Path:
    """The same in a zip archive, below one folder `top`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)
    return path
