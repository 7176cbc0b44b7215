"""A stem whose convolutions are frozen, and a memory of the spikes that it fires.

The four convolutions and two pools in front of the position branch are more than half of the work
of training a small Spikformer. Where they keep their weights, what they fire depends on the image
alone: no gradient goes there, and runs that are shown the same images ask a file for the spikes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from atsnn.answers import Answers
from atsnn.config import ModelConfig
from atsnn.spikformer import Spikformer, Stem

STEM_FILE = "stem.sqlite"
FRONT = ("conv1", "conv2", "conv3", "conv4")
_SHAPING = ("steps", "tau", "v_threshold", "events", "stem_once")


class FrozenFront:
    """Spikes of the frozen part of a stem, as its training form wants them.

    Args:
        memory: folder whose file `stem.sqlite` keeps them, one bit each (see `atsnn.answers`).
    """

    def __init__(self, model: Spikformer, memory: Path | None) -> None:
        self.stem = stem_of(model)
        self.layers: list[nn.Module] = [getattr(self.stem, name) for name in FRONT]
        for layer in self.layers:
            layer.requires_grad_(False)
        self.digest = _digest(self.layers, model.config)
        self.shape = (self.stem.steps, *model.config.grid, model.config.dim)
        self.answers = Answers(memory and memory / STEM_FILE, "the frozen stem")

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W], or events [B, T, C, H, W] -> spikes [T, B, D, h, w]."""
        if self.answers.path is None:
            return _channels_first(self._fired(image))
        key = hashlib.sha256(self.digest + image.cpu().numpy().tobytes()).digest()
        bits = np.frombuffer(self.answers.remembered(key, lambda: self._packed(image)), np.uint8)
        steps, *place = self.shape
        rows = np.unpackbits(bits, count=steps * len(image) * int(np.prod(place)))
        spikes = torch.from_numpy(rows).view(steps, len(image), *place)
        return _channels_first(spikes.to(image.device, image.dtype))

    def _fired(self, image: Tensor) -> Tensor:
        """Spikes [T, B, h, w, D], contiguous: in one layout whether remembered or not, since sums
        behind them are taken in an order that depends on it.
        """
        for layer in self.layers:
            layer.eval()  # their normalisation is frozen as well, whatever the model's mode is
        return self.stem.front(image).permute(0, 1, 3, 4, 2).contiguous()

    def _packed(self, image: Tensor) -> bytes:
        return np.packbits(self._fired(image).cpu().numpy() > 0).tobytes()


def freeze_stem(model: Spikformer, memory: Path | None) -> None:
    """Freeze the convolutions in front of the position branch of a float or quantised model.

    Training then uses their spikes in inference; evaluation runs the layers themselves.

    Args:
        memory: folder that keeps the spikes for other runs, see `FrozenFront`; None: every batch
            is computed.
    """
    stem_of(model).frozen = FrozenFront(model, memory)


def stem_of(model: Spikformer) -> Stem:
    """The stem itself, of a float or a quantised model."""
    stem = model.stem.stem if model.quantized else model.stem
    assert isinstance(stem, Stem)
    return stem


def _channels_first(rows: Tensor) -> Tensor:
    return rows.permute(0, 1, 4, 2, 3)


def _digest(layers: list[nn.Module], config: ModelConfig) -> bytes:
    """Of all that determines the spikes for an input."""
    shaping = config.model_dump(mode="json", include=set(_SHAPING))
    found = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
    for layer in layers:
        found.update(type(layer).__name__.encode())
        for name, value in layer.state_dict().items():
            found.update(name.encode() + value.cpu().numpy().tobytes())
    return found.digest()
