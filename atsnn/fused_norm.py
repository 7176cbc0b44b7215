"""Fused normalisation and LIF over all time steps, for training on the CPU.

One pass forward for the statistics of batch normalisation and one for affine map, neurons and gate;
two backward, for sums per channel and for the gradient of the input. Membrane potentials are
computed again in the backward pass, so that only the layer's input is kept.
`SpikingNeuron.step` behind torch's batch norm stays the definition.

Values are rows of contiguous channels: tokens [T, B, N, D], or maps [T, B, C, H, W] in
channels-last memory. Without a gate, the kernels walk over long stretches of several rows at once
("tiles"), which small layers need to fill vector registers. Sums are taken in chunks of tiles, the
same for any number of threads, and added in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from atsnn.distributed import processes, sum_over_processes
from atsnn.fused import FusedNeuron
from atsnn.threads import KERNELS, use_torch_threads

TILE = 1024
"""Values of a tile at one time step; T tiles of membrane potentials should fit into L1."""
CHUNK = 32
"""Tiles whose sums are taken in float32 before they are added in float64."""


# --- loops over contiguous values; each is small so that it is compiled to vector instructions ---


@numba.njit(error_model="numpy")
def _add_squares(x, reference, first, second):
    for j in range(x.size):
        d = x[j] - reference[j]
        first[j] += d
        second[j] += d * d


@numba.njit(error_model="numpy")
def _fire(x, scale, shift, gain, threshold, voltage, spikes):
    zero, one = x.dtype.type(0.0), x.dtype.type(1.0)
    for j in range(x.size):
        v = voltage[j]
        v = v + gain * ((x[j] * scale[j] + shift[j]) - v)
        fires = v > threshold
        spikes[j] = one if fires else zero
        voltage[j] = zero if fires else v


@numba.njit(error_model="numpy")
def _charge(x, scale, shift, gain, threshold, voltage, before):
    zero = x.dtype.type(0.0)
    for j in range(x.size):
        v = voltage[j]
        v = v + gain * ((x[j] * scale[j] + shift[j]) - v)
        before[j] = v
        voltage[j] = zero if v > threshold else v


@numba.njit(error_model="numpy")
def _back_one_step(grad, before, gain, threshold, slope, carried, out):
    zero, one = grad.dtype.type(0.0), grad.dtype.type(1.0)
    keep = one - gain
    for j in range(grad.size):
        v, g = before[j], carried[j]
        surrogate = slope * max(one - abs(v - threshold), zero)
        total = (grad[j] - g * v) * surrogate
        kept = zero if v > threshold else g
        total = total + kept
        out[j] = total * gain
        carried[j] = total * keep


@numba.njit(error_model="numpy")
def _add_products(g, x, mean, first, second):
    for j in range(g.size):
        first[j] += g[j]
        second[j] += g[j] * (x[j] - mean[j])


@numba.njit(error_model="numpy")
def _probe(x, scale, shift, gain, voltage, before):
    """What the potential would become; a closed gate holds the voltage."""
    for j in range(x.size):
        v = voltage[j]
        before[j] = v + gain * ((x[j] * scale[j] + shift[j]) - v)


@numba.njit(error_model="numpy")
def _sum_where_fired(grad, before, threshold):
    total = 0.0
    for j in range(grad.size):
        if before[j] > threshold:
            total += grad[j]
    return total


@numba.njit(error_model="numpy")
def _add(x, into):
    for j in range(x.size):
        into[j] += x[j]


@numba.njit(error_model="numpy")
def _combine(x, mean, scale, along, offset, g):
    for j in range(g.size):
        g[j] = scale[j] * g[j] + (along[j] * (x[j] - mean[j]) + offset[j])


# --- kernels ---
# x [Tx, n] flat, Tx = T or 1 (constant current); a tile is `width` values, a multiple of the
# channels, at all steps. gate [T, tiles] with one row a tile, or [0, 0]: all open. Arrays that are
# not wanted are empty.


@numba.njit(parallel=True, cache=True, error_model="numpy")
def sum_tiles(x, gate, reference, partial):
    """Sums of x - reference and of its square over x [n] where gate [tiles] is open.

    partial [chunks, 2, width]; reference [width].
    """
    n, width = x.size, reference.size
    tiles = (n + width - 1) // width
    for c in numba.prange(partial.shape[0]):
        first, second = partial[c, 0], partial[c, 1]
        for i in range(c * CHUNK, min(tiles, (c + 1) * CHUNK)):
            if gate.size == 0 or gate[i] > 0:
                part = x[i * width : min(n, (i + 1) * width)]
                _add_squares(part, reference, first, second)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def fire_tiles(x, gate, scale, shift, gain, threshold, spikes, state):
    """Spikes [T, n] of the neurons behind `x * scale + shift`, and their last potentials [n]."""
    steps, n = spikes.shape
    width = scale.size
    moving = x.shape[0] > 1
    tiles = (n + width - 1) // width
    for c in numba.prange((tiles + CHUNK - 1) // CHUNK):
        voltage = np.empty(width, x.dtype)
        for i in range(c * CHUNK, min(tiles, (c + 1) * CHUNK)):
            start, stop = i * width, min(n, (i + 1) * width)
            voltage[:] = 0.0
            for t in range(steps):
                fired = spikes[t, start:stop]
                if gate.size == 0 or gate[t, i] > 0:
                    current = x[t if moving else 0, start:stop]
                    _fire(current, scale, shift, gain, threshold, voltage, fired)
                else:
                    fired[:] = 0.0
            if state.size > 0:
                state[start:stop] = voltage[: stop - start]


@numba.njit(error_model="numpy")
def _through_time(
    x,
    gate,
    grad,
    grad_state,
    i,
    start,
    stop,
    scale,
    shift,
    gain,
    threshold,
    slope,
    before,
    carried,
    out,
):
    """Gradient of the normalised current of tile i into out [T, width], potentials into before."""
    steps = grad.shape[0]
    moving = x.shape[0] > 1
    size = stop - start
    carried[:] = 0.0
    for t in range(steps):
        current = x[t if moving else 0, start:stop]
        if gate.size == 0 or gate[t, i] > 0:
            _charge(current, scale, shift, gain, threshold, carried, before[t, :size])
        else:
            _probe(current, scale, shift, gain, carried, before[t, :size])
    if grad_state.size > 0:
        carried[:size] = grad_state[start:stop]
    else:
        carried[:] = 0.0
    for back in range(steps):
        t = steps - 1 - back
        if gate.size == 0 or gate[t, i] > 0:
            arriving, into = grad[t, start:stop], out[t, :size]
            _back_one_step(arriving, before[t, :size], gain, threshold, slope, carried, into)
        else:
            out[t, :] = 0.0


@numba.njit(parallel=True, cache=True, error_model="numpy")
def reduce_tiles(
    x, gate, grad, grad_state, scale, shift, mean, gain, threshold, slope,
    partial, result, grad_gate,
):  # fmt: skip
    """Gradient g of the normalised current into result [Tx, n], and its sums.

    A constant x gets the sum over t. partial [chunks, 2, width]: sums of g and of g * (x - mean).
    grad_gate [T, tiles]: sums of the gradients of the spikes that an open gate would let through.
    """
    steps, n = grad.shape
    width = scale.size
    moving = x.shape[0] > 1
    tiles = (n + width - 1) // width
    for c in numba.prange(partial.shape[0]):
        before = np.empty((steps, width), x.dtype)
        out = np.empty((steps, width), x.dtype)
        carried = np.empty(width, x.dtype)
        first, second = partial[c, 0], partial[c, 1]
        for i in range(c * CHUNK, min(tiles, (c + 1) * CHUNK)):
            start, stop = i * width, min(n, (i + 1) * width)
            size = stop - start
            _through_time(
                x, gate, grad, grad_state, i, start, stop,
                scale, shift, gain, threshold, slope, before, carried, out,
            )  # fmt: skip
            if not moving:
                for t in range(1, steps):
                    _add(out[t, :size], out[0])
            for t in range(x.shape[0]):
                into = result[t, start:stop]
                into[:] = out[t, :size]
                if gate.size == 0 or gate[t, i] > 0:
                    _add_products(out[t, :size], x[t, start:stop], mean, first, second)
            if grad_gate.size > 0:
                for t in range(steps):
                    arriving = grad[t, start:stop]
                    grad_gate[t, i] = _sum_where_fired(arriving, before[t, :size], threshold)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def return_tiles(x, gate, scale, mean, along, offset, result):
    """g in result [Tx, n] -> `scale * g + along * (x - mean) + offset` where the gate is open."""
    n, width = x.shape[1], scale.size
    tiles = (n + width - 1) // width
    for c in numba.prange((tiles + CHUNK - 1) // CHUNK):
        for i in range(c * CHUNK, min(tiles, (c + 1) * CHUNK)):
            start, stop = i * width, min(n, (i + 1) * width)
            for t in range(x.shape[0]):
                if gate.size == 0 or gate[t, i] > 0:
                    into = result[t, start:stop]
                    _combine(x[t, start:stop], mean, scale, along, offset, into)


# --- autograd ---


@dataclass(frozen=True)
class Statistics:
    """Mean and biased variance per channel, float64 [C], and the rows that they are of.

    Attributes:
        count: rows of the batch, or 0 where the statistics do not depend on the batch.
    """

    mean: Tensor
    variance: Tensor
    count: float


@dataclass(frozen=True)
class _Affine:
    """Constants of one pass through a layer, in tiles."""

    width: int
    scale: np.ndarray
    shift: np.ndarray
    mean: np.ndarray


def fits(current: Tensor, norm: object) -> bool:
    """True where the fused layer applies: float32 or float64 on the CPU, a plain batch norm."""
    return (
        current.device.type == "cpu"
        and current.dtype in (torch.float32, torch.float64)
        and isinstance(norm, _BatchNorm)
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


def normalize_and_fire(
    current: Tensor,
    norm: _BatchNorm,
    neuron: FusedNeuron,
    steps: int,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Batch norm and LIF neurons over all steps, from zero potential.

    With several processes the statistics are those of all of them.

    Args:
        current: [Tx, R, C] contiguous, Tx = `steps`, or 1 for a current that is the same at every
            step. Float32 or float64.
        gate: [T, R] of 0 and 1, or None: closed rows hold their potential, fire nothing and stay
            out of the statistics. Its gradient is that of a mask on the spikes.

    Returns spikes [T, R, C] and potentials [R, C] after the last step. In training mode running
    statistics are updated as torch does it; fewer than two open rows take the running ones.
    """
    opened = None if gate is None else gate.detach().contiguous()
    statistics = _statistics(current.detach(), opened, norm)
    return _NormalizeAndFire.apply(  # pyright: ignore[reportReturnType] autograd's apply is untyped
        current, norm.weight, norm.bias, gate, statistics, norm.eps, neuron, steps
    )


def _statistics(x: Tensor, gate: Tensor | None, norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    own = float(x.shape[0] * x.shape[1]) if gate is None else float(gate.sum())
    count = float(sum_over_processes(torch.tensor(own, dtype=torch.float64)))
    if not norm.training or count < 2:
        return Statistics(norm.running_mean.double(), norm.running_var.double(), 0.0)
    found = _batch_statistics(x, gate, own, count)
    momentum = norm.momentum
    assert momentum is not None
    with torch.no_grad():
        unbiased = found.variance * (count / (count - 1))
        norm.running_mean.lerp_(found.mean.to(norm.running_mean), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var), momentum)
        if norm.num_batches_tracked is not None and gate is None:
            norm.num_batches_tracked.add_(1)
    return found


def _batch_statistics(x: Tensor, gate: Tensor | None, own: float, count: float) -> Statistics:
    """Sums are taken around the mean of a few rows, which keeps float32 sums of squares exact."""
    channels = x.shape[2]
    width = _width(channels, gate)
    flat = x.reshape(-1)
    some = x.reshape(-1, channels)[: 4 * TILE // channels + 1].double().mean(0)
    reference = some.to(x.dtype)
    partial = np.zeros((_chunks(flat.numel(), width), 2, width), _numpy_type(x))
    opened = _nothing(x, 1) if gate is None else gate.reshape(-1).to(x.dtype).numpy()
    with KERNELS:
        use_torch_threads()
        sum_tiles(flat.numpy(), opened, _tiled(reference, width), partial)
    sums = _add_partial(partial, channels)
    if processes() > 1:  # each process has a reference of its own: back to plain sums
        far = reference.double()
        squares = sums[1] + 2 * far * sums[0] + own * far.square()
        first, second = sum_over_processes(torch.stack([sums[0] + own * far, squares])) / count
        return Statistics(first, (second - first.square()).clamp(min=0.0), count)
    first, second = sums / count
    return Statistics(reference.double() + first, (second - first.square()).clamp(min=0.0), count)


class _NormalizeAndFire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        statistics: Statistics,
        eps: float,
        neuron: FusedNeuron,
        steps: int,
    ) -> tuple[Tensor, Tensor]:
        rows, channels = current.shape[1:]
        x = current.reshape(current.shape[0], -1)
        spikes = x.new_empty((steps, rows * channels))
        state = x.new_empty(rows * channels)
        affine = _affine(weight, bias, statistics, eps, _width(channels, gate), x.dtype)
        opened = _nothing(x, 2) if gate is None else gate.detach().contiguous().to(x.dtype).numpy()
        f = _numpy_type(x)
        with KERNELS:
            use_torch_threads()
            fire_tiles(
                x.numpy(),
                opened,
                affine.scale,
                affine.shift,
                *_constants(neuron, f)[:2],
                spikes.numpy(),
                state.numpy(),
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(current, weight, bias, gate)
        ctx.statistics, ctx.eps, ctx.neuron, ctx.steps = statistics, eps, neuron, steps
        return spikes.view(steps, rows, channels), state.view(rows, channels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        current, weight, bias, gate = ctx.saved_tensors
        statistics: Statistics = ctx.statistics
        neuron: FusedNeuron = ctx.neuron
        grad_spikes, grad_state = grads
        steps: int = ctx.steps
        rows, channels = current.shape[1:]
        x = current.reshape(current.shape[0], -1)
        if grad_spikes is None:
            grad_spikes = x.new_zeros((steps, rows, channels))
        width = _width(channels, gate)
        affine = _affine(weight, bias, statistics, ctx.eps, width, x.dtype)
        f = _numpy_type(x)
        opened = _nothing(x, 2) if gate is None else gate.contiguous().to(x.dtype).numpy()
        partial = np.zeros((_chunks(rows * channels, width), 2, width), f)
        grad_x = torch.empty_like(x)
        grad_gate = None
        if gate is not None and ctx.needs_input_grad[3]:
            grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        with KERNELS:
            use_torch_threads()
            reduce_tiles(
                x.numpy(),
                opened,
                grad_spikes.contiguous().view(steps, -1).numpy(),
                _nothing(x, 1) if grad_state is None else grad_state.contiguous().view(-1).numpy(),
                affine.scale,
                affine.shift,
                affine.mean,
                *_constants(neuron, f),
                partial,
                grad_x.numpy(),
                _nothing(x, 2) if grad_gate is None else grad_gate.numpy(),
            )
        deviation = (statistics.variance + ctx.eps).sqrt()
        sum_g, sum_gx = _add_partial(partial, channels)
        grad_weight, grad_bias = sum_gx / deviation, sum_g
        along = offset = torch.zeros_like(sum_g)
        if statistics.count:
            sum_g, sum_gx = sum_over_processes(torch.stack([sum_g, sum_gx]))
            scale = weight.double() / deviation
            along = -scale * sum_gx / deviation.square() / statistics.count
            offset = -scale * sum_g / statistics.count
        with KERNELS:
            use_torch_threads()
            return_tiles(
                x.numpy(),
                opened,
                affine.scale,
                affine.mean,
                _tiled(along.to(x.dtype), width),
                _tiled(offset.to(x.dtype), width),
                grad_x.numpy(),
            )
        return (
            grad_x.view_as(current),
            grad_weight.to(weight.dtype),
            grad_bias.to(bias.dtype),
            grad_gate,
            None,
            None,
            None,
            None,
        )


def _constants(neuron: FusedNeuron, number: Any) -> tuple[Any, Any, Any]:
    """Gain, threshold and slope; norse keeps them in float32 whatever it computes in."""
    values = neuron.gain, neuron.threshold, neuron.slope
    gain, threshold, slope = (number(np.float32(value)) for value in values)
    return gain, threshold, slope


def _affine(
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics,
    eps: float,
    width: int,
    dtype: torch.dtype,
) -> _Affine:
    scale = weight.detach().double() * (statistics.variance + eps).rsqrt()
    shift = bias.detach().double() - statistics.mean * scale
    scale, shift, mean = (_tiled(v.to(dtype), width) for v in (scale, shift, statistics.mean))
    return _Affine(width, scale, shift, mean)


def _width(channels: int, gate: Tensor | None) -> int:
    """Values of a tile: whole rows; a gate makes each row a tile of its own."""
    return channels if gate is not None else channels * max(1, TILE // channels)


def _chunks(values: int, width: int) -> int:
    return -(-values // (width * CHUNK))


def _tiled(values: Tensor, width: int) -> npt.NDArray[Any]:
    return np.tile(values.numpy(), width // values.numel())


def _add_partial(partial: npt.NDArray[Any], channels: int) -> Tensor:
    """Sums [2, C] in float64 of partial sums [chunks, 2, width]."""
    whole = partial.astype(np.float64).sum(0).reshape(2, -1, channels).sum(1)
    return torch.from_numpy(whole)


def _nothing(like: Tensor, axes: int) -> npt.NDArray[Any]:
    return np.empty((0,) * axes, _numpy_type(like))


def _numpy_type(values: Tensor) -> Any:
    return np.float64 if values.dtype == torch.float64 else np.float32
