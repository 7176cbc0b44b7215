"""The semantics of a quantised graph written out plainly: one image, step by step, int64, masked.

Nothing is left out here and nothing is fast. Halted tokens are computed and then masked, so that
equality with the engine, which leaves their rows out, says something. Shares no code with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from export.graph import Graph, Input, Merge, Node, Readout

Values = dict[tuple[str, str], np.ndarray]


def simulate(graph: Graph, image: np.ndarray) -> tuple[list[Values], np.ndarray | None]:
    """Values of every output port at every time step, and the logits (None without Readout)."""
    if any(isinstance(n, Merge) and n.assignment == "all" for n in graph.nodes):
        raise NotImplementedError("assignment 'all' needs all steps first")
    state: dict[str, Any] = {}
    history: list[Values] = []
    for _ in range(graph.steps):
        now: Values = {}
        for node in graph.nodes:
            arriving: dict[str, list[np.ndarray]] = {}
            for edge in graph.into(node.name):
                port = (edge.source, edge.source_port)
                if edge.lag:
                    late = history[-1][port] if history else np.zeros(_tokens(graph, now), int)
                    arriving.setdefault(edge.target_port, []).append(late)
                elif port in now:
                    arriving.setdefault(edge.target_port, []).append(now[port])
            if isinstance(node, Input):
                now[node.name, "out"] = image.astype(np.int64) >> (8 - node.bits)
            else:
                now.update(_RULES[node.kind](node, arriving, state))
        history.append(now)
    for node in graph.nodes:
        if isinstance(node, Readout):
            total = node.weight.astype(np.int64) @ state[node.name] + node.bias
            return history, total / node.scale
    return history, None


def _tokens(graph: Graph, now: Values) -> int:
    return next(len(value) for value in now.values() if value.ndim == 2)


def _conv(node: Any, arriving: dict, _: dict) -> Values:
    (x,) = arriving["in"]
    out_channels, in_channels, kernel_h, kernel_w = node.weight.shape
    (sy, sx), (py, px), (dy, dx) = node.stride, node.padding, node.dilation
    padded = np.pad(x, ((0, 0), (py, py), (px, px)))
    height = (padded.shape[1] - dy * (kernel_h - 1) - 1) // sy + 1
    width = (padded.shape[2] - dx * (kernel_w - 1) - 1) // sx + 1
    out = np.zeros((out_channels, height, width), np.int64)
    per_group = out_channels // node.groups
    for o in range(out_channels):
        first = (o // per_group) * in_channels
        for y in range(height):
            for z in range(width):
                window = padded[
                    first : first + in_channels,
                    y * sy : y * sy + dy * kernel_h : dy,
                    z * sx : z * sx + dx * kernel_w : dx,
                ][:, :kernel_h, :kernel_w]
                out[o, y, z] = (window * node.weight[o]).sum()
    return {(node.name, "out"): out}


def _linear(node: Any, arriving: dict, _: dict) -> Values:
    out = arriving["in"][0] @ node.weight.T.astype(np.int64)
    if "gate" in arriving:
        out = out * arriving["gate"][0][:, None]
    return {(node.name, "out"): out}


def _lif(node: Any, arriving: dict, state: dict) -> Values:
    (x,) = arriving["in"]
    c = node.constants
    bias = (c.bias_mantissa.astype(np.int64) << c.bias_exponent).reshape(-1, *[1] * (x.ndim - 1))
    bias = bias if x.ndim == 3 else bias.reshape(-1)
    u, v = state.get(node.name, (np.zeros_like(x), np.zeros_like(x)))

    def decayed(value: np.ndarray, keep: int) -> np.ndarray:
        return np.sign(value) * (np.abs(value) * keep // 4096)

    limit = 2**23 - 1
    new_u = (decayed(u, 4096 - (c.du + 1)) + x * 64 + limit) % 2**24 - limit
    new_v = np.clip(decayed(v, 4096 - c.dv) + new_u + bias, -limit, limit)
    fired = (new_v > c.threshold * 64).astype(np.int64)
    new_v = new_v * (1 - fired)
    if "gate" in arriving:
        gate = arriving["gate"][0][:, None].astype(bool)
        new_u, new_v, fired = np.where(gate, new_u, u), np.where(gate, new_v, v), fired * gate
    state[node.name] = new_u, new_v
    return {(node.name, "out"): fired}


def _or_pool(node: Any, arriving: dict, _: dict) -> Values:
    (x,) = arriving["in"]
    (ky, kx), (sy, sx), (py, px) = node.kernel, node.stride, node.padding
    padded = np.pad(x, ((0, 0), (py, py), (px, px)))
    rows = range(0, padded.shape[1] - ky + 1, sy)
    columns = range(0, padded.shape[2] - kx + 1, sx)
    out = [[padded[:, y : y + ky, z : z + kx].max(axis=(1, 2)) for z in columns] for y in rows]
    return {(node.name, "out"): np.moveaxis(np.array(out), 2, 0)}


def _reshape(node: Any, arriving: dict, _: dict) -> Values:
    (x,) = arriving["in"]
    out = x.reshape(-1) if node.to == "flatten" else x.reshape(x.shape[0], -1).T
    return {(node.name, "out"): out}


def _add(node: Any, arriving: dict, _: dict) -> Values:
    parts = zip(arriving["in"], node.shifts, strict=True)
    return {(node.name, "out"): sum(part * 2**shift for part, shift in parts)}


def _attention(node: Any, arriving: dict, _: dict) -> Values:
    q, k, v = (arriving[port][0] for port in "qkv")
    d = q.shape[1] // node.heads
    out = np.zeros_like(q)
    for h in range(node.heads):
        part = slice(h * d, (h + 1) * d)
        out[:, part] = (q[:, part] @ k[:, part].T) @ v[:, part]
    return {(node.name, "out"): out}


def _score(node: Any, arriving: dict, _: dict) -> Values:
    return {(node.name, "out"): node.table.astype(np.int64)[arriving["in"][0][:, 0]]}


def _gate(node: Any, arriving: dict, state: dict) -> Values:
    total = sum(arriving["score"]) + (state.get(node.name, 0) if node.accumulate else 0)
    state[node.name] = total
    out = (total < node.threshold).astype(np.int64)
    return {(node.name, "out"): out * arriving["alive"][0] if "alive" in arriving else out}


def _merge(node: Any, arriving: dict, state: dict) -> Values:
    x, gate = arriving["x"][0], arriving["gate"][0]
    if node.name not in state:
        alive = arriving["alive"][0].copy() if "alive" in arriving else np.ones(len(x), np.int64)
        size = arriving["size"][0].copy() if "size" in arriving else np.ones(len(x), np.int64)
        compared = arriving["keys"][0] if node.similarity == "keys" else x
        state[node.name] = _pairs(node, compared, gate * alive), alive, size
    pairs, alive, size = state[node.name]
    out, new_alive, new_size = x.copy(), alive.copy(), size.copy()
    for b in {b for _, b in pairs}:
        givers = [a for a, target in pairs if target == b]
        total = size[b] + sum(size[a] for a in givers)
        if node.combine == "mean":
            weights = [256 * size[a] // total for a in givers]
            kept = (256 - sum(weights)) * x[b]
            out[b] = (kept + sum(w * x[a] for w, a in zip(weights, givers, strict=True))) // 256
        elif node.combine == "max":
            out[b] = np.max([x[b], *(x[a] for a in givers)], axis=0)
        else:
            out[b] = x[max([b, *givers], key=lambda k: size[k])]  # max keeps the first of equals
        new_size[b] = total
        new_size[givers], new_alive[givers] = 0, 0
    return {
        (node.name, "out"): out,
        (node.name, "gate"): gate * new_alive,
        (node.name, "alive"): new_alive,
        (node.name, "size"): new_size,
    }


def _pairs(node: Any, vectors: np.ndarray, open_tokens: np.ndarray) -> list[tuple[int, int]]:
    norm = [int(vector @ vector) for vector in vectors]
    usable = [k for k in range(len(vectors)) if open_tokens[k] and norm[k] > 0]
    edges = []
    for a in (k for k in usable if k % 2 == 0):
        best = max(
            ((_squared_cosine(vectors, norm, a, b), -b) for b in usable if b % 2 == 1),
            default=(0.0, 0),
        )
        if best[0] > 0 and best[0] >= node.minimum_similarity**2:
            edges.append((-best[0], a, -best[1]))
    limit = len(edges) if node.count == 0 and node.minimum_similarity > 0 else node.count
    return [(a, b) for _, a, b in sorted(edges)[:limit]]


def _squared_cosine(vectors: np.ndarray, norm: list[int], a: int, b: int) -> float:
    dot = int(vectors[a] @ vectors[b])
    return dot * abs(dot) / (norm[a] * norm[b])


def _readout(node: Any, arriving: dict, state: dict) -> Values:
    x = np.atleast_2d(arriving["x"][0])
    size = arriving["size"][0] if "size" in arriving else np.ones(len(x), np.int64)
    state[node.name] = state.get(node.name, 0) + (size[:, None] * x).sum(axis=0)
    return {}


def _output(node: Node, arriving: dict, _: dict) -> Values:
    return {}


_RULES: dict[str, Any] = {
    "Conv": _conv,
    "Linear": _linear,
    "LIF": _lif,
    "OrPool": _or_pool,
    "Reshape": _reshape,
    "Add": _add,
    "Attention": _attention,
    "HaltingScore": _score,
    "Gate": _gate,
    "Merge": _merge,
    "Readout": _readout,
    "Output": _output,
}
