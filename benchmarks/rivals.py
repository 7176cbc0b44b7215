"""The same Spikformer as users of norse and of SpikingJelly write it, with the weights of ours.

Both take the float network with its normalisation folded into the synapses, which helps them, and
compute what it computes: float inference, all tokens.
"""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from norse.torch import LIFBoxCell, LIFBoxParameters
from torch import Tensor, nn
from torch.nn import functional

from atsnn.config import ModelConfig
from atsnn.layers import ConvLayer, TokenLayer
from atsnn.neurons import SpikingNeuron
from atsnn.spikformer import EncoderBlock, Spikformer
from benchmarks.errors import BenchmarkError

STEM = ("conv1", "conv2", "conv3", "conv4", "position")
BLOCK = ("q", "k", "v", "proj", "fc1", "fc2")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., N, D] -> [..., heads, N, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attend(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """Attention without softmax, `scale * q (k^T v)` per head, all [..., N, D]."""
    q, k, v = (split_heads(x, config.heads) for x in (q, k, v))
    mixed = (q @ (k.transpose(-1, -2) @ v)) * config.attention_scale
    return mixed.transpose(-2, -3).flatten(-2)


# --- norse: one time step at a time, states handed on ---


class NorseSpikformer(nn.Module):
    """One time step per call of `step`; every layer is a synapse and norse's own `LIFBoxCell`."""

    def __init__(self, folded: Spikformer) -> None:
        super().__init__()
        self.config = folded.config
        self.stem = nn.ModuleDict({name: _norse_layer(getattr(folded.stem, name)) for name in STEM})
        self.blocks = nn.ModuleList(_norse_block(block) for block in folded.block_list)
        self.head = folded.readout.head

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W] -> logits [B, classes]."""
        states: dict[str, Any] = {}
        total = torch.zeros(())
        for _ in range(self.config.steps):
            total = total + self.step(image, states).mean(1)
        return self.head(total / self.config.steps)

    def step(self, image: Tensor, states: dict[str, Any]) -> Tensor:
        """One time step: image to the residual stream [B, N, D]; `states` is changed in place."""
        x = image
        for name in STEM[:-1]:
            x = _norse_run(self.stem[name], x, states, name)
            if name in ("conv3", "conv4"):
                x = functional.max_pool2d(x, 3, 2, 1)
        x = x + _norse_run(self.stem["position"], x, states, "position")
        x = x.flatten(2).transpose(1, 2)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleDict)
            x = self._block(block, x, states, f"{index}.")
        return x

    def _block(self, block: nn.ModuleDict, x: Tensor, states: dict[str, Any], label: str) -> Tensor:
        q, k, v = (_norse_run(block[name], x, states, label + name) for name in "qkv")
        mixed = attend(q, k, v, self.config)
        y, states[label] = block["attention_neuron"](mixed, states.get(label))
        x = x + _norse_run(block["proj"], y, states, f"{label}proj")
        y = _norse_run(block["fc1"], x, states, f"{label}fc1")
        return x + _norse_run(block["fc2"], y, states, f"{label}fc2")


def _norse_neuron(neuron: SpikingNeuron) -> LIFBoxCell:
    rate, threshold = torch.tensor(1.0 / neuron.tau), torch.tensor(neuron.threshold)
    return LIFBoxCell(LIFBoxParameters(tau_mem_inv=rate, v_th=threshold), dt=1.0)


def _norse_layer(layer: ConvLayer | TokenLayer) -> nn.ModuleList:
    return nn.ModuleList([layer.synapse, _norse_neuron(layer.neuron)])


def _norse_block(block: EncoderBlock) -> nn.ModuleDict:
    layers: dict[str, nn.Module] = {name: _norse_layer(getattr(block, name)) for name in BLOCK}
    return nn.ModuleDict({**layers, "attention_neuron": _norse_neuron(block.attention_neuron)})


def _norse_run(layer: nn.Module, x: Tensor, states: dict[str, Any], name: str) -> Tensor:
    synapse, neuron = layer.children()
    spikes, states[name] = neuron(synapse(x), states.get(name))
    return spikes


# --- SpikingJelly: multi-step mode, torch backend ---


class SpikingJellySpikformer(nn.Module):
    """Spikformer on SpikingJelly's layers and `LIFNode`, all time steps at once [T, B, ...].

    SpikingJelly ships no Spikformer; the published one is written for its layers in this way: the
    image is repeated T times in front of the first convolution, tokens are flattened for `Linear`.
    Its neuron fires at `v >= v_threshold`, ours above it; equality is common behind attention,
    whose counts are small integers, so it is given the next larger threshold: the same spikes.

    Raises:
        BenchmarkError: SpikingJelly is not installed.
    """

    def __init__(self, folded: Spikformer) -> None:
        super().__init__()
        jelly = import_spikingjelly("functional", "layer", "neuron")
        self.config = folded.config
        self.forget = jelly.functional.reset_net
        self.stem = nn.ModuleDict(
            {name: _jelly_conv(getattr(folded.stem, name), jelly) for name in STEM}
        )
        self.pool = jelly.layer.MaxPool2d(3, 2, 1, step_mode="m")
        self.blocks = nn.ModuleList(_jelly_block(block, jelly) for block in folded.block_list)
        self.head = folded.readout.head

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, C, H, W] -> logits [B, classes]."""
        self.forget(self)
        x = image.unsqueeze(0).repeat(self.config.steps, 1, 1, 1, 1)
        for name in STEM[:-1]:
            x = self.stem[name](x)
            if name in ("conv3", "conv4"):
                x = self.pool(x)
        x = x + self.stem["position"](x)
        x = x.flatten(3).transpose(2, 3)
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = self._block(block, x)
        return self.head(x.mean(2).mean(0))

    def _block(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        q, k, v = (_jelly_tokens(block[name], x) for name in "qkv")
        y = block["attention_neuron"](attend(q, k, v, self.config))
        x = x + _jelly_tokens(block["proj"], y)
        return x + _jelly_tokens(block["fc2"], _jelly_tokens(block["fc1"], x))


def import_spikingjelly(*names: str) -> Any:
    """Modules of SpikingJelly as attributes of one object.

    Raises:
        BenchmarkError: it is not installed.
    """
    # It imports what else is installed (Lava's library among others), and that prints.
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        try:
            return SimpleNamespace(
                **{name: import_module(f"spikingjelly.activation_based.{name}") for name in names}
            )
        except ImportError as error:
            raise BenchmarkError(
                f"SpikingJelly cannot be imported ({error}): pip install '.[benchmarks]'"
            ) from None


def _jelly_neuron(neuron: SpikingNeuron, jelly: Any) -> nn.Module:
    return jelly.neuron.LIFNode(
        tau=float(neuron.tau),
        decay_input=True,
        v_threshold=float(np.nextafter(np.float32(neuron.threshold), np.float32(np.inf))),
        v_reset=0.0,
        detach_reset=True,
        step_mode="m",
        backend="torch",
    )


def _jelly_conv(layer: ConvLayer, jelly: Any) -> nn.Sequential:
    ours = layer.synapse
    bias = ours.bias is not None
    conv = jelly.layer.Conv2d(
        ours.in_channels, ours.out_channels, 3, padding=1, bias=bias, step_mode="m"
    )
    conv.load_state_dict(ours.state_dict())
    return nn.Sequential(conv, _jelly_neuron(layer.neuron, jelly))


def _jelly_block(block: EncoderBlock, jelly: Any) -> nn.ModuleDict:
    layers: dict[str, nn.Module] = {
        name: nn.ModuleList(
            [getattr(block, name).synapse, _jelly_neuron(getattr(block, name).neuron, jelly)]
        )
        for name in BLOCK
    }
    layers["attention_neuron"] = _jelly_neuron(block.attention_neuron, jelly)
    return nn.ModuleDict(layers)


def _jelly_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    synapse, neuron = layer.children()
    return neuron(synapse(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
