"""Image sets: labelled uint8 images that a training loop asks for by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from atsnn.errors import DatasetError

CACHE_LIMIT = 4 * 2**30
"""Decoded images are kept in memory when the whole set takes at most so many bytes."""


class ImageSet(Protocol):
    """Labelled images of one size."""

    labels: Tensor
    """int64 [images]."""
    shape: tuple[int, int, int]
    """Channels, height, width."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """Images at `indices` (int64 [B]) as uint8 [B, C, H, W]."""
        ...

    def first(self, count: int) -> ImageSet:
        """The first `count` images (all, if there are fewer)."""
        ...


class StoredImages:
    """Images held as one tensor.

    Args:
        images: uint8 [images, C, H, W], or events over T steps (0 or 255) [images, T, C, H, W].
        labels: int64 [images].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.shape = (images.shape[-3], images.shape[-2], images.shape[-1])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def first(self, count: int) -> StoredImages:
        return StoredImages(self.images[:count], self.labels[:count])


class DecodedImages:
    """Images decoded from files when they are first asked for, and kept if memory allows.

    Args:
        decode: index -> uint8 array [C, H, W].
        labels: int64 [images].
        shape: channels, height, width of every image.
    """

    def __init__(
        self,
        decode: Callable[[int], np.ndarray],
        labels: Tensor,
        shape: tuple[int, int, int],
    ) -> None:
        self._decode = decode
        self.labels = labels
        self.shape = shape
        size = len(labels) * int(np.prod(shape))
        # np.empty takes address space only; pages come into being as images are decoded.
        self._kept = np.empty((len(labels), *shape), np.uint8) if size <= CACHE_LIMIT else None
        self._known = np.zeros(len(labels), np.bool_)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        wanted = indices.numpy()
        if self._kept is None:
            return torch.from_numpy(np.stack([self._decode(int(i)) for i in wanted]))
        for i in wanted[~self._known[wanted]]:
            self._kept[i] = self._decode(int(i))
            self._known[i] = True
        return torch.from_numpy(self._kept[wanted])

    def first(self, count: int) -> DecodedImages:
        return DecodedImages(self._decode, self.labels[:count], self.shape)


class ChosenImages:
    """Some images of a set, in the order of `indices` (int64 [images])."""

    def __init__(self, images: ImageSet, indices: Tensor) -> None:
        self._images = images
        self._indices = indices
        self.labels = images.labels[indices]
        self.shape = images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> Tensor:
        return self._images.batch(self._indices[indices])

    def first(self, count: int) -> ChosenImages:
        return ChosenImages(self._images, self._indices[:count])


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one source.

    Attributes:
        format: layout that was read (`idx`, `cifar10`, ...).
        location: folder, archive or `built in`.
        classes: class names in the order of the labels.
        validation: training images held out for every choice that is made; None: there are none.
    """

    format: str
    location: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    validation: ImageSet | None = None

    @property
    def watched(self) -> tuple[str, ImageSet]:
        """The images that training looks at after each epoch, and what to call them."""
        return ("test", self.test) if self.validation is None else ("validation", self.validation)


def stored(images: np.ndarray, labels: Sequence[int] | np.ndarray, origin: Path | str) -> ImageSet:
    """Check counts and make a `StoredImages` of uint8 [N, C, H, W] and N labels.

    Raises:
        DatasetError: no images, or another number of labels than of images.
    """
    values = np.asarray(labels, np.int64)
    if len(images) != len(values):
        raise DatasetError(f"{origin}: {len(images)} images but {len(values)} labels")
    if not len(images):
        raise DatasetError(f"{origin}: holds no images")
    own = np.require(images, np.uint8, ["C", "W", "O"])
    return StoredImages(torch.from_numpy(own), torch.from_numpy(values))
