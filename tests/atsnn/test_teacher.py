"""The teacher of a training run: what it remembers changes nothing but the time."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spikformers import lively, pixels
from tiny_runs import run_tiny, tiny_config

from atsnn.checkpoint import load_model, save_checkpoint
from atsnn.spikformer import Spikformer
from atsnn.teacher import TEACHER_FILE, Teacher

CONFIG = tiny_config(model={"halting": {"enabled": False}}).model
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "start" / "model.safetensors", lively(CONFIG), CONFIG)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the forward passes of plain models in inference."""
    found: list[int] = []
    forward = Spikformer.forward

    def counted(model: Spikformer, image: torch.Tensor):
        if not model.training:
            found.append(len(image))
        return forward(model, image)

    monkeypatch.setattr(Spikformer, "forward", counted)
    return found


def test_an_answer_is_computed_once_for_all_that_share_the_file(tmp_path, checkpoint, passes):
    first, second = pixels(CONFIG, 3), pixels(CONFIG, 5)
    expected = load_model(checkpoint)(first).logits
    passes.clear()
    for _ in range(2):
        teacher = Teacher(checkpoint, tmp_path / "sweep", CPU)
        for _ in range(2):
            assert torch.equal(teacher(first), expected)
            assert teacher(second).shape == (5, CONFIG.classes)
    assert passes == [3, 5]


def test_another_teacher_answers_for_itself(tmp_path, checkpoint):
    other = lively(CONFIG)
    with torch.no_grad():
        other.readout.head.bias += 1.0
    other_checkpoint = save_checkpoint(tmp_path / "other" / "model.safetensors", other, CONFIG)
    memory, image = tmp_path, pixels(CONFIG, 2)
    one = Teacher(checkpoint, memory, CPU)(image)
    assert not torch.equal(Teacher(other_checkpoint, memory, CPU)(image), one)


def test_a_file_that_cannot_be_used_costs_time_only(tmp_path, checkpoint):
    memory, image = tmp_path / TEACHER_FILE, pixels(CONFIG, 2)
    memory.write_bytes(b"not a database, but as long as the head of one" * 4)
    teacher = Teacher(checkpoint, tmp_path, CPU)
    with pytest.warns(UserWarning, match=r"the teacher are not kept .*; delete the file"):
        answer = teacher(image)
    assert torch.equal(answer, load_model(checkpoint)(image).logits)
    assert torch.equal(teacher(image), answer)


def test_training_with_a_memory_ends_in_the_same_bits(tmp_path, checkpoint, passes):
    config = tiny_config(
        model={"halting": {"enabled": False}},
        train={"initial": str(checkpoint), "distill_weight": 0.5, "epochs": 1},
        stages=({"name": "float"}, {"name": "quantized", "train": {"quantized": True}}),
    )
    plain = run_tiny(tmp_path / "plain", config)
    without = len(passes)
    memory = tmp_path / "memory"
    for name in ("filling", "filled"):
        passes.clear()
        remembering = run_tiny(tmp_path / name, config, memory=memory)
        torch.testing.assert_close(load_file(remembering), load_file(plain), rtol=0, atol=0)
        assert len(passes) < without
    with sqlite3.connect(memory / TEACHER_FILE) as connection:
        (answers,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    assert answers > 0
    assert without - len(passes) == 2 * answers  # both stages show the same batches
