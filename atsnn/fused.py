"""Fused multi-step LIF for the CPU: the same spikes and gradients as norse's step, in one pass.

norse's eager loop reads and writes the membrane a dozen times per step; these numba kernels do it
once. They are used for float32 tensors on the CPU; `atsnn.neurons` keeps norse's step as the
definition, which tests compare bit for bit.

Every neuron computes `v' = keep * v + gain * x + bias` (rounded as its number system demands),
fires where v' > threshold, and is reset to 0. Arrays are [T, R, D]: a row of D contiguous neurons
shares a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from atsnn.threads import KERNELS


@dataclass(frozen=True)
class FusedNeuron:
    """Constants of a fused step.

    Attributes:
        kernel: forward kernel, `float_forward` or `fixed_forward`.
        keep: factor on the membrane potential per step.
        gain: factor on the input.
        threshold: firing threshold in membrane units.
        unit: membrane units per real unit, for the surrogate gradient.
        slope: of the triangular surrogate `slope * max(0, 1 - |v|)`.
        limit: magnitude at which the membrane saturates.
    """

    kernel: Any
    keep: float
    gain: float
    threshold: float
    unit: float
    slope: float
    limit: float


@numba.njit(parallel=True, cache=True)
def float_forward(x, gate, bias, voltage, keep, gain, threshold, limit, spikes, before):
    """norse's LIFBox: v' = v + gain * (x - v)."""
    steps, rows, width = spikes.shape
    constant = x.shape[0] == 1
    for r in numba.prange(rows):
        for t in range(steps):
            tx = 0 if constant else t
            is_open = gate[t, r] > 0
            for d in range(width):
                v = voltage[r, d]
                new = v + gain * (x[tx, r, d] - v)
                before[t, r, d] = new
                fires = new > threshold
                spikes[t, r, d] = np.float32(1.0) if fires else np.float32(0.0)
                if is_open:
                    voltage[r, d] = np.float32(0.0) if fires else new


@numba.njit(parallel=True, cache=True)
def fixed_forward(x, gate, bias, voltage, keep, gain, threshold, limit, spikes, before):
    """Fixed point: v' = clip(trunc(keep * v) + gain * x + bias), all of them exact integers."""
    steps, rows, width = spikes.shape
    constant = x.shape[0] == 1
    for r in numba.prange(rows):
        row = r % bias.shape[0]
        for t in range(steps):
            tx = 0 if constant else t
            is_open = gate[t, r] > 0
            for d in range(width):
                decayed = np.trunc(voltage[r, d] * keep)
                new = decayed + x[tx, r, d] * gain + bias[row, d]
                new = min(max(new, -limit), limit)
                before[t, r, d] = new
                fires = new > threshold
                spikes[t, r, d] = np.float32(1.0) if fires else np.float32(0.0)
                if is_open:
                    voltage[r, d] = np.float32(0.0) if fires else new


@numba.njit(parallel=True, cache=True)
def backward_kernel(
    grad_spikes, spikes, before, gate, keep, gain, threshold, unit, slope, limit, grad_v, grad_x
):
    """Backpropagation through time; `grad_v` [R, D] starts as the gradient of the last voltage."""
    steps, rows, width = spikes.shape
    zero, one = np.float32(0.0), np.float32(1.0)
    for r in numba.prange(rows):
        for back in range(steps):
            t = steps - 1 - back
            is_open = gate[t, r] > 0
            for d in range(width):
                new = before[t, r, d]
                fired = spikes[t, r, d]
                surrogate = slope * max(one - abs((new - threshold) / unit), zero) / unit
                from_state = grad_v[r, d] if is_open else zero
                g = (grad_spikes[t, r, d] - from_state * new) * surrogate
                g += from_state * (one - fired)
                if abs(new) >= limit:
                    g = zero
                grad_x[t, r, d] = g * gain
                held = zero if is_open else grad_v[r, d]
                grad_v[r, d] = g * keep + held


class _FusedLIF(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        bias: Tensor,
        gate: Tensor,
        voltage: Tensor,
        neuron: FusedNeuron,
    ) -> tuple[Tensor, Tensor]:
        steps, rows, width = current.shape
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # pyright: ignore[reportAttributeAccessIssue] numba's config is built at run time
        spikes = torch.empty((steps, rows, width), dtype=torch.float32)
        before = torch.empty_like(spikes)
        state = voltage.clone()
        seen = current[:1] if current.stride(0) == 0 else current
        f = np.float32
        with KERNELS:
            neuron.kernel(
                seen.contiguous().numpy(),
                gate.numpy(),
                bias.numpy(),
                state.numpy(),
                f(neuron.keep),
                f(neuron.gain),
                f(neuron.threshold),
                f(neuron.limit),
                spikes.numpy(),
                before.numpy(),
            )
        ctx.set_materialize_grads(False)
        ctx.neuron = neuron
        ctx.bias_shape = bias.shape
        ctx.save_for_backward(spikes, before, gate)
        return spikes, state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad_spikes, grad_state = grads
        spikes, before, gate = ctx.saved_tensors
        neuron: FusedNeuron = ctx.neuron
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(spikes)
        grad_x = torch.empty_like(spikes)
        last = (
            torch.zeros_like(spikes[0]) if grad_state is None else grad_state.contiguous().clone()
        )
        f = np.float32
        with KERNELS:
            backward_kernel(
                grad_spikes.contiguous().numpy(),
                spikes.numpy(),
                before.numpy(),
                gate.numpy(),
                f(neuron.keep),
                f(neuron.gain),
                f(neuron.threshold),
                f(neuron.unit),
                f(neuron.slope),
                f(neuron.limit),
                last.numpy(),
                grad_x.numpy(),
            )
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = _sum_to_bias(grad_x, ctx.bias_shape) / neuron.gain
        return grad_x, grad_bias, None, last, None


def _sum_to_bias(grad: Tensor, shape: torch.Size) -> Tensor:
    """Gradient [T, R, D] summed to a bias [Rb, D], where Rb divides R."""
    return grad.view(-1, shape[0], shape[1]).sum(0)


def gate_like(gate: Tensor, values: Tensor) -> Tensor:
    """Append axes to a gate [..., N] until it broadcasts against values [..., N, ...]."""
    return gate.reshape(gate.shape + (1,) * (values.dim() - gate.dim()))


def fits(current: Tensor, voltage: Tensor | None) -> bool:
    """True where the fused kernels apply: float32 on the CPU."""
    on_cpu = current.device.type == "cpu" and current.dtype == torch.float32
    return on_cpu and (voltage is None or voltage.dtype == torch.float32)


def run_fused(
    neuron: FusedNeuron,
    current: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    voltage: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All steps of `current` [T, B, ...]: masked spikes [T, B, ...] and the last voltage [B, ...].

    Args:
        bias: None, [D] for tokens [T, B, N, D], or [C, 1, 1] for maps [T, B, C, H, W].
        gate: [T, B, N] or None (all open); its gradient is that of the mask on the spikes.
    """
    shape = current.shape
    width = shape[-1] if len(shape) == 4 else shape[-1] * shape[-2]
    flat = (
        current.reshape(shape[0], -1, width)
        if current.stride(0)
        else _flat_constant(current, width)
    )
    rows = flat.shape[1]
    opened = torch.ones((shape[0], rows)) if gate is None else gate.detach().reshape(shape[0], rows)
    state = torch.zeros((rows, width)) if voltage is None else voltage.reshape(rows, width)
    flat_bias = torch.zeros((1, width)) if bias is None else _flat_bias(bias, width)
    spikes, state = _FusedLIF.apply(flat, flat_bias, opened.contiguous(), state, neuron)  # pyright: ignore[reportGeneralTypeIssues] autograd's apply is untyped
    spikes = spikes.view(shape)
    if gate is not None:
        spikes = spikes * gate_like(gate, spikes)
    return spikes, state.view(shape[1:])


def _flat_constant(current: Tensor, width: int) -> Tensor:
    return current[:1].reshape(1, -1, width).expand(current.shape[0], -1, -1)


def _flat_bias(bias: Tensor, width: int) -> Tensor:
    flat = bias.reshape(-1, 1) if bias.dim() == 3 else bias.reshape(1, -1)
    return flat.expand(-1, width).contiguous()
