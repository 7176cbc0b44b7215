"""A graph as a torch module: the masked form, independent of the numpy engine.

Float graphs run in float32 with norse's order of operations; quantised graphs hold exact integers
in float32 (in float64 where a layer's bound exceeds 2^24), membranes in int64. Halted tokens are
masked, never left out, so that the comparison with the engine, which leaves them out, is a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atsnn.fixed_point import (
    ACTIVATION_SHIFT,
    DECAY_UNITY,
    EXACT_FLOAT32,
    MERGE_UNITY,
    SCORE_UNITY,
    STATE_LIMIT,
    pixels_to_integers,
)
from export.errors import GraphError
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Gate,
    Graph,
    HaltingScore,
    Hold,
    Input,
    Linear,
    Merge,
    Node,
    Norm,
    OrPool,
    Output,
    Readout,
    Reshape,
    Selection,
)
from export.ranges import maxima
from export.shapes import shapes
from export.validation import validate

Values = dict[str, list[Tensor]]
State = dict[str, Any]
Trace = dict[str, npt.NDArray]


def graph_to_torch(graph: Graph) -> GraphModule:
    """A module `images -> logits` (or spike counts) that executes the graph.

    Raises:
        GraphError: the graph is not valid, or looks back while it merges by all steps.
    """
    return GraphModule(graph)


def torch_trace(
    graph: Graph,
    images: npt.NDArray,
    *,
    selection: Mapping[str, npt.NDArray] | None = None,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Spikes, gates and logits of a graph on images, to be compared with other executors.

    Args:
        images: uint8 pixels [B, *input shape] for a quantised graph (events [T, B, ...] of 0 and 1
            where the input has one bit), reals for a float graph.
        selection: of each Selection node the tokens that are processed, 0 or 1 [B, N].
        batch: images at a time.
        progress: called with (images done, images in all).

    Returns:
        LIF and OrPool nodes: bool [T, B, ...]; Gate nodes: uint8 [T, B, N]; `logits`: float64.
    """
    module = graph_to_torch(graph).eval()
    axis = 1 if module.takes_events(images) else 0
    total = images.shape[axis]
    parts: list[Trace] = []
    with torch.no_grad():
        for start in range(0, total, batch):
            stop = min(start + batch, total)
            chunk = images[:, start:stop] if axis else images[start:stop]
            chosen = {name: mask[start:stop] for name, mask in (selection or {}).items()}
            parts.append(_traced(module, chunk, chosen))
            if progress:
                progress(stop, total)
    if not parts:
        raise GraphError("no images to run; give at least one")
    return {
        key: np.concatenate([part[key] for part in parts], axis=0 if key == "logits" else 1)
        for key in parts[0]
    }


def _traced(
    module: GraphModule, images: npt.NDArray, selection: Mapping[str, npt.NDArray]
) -> Trace:
    masks = {name: torch.from_numpy(np.array(mask)) for name, mask in selection.items()}
    values = module.run(module.prepare(images), masks)
    kinds: dict[type[Node], Any] = {LIF: bool, OrPool: bool, Gate: np.uint8}
    trace = {
        node.name: module.all_steps(values[node.name, "out"]).numpy().astype(kinds[type(node)])
        for node in module.graph.of_kind(LIF, OrPool, Gate)
    }
    return {**trace, "logits": module.result(values).double().numpy()}


class GraphModule(nn.Module):
    """Executes one graph. `forward` returns logits [B, classes], or spike counts [B, ...]."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = validate(graph)
        self._shapes = shapes(graph)
        self._image = graph.input.shape
        self._once = graph.once
        self._masks: dict[str, Tensor] = {}
        self._bounds = maxima(graph) if graph.quantized else {}
        for node in graph.nodes:
            _check_look_back(graph, node)
            for label, array in _arrays(node):
                tensor = torch.from_numpy(np.array(array)).to(self._dtype(node))
                self.register_buffer(_buffer(node, label), tensor)

    def _dtype(self, node: Node) -> torch.dtype:
        if not self.graph.quantized:
            return torch.float32
        if isinstance(node, Readout) or self._bounds[node.name, node.outputs[0]] > EXACT_FLOAT32:
            return torch.float64
        return torch.int64 if isinstance(node, LIF | HaltingScore) else torch.float32

    def array(self, node: Node, label: str) -> Tensor | None:
        """The tensor that holds field `label` of a node."""
        return getattr(self, _buffer(node, label), None)

    def takes_events(self, images: npt.NDArray) -> bool:
        """True if `images` has a time axis before its batch axis."""
        return images.ndim == len(self.graph.input.shape) + 2

    def prepare(self, images: npt.NDArray) -> Tensor:
        """Pixels to what the first layer receives: integers of the input's bits, or reals.

        Raises:
            GraphError: images of another size or type than the graph takes.
        """
        node = self.graph.input
        rank = len(node.shape)
        if images.shape[-rank:] != node.shape or images.ndim not in (rank + 1, rank + 2):
            raise GraphError(
                f"images of shape {list(images.shape[1:])}, the graph takes {list(node.shape)}; "
                "resize the images or choose another graph"
            )
        if self.takes_events(images) and images.shape[0] != self.graph.steps:
            raise GraphError(
                f"events of {images.shape[0]} steps, the graph runs {self.graph.steps}; "
                "bin the events into as many steps"
            )
        if self.graph.quantized and not self.takes_events(images):
            if images.dtype != np.uint8:
                raise GraphError(f"pixels are {images.dtype}; a quantised graph takes uint8")
            images = pixels_to_integers(images, node.bits)
        return torch.from_numpy(np.ascontiguousarray(images, np.float32))

    def forward(self, images: Tensor) -> Tensor:
        """`images` as `prepare` returns them, [B, ...] or [T, B, ...]."""
        return self.result(self.run(images))

    def result(self, values: dict[tuple[str, str], Tensor]) -> Tensor:
        """Logits, or the spikes of the last layer summed over time."""
        output = next(iter(self.graph.of_kind(Output)))
        (edge,) = self.graph.into(output.name)
        value = values[edge.source, edge.source_port]
        return value if isinstance(self.graph[edge.source], Readout) else value.sum(0)

    def all_steps(self, value: Tensor) -> Tensor:
        """A value over all time steps; what runs at the first step only holds."""
        return value.expand(self.graph.steps, *value.shape[1:]) if len(value) == 1 else value

    def run(
        self, images: Tensor, selection: Mapping[str, Tensor] | None = None
    ) -> dict[tuple[str, str], Tensor]:
        """Every output port over time, [T, B, ...]; of a Readout, [B, classes].

        Where a node runs at the first step only, T is 1.

        Args:
            images: as `prepare` returns them. selection: see `torch_trace`.

        Raises:
            GraphError: a Selection node without a mask of its shape.
        """
        self._masks = self._checked_masks(selection or {}, images.shape[-len(self._image) - 1])
        if images.dim() == len(self.graph.input.shape) + 1:
            images = images.expand(self.graph.steps, *images.shape)
        if self.graph.feedback:
            return self._step_by_step(images)
        values: dict[tuple[str, str], Tensor] = {}
        for node in self.graph.nodes:
            self._execute(node, images, values, {}, {})
        return values

    def _step_by_step(self, images: Tensor) -> dict[tuple[str, str], Tensor]:
        state: dict[str, State] = {node.name: {} for node in self.graph.nodes}
        history: list[dict[tuple[str, str], Tensor]] = []
        last = [node for node in self.graph.nodes if isinstance(node, Readout | Output)]
        for t in range(self.graph.steps):
            values: dict[tuple[str, str], Tensor] = {}
            before = history[-1] if history else {}
            for node in self.graph.nodes:
                if t and node.name in self._once:
                    values.update({port: v for port, v in before.items() if port[0] == node.name})
                elif node not in last:
                    self._execute(node, images[t : t + 1], values, state[node.name], before)
            history.append(values)
        joined = {port: torch.cat([values[port] for values in history]) for port in history[0]}
        for node in last:
            self._execute(node, images, joined, {}, {})
        return joined

    def _execute(
        self,
        node: Node,
        images: Tensor,
        values: dict[tuple[str, str], Tensor],
        state: State,
        before: dict[tuple[str, str], Tensor],
    ) -> None:
        arriving: Values = {}
        for edge in self.graph.into(node.name):
            port = (edge.source, edge.source_port)
            if not edge.lag:
                value = values[port]
            elif port in before:
                value = before[port]
            else:
                value = torch.zeros(1, images.shape[1], *self._shapes[port])
            arriving.setdefault(edge.target_port, []).append(value)
        if isinstance(node, Input):
            arriving["in"] = [images[:1] if node.name in self._once else images]
        result = _EXECUTORS[node.kind](self, node, arriving, state)
        for port, value in zip(node.outputs, result, strict=True):
            values[node.name, port] = value

    def _checked_masks(self, selection: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
        names = {node.name for node in self.graph.of_kind(Selection)}
        for name in sorted(names ^ selection.keys()):
            raise GraphError(
                f"selection of {name}: the graph has Selection nodes {sorted(names)}, masks are "
                f"given for {sorted(selection)}; give one mask [images, tokens] for each"
            )
        for name, mask in selection.items():
            wanted = (images, *self._shapes[name, "out"])
            if tuple(mask.shape) != wanted:
                raise GraphError(
                    f"selection of {name}: shape {list(mask.shape)}, it needs {list(wanted)}"
                )
        unit = float(SCORE_UNITY if self.graph.quantized else 1)
        return {name: (mask <= 0).float() * unit for name, mask in selection.items()}

    def mask(self, node: Selection) -> Tensor:
        """Score [1, B, N] of the tokens that are left out."""
        return self._masks[node.name][None]


def _buffer(node: Node, label: str) -> str:
    return f"{node.name}/{label}".replace(".", "/")


def _arrays(node: Node) -> list[tuple[str, npt.NDArray]]:
    found = [(label, value) for label, value in vars(node).items() if isinstance(value, np.ndarray)]
    if isinstance(node, LIF) and node.constants is not None:
        found.append(("bias", node.constants.bias))
    return found


def _check_look_back(graph: Graph, node: Node) -> None:
    if graph.feedback and isinstance(node, Merge) and node.assignment == "all":
        raise GraphError(
            f"{node.name} merges by all steps in a graph whose gates look back step by step; "
            "use assignment 'first'"
        )


def _channels_last(parameter: Tensor, value: Tensor) -> Tensor:
    """A parameter [C] shaped to broadcast against [..., C, H, W] (5 axes) or [..., C]."""
    return parameter[:, None, None] if value.dim() == 5 else parameter


# --- one function per kind of node: (module, node, arriving values, state) -> output ports ---

Result = tuple[Tensor, ...]


def _input(_: GraphModule, __: Input, arriving: Values, ___: State) -> Result:
    return (arriving["in"][0],)


def _selection(module: GraphModule, node: Selection, _: Values, __: State) -> Result:
    score = module.mask(node)
    steps = 1 if module.graph.feedback else module.graph.steps
    return (score.expand(steps, *score.shape[1:]),)


def _hold(module: GraphModule, _: Hold, arriving: Values, __: State) -> Result:
    first = arriving["in"][0][:1]
    return (first if module.graph.feedback else module.all_steps(first),)


def _conv(module: GraphModule, node: Conv, arriving: Values, _: State) -> Result:
    (x,) = arriving["in"]
    weight, bias = module.array(node, "weight"), module.array(node, "bias")
    assert weight is not None
    flat = x.flatten(0, 1).to(weight.dtype)
    out = F.conv2d(flat, weight, bias, node.stride, node.padding, node.dilation, node.groups)
    return (out.unflatten(0, x.shape[:2]),)


def _linear(module: GraphModule, node: Linear, arriving: Values, _: State) -> Result:
    (x,) = arriving["in"]
    weight = module.array(node, "weight")
    assert weight is not None
    out = F.linear(x.to(weight.dtype), weight, module.array(node, "bias"))
    if "gate" in arriving:
        out = out * arriving["gate"][0][..., None]
    return (out,)


def _norm(module: GraphModule, node: Norm, arriving: Values, _: State) -> Result:
    (x,) = arriving["in"]
    mean, variance = module.array(node, "mean"), module.array(node, "variance")
    weight, bias = module.array(node, "weight"), module.array(node, "bias")
    flat = x.flatten(0, 1) if x.dim() == 5 else x.flatten(0, -2)
    out = F.batch_norm(flat, mean, variance, weight, bias, False, 0.0, node.epsilon)
    return (out.view(x.shape),)


def _lif(module: GraphModule, node: LIF, arriving: Values, state: State) -> Result:
    (x,) = arriving["in"]
    step = _fixed_step if module.graph.quantized else _float_step
    if not state:
        state["current"] = state["voltage"] = torch.zeros_like(
            x[0], dtype=torch.int64 if module.graph.quantized else x.dtype
        )
    gates = arriving.get("gate")
    fired = []
    for t in range(len(x)):
        current, voltage, spikes = step(module, node, x[t], state["current"], state["voltage"])
        if gates is not None:
            gate = gates[0][t][..., None]
            spikes = spikes * gate
            current = torch.where(gate > 0, current, state["current"])
            voltage = torch.where(gate > 0, voltage, state["voltage"])
        state["current"], state["voltage"] = current, voltage
        fired.append(spikes)
    return (torch.stack(fired),)


def _float_step(
    _: GraphModule, node: LIF, x: Tensor, current: Tensor, voltage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    model = node.model
    if model.current_rate != 1:
        x = current + x
        current = x + (-model.current_rate) * x
        change = model.membrane_rate * ((model.leak - voltage) + x)
    else:
        change = model.membrane_rate * (x + model.leak - voltage)
    voltage = voltage + change if model.membrane_rate else voltage + x
    spikes = (voltage - model.threshold > 0).to(x.dtype)
    return current, voltage * (1 - spikes), spikes


def _fixed_step(
    module: GraphModule, node: LIF, x: Tensor, current: Tensor, voltage: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    constants, bias = node.constants, module.array(node, "bias")
    assert constants is not None
    assert bias is not None
    bias = bias[:, None, None] if x.dim() == 4 else bias
    current = _decayed(current, constants.du + 1) + x.to(torch.int64) * 2**ACTIVATION_SHIFT
    current = torch.remainder(current + STATE_LIMIT, 2**24) - STATE_LIMIT
    voltage = (_decayed(voltage, constants.dv) + current + bias).clamp(-STATE_LIMIT, STATE_LIMIT)
    fired = voltage > constants.threshold * 2**ACTIVATION_SHIFT
    return current, voltage.masked_fill(fired, 0), fired.to(torch.float32)


def _decayed(state: Tensor, constant: int) -> Tensor:
    return torch.div(state * (DECAY_UNITY - constant), DECAY_UNITY, rounding_mode="trunc")


def _or_pool(_: GraphModule, node: OrPool, arriving: Values, __: State) -> Result:
    (x,) = arriving["in"]
    padded = F.pad(x.flatten(0, 1), (*node.padding[1:] * 2, *node.padding[:1] * 2))
    return (F.max_pool2d(padded, node.kernel, node.stride).unflatten(0, x.shape[:2]),)


def _reshape(_: GraphModule, node: Reshape, arriving: Values, __: State) -> Result:
    (x,) = arriving["in"]
    return (x.flatten(3).transpose(2, 3) if node.to == "tokens" else x.flatten(2),)


def _add(_: GraphModule, node: Add, arriving: Values, __: State) -> Result:
    parts = [value * 2**shift for value, shift in zip(arriving["in"], node.shifts, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return (total,)


def _attention(_: GraphModule, node: Attention, arriving: Values, __: State) -> Result:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(3, (node.heads, -1)).transpose(2, 3)

    q, k, v = (heads(arriving[port][0]) for port in ("q", "k", "v"))
    mixed = q @ (k.transpose(-1, -2) @ v)
    return ((mixed * node.scale).transpose(2, 3).flatten(3),)


def _halting_score(module: GraphModule, node: HaltingScore, arriving: Values, _: State) -> Result:
    x = arriving["in"][0][..., 0]
    table = module.array(node, "table")
    if table is None:
        return (torch.sigmoid(node.gamma * x + node.beta),)
    return (table[x.to(torch.int64)],)


def _gate(_: GraphModule, node: Gate, arriving: Values, state: State) -> Result:
    arrived = arriving["score"]
    score = arrived[0]
    for other in arrived[1:]:
        score = score + other
    if node.accumulate:
        total = score.cumsum(0) + state.get("total", 0)
        state["total"] = total[-1]
    else:
        total = score
    gate = (total < node.threshold).to(torch.float32)
    if "alive" in arriving:
        gate = gate * arriving["alive"][0]
    return (gate,)


def _merge(module: GraphModule, node: Merge, arriving: Values, state: State) -> Result:
    x, gate = arriving["x"][0], arriving["gate"][0]
    ones = torch.ones_like(gate)
    alive = arriving["alive"][0] if "alive" in arriving else ones
    size = arriving["size"][0] if "size" in arriving else ones
    if "partner" not in state:
        features = arriving["keys"][0] if node.similarity == "keys" else x
        seen = features[:1] if node.assignment == "first" else features
        state["partner"] = _partners(node, seen.double(), (gate[0] * alive[0]) > 0)
    partner = state["partner"]
    joined = F.one_hot(partner.clamp(min=0), x.shape[2]).to(x.dtype) * (partner >= 0)[..., None]
    stays = (partner < 0).to(x.dtype)
    new_size = size * stays + torch.einsum("ban,tba->tbn", joined, size)
    out = _COMBINE[node.combine](module, x, joined, size, new_size)
    return out, gate * stays, alive * stays, new_size


def _partners(node: Merge, features: Tensor, eligible: Tensor) -> Tensor:
    """Index of the token that each token joins, -1 for those that stay, int64 [B, N]."""
    images, tokens = eligible.shape
    gram = torch.einsum("tbid,tbjd->bij", features, features)
    norm = gram.diagonal(dim1=1, dim2=2)
    usable = eligible & (norm > 0)
    squared = gram * gram.abs() / (norm[:, :, None] * norm[:, None, :]).clamp(min=1e-300)
    partner = torch.full((images, tokens), -1, dtype=torch.int64)
    for b in range(images):
        edges = []
        odd = [j for j in range(1, tokens, 2) if usable[b, j]]
        for i in range(0, tokens, 2):
            if not usable[b, i] or not odd:
                continue
            row = squared[b, i, odd].tolist()
            best = max(row)
            if best > 0 and best >= node.minimum_similarity**2:
                edges.append((-best, i, odd[row.index(best)]))
        for _, i, j in sorted(edges)[: node.count or None]:
            partner[b, i] = j
    return partner


def _combine_mean(
    module: GraphModule, x: Tensor, joined: Tensor, size: Tensor, new_size: Tensor
) -> Tensor:
    total = torch.einsum("ban,tbn->tba", joined, new_size).clamp(min=1)
    target = joined.sum(1) > 0
    if not module.graph.quantized:
        share = size / total
        moved = torch.einsum("ban,tbad->tbnd", joined, share[..., None] * x)
        rest = 1 - torch.einsum("ban,tba->tbn", joined, share)
        return torch.where(target[None, :, :, None], moved + rest[..., None] * x, x)
    share = torch.div(MERGE_UNITY * size.double(), total.double(), rounding_mode="floor")
    moved = torch.einsum("ban,tbad->tbnd", joined.double(), share[..., None] * x.double())
    rest = MERGE_UNITY - torch.einsum("ban,tba->tbn", joined.double(), share)
    mixed = torch.div(moved + rest[..., None] * x.double(), MERGE_UNITY, rounding_mode="floor")
    return torch.where(target[None, :, :, None], mixed.to(x.dtype), x)


def _combine_max(
    _: GraphModule, x: Tensor, joined: Tensor, size: Tensor, new_size: Tensor
) -> Tensor:
    out = x.clone()
    for b, a in (joined.sum(2) > 0).nonzero().tolist():
        n = int(joined[b, a].argmax())
        out[:, b, n] = torch.maximum(out[:, b, n], x[:, b, a])
    return out


def _combine_keep(
    _: GraphModule, x: Tensor, joined: Tensor, size: Tensor, new_size: Tensor
) -> Tensor:
    out, largest = x.clone(), size.clone()
    for b, a in (joined.sum(2) > 0).nonzero().tolist():
        n = int(joined[b, a].argmax())
        wins = size[:, b, a] > largest[:, b, n]
        out[:, b, n] = torch.where(wins[:, None], x[:, b, a], out[:, b, n])
        largest[:, b, n] = torch.where(wins, size[:, b, a], largest[:, b, n])
    return out


_COMBINE = {"mean": _combine_mean, "max": _combine_max, "keep": _combine_keep}


def _readout(module: GraphModule, node: Readout, arriving: Values, _: State) -> Result:
    (x,) = arriving["x"]
    weight, bias = module.array(node, "weight"), module.array(node, "bias")
    assert weight is not None
    assert bias is not None
    if "size" in arriving:
        x = x * arriving["size"][0][..., None]
    if not module.graph.quantized:
        mean = x.mean((0, 2)) if x.dim() == 4 else x.mean(0)
        return (F.linear(mean, weight, bias) / node.scale,)
    total = x.double().sum((0, 2)) if x.dim() == 4 else x.double().sum(0)
    return (F.linear(total, weight, bias) / node.scale,)


def _output(_: GraphModule, __: Output, arriving: Values, ___: State) -> Result:
    return (arriving["in"][0],)


_EXECUTORS: dict[str, Callable[..., Result]] = {
    "Input": _input,
    "Selection": _selection,
    "Hold": _hold,
    "Conv": _conv,
    "Linear": _linear,
    "Norm": _norm,
    "LIF": _lif,
    "OrPool": _or_pool,
    "Reshape": _reshape,
    "Add": _add,
    "Attention": _attention,
    "HaltingScore": _halting_score,
    "Gate": _gate,
    "Merge": _merge,
    "Readout": _readout,
    "Output": _output,
}
