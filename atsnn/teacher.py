"""The model that training holds another one to, and a memory of what it answered.

Batches depend on seed, epoch and step alone, so that the cells of a sweep with one seed, and the
stages of one run, show the teacher the same images again: its answers are kept by the images' own
digest, and asking again costs no forward pass.
"""

from __future__ import annotations

import hashlib
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from atsnn.checkpoint import model_of, read_checkpoint
from atsnn.config import TrainConfig
from atsnn.errors import ConfigError

TEACHER_FILE = "teacher.sqlite"
WAIT_FOR_OTHERS = 60.0
"""Seconds in which another process has to finish writing an answer."""


class Teacher:
    """Logits of the checkpoint in `train.initial`.

    Args:
        memory: file that keeps its answers, 4 bytes for each image and class; several processes may
            use it at once. None, or a file that cannot be used (which is said once): every batch is
            computed.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(self, checkpoint: Path, memory: Path | None, device: torch.device) -> None:
        self.model = model_of(read_checkpoint(checkpoint)).to(device)
        self.digest = hashlib.sha256(checkpoint.read_bytes()).digest()
        self.memory = memory

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as the trained model takes them -> logits [B, classes]."""
        if self.memory is None:
            return self.model(images).logits
        try:
            return self._remembered(images, self.memory)
        except (sqlite3.Error, OSError) as error:
            warnings.warn(
                f"{self.memory}: the teacher's answers are not kept ({error}), which costs a "
                "forward pass for each batch; delete the file",
                stacklevel=2,
            )
            self.memory = None
            return self.model(images).logits

    def _remembered(self, images: Tensor, memory: Path) -> Tensor:
        key = hashlib.sha256(self.digest + images.cpu().numpy().tobytes()).digest()
        with _answers(memory) as answers:
            row = answers.execute("SELECT logits FROM answers WHERE key = ?", (key,)).fetchone()
        if row is not None:
            known = torch.frombuffer(bytearray(row[0]), dtype=torch.float32)
            return known.view(len(images), -1).to(images.device)
        logits = self.model(images).logits.float()
        values = logits.cpu().numpy().tobytes()
        with _answers(memory) as answers:
            answers.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, values))
        return logits


@contextmanager
def _answers(path: Path) -> Iterator[sqlite3.Connection]:
    """The table of answers; what is written to it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=WAIT_FOR_OTHERS)
    try:
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, logits BLOB)"
            )
            yield connection
    finally:
        connection.close()


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
