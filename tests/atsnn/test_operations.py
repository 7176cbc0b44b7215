"""Synaptic operations as a loss: what it counts, and that training with it saves some."""

from __future__ import annotations

import pytest
import torch
from spikformers import lively, pixels, small_config

from atsnn.config import HaltingConfig
from atsnn.operations import operation_share
from atsnn.quantization import quantize_model
from atsnn.spikformer import Spikformer
from export.spikformer import compile_spikformer
from hardware.engine import run


def shares(model: Spikformer, image: torch.Tensor) -> float:
    with operation_share(model) as share:
        model(image)
        return float(share())


PLAIN = small_config(merging=False).model_copy(update={"halting": HaltingConfig()})
UINT8 = torch.randint(0, 256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.manual_seed(0))


def as_input(model: Spikformer) -> torch.Tensor:
    bits = model.config.quantization.pixel_bits
    return (UINT8 >> (8 - bits)).float() / (2**bits - 1)


def test_follows_the_operations_that_the_engine_counts() -> None:
    """Within a tenth: borders of maps and attention are left out of the share."""
    ratios = []
    for seed in (0, 1, 2):
        model = quantize_model(lively(PLAIN, seed)).eval()
        events = run(compile_spikformer(model), UINT8.numpy()).events
        assert events is not None
        layers = [node for node in events.nodes if node.kind in ("Conv", "Linear")]
        counted = sum(node.sum("sops") for node in layers if "conv1" not in node.name)
        ratios.append(shares(model, as_input(model)) / counted)
    assert max(ratios) < 1.1 * min(ratios)


@pytest.mark.parametrize("quantized", [False, True])
def test_is_between_nothing_and_everything(quantized: bool) -> None:
    model = lively(small_config())
    model = quantize_model(model).eval() if quantized else model
    assert 0.01 < shares(model, pixels(model.config, 8)) < 0.9


def test_closed_tokens_cost_nothing() -> None:
    config = small_config(merging=False)
    model = lively(config)
    image = pixels(config, 8)
    halting = shares(model, image)
    for score in model.score_list:
        score.beta.data.fill_(-1e4)
    assert halting < shares(model, image)


def test_gradient_asks_for_fewer_spikes() -> None:
    model = lively(PLAIN).train()
    with operation_share(model) as share:
        model(pixels(PLAIN, 16))
        share().backward()
    bias = model.stem.conv2.norm.bias.grad
    assert bias is not None
    assert (bias >= 0).all()
    assert bias.max() > 0


def test_hooks_are_gone_afterwards() -> None:
    model = lively(PLAIN)
    shares(model, pixels(PLAIN, 2))
    assert not any(module._forward_pre_hooks for module in model.modules())
