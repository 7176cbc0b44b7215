"""The model that training holds another one to, and a memory of what it answered."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from atsnn.answers import Answers
from atsnn.checkpoint import model_of, read_checkpoint
from atsnn.config import TrainConfig
from atsnn.errors import ConfigError

TEACHER_FILE = "teacher.sqlite"


class Teacher:
    """Logits of the checkpoint in `train.initial`.

    Args:
        memory: folder whose file `teacher.sqlite` keeps its answers, 4 bytes for each image and
            class (see `atsnn.answers`); None: every batch is computed.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(self, checkpoint: Path, memory: Path | None, device: torch.device) -> None:
        self.model = model_of(read_checkpoint(checkpoint)).to(device)
        self.digest = hashlib.sha256(checkpoint.read_bytes()).digest()
        self.answers = Answers(memory and memory / TEACHER_FILE, "the teacher")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as the trained model takes them -> logits [B, classes]."""
        if self.answers.path is None:
            return self.model(images).logits
        key = hashlib.sha256(self.digest + images.cpu().numpy().tobytes()).digest()
        answer = self.answers.remembered(
            key, lambda: self.model(images).logits.float().cpu().numpy().tobytes()
        )
        logits = torch.frombuffer(bytearray(answer), dtype=torch.float32)
        return logits.view(len(images), -1).to(images.device)


def teacher_of(config: TrainConfig, memory: Path | None, device: torch.device) -> Teacher | None:
    """The model whose class probabilities the trained one is held to, if any.

    Raises:
        ConfigError: it is wanted, but there is no checkpoint to start from.
    """
    if not config.distill_weight:
        return None
    if config.initial is None:
        raise ConfigError(
            f"train.distill_weight is {config.distill_weight}, but there is no teacher: set "
            "train.initial to the checkpoint that training starts from, which is the teacher too"
        )
    return Teacher(Path(config.initial), memory, device)
