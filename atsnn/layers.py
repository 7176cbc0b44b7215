"""Layers of a Spikformer: synapses with normalisation and neurons, pooling, attention, read-out.

Shapes: T time steps, B images, N tokens, D channels. In training a closed gate masks spikes; where
that is exact, the rows are left out.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from atsnn import event_products, fused_norm, fused_pool
from atsnn.distributed import differentiable_sum, processes, sum_over_processes
from atsnn.neurons import SpikingNeuron

WORTH_LEAVING_OUT = 0.75
"""Share of tokens open at some step up to which training gathers them (see docs/training.md)."""


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation over the rows [T, B, N] of open tokens; halted ones stay out of it."""

    def forward(self, input: Tensor, gate: Tensor | None = None) -> Tensor:
        if self.training and (gate is not None or processes() > 1):
            return normalize_open_rows(self, input, gate)
        return super().forward(input.flatten(0, -2)).view(input.shape)


def normalize_open_rows(norm: _BatchNorm, input: Tensor, gate: Tensor | None) -> Tensor:
    """Batch norm in training mode with the statistics of the open rows of all processes.

    Args:
        input: [..., C]. gate: [...] of 0 and 1, or None: all rows are open.
    """
    rows = input.flatten(0, -2)
    weight = rows.new_ones(len(rows)) if gate is None else gate.detach().flatten()
    count = float(sum_over_processes(weight.sum()))
    if count < 2:
        mean, variance = norm.running_mean, norm.running_var
    else:
        mean = differentiable_sum((weight / count) @ rows)
        variance = differentiable_sum((weight / count) @ (rows - mean).square())
        _update(norm, mean.detach(), variance.detach() * count / (count - 1))
        if gate is None and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    assert variance is not None
    assert mean is not None
    factor = norm.weight * torch.rsqrt(variance + norm.eps)
    return input * factor + (norm.bias - mean * factor)


@torch.no_grad()
def _update(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)


def full_precision(device: torch.device) -> torch.autocast:
    """Within it, mixed precision is off: counts of spikes stay exact integers."""
    return torch.autocast(device.type, enabled=False)


class ConvLayer(nn.Module):
    """Convolution, normalisation, neurons: [T, B, C, H, W] -> spikes [T, B, O, H, W].

    With `repeat` = T an input [1, B, C, H, W] is the same at every step: one current serves all.
    """

    def __init__(self, synapse: nn.Conv2d, norm: nn.Module, neuron: SpikingNeuron) -> None:
        super().__init__()
        self.synapse, self.norm, self.neuron = synapse, norm, neuron

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        steps = max(repeat, x.shape[0])
        if self.training and fused_norm.fits(x, self.norm):
            return self._fused(x, steps)
        current = self._normalized(self.synapse(x.flatten(0, 1)).to(x.dtype))
        current = current.view(*x.shape[:2], *current.shape[1:])
        return self.neuron(current.expand(steps, *current.shape[1:]))[0]

    def _normalized(self, maps: Tensor) -> Tensor:
        """Batch norm; of all processes where there are several."""
        if self.training and processes() > 1 and isinstance(self.norm, _BatchNorm):
            rows = normalize_open_rows(self.norm, maps.permute(0, 2, 3, 1), None)
            return rows.permute(0, 3, 1, 2).contiguous()
        return self.norm(maps)

    def _fused(self, x: Tensor, steps: int) -> Tensor:
        """The same in one operation, on maps whose channels are contiguous in memory."""
        rows = convolve(self.synapse, x.flatten(0, 1)).to(x.dtype)
        norm = cast("_BatchNorm", self.norm)
        spikes, _ = fused_norm.normalize_and_fire(
            rows.reshape(x.shape[0], -1, rows.shape[-1]), norm, self.neuron.fused, steps
        )
        return spikes.view(steps, x.shape[1], *rows.shape[1:]).permute(0, 1, 4, 2, 3)


class TokenLayer(nn.Module):
    """Linear, normalisation, neurons over tokens: [T, B, N, I] -> spikes [T, B, N, O]."""

    def __init__(self, synapse: nn.Linear, norm: nn.Module, neuron: SpikingNeuron) -> None:
        super().__init__()
        self.synapse, self.norm, self.neuron = synapse, norm, neuron

    def forward(
        self, x: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.training and voltage is None and fused_norm.fits(x, self.norm):
            return self._fused(x, gate)
        current = functional.linear(x, self.synapse.weight, self._bias()).to(x.dtype)
        current = (
            self.norm(current, gate) if isinstance(self.norm, TokenNorm) else self.norm(current)
        )
        return self.neuron(current, gate, voltage)

    def _bias(self) -> Tensor | None:
        """The synapse's bias, without a gradient in front of batch statistics.

        They take away what it adds, so that its gradient is 0 but for rounding errors, which Adam
        would scale up to whole steps.
        """
        bias = self.synapse.bias
        if bias is not None and isinstance(self.norm, _BatchNorm) and self.norm.training:
            return bias.detach()
        return bias

    def _fused(self, x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalisation, neurons and gate in one operation, from zero potential.

        Tokens that are closed at every step are left out, unless the gate needs a gradient: that of
        a closed gate is made of the spikes that it holds back.
        """
        opened = worth_gathering(gate)
        if gate is not None and opened is not None:
            return self._fused_without(x, gate, opened)
        current = pointwise(x, self.synapse.weight, self._bias()).to(x.dtype)
        steps, shape = current.shape[0], current.shape
        spikes, state = fused_norm.normalize_and_fire(
            current.reshape(steps, -1, shape[-1]),
            cast("_BatchNorm", self.norm),
            self.neuron.fused,
            steps,
            None if gate is None else gate.reshape(steps, -1),
        )
        return spikes.view(shape), state.view(shape[1:])

    def _fused_without(self, x: Tensor, gate: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the tokens `opened` [B, N] alone, in images of N tokens, the last filled up
        with closed ones; the others fire nothing and stay at zero potential.
        """
        steps = len(x)
        index, rows, gates = gather_tokens(x, gate, opened)
        current = pointwise(rows, self.synapse.weight, self._bias()).to(x.dtype)
        spikes, state = fused_norm.normalize_and_fire(
            current.reshape(steps, -1, current.shape[-1]),
            cast("_BatchNorm", self.norm),
            self.neuron.fused,
            steps,
            gates.flatten(1),
        )
        return spread_tokens(spikes[:, : len(index)], state[: len(index)], index, opened)

    def forward_rows(
        self, rows: Tensor, gate: Tensor, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same for open tokens only: rows [R, I] -> spikes [R, O]."""
        return self.neuron.forward_rows(self.norm(self.synapse(rows)), gate, voltage)


def worth_gathering(gate: Tensor | None) -> Tensor | None:
    """Tokens [B, N] that a gate [T, B, N] opens at some step, if training should gather them.

    None if they are all but a few, or if the gate needs a gradient: that of a closed gate is made
    of the spikes that it holds back.
    """
    if gate is None or gate.requires_grad:
        return None
    opened = gate.amax(0) > 0
    return opened if 0 < int(opened.sum()) <= WORTH_LEAVING_OUT * opened.numel() else None


def gather_tokens(x: Tensor, gate: Tensor, opened: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x [T, B, N, I] and gate [T, B, N] the tokens `opened` [B, N] alone.

    Returns their places among all tokens [R], and both in images of N tokens, the last filled up
    with closed ones: [T, B', N, I] and [T, B', N].
    """
    steps, _, count, width = x.shape
    index = opened.flatten().nonzero()[:, 0]
    fill = -len(index) % count
    rows = functional.pad(x.reshape(steps, -1, width)[:, index], (0, 0, 0, fill))
    gates = functional.pad(gate.reshape(steps, -1)[:, index], (0, fill))
    return index, rows.view(steps, -1, count, width), gates.view(steps, -1, count)


def spread_tokens(
    spikes: Tensor, state: Tensor, index: Tensor, opened: Tensor
) -> tuple[Tensor, Tensor]:
    """Spikes [T, R, O] and potentials [R, O] of the R tokens `index` of `opened` [B, N], among
    zeros for the others: [T, B, N, O] and [B, N, O].
    """
    shape = (opened.numel(), spikes.shape[-1])
    full = spikes.new_zeros((len(spikes), *shape)).index_copy(1, index, spikes)
    rest = state.new_zeros(shape).index_copy(0, index, state)
    return full.unflatten(1, opened.shape), rest.unflatten(0, opened.shape)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of tokens [T, B, N, I] as a 1x1 convolution over rows of N, from events if few.

    On the CPU torch gives products of matrices to MKL and convolutions to oneDNN, which is up to
    twice as fast on these shapes (processors other than Intel's above all).
    """
    steps, images, count, width = x.shape
    maps, kernel = x.reshape(steps * images, 1, count, width), weight[:, :, None, None]
    events = event_products.find_events(maps, kernel)
    if events is None:
        rows = functional.conv2d(maps.permute(0, 3, 1, 2), kernel, bias).permute(0, 2, 3, 1)
    else:
        rows = event_products.multiply(maps, kernel, bias, events)
    return rows.reshape(steps, images, count, -1)


def convolve(synapse: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolution of maps [M, I, H, W] as rows of contiguous channels [M, H, W, O]."""
    maps = x.contiguous(memory_format=torch.channels_last)
    rows = maps.permute(0, 2, 3, 1)
    events = None
    if event_products.fits(synapse):
        events = event_products.find_events(rows, synapse.weight)
    if events is not None:
        return event_products.multiply(rows, synapse.weight, synapse.bias, events)
    return synapse(maps).permute(0, 2, 3, 1).contiguous()


class SpikePool(nn.Module):
    """Max pooling 3x3, stride 2: a pooled neuron fires if any in its window did."""

    def forward(self, spikes: Tensor) -> Tensor:
        maps = spikes.flatten(0, 1)
        if self.training and fused_pool.fits(maps):
            pooled = fused_pool.max_pool(maps)
        else:
            pooled = functional.max_pool2d(maps, 3, 2, 1)
        return pooled.unflatten(0, spikes.shape[:2])


class ToTokens(nn.Module):
    """Feature maps [T, B, C, H, W] -> tokens [T, B, H*W, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(3).transpose(2, 3)


class StreamAdd(nn.Module):
    """Sum of values on the residual stream and spikes that join it.

    Args:
        joins: number of leading inputs that are spikes; a spike counts `unit` on the stream.
    """

    def __init__(self, unit: float = 1.0, joins: int = 1) -> None:
        super().__init__()
        self.unit = unit
        self.joins = joins

    def forward(self, spikes: Tensor, other: Tensor) -> Tensor:
        """`spikes * unit + other`, where `other` is spikes as well if `joins` is 2."""
        if self.joins == 2:
            return (spikes + other) * self.unit
        return torch.add(other, spikes, alpha=self.unit)


class AttentionCore(nn.Module):
    """Spiking self-attention without softmax: per head `scale * q (k^T v)`."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = (*q.shape[:3], self.heads, q.shape[3] // self.heads)
        q, k, v = (x.view(split).transpose(2, 3) for x in (q, k, v))
        with full_precision(q.device):
            mixed = (q @ (k.transpose(-1, -2) @ v)) * self.scale
        return mixed.transpose(2, 3).flatten(3)


class TimeFirst(nn.Module):
    """Events of each image [B, T, C, H, W] -> of each step [T, B, C, H, W]."""

    def forward(self, events: Tensor) -> Tensor:
        return events.transpose(0, 1)


class Hold(nn.Module):
    """What the first step brought, at every step: [1 or T, B, ...] -> [T, B, ...]."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x[:1].expand(self.steps, *x.shape[1:])


class Readout(nn.Module):
    """Logits from the mean over time and the size-weighted mean over tokens."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """x [T, B, N, D], size [B, N] -> logits [B, classes]."""
        if size is None:
            pooled = x.mean((0, 2))
        else:
            pooled = (x.mean(0) * size[:, :, None]).sum(1) / x.shape[2]
        with full_precision(x.device):
            return self.head(pooled)
