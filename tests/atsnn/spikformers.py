"""Small adaptive Spikformers that fire, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atsnn.config import ModelConfig
from atsnn.spikformer import Spikformer


def small_config(order: str = "upstream", merging: bool = True, **merge: object) -> ModelConfig:
    """12 x 12 pixels, 9 tokens, 2 blocks, 3 steps."""
    return ModelConfig.model_validate(
        {
            "in_channels": 1,
            "image_size": (12, 12),
            "classes": 4,
            "steps": 3,
            "blocks": 2,
            "dim": 16,
            "heads": 2,
            "mlp_ratio": 2,
            "halting": {"enabled": True, "order": order},
            "merging": {"enabled": merging, "count": 2, **merge},
        }
    )


def lively(config: ModelConfig, seed: int = 0) -> Spikformer:
    """A model in evaluation mode whose normalisation makes 5 to 50 % of its neurons fire."""
    torch.manual_seed(seed)
    model = Spikformer(config)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 2.5)
            nn.init.uniform_(module.bias, -0.5, 1.0)
    for _ in range(3):
        model(pixels(config, 32, seed))
    return model.eval()


def pixels(config: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """Images [count, C, H, W] in [0, 1] on the grid of `pixel_bits`."""
    generator = torch.Generator().manual_seed(seed)
    levels = 2**config.quantization.pixel_bits
    shape = (count, config.in_channels, *config.image_size)
    return torch.randint(0, levels, shape, generator=generator) / (levels - 1)
