"""Find out what a data folder holds, read it, and check that it fits the model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as transforms

from atsnn.config import DataConfig, ModelConfig
from atsnn.data import cifar, digits, folders, idx, recordings
from atsnn.data.images import ChosenImages, Dataset, ImageSet, StoredImages
from atsnn.errors import DatasetError

BUILT_IN = "digits"
_SPLIT_SEED = 0
_KNOWN = (
    "IDX files (train-images-idx3-ubyte.gz ...), CIFAR-10 or CIFAR-100 as published (binary or "
    "python version, unpacked), class folders train/<class>/ and test/<class>/ (directory or zip), "
    "TinyImageNet as published, N-MNIST (.bin or .bs2 recordings)"
)


def detect(location: Path) -> str:
    """Format of a data folder or archive: a value of `data.format`.

    Raises:
        DatasetError: nothing there, or nothing known; says what can be put there.
    """
    if not location.exists():
        raise DatasetError(f"{location}: no such data folder; put one of these there: {_KNOWN}")
    if location.is_dir():
        if any(idx.find(location, split, "images") for split in idx.SPLITS):
            return "idx"
        found = cifar.find(location)
        if found:
            return found[0].format
    names = folders.open_files(location).names()
    format = folders.layout(names) or recordings.layout(names)
    if format is None:
        raise DatasetError(f"{location}: holds no data set that is known here: {_KNOWN}")
    return format


def load_dataset(location: Path | str | None, data: DataConfig, model: ModelConfig) -> Dataset:
    """Read a data set for a model.

    Args:
        location: data folder or zip; `digits` or None (with data.format `digits`): built in.

    Returns:
        Images of the model's size; image files are decoded when they are first used.

    Raises:
        DatasetError: missing, damaged, empty, or of another size, depth or number of classes.
    """
    dataset = _read(location, data, model)
    _check_kind(dataset, data, model)
    if data.resize:
        size = model.image_size
        dataset = replace(
            dataset, train=_resized(dataset.train, size), test=_resized(dataset.test, size)
        )
    _check_fit(dataset, model)
    if data.validation_images:
        dataset = _hold_out(dataset, data.validation_images)
    if data.train_images:
        dataset = replace(dataset, train=dataset.train.first(data.train_images))
    if data.test_images:
        dataset = replace(dataset, test=dataset.test.first(data.test_images))
    return dataset


def _read(location: Path | str | None, data: DataConfig, model: ModelConfig) -> Dataset:
    if is_built_in(location, data):
        return digits.load()
    if location is None:
        raise DatasetError(f"no data folder given; it may hold: {_KNOWN}")
    path = Path(location)
    named = data.format if data.format not in ("auto", BUILT_IN) and path.exists() else None
    format = named or detect(path)
    if format == "idx":
        return idx.load(path)
    if format in ("cifar10", "cifar100"):
        return cifar.load(path, format)
    if format == "nmnist":
        return recordings.load(path, model.steps, data.time == "collapsed")
    return folders.load(path, format, (model.in_channels, *model.image_size), data.resize)


def is_built_in(location: Path | str | None, data: DataConfig) -> bool:
    """True if scikit-learn's digits are meant, which need no folder."""
    named = str(location) == BUILT_IN and not Path(BUILT_IN).exists()
    return named or (location is None and data.format == BUILT_IN)


def _hold_out(dataset: Dataset, count: int) -> Dataset:
    """Move `count` training images to the validation set, drawn alike in every run."""
    available = len(dataset.train)
    if count >= available:
        raise DatasetError(
            f"{dataset.location}: {count} validation images of {available} training images leave "
            "none to train on; lower data.validation_images"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held, rest = order[:count].sort().values, order[count:].sort().values
    return replace(
        dataset,
        train=ChosenImages(dataset.train, rest),
        validation=ChosenImages(dataset.train, held),
    )


def _resized(images: ImageSet, size: tuple[int, int]) -> ImageSet:
    if not isinstance(images, StoredImages) or images.shape[1:] == size:
        return images
    parts = [transforms.resize(part, list(size)) for part in images.images.split(4096)]
    return StoredImages(torch.cat(parts), images.labels)


def _check_kind(dataset: Dataset, data: DataConfig, model: ModelConfig) -> None:
    events = dataset.format == "nmnist"
    if events != model.events:
        raise DatasetError(
            f"{dataset.location}: holds {'events' if events else 'images'}, the model takes "
            f"{'events' if model.events else 'images'}; give other data, or a model trained with "
            f"model.events: {str(events).lower()}"
        )
    if events and data.resize:
        raise DatasetError(
            f"{dataset.location}: events are not scaled; set model.image_size to "
            f"{list(dataset.train.shape[1:])} and data.resize to false"
        )


def _check_fit(dataset: Dataset, model: ModelConfig) -> None:
    for split, images in (("train", dataset.train), ("test", dataset.test)):
        channels, height, width = images.shape
        if channels != model.in_channels:
            raise DatasetError(
                f"{dataset.location}: {split} images have {channels} channels; the model takes "
                f"{model.in_channels} (model.in_channels)"
            )
        if (height, width) != model.image_size:
            raise DatasetError(
                f"{dataset.location}: {split} images are {height} x {width}; the model takes "
                f"{model.image_size[0]} x {model.image_size[1]} ({folders.SCALES})"
            )
        highest = int(images.labels.max())
        if highest >= model.classes:
            raise DatasetError(
                f"{dataset.location}: {split} labels run to {highest}; the model has "
                f"{model.classes} classes (model.classes)"
            )


def describe(location: Path | str) -> dict[str, str | int | list[str]]:
    """What a data folder holds: format, place, numbers of images, their size, and the classes."""
    if is_built_in(location, DataConfig()):
        dataset = digits.load()
    else:
        path = Path(location)
        format = detect(path)
        if format == "idx":
            dataset = idx.load(path)
        elif format in ("cifar10", "cifar100"):
            dataset = cifar.load(path, format)
        elif format == "nmnist":
            dataset = recordings.load(path, steps=1, collapsed=False)
        else:
            dataset = folders.load(path, format, folders.first_shape(path), resize=False)
    channels, height, width = dataset.train.shape
    return {
        "format": dataset.format,
        "location": dataset.location,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "channels": channels,
        "size": f"{height} x {width}",
        "classes": list(dataset.classes),
    }


def fingerprint(images: ImageSet) -> str:
    """Short digest of labels and first images: tells a resumed run that its data changed."""
    digest = hashlib.sha256(images.labels.numpy().tobytes())
    digest.update(images.batch(torch.arange(min(64, len(images)))).numpy().tobytes())
    return f"{len(images)} images, {digest.hexdigest()[:16]}"
