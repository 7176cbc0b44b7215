"""A frozen stem: nothing in front of the position branch is trained; its memory saves time only."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spikformers import lively, pixels
from tiny_runs import run_tiny, tiny_config

from atsnn.checkpoint import save_checkpoint
from atsnn.errors import ConfigError
from atsnn.frozen_stem import FRONT, STEM_FILE, FrozenFront, freeze_stem, stem_of
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer, Stem

CONFIG = tiny_config(model={"halting": {"enabled": False}}).model
STAGES = ({"name": "float"}, {"name": "quantized", "train": {"quantized": True}})


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "start" / "model.safetensors", lively(CONFIG), CONFIG)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the passes through the front that training asks for."""
    found: list[int] = []
    front = Stem.front

    def counted(stem: Stem, image: torch.Tensor):
        if stem.training:
            found.append(len(image))
        return front(stem, image)

    monkeypatch.setattr(Stem, "front", counted)
    return found


def frozen_config(start: Path, **changes):
    train = {"initial": str(start), "freeze_stem": True, "epochs": 1, **changes.pop("train", {})}
    model = changes.pop("model", {"halting": {"enabled": False}})
    return tiny_config(model=model, train=train, stages=STAGES, **changes)


def model_of(kind: str) -> Spikformer:
    model = lively(CONFIG)
    return quantize_model(model) if kind == "quantized" else model


@pytest.mark.parametrize("kind", ["float", "quantized"])
class TestSpikes:
    def test_are_those_of_the_stem_in_inference(self, tmp_path, kind):
        model, image = model_of(kind), pixels(CONFIG, 3)
        image = torch.round(image * 63) if kind == "quantized" else image
        expected = stem_of(model).eval().front(image)
        assert 0 < expected.mean() < 1
        model.train()
        for memory in (None, tmp_path, tmp_path):
            assert torch.equal(FrozenFront(model, memory)(image), expected)

    def test_are_used_in_training_alone(self, kind):
        model, image = model_of(kind), pixels(CONFIG, 3)
        freeze_stem(model, None)
        stem_of(model).frozen = lambda image: pytest.fail("asked in inference")
        model.eval()(image)
        with pytest.raises(pytest.fail.Exception):
            model.train()(image)

    def test_of_other_weights_are_other_answers(self, tmp_path, kind):
        image = torch.ones(2, 1, 8, 8)
        one, other = model_of(kind), model_of(kind)
        with torch.no_grad():
            next(iter(stem_of(other).conv4.parameters())).mul_(-1)
        found = [FrozenFront(model, tmp_path)(image) for model in (one, other)]
        assert not torch.equal(*found)


def test_training_leaves_the_front_as_it_was(tmp_path, start):
    begun = load_file(start)
    run_tiny(tmp_path / "run", frozen_config(start))
    ended = load_file(tmp_path / "run" / "float" / "model.safetensors")
    front = {name for name in begun if name.startswith(tuple(f"stem.{layer}." for layer in FRONT))}
    assert len(front) == 4 * 6  # a convolution's weight, five tensors of its normalisation
    for name in begun:
        same = torch.equal(begun[name], ended[name])
        assert same == (name in front or begun[name].abs().sum() == ended[name].abs().sum()), name
    assert not torch.equal(
        begun["stem.position.synapse.weight"], ended["stem.position.synapse.weight"]
    )


def test_training_with_a_memory_ends_in_the_same_bits(tmp_path, start, passes):
    config = frozen_config(start)
    plain = load_file(run_tiny(tmp_path / "plain", config))
    assert passes
    for name, asked in (("filling", len(passes)), ("filled", 0)):
        passes.clear()
        remembering = run_tiny(tmp_path / name, config, memory=tmp_path / "memory")
        torch.testing.assert_close(load_file(remembering), plain, rtol=0, atol=0)
        assert len(passes) == asked
    with sqlite3.connect(tmp_path / "memory" / STEM_FILE) as connection:
        (answers,) = connection.execute("SELECT count(*) FROM answers").fetchone()
    assert answers == len(config.stages) * 5  # batches of an epoch


def test_a_detector_of_quiet_tokens_has_a_front_of_its_own(tmp_path, start):
    halting = {"enabled": True, "gamma": 20.0, "beta": -14.0, "block_scores": False, "quiet": 0.5}
    quiet = frozen_config(start, model={"halting": {**halting, "learn": False}})
    memory = tmp_path / "memory"
    plain = load_file(run_tiny(tmp_path / "quiet", quiet))
    shared = load_file(run_tiny(tmp_path / "shared", quiet, memory=memory))
    torch.testing.assert_close(shared, plain, rtol=0, atol=0)
    alone = run_tiny(tmp_path / "all", frozen_config(start), memory=memory)
    torch.testing.assert_close(
        load_file(alone), load_file(run_tiny(tmp_path / "again", frozen_config(start)))
    )


def test_a_file_that_cannot_be_used_costs_time_only(tmp_path):
    model, image = lively(CONFIG), pixels(CONFIG, 2)
    (tmp_path / STEM_FILE).write_bytes(b"not a database, but as long as the head of one" * 4)
    front = FrozenFront(model, tmp_path)
    with pytest.warns(UserWarning, match=r"answers of the frozen stem are not kept .* the file"):
        answer = front(image)
    assert torch.equal(answer, stem_of(model).eval().front(image))


def test_from_scratch_there_is_nothing_to_freeze(tmp_path):
    with pytest.raises(ConfigError, match=r"set train\.initial to a checkpoint"):
        run_tiny(tmp_path, tiny_config(train={"freeze_stem": True}))


def test_the_operations_of_a_frozen_stem_cannot_be_trained():
    with pytest.raises(ConfigError, match=r"operation_weight 1\.0 .* choose one of them"):
        tiny_config(train={"freeze_stem": True, "operation_weight": 1.0})
