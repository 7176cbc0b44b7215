"""Read-outs over the first steps: what a network of fewer steps would say, with a gradient."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from spikformers import lively, pixels, small_config
from tiny_runs import run_tiny, tiny_config
from torch.nn import functional

from atsnn.early_readouts import early_loss, early_readouts
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer

IMAGES = 6


def with_steps(model: Spikformer, steps: int) -> Spikformer:
    """The same float weights for another number of steps."""
    other = Spikformer(model.config.model_copy(update={"steps": steps}))
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("merging", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_are_those_of_a_network_with_fewer_steps(merging: bool, quantized: bool) -> None:
    model, image = lively(small_config(merging=merging)), pixels(small_config(), IMAGES)
    form = quantize_model if quantized else lambda it: it
    whole = form(model).eval()
    with early_readouts(whole) as readouts:
        whole(image)
        found = readouts()
    assert len(found) == model.config.steps - 1
    for steps, logits in enumerate(found, start=1):
        expected = form(with_steps(model, steps)).eval()(image).logits
        torch.testing.assert_close(logits.double(), expected.double(), rtol=0, atol=1e-4)


def test_the_loss_is_their_mean_cross_entropy_and_reaches_the_weights() -> None:
    config = small_config()
    model = lively(config).train()
    targets = functional.one_hot(torch.arange(IMAGES) % config.classes, config.classes).float()
    with early_readouts(model) as readouts:
        model(pixels(config, IMAGES))
        found = readouts()
    loss = early_loss(found, targets)
    each = [-(targets * logits.log_softmax(1)).sum(1).mean() for logits in found]
    torch.testing.assert_close(loss, sum(each) / len(each))
    loss.backward()
    gradient = model.stem.conv1.synapse.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_one_step_has_no_earlier_one() -> None:
    model = lively(small_config().model_copy(update={"steps": 1}))
    with early_readouts(model) as readouts:
        model(pixels(model.config, 2))
        assert early_loss(readouts(), torch.zeros(2, 4)) == 0


def test_hooks_are_gone_afterwards() -> None:
    model = lively(small_config())
    with early_readouts(model):
        model(pixels(model.config, 2))
    assert not model.readout._forward_pre_hooks


def test_training_with_it_ends_elsewhere(tmp_path) -> None:
    ends = [
        load_file(run_tiny(tmp_path / str(weight), tiny_config(train={"early_weight": weight})))
        for weight in (0.0, 1.0)
    ]
    name = "readout.head.weight"
    assert not torch.equal(ends[0][name], ends[1][name])
