"""Converters of a Spikformer's own modules: layers, gates, attention, merging and read-out."""

from __future__ import annotations

from typing import Any

from torch import nn

from atsnn.halting import Gate as GateModule
from atsnn.halting import HaltingScore as HaltingScoreModule
from atsnn.layers import (
    AttentionCore,
    ConvLayer,
    SpikePool,
    StreamAdd,
    TimeFirst,
    TokenLayer,
    ToTokens,
)
from atsnn.layers import Hold as HoldModule
from atsnn.layers import Readout as ReadoutModule
from atsnn.merging import TokenMerging
from atsnn.neurons import SpikingNeuron
from atsnn.rivals import RandomDrop, SpikingTokenSelector, TokenPreference, TokenSelection
from export.converters import Call, Value, batch_norm_node, register_converter, to_numpy
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Gate,
    HaltingScore,
    Hold,
    Linear,
    Merge,
    OrPool,
    Readout,
    Reshape,
    Selection,
)


def _norm(call: Call, module: nn.Module, current: Value) -> Value:
    if isinstance(module, nn.Identity):
        return current
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        call.refuse(f"its norm is {type(module).__name__}", "use batch normalisation")
    node = batch_norm_node(call, module, call.part("norm"), f"{call.source}.norm")
    return call.add(node, "current", current)


def _neuron(
    call: Call, module: SpikingNeuron, current: Value, gate: Value | None, name: str, source: str
) -> Value:
    return call.add(LIF(name, source, module.model), "spikes", current, gate=gate)


@register_converter(ConvLayer)
def convert_conv_layer(call: Call, module: ConvLayer, x: Value, repeat: int = 1) -> Value:
    """Convolution, normalisation, neurons."""
    call.once()
    conv = module.synapse
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        call.refuse(f"its padding is {conv.padding} ({conv.padding_mode})", "give it in numbers")
    node = Conv(
        call.part("synapse"),
        f"{call.source}.synapse",
        to_numpy(conv.weight),
        None if conv.bias is None else to_numpy(conv.bias),
        (conv.stride[0], conv.stride[1]),
        (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]),
        conv.groups,
    )
    current = _norm(call, module.norm, call.add(node, "current", x))
    return _neuron(call, module.neuron, current, None, call.part("neuron"), f"{call.source}.neuron")


@register_converter(TokenLayer)
def convert_token_layer(
    call: Call, module: TokenLayer, x: Value, gate: Value | None = None, voltage: Any = None
) -> tuple[Value, None]:
    """Linear, normalisation, neurons over tokens, all under one gate."""
    call.once()
    linear = module.synapse
    bias = None if linear.bias is None else to_numpy(linear.bias)
    node = Linear(call.part("synapse"), f"{call.source}.synapse", to_numpy(linear.weight), bias)
    current = _norm(call, module.norm, call.add(node, "current", x, gate=gate))
    name, source = call.part("neuron"), f"{call.source}.neuron"
    return _neuron(call, module.neuron, current, gate, name, source), None


@register_converter(SpikingNeuron)
def convert_spiking_neuron(
    call: Call, module: SpikingNeuron, x: Value, gate: Value | None = None, voltage: Any = None
) -> tuple[Value, None]:
    """norse LIFBox neurons under a gate."""
    call.once()
    return _neuron(call, module, x, gate, call.name, call.source), None


@register_converter(SpikePool)
def convert_spike_pool(call: Call, module: SpikePool, x: Value) -> Value:
    """OR over 3x3 windows, stride 2."""
    return call.add(OrPool(call.name, call.source, (3, 3), (2, 2), (1, 1)), "spikes", x)


@register_converter(ToTokens)
def convert_to_tokens(call: Call, module: ToTokens, x: Value) -> Value:
    """Feature maps to tokens."""
    return call.add(Reshape(call.name, call.source, "tokens"), x.kind, x)


@register_converter(StreamAdd)
def convert_stream_add(call: Call, module: StreamAdd, spikes: Value, other: Value) -> Value:
    """Spikes that join the residual stream."""
    return call.add(Add(call.name, call.source, (0, 0)), "value", spikes, other)


@register_converter(AttentionCore)
def convert_attention(call: Call, module: AttentionCore, q: Value, k: Value, v: Value) -> Value:
    """Spiking self-attention."""
    return call.add(
        Attention(call.name, call.source, module.heads, module.scale), "current", q=q, k=k, v=v
    )


@register_converter(HaltingScoreModule)
def convert_halting_score(call: Call, module: HaltingScoreModule, x: Value) -> Value:
    """Halting score of each token from channel 0."""
    node = HaltingScore(
        call.name, call.source, float(module.gamma.detach()), float(module.beta.detach())
    )
    return call.add(node, "value", x)


@register_converter(GateModule)
def convert_gate(
    call: Call,
    module: GateModule,
    score: Value,
    alive: Value | None = None,
    carried: Any = None,
) -> tuple[Value, None]:
    """Gate of a block."""
    call.once()
    node = Gate(call.name, call.source, module.threshold / module.unit, module.accumulate)
    return call.add(node, "value", score=score, alive=alive), None


@register_converter(SpikingTokenSelector)
@register_converter(TokenPreference)
@register_converter(RandomDrop)
def convert_selection(
    call: Call, module: TokenSelection, x: Value, before: Value | None = None
) -> Value:
    """A decision outside of the network, handed over beside the image, and the gate it works."""
    call.once()
    chosen = Selection(call.part("chosen"), call.source, module.tokens)
    score = call.add(chosen, "value")
    return call.add(Gate(call.name, call.source, 0.5, accumulate=False), "value", score=score)


@register_converter(TimeFirst)
def convert_time_first(call: Call, module: TimeFirst, x: Value) -> Value:
    """Which axis is time: a graph knows one step at a time."""
    return x


@register_converter(HoldModule)
def convert_hold(call: Call, module: HoldModule, x: Value) -> Value:
    """The first step's value at every step."""
    return call.add(Hold(call.name, call.source), "value", x)


@register_converter(TokenMerging)
def convert_merging(
    call: Call,
    module: TokenMerging,
    x: Value,
    gate: Value | None,
    alive: Value | None = None,
    size: Value | None = None,
    keys: Value | None = None,
    latched: Any = None,
) -> tuple[Value, Value, Value, Value, None]:
    """Merging of similar tokens; four outputs."""
    call.once()
    if gate is None:
        call.refuse("it has no gate", "put a Gate in front of its block")
    node = Merge(
        call.name,
        call.source,
        module.count,
        module.minimum_similarity,
        module.combine,  # type: ignore[arg-type]  # checked by the model's configuration
        module.similarity,  # type: ignore[arg-type]
        module.assignment,  # type: ignore[arg-type]
    )
    compared = keys if module.similarity == "keys" else None
    out = call.add(node, "value", x=x, gate=gate, alive=alive, size=size, keys=compared)
    others = [Value(node.name, port, out.shape[:1], "value") for port in node.outputs[1:]]
    return out, others[0], others[1], others[2], None


@register_converter(ReadoutModule)
def convert_readout(
    call: Call, module: ReadoutModule, x: Value, size: Value | None = None
) -> Value:
    """Logits from the mean over time and the size-weighted mean over tokens."""
    node = Readout(call.name, call.source, to_numpy(module.head.weight), to_numpy(module.head.bias))
    return call.add(node, "value", x=x, size=size)
