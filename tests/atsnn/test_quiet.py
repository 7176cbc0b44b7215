"""The stem's channel 0 as a detector of quiet tokens: whom it closes, and that it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spikformers import lively, pixels, small_config
from tiny_runs import run_tiny, tiny_config, tiny_dataset

from atsnn.checkpoint import load_model, save_checkpoint
from atsnn.errors import ConfigError
from atsnn.quantization import FixedPointTokenLayer, fold_norm, quantize_model
from atsnn.quiet import LARGEST_WEIGHT, NEVER_FIRES, detect_quiet_tokens
from atsnn.spikformer import Spikformer
from atsnn.training import initial_model

FIXED = {"gamma": 20.0, "beta": -14.0, "block_scores": False}


def quiet_model(share: float) -> tuple[Spikformer, torch.Tensor]:
    config = small_config(merging=False)
    halting = config.halting.model_copy(update={**FIXED, "quiet": share})
    config = config.model_copy(update={"halting": halting})
    model, image = lively(config), pixels(config, 64)
    detect_quiet_tokens(model, image, share)
    return model, image


def spikes_at_first_step(model: Spikformer, image: torch.Tensor) -> torch.Tensor:
    """Of the position branch, without the detector, [B, N]."""
    seen = []
    stem = model.stem.stem if model.quantized else model.stem
    stem.position.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model(image)
    return seen[0][0, :, 1:].sum(1).flatten(1)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_closes_the_share_at_the_first_step(share: float) -> None:
    model, image = quiet_model(share)
    closed = model(image).gates[0, 0] == 0
    assert float(closed.double().mean()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("quantized", [False, True])
def test_closes_quiet_tokens(quantized: bool) -> None:
    model, image = quiet_model(0.5)
    model = quantize_model(model).eval() if quantized else model
    spikes = spikes_at_first_step(model, image)
    closed = model(image).gates[0, 0] == 0
    assert 0.3 < float(closed.double().mean()) < 0.7
    assert spikes[closed].mean() < 0.8 * spikes[~closed].mean()


def test_does_not_see_itself_and_weighs_as_much_as_trained_channels() -> None:
    model, _ = quiet_model(0.5)
    weight, _ = fold_norm(model.stem.position.synapse, model.stem.position.norm)
    assert torch.all(weight[0, 0] == 0)
    assert float(weight[0].abs().max()) == pytest.approx(LARGEST_WEIGHT, rel=1e-3)


def test_gates_have_no_gradient_so_that_rows_are_left_out() -> None:
    model, image = quiet_model(0.5)
    assert not model.train()(image).gates.requires_grad


def test_quantised_training_without_closed_rows_is_training_with_them_masked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, image = quiet_model(0.6)
    model = quantize_model(model).train()
    gathered = []
    without = FixedPointTokenLayer._gathered
    monkeypatch.setattr(
        FixedPointTokenLayer, "_gathered", lambda *a: gathered.append(1) or without(*a)
    )

    def observed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(image).logits
        logits.square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), found

    logits, gradients = observed()
    assert len(gathered) == 2 * 6  # q, k, v, proj, fc1, fc2 of two blocks
    monkeypatch.setattr("atsnn.layers.WORTH_LEAVING_OUT", -1.0)
    masked, expected = observed()
    assert len(gathered) == 2 * 6
    assert torch.equal(logits, masked)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    config = tiny_config(model={"halting": {"enabled": False}}).model
    path = tmp_path_factory.mktemp("start") / "model.safetensors"
    save_checkpoint(path, lively(config), config)
    return path


def test_training_keeps_the_detector_and_changes_the_rest(tmp_path, start) -> None:
    stages = (
        {"name": "float", "train": {"epochs": 1}},
        {"name": "quantized", "train": {"epochs": 1, "quantized": True}},
    )
    config = tiny_config(
        model={"halting": {**FIXED, "learn": False, "quiet": 0.5}},
        train={"initial": str(start)},
        stages=stages,
    )
    folder = tmp_path / "run"
    begun = initial_model(config, Path(start), tiny_dataset().train).state_dict()
    run_tiny(folder, config)
    first = load_file(folder / "float" / "model.safetensors")
    last = load_file(folder / "quantized" / "model.safetensors")
    name = "stem.position.synapse.weight"
    assert torch.equal(first[name][0], begun[name][0])
    assert not torch.equal(first[name][1], begun[name][1])
    folded = quantize_model(load_model(folder / "float")).state_dict()[f"stem.{name}"]
    assert torch.equal(last[f"stem.{name}"][0], folded[0])
    assert not torch.equal(last[f"stem.{name}"][1], folded[1])
    assert last["stem.stem.conv4.synapse.bias"][0] == NEVER_FIRES
    images = tiny_dataset().train.batch(torch.arange(32)).float() / 255
    tokens = float(load_model(folder / "quantized")(images).average_tokens)
    assert 0.1 < tokens < 0.9


def test_it_needs_a_trained_stem(tmp_path) -> None:
    config = tiny_config(model={"halting": {**FIXED, "quiet": 0.5}})
    with pytest.raises(ConfigError, match=r"spikes of a trained stem: set train\.initial"):
        run_tiny(tmp_path, config)


def test_switched_off_it_leaves_a_quantised_model_as_it_is(tmp_path, start) -> None:
    model = quantize_model(load_model(start))
    path = save_checkpoint(tmp_path / "model.safetensors", model, model.config)
    config = tiny_config(
        model={"halting": {**FIXED, "enabled": False, "quiet": 0.5}}, train={"quantized": True}
    )
    weights = initial_model(config, path, tiny_dataset().train).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_it_needs_a_stem_that_fires(tmp_path) -> None:
    silent = tiny_config(model={"halting": {"enabled": False}})
    start = run_tiny(tmp_path / "start", silent)
    config = tiny_config(model={"halting": {**FIXED, "quiet": 0.5}}, train={"initial": str(start)})
    with pytest.raises(ConfigError, match="40 training images have no spikes to count"):
        run_tiny(tmp_path / "run", config)


def test_it_needs_a_float_start(tmp_path, start) -> None:
    stages = ({"name": "q", "train": {"epochs": 1, "quantized": True}},)
    quantized = tiny_config(
        model={"halting": {"enabled": False}}, train={"initial": str(start)}, stages=stages
    )
    run_tiny(tmp_path / "q", quantized)
    config = tiny_config(
        model={"halting": {**FIXED, "quiet": 0.5}},
        train={"initial": str(tmp_path / "q" / "model.safetensors"), "quantized": True},
    )
    with pytest.raises(ConfigError, match=r"starts from a float model, .* is quantised"):
        run_tiny(tmp_path / "again", config)
