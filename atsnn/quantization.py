"""Quantisation-aware training: the model in the integers that a neuron core holds.

`quantize_model` folds normalisation into the synapses and replaces every layer by one whose forward
pass is the chip's integer arithmetic (`atsnn.fixed_point`), carried in float tensors, where all
integers are exact; the backward pass goes straight through the roundings. Float master weights
stay the parameters. In evaluation the result is the *quantised torch model* that engine and Lava
equal to the last spike.
"""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import torch
from norse.torch.functional.threshold import threshold as spike
from torch import Tensor, nn
from torch.nn import functional

from atsnn import fixed_point
from atsnn.config import ModelConfig
from atsnn.errors import QuantizationError
from atsnn.fixed_point import NeuronConstants, NeuronModel, QuantizedSynapse
from atsnn.fused import FusedNeuron, fits, fixed_forward, run_fused
from atsnn.halting import Gate, HaltingScore
from atsnn.layers import (
    ConvLayer,
    StreamAdd,
    TokenLayer,
    gather_tokens,
    pointwise,
    spread_tokens,
    worth_gathering,
)
from atsnn.merging import TokenMerging, fixed_weights, floor_straight_through
from atsnn.neurons import SURROGATE, SURROGATE_SLOPE, run_rows, run_steps
from atsnn.spikformer import EncoderBlock, Spikformer


def straight_through(real: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in the forward pass, the gradient of `real` in the backward pass."""
    return real + (rounded - real).detach()


class FixedPointStep:
    """One step of the fixed-point LIF on float tensors that hold exact integers.

    Args:
        constants: of the layer.
        bias: of the membrane, broadcastable to the state, with gradient; None for none.
        scale: activation units per real unit of current.
        model: the real-valued neuron.
    """

    def __init__(
        self, constants: NeuronConstants, bias: Tensor | None, scale: float, model: NeuronModel
    ) -> None:
        if constants.du + 1 != fixed_point.DECAY_UNITY:
            raise QuantizationError("quantised training needs neurons without current memory")
        self.keep = (fixed_point.DECAY_UNITY - constants.dv) / fixed_point.DECAY_UNITY
        self.exact_in_float32 = float(np.log2(self.keep)).is_integer() if self.keep else True
        self.threshold = float(constants.threshold << fixed_point.ACTIVATION_SHIFT)
        self.bias = bias
        self.unit = 2**fixed_point.ACTIVATION_SHIFT * scale * model.gain

    def __call__(self, activation: Tensor, voltage: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and new voltage for integer activations."""
        current = wrap24(activation * 2**fixed_point.ACTIVATION_SHIFT)
        limit = float(fixed_point.STATE_LIMIT)
        driven = current if self.bias is None else current + self.bias
        new = (self._decay(voltage) + driven).clamp(-limit, limit)
        spikes = spike((new - self.threshold) / self.unit, SURROGATE, SURROGATE_SLOPE)
        return spikes, new * (1.0 - spikes)

    def run(
        self, activation: Tensor, gate: Tensor | None, voltage: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All steps of `activation` [T, B, ...]; fused where every integer is exact in float32."""
        if not (self.exact_in_float32 and fits(activation, voltage)):
            return run_steps(self, activation, gate, voltage)
        neuron = FusedNeuron(
            kernel=fixed_forward,
            keep=self.keep,
            gain=float(2**fixed_point.ACTIVATION_SHIFT),
            threshold=self.threshold,
            unit=self.unit,
            slope=SURROGATE_SLOPE,
            limit=float(fixed_point.STATE_LIMIT),
        )
        return run_fused(neuron, activation, self.bias, gate, voltage)

    def _decay(self, voltage: Tensor) -> Tensor:
        exact = voltage if self.exact_in_float32 else voltage.double()
        decayed = exact * self.keep
        return straight_through(decayed, torch.trunc(decayed)).to(voltage.dtype)


def wrap24(current: Tensor) -> Tensor:
    """The chip's 24-bit wrap; the identity for every layer whose bound the quantiser proved."""
    limit = float(fixed_point.STATE_LIMIT)
    return straight_through(current, torch.remainder(current + limit, 2.0**24) - limit)


class FixedPointNeuron(nn.Module):
    """LIF neurons behind attention: coincidence counts in, no bias."""

    def __init__(self, model: NeuronModel, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.constants = fixed_point.neuron_constants(model, scale, np.zeros(1))

    def _step(self) -> FixedPointStep:
        return FixedPointStep(self.constants, None, self.scale, self.model)

    def forward(
        self, current: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._step().run(current, gate, voltage)

    def forward_rows(
        self, current: Tensor, gate: Tensor, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return run_rows(self._step(), current, gate, voltage)


class FixedPointSynapse(nn.Module):
    """Folded weights and bias of one layer, and the integers that they round to.

    Args:
        weight, bias: float master parameters (normalisation folded in).
        model: neuron behind the synapse.
        input_max, input_scale: largest integer on an axon; integer per real unit.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        model: NeuronModel,
        input_max: int,
        input_scale: float,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())
        self.model = model
        self.input_max = input_max
        self.input_scale = input_scale
        self._cache: tuple[tuple[int, ...], QuantizedSynapse] | None = None

    def quantized(self) -> QuantizedSynapse:
        """The integers of the present master weights."""
        key = (self.weight._version, self.bias._version, self.weight.data_ptr())
        if self._cache is None or self._cache[0] != key:
            quantized = fixed_point.quantize_synapse(
                self.weight.detach().cpu().double().numpy(),
                self.bias.detach().cpu().double().numpy(),
                self.model,
                self.input_max,
                self.input_scale,
            )
            self._cache = (key, quantized)
        return self._cache[1]

    def integer_weight(self, quantized: QuantizedSynapse) -> Tensor:
        rounded = torch.from_numpy(quantized.weight).to(self.weight)
        return straight_through(self.weight * quantized.weight_scale, rounded)

    def step(self, quantized: QuantizedSynapse, axes: int) -> FixedPointStep:
        """The neurons' step; `axes` is the number of axes behind the channel axis."""
        real = self.bias * (quantized.scale * 2**fixed_point.ACTIVATION_SHIFT)
        rounded = torch.from_numpy(quantized.constants.bias).to(self.bias)
        bias = straight_through(real, rounded).reshape(-1, *(1,) * axes)
        return FixedPointStep(quantized.constants, bias, quantized.scale, self.model)


class FixedPointConvLayer(nn.Module):
    """Quantised form of `ConvLayer`."""

    def __init__(self, synapse: FixedPointSynapse, conv: nn.Conv2d) -> None:
        super().__init__()
        self.synapse = synapse
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups = conv.groups

    def forward(self, x: Tensor, repeat: int = 1) -> Tensor:
        quantized = self.synapse.quantized()
        weight = self.synapse.integer_weight(quantized)
        activation = functional.conv2d(
            x.flatten(0, 1), weight, None, self.stride, self.padding, self.dilation, self.groups
        )
        activation = activation.view(*x.shape[:2], *activation.shape[1:])
        activation = activation.expand(max(repeat, x.shape[0]), *activation.shape[1:])
        return self.synapse.step(quantized, 2).run(activation, None, None)[0]


class FixedPointTokenLayer(nn.Module):
    """Quantised form of `TokenLayer`."""

    def __init__(self, synapse: FixedPointSynapse) -> None:
        super().__init__()
        self.synapse = synapse

    def forward(
        self, x: Tensor, gate: Tensor | None = None, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        opened = worth_gathering(gate) if self.training and voltage is None else None
        if gate is not None and opened is not None:
            return self._gathered(x, gate, opened)
        return self._all(x, gate, voltage)

    def _all(self, x: Tensor, gate: Tensor | None, voltage: Tensor | None) -> tuple[Tensor, Tensor]:
        quantized = self.synapse.quantized()
        activation = pointwise(x, self.synapse.integer_weight(quantized), None)
        return self.synapse.step(quantized, 0).run(activation, gate, voltage)

    def _gathered(self, x: Tensor, gate: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the tokens `opened` [B, N]; others fire nothing and stay at zero."""
        index, rows, gates = gather_tokens(x, gate, opened)
        spikes, state = self._all(rows, gates, None)
        count = len(index)
        return spread_tokens(
            spikes.flatten(1, 2)[:, :count], state.flatten(0, 1)[:count], index, opened
        )

    def forward_rows(
        self, rows: Tensor, gate: Tensor, voltage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        quantized = self.synapse.quantized()
        activation = functional.linear(rows, self.synapse.integer_weight(quantized))
        return run_rows(self.synapse.step(quantized, 0), activation, gate, voltage)


class FixedPointHaltingScore(nn.Module):
    """Halting score from a table, in units of 1/4096; the stream carries `fraction_bits`."""

    def __init__(self, score: HaltingScore, levels: int, fraction_bits: int) -> None:
        super().__init__()
        self.gamma, self.beta = score.gamma, score.beta
        self.levels = levels
        self.fraction_bits = fraction_bits

    def table(self) -> np.ndarray:
        """int32 [levels], entry X for the stream value X / 2^F."""
        return fixed_point.halting_table(
            float(self.gamma.detach()), float(self.beta.detach()), self.levels, self.fraction_bits
        )

    def forward(self, x: Tensor) -> Tensor:
        channel = x[..., 0]
        table = torch.from_numpy(self.table()).to(channel)
        real = torch.sigmoid(self.gamma * channel / 2**self.fraction_bits + self.beta)
        return straight_through(real * fixed_point.SCORE_UNITY, table[channel.detach().long()])


class FixedPointReadout(nn.Module):
    """Integer read-out; logits are exact integers in float64, divided by one scale."""

    def __init__(self, head: nn.Linear, cells: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach().clone())
        self.bias = nn.Parameter(head.bias.detach().clone())
        self.cells = cells

    def integers(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Weight int32 (even, 8 bit), bias int64, and the scale of the logits."""
        return fixed_point.quantize_readout(
            self.weight.detach().cpu().double().numpy(),
            self.bias.detach().cpu().double().numpy(),
            self.cells,
        )

    def forward(self, x: Tensor, size: Tensor | None = None) -> Tensor:
        """x [T, B, N, D], size [B, N] -> logits [B, classes] float64."""
        weight, bias, scale = self.integers()
        total = x.double().sum(0)
        total = total.sum(1) if size is None else (total * size.double()[:, :, None]).sum(1)
        master, master_bias = self.weight.double(), self.bias.double()
        real_weight = master * (scale / self.cells)
        integer_weight = straight_through(real_weight, torch.from_numpy(weight).to(real_weight))
        real_bias = master_bias * scale
        integer_bias = straight_through(real_bias, torch.from_numpy(bias).to(real_bias))
        return functional.linear(total, integer_weight, integer_bias) / scale


class FixedPointStem(nn.Module):
    """Turns reals in [0, 1] into pixel integers in front of the quantised stem."""

    def __init__(self, stem: nn.Module, bits: int) -> None:
        super().__init__()
        self.stem = stem
        self.bits = bits

    def forward(self, image: Tensor) -> Tensor:
        return self.stem(torch.round(image * (2**self.bits - 1)))


def quantize_model(model: Spikformer) -> Spikformer:
    """Fold normalisation and put every layer into fixed point; `model` is left as it is.

    Parameters of the result are the folded float weights, to be trained further or used so.

    Raises:
        QuantizationError: a layer that the fixed-point format cannot hold.
    """
    if model.quantized:
        return model
    _check_attention(model.config)
    bits = model.config.quantization
    result = copy.deepcopy(model)
    result.quantized = True
    unit = 2**bits.fraction_bits
    pixel_max = 2**bits.pixel_bits - 1
    stem = result.stem
    stem.conv1 = _fixed_conv(stem.conv1, pixel_max, float(pixel_max))  # pyright: ignore[reportAttributeAccessIssue] replaced by its quantised form
    for name in ("conv2", "conv3", "conv4", "position"):
        setattr(stem, name, _fixed_conv(getattr(stem, name), 1, 1.0))
    stem.add = StreamAdd(unit, joins=2)
    result.stem = FixedPointStem(stem, bits.pixel_bits)  # pyright: ignore[reportAttributeAccessIssue] likewise
    for index, block in enumerate(result.block_list):
        _quantize_block(block, stream_max(index) * unit, unit)
    if result.adaptive:
        _quantize_halting(result, bits.fraction_bits)
    for selection in result.selection_list:
        selection.unit = float(unit)
    cells = model.config.steps * model.config.tokens * unit
    result.readout = FixedPointReadout(model.readout.head, cells)  # pyright: ignore[reportAttributeAccessIssue] likewise
    return result


def _check_attention(config: ModelConfig) -> None:
    """Coincidence counts must not wrap a current: at most tokens * channels of a head."""
    largest = config.tokens * (config.dim // config.heads)
    if largest > fixed_point.ACTIVATION_LIMIT:
        raise QuantizationError(
            f"attention: {config.tokens} tokens times {config.dim // config.heads} channels of a "
            f"head can count to {largest:,}, a current holds {fixed_point.ACTIVATION_LIMIT:,}; "
            "use more heads or smaller images"
        )


def stream_max(index: int) -> int:
    """Largest value of the residual stream in front of block `index` (counted from 0)."""
    return 2 + 2 * index


def _quantize_block(block: EncoderBlock, entering: int, unit: int) -> None:
    for name in ("q", "k", "v"):
        setattr(block, name, _fixed_tokens(getattr(block, name), entering, unit))
    block.proj = _fixed_tokens(block.proj, 1, 1)  # pyright: ignore[reportAttributeAccessIssue] replaced by its quantised form
    block.fc1 = _fixed_tokens(block.fc1, entering + unit, unit)  # pyright: ignore[reportAttributeAccessIssue] likewise
    block.fc2 = _fixed_tokens(block.fc2, 1, 1)  # pyright: ignore[reportAttributeAccessIssue] likewise
    scale = 1.0 / block.attention.scale
    block.attention.scale = 1.0
    block.attention_neuron = FixedPointNeuron(block.attention_neuron.model, scale)  # pyright: ignore[reportAttributeAccessIssue] likewise
    block.add_attention = StreamAdd(unit)
    block.add_mlp = StreamAdd(unit)
    if block.merging is not None:
        block.merging = _fixed_merging(block.merging)


def _fixed_merging(merging: TokenMerging) -> TokenMerging:
    return TokenMerging(
        merging.count,
        merging.minimum_similarity,
        merging.combine,
        merging.similarity,
        merging.assignment,
        fixed_weights,
        floor_straight_through,
    )


def _quantize_halting(model: Spikformer, fraction_bits: int) -> None:
    levels = [stream_max(i) * 2**fraction_bits + 1 for i in range(len(model.scores))]
    model.scores = nn.ModuleList(
        FixedPointHaltingScore(score, n, fraction_bits)
        for score, n in zip(model.score_list, levels, strict=True)
    )
    accumulate = model.config.halting.order != "blocks"
    model.gates = nn.ModuleList(_fixed_gate(model.config, accumulate) for _ in model.gates)
    if model.stem_merging is not None:
        stem = model.stem_merging
        stem.score = FixedPointHaltingScore(stem.score, levels[0], fraction_bits)  # pyright: ignore[reportAttributeAccessIssue] replaced by its quantised form
        stem.gate = _fixed_gate(model.config, accumulate=False)
        stem.merging = _fixed_merging(stem.merging)


def _fixed_gate(config: ModelConfig, accumulate: bool) -> Gate:
    threshold = fixed_point.halting_threshold(config.halting.epsilon)
    return Gate(float(threshold), float(fixed_point.SCORE_UNITY), accumulate)


def _fixed_conv(layer: ConvLayer, input_max: int, input_scale: float) -> FixedPointConvLayer:
    weight, bias = fold_norm(layer.synapse, layer.norm)
    synapse = FixedPointSynapse(weight, bias, layer.neuron.model, input_max, input_scale)
    return FixedPointConvLayer(synapse, layer.synapse)


def _fixed_tokens(layer: TokenLayer, input_max: int, input_scale: float) -> FixedPointTokenLayer:
    weight, bias = fold_norm(layer.synapse, layer.norm)
    synapse = FixedPointSynapse(weight, bias, layer.neuron.model, input_max, float(input_scale))
    return FixedPointTokenLayer(synapse)


@torch.no_grad()
def fold_norm(synapse: nn.Conv2d | nn.Linear, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a synapse with the batch normalisation behind it folded in."""
    weight = synapse.weight.detach()
    bias = weight.new_zeros(len(weight)) if synapse.bias is None else synapse.bias.detach()
    if isinstance(norm, nn.Identity):
        return weight, bias
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        raise QuantizationError(f"{type(norm).__name__}: only batch normalisation folds")
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    folded = weight.double() * factor.reshape(-1, *(1,) * (weight.dim() - 1))
    assert norm.running_mean is not None
    shifted = (bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    return folded.to(weight.dtype), shifted.to(weight.dtype)


@torch.no_grad()
def float_twin(model: Spikformer) -> Spikformer:
    """The float model with a quantised model's master weights: what rounding is judged by."""
    if not model.quantized:
        return model
    twin = Spikformer(model.config).to(next(model.parameters()).device)
    quantized_stem = model.stem.stem
    for name in ("conv1", "conv2", "conv3", "conv4", "position"):
        _restore(getattr(twin.stem, name), getattr(quantized_stem, name).synapse)
    for ours, theirs in zip(twin.block_list, model.block_list, strict=True):
        for name in ("q", "k", "v", "proj", "fc1", "fc2"):
            _restore(getattr(ours, name), getattr(theirs, name).synapse)
    for ours, theirs in zip(twin.score_list, model.score_list, strict=True):
        ours.gamma.copy_(theirs.gamma)
        ours.beta.copy_(theirs.beta)
    for ours, theirs in zip(twin.selection_list, model.selection_list, strict=True):
        ours.load_state_dict(theirs.state_dict())
    fixed = cast("FixedPointReadout", model.readout)
    twin.readout.head.weight.copy_(fixed.weight)
    twin.readout.head.bias.copy_(fixed.bias)
    return twin.eval()


def _restore(layer: ConvLayer | TokenLayer, synapse: FixedPointSynapse) -> None:
    layer.synapse.weight = nn.Parameter(synapse.weight.detach().clone())
    layer.synapse.bias = nn.Parameter(synapse.bias.detach().clone())
    layer.norm = nn.Identity()
