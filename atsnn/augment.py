"""Augmentation of training batches. Every draw is a function of (seed, epoch, step)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from atsnn.config import AugmentConfig

LEVELS = 11
"""Strengths of RandAugment, 0 to 10, as in the published recipe's m9."""


@dataclass(frozen=True)
class Batch:
    """Augmented images and what they show.

    Attributes:
        images: uint8 [B, C, H, W].
        targets: float32 [B, classes], rows sum to 1.
        labels: int64 [B], the stronger of two mixed labels.
    """

    images: Tensor
    targets: Tensor
    labels: Tensor


def derived_seed(*values: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0]) >> 1


class Augmentation:
    """Random shift, flip, RandAugment, erasing and mixup as configured.

    Args:
        config: what to do. classes: number of classes. smoothing: label smoothing.
        seed: of the run.
    """

    def __init__(self, config: AugmentConfig, classes: int, smoothing: float, seed: int) -> None:
        self.config = config
        self.classes = classes
        self.smoothing = smoothing
        self.seed = seed
        self._each = self._per_image()

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Batch:
        """Augment uint8 images [B, C, H, W] or events [B, T, C, H, W].

        The global random state is left as it was.
        """
        targets = self._targets(labels)
        if images.dim() == 5:  # events: all steps and polarities of a recording move together
            batch = self(images.flatten(1, 2), labels, epoch, step)
            whole = batch.images.unflatten(1, images.shape[1:3])
            return Batch(whole, batch.targets, batch.labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, epoch, step))
            if self.config.shift:
                images = random_shift(images, self.config.shift)
            if self.config.flip:
                images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
            for transform in self._each:
                images = torch.stack([transform(image) for image in images])
            if self._mixes(epoch):
                share = derived_beta(self.config.mixup, self.seed, epoch, step)
                images = mix(images, share)
                targets = share * targets + (1 - share) * targets.flip(0)
        return Batch(images, targets, targets.argmax(1))

    def _mixes(self, epoch: int) -> bool:
        last = self.config.mixup_epochs
        return self.config.mixup > 0 and (last is None or epoch < last)

    def _targets(self, labels: Tensor) -> Tensor:
        one_hot = functional.one_hot(labels, self.classes).float()
        return one_hot * (1 - self.smoothing) + self.smoothing / self.classes

    def _per_image(self) -> list[v2.Transform]:
        config, each = self.config, []
        if config.randaugment:
            each.append(
                v2.RandAugment(config.randaugment, config.magnitude, num_magnitude_bins=LEVELS)
            )
        if config.random_erase:
            each.append(v2.RandomErasing(config.random_erase))
        return each


def random_shift(images: Tensor, reach: int) -> Tensor:
    """Move each image by up to `reach` pixels in both directions; what comes in is 0."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (reach, reach, reach, reach)).permute(0, 2, 3, 1)
    rows = torch.randint(0, 2 * reach + 1, (count, 1)) + torch.arange(height)
    columns = torch.randint(0, 2 * reach + 1, (count, 1)) + torch.arange(width)
    index = torch.arange(count)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def mix(images: Tensor, share: float) -> Tensor:
    """Mix each image with its counterpart in the reversed batch, rounded to whole pixels values."""
    mixed = share * images.float() + (1 - share) * images.flip(0).float()
    return mixed.round_().to(torch.uint8)


def derived_beta(parameter: float, *seed: int) -> float:
    """A draw of Beta(parameter, parameter) that depends on the seed alone."""
    return float(np.random.default_rng(seed).beta(parameter, parameter))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Permutation of the training images, int64 [count], for one epoch (counted from 0)."""
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(count, generator=generator)


def to_input(images: Tensor, bits: int) -> Tensor:
    """uint8 pixels to the reals of the upper `bits` bits, `value / (2^bits - 1)` in [0, 1]."""
    return (images >> (8 - bits)).float().div_(2**bits - 1)
