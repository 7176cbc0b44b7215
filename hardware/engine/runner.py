"""Drive the executors of a graph over batches of images and over time.

Without feedback a graph runs layer by layer, each layer over all time steps at once. With feedback
(gates that look back from a later place) it runs step by step. The executors are the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from atsnn.fixed_point import SCORE_UNITY, pixels_to_integers
from atsnn.threads import KERNELS
from export.graph import (
    LIF,
    Add,
    Attention,
    Conv,
    Gate,
    Graph,
    Hold,
    Input,
    Linear,
    Merge,
    Node,
    OrPool,
    Output,
    Readout,
    Selection,
)
from hardware.engine import buffers
from hardware.engine.buffers import Buffers
from hardware.engine.executors import (
    EXECUTORS,
    AddExecutor,
    Executor,
    LIFExecutor,
    OutputExecutor,
    ReadoutExecutor,
    SpikingAttentionExecutor,
    fusible_attention,
)
from hardware.engine.layers import SpikingSynapseExecutor, fusible
from hardware.engine.plan import Plan, Port, dense_macs, image_axis, make_plan
from hardware.engine.result import EngineResult, LayerRange
from hardware.engine.shared import Shared
from hardware.errors import EngineError
from hardware.events import NodeCounter, NodeLabel, collect

Record = Literal["none", "spikes", "all"] | Collection[str]
Array = npt.NDArray
Masks = Mapping[str, npt.NDArray]
LOGITS = "logits"

_BATCH_BYTES = 64 * 2**20
_LARGEST_BATCH = 512


def run(
    graph: Graph,
    images: npt.NDArray[np.uint8],
    *,
    selection: Masks | None = None,
    record: Record = "spikes",
    count_events: bool = True,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EngineResult:
    """Run a quantised graph on images, to the last spike what the cores would do.

    Args:
        graph: a quantised graph.
        images: raw 8-bit pixels, uint8 [B, *input shape]; the engine keeps the upper `Input.bits`.
            A graph whose input has 1 bit also takes events, [T, B, *input shape] of 0 and 1.
        selection: of each Selection node the tokens that are processed, 0 or 1 [B, N].
        record: what `EngineResult.trace` holds: "spikes" (LIF, OrPool and Gate nodes, and logits),
            "all" (every node; other outputs of a Merge as "name:gate", "name:alive", "name:size"),
            "none" (logits only), or the names of nodes.
        count_events: False leaves `EngineResult.events` None and saves time.
        batch: images at a time; by default as many as keep the spikes of a layer near 64 MB.
        progress: called with (images done, images in all) after each batch.

    Raises:
        EngineError: the graph is not quantised or holds what the engine cannot run, or the images
            or masks are of another size or type; the message names both sizes.
    """
    return _run(
        Engine(graph), images, selection, record, count_events, batch, progress, keep_packed=False
    )


class Engine:
    """A graph made ready: checked and planned once, weights packed once, for any number of runs.

    Raises:
        GraphError: the graph is not valid.
        EngineError: the engine cannot run it; names the node and its torch module.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._plans = {False: make_plan(graph)}
        self._ready: dict[tuple[bool, frozenset[Port]], _Network] = {}
        self._running = threading.Lock()
        self.buffers = Buffers()

    def run(
        self,
        images: npt.NDArray[np.uint8],
        *,
        selection: Masks | None = None,
        record: Record = "spikes",
        count_events: bool = True,
        batch: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> EngineResult:
        """As `hardware.engine.run`. One run at a time: a second thread waits."""
        with self._running:
            return _run(
                self, images, selection, record, count_events, batch, progress, keep_packed=True
            )

    def plan(self, moving: bool) -> Plan:
        """The plan for images that stand still, or for events."""
        if moving not in self._plans:
            self._plans[moving] = make_plan(self.graph, moving)
        return self._plans[moving]

    def network(self, moving: bool, recorded: Collection[Port]) -> _Network:
        """The executors of a plan; which nodes run as one depends on what is recorded."""
        key = moving, frozenset(recorded)
        if key not in self._ready:
            self._ready[key] = _Network(self.plan(moving), recorded)
        return self._ready[key]


def _run(
    engine: Engine,
    images: Array,
    selection: Masks | None,
    record: Record,
    count_events: bool,
    batch: int | None,
    progress: Callable[[int, int], None] | None,
    keep_packed: bool,
) -> EngineResult:
    moving = bool(image_axis(engine.graph, images))
    plan = engine.plan(moving)
    _check_images(plan, images, moving)
    total = images.shape[1] if moving else len(images)
    scores = _selection_scores(plan, selection or {}, total)
    if batch is not None and batch < 1:
        raise EngineError(f"batch is {batch}; the engine runs at least 1 image at a time")
    recorded = _recorded_ports(plan, record)
    size = batch or _batch_size(plan, total)
    # a run of one batch would only hold on to memory that it could give back
    memory = engine.buffers if keep_packed or size < total else None
    with KERNELS:
        current = _Run(engine.network(moving, recorded), recorded, count_events, total)
    for start in range(0, total, size):
        part = slice(start, start + size)
        pixels = images[:, part] if moving else images[None, part]
        if not moving:
            pixels = pixels_to_integers(pixels, plan.input_node.bits)
        with KERNELS, buffers.using(memory):
            chosen = {port: score[:, part] for port, score in scores.items()}
            current.run_batch(pixels, chosen, release=not keep_packed and start + size >= total)
        if progress:
            progress(min(start + size, total), total)
    return current.result()


def _check_images(plan: Plan, images: Array, moving: bool) -> None:
    node = plan.input_node
    given = images.shape[2:] if moving else images.shape[1:]
    if given != node.shape:
        raise EngineError(
            f"images of size {_size(given)} (array of shape {list(images.shape)}), but "
            f"`{node.name}` of this network takes {_size(node.shape)}: give uint8 "
            f"[images, {', '.join(map(str, node.shape))}]"
        )
    if images.dtype != np.uint8:
        raise EngineError(
            f"images of type {images.dtype}, but the network takes raw 8-bit pixels (uint8)"
        )
    if not moving:
        if len(images) == 0:
            raise EngineError("no images: the array of images is empty")
        return
    if node.bits != 1:
        raise EngineError(
            f"`{node.name}` takes {node.bits}-bit pixels, which stand still: give "
            f"[images, {', '.join(map(str, node.shape))}]; only a 1-bit input takes events"
        )
    if images.shape[0] != plan.graph.steps or images.shape[1] == 0 or images.max() > 1:
        raise EngineError(
            f"events of shape {list(images.shape)} with values up to {images.max(initial=0)}, but "
            f"the network takes 0 and 1 over {plan.graph.steps} time steps: "
            "[steps, images, ...] with at least one image"
        )


def _selection_scores(plan: Plan, selection: Masks, images: int) -> dict[Port, Array]:
    """Scores int32 [1, B, N] of all Selection nodes, from masks of the tokens that are kept."""
    names = {node.name for node in plan.graph.of_kind(Selection)}
    if names ^ selection.keys():
        raise EngineError(
            f"selection: masks are given for {sorted(selection)}, the graph has Selection nodes "
            f"{sorted(names)}: give one mask [images, tokens] for each"
        )
    scores = {}
    for name, mask in selection.items():
        wanted = (images, *plan.shapes[name, "out"])
        if mask.shape != wanted:
            raise EngineError(
                f"selection of {name}: shape {list(mask.shape)}, it needs {list(wanted)} "
                "(images, tokens)"
            )
        scores[name, "out"] = np.where(mask > 0, 0, SCORE_UNITY).astype(np.int32)[None]
    return scores


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _batch_size(plan: Plan, images: int) -> int:
    """Near what is allowed, and such that all batches are about as large."""
    largest = max(int(np.prod(shape, dtype=int)) for shape in plan.shapes.values())
    allowed = int(np.clip(_BATCH_BYTES // (largest * plan.graph.steps), 1, _LARGEST_BATCH))
    return -(-images // -(-images // allowed))


Fused = SpikingSynapseExecutor | SpikingAttentionExecutor
"""Runs a LIF node together with the node in front of it."""


class _Network:
    """The executors of a plan.

    Attributes:
        nodes: all but the Input and Selections.
        spiking: LIF node -> executor of what is in front of it and of itself as one.
        absorbed: the nodes that run with the LIF behind them.
        executors: node -> executor, of all that are not absorbed.
    """

    def __init__(self, plan: Plan, recorded: Collection[Port]) -> None:
        self.plan = plan
        self.nodes = [node for node in plan.graph.nodes if not isinstance(node, Input | Selection)]
        self.spiking = self._spiking(recorded)
        self.absorbed = {spiking.node_name for spiking in self.spiking.values()}
        self.executors: dict[str, Executor] = {
            **{
                node.name: EXECUTORS[node.kind](node, plan)
                for node in self.nodes
                if node.name not in self.absorbed and node.name not in self.spiking
            },
            **self.spiking,
        }
        self._allow_overwriting(recorded)

    def _allow_overwriting(self, recorded: Collection[Port]) -> None:
        """Tell each Add which of its addends nobody reads after it, if it was made for it alone."""
        if self.plan.graph.feedback:
            return
        place = {node.name: i for i, node in enumerate(self.nodes)}
        place.update({fused.node_name: place[name] for name, fused in self.spiking.items()})
        readers: dict[Port, list[str]] = {}
        for edge in self.plan.graph.edges:
            readers.setdefault((edge.source, edge.source_port), []).append(edge.target)
        for node in self.plan.graph.of_kind(Add):
            executor = self.executors[node.name]
            assert isinstance(executor, AddExecutor)
            for which, edge in enumerate(self.plan.edges(node.name, "in")):
                port = edge.source, edge.source_port
                others = [place[name] for name in readers[port] if name != node.name]
                alone = len(others) == len(readers[port]) - 1
                own_memory = isinstance(self.plan.graph[edge.source], Add | Merge)
                last = all(other < place[node.name] for other in others)
                if own_memory and alone and last and port not in recorded:
                    executor.overwritten = which

    def _spiking(self, recorded: Collection[Port]) -> dict[str, Fused]:
        found: dict[str, Fused] = {}
        if self.plan.graph.feedback:
            return found
        for node in self.nodes:
            if (node.name, "out") in recorded:
                continue
            if isinstance(node, Conv | Linear):
                neurons = fusible(self.plan, node)
                if neurons is not None:
                    found[neurons.name] = SpikingSynapseExecutor(node, neurons, self.plan)
            elif isinstance(node, Attention):
                neurons = fusible_attention(self.plan, node)
                if neurons is not None:
                    found[neurons.name] = SpikingAttentionExecutor(node, neurons, self.plan)
        return found


class _Run:
    """What was recorded of each batch of one run."""

    def __init__(
        self, network: _Network, recorded: dict[Port, str], count_events: bool, images: int
    ) -> None:
        self.network = network
        self.plan, self.nodes = network.plan, network.nodes
        self.executors, self.spiking = network.executors, network.spiking
        self.recorded, self.count_events = recorded, count_events
        self.readouts = {node.name for node in self.plan.graph.of_kind(Readout)}
        self.gates = [node.name for node in self.plan.graph.of_kind(Gate)]
        self.kept = {**recorded, **{(name, "out"): name for name in self.gates}}
        self.uses = Counter((edge.source, edge.source_port) for edge in self.plan.graph.edges)
        self.traces: dict[str, Array] = {}
        self.images, self.done = images, 0
        self.release = False
        self.logits: list[npt.NDArray[np.float64]] = []
        self.counters: list[dict[str, NodeCounter]] = []
        for executor in self.executors.values():
            executor.begin()

    def run_batch(self, pixels: Array, chosen: dict[Port, Array], release: bool) -> None:
        """Run one batch, pixels [1 or T, B, *input shape], and keep what was asked for.

        `chosen`: what the Selections bring.

        With `release`, each layer frees its packed weights once it has run.
        """
        self.release = release
        shared = Shared()
        for executor in self.executors.values():
            executor.start(pixels.shape[1], shared)
        counters = {node.name: NodeCounter(pixels.shape[1]) for node in self.nodes}
        parts: dict[str, list[Array]] = {name: [] for name in self.kept.values()}
        passes = self._step_by_step if self.plan.graph.feedback else self._layer_by_layer
        given = {(self.plan.input_node.name, "out"): self._first(pixels), **chosen}
        for values in passes(given, counters if self.count_events else {}):
            for port in self.kept.keys() & values.keys():
                parts[self.kept[port]].append(values[port])
        for name, pieces in parts.items():
            self._keep(name, self._joined(name, pieces))
        self.logits.append(self._finish(counters if self.count_events else {}))
        self.counters.append(counters)
        self.done += pixels.shape[1]

    def _keep(self, name: str, values: Array) -> None:
        """Copy a batch to its place among all images."""
        if name not in self.traces:
            shape = (len(values), self.images, *values.shape[2:])
            self.traces[name] = np.empty(shape, values.dtype)
        self.traces[name][:, self.done : self.done + values.shape[1]] = values

    def _joined(self, name: str, pieces: list[Array]) -> Array:
        whole = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        if len(whole) == 1:
            whole = np.broadcast_to(whole, (self.plan.graph.steps, *whole.shape[1:]))
        return whole.astype(np.uint8) if name in self.gates else whole

    def _layer_by_layer(
        self, given: dict[Port, Array], counters: dict[str, NodeCounter]
    ) -> Iterator[dict[Port, Array]]:
        """Yield each node's outputs, all time steps at once; drop what no later node reads."""
        values = dict(given)
        if self.plan.input_node.name in self.plan.once:
            image = (self.plan.input_node.name, "out")
            values[image] = values[image][:1]
        left = self.uses.copy()
        yield dict(values)
        for node in self.nodes:
            if node.name in self.network.absorbed:
                continue
            rests = node.name in self.plan.once and not isinstance(node, Hold)
            steps = 1 if rests else self.plan.graph.steps
            outputs = self._advance(node, values, {}, steps, counters)
            if self.release:
                self.executors[node.name].release()
            yield outputs
            values.update(outputs)
            done = [node.name]
            if node.name in self.spiking:
                done.append(self.spiking[node.name].node_name)
            for edge in (edge for name in done for edge in self.plan.graph.into(name)):
                port = (edge.source, edge.source_port)
                left[port] -= 1
                if not left[port] and port not in self.plan.attention_gates.values():
                    values.pop(port, None)

    def _step_by_step(
        self, given: dict[Port, Array], counters: dict[str, NodeCounter]
    ) -> Iterator[dict[Port, Array]]:
        """Yield all outputs of each time step; what stands still is computed at the first."""
        before: dict[Port, Array] = {}
        for t in range(self.plan.graph.steps):
            now = {port: value[t % len(value)][None] for port, value in given.items()}
            for node in self.nodes:
                if t and node.name in self.plan.once:
                    now[node.name, "out"] = before[node.name, "out"]
                elif node.name in self.plan.once or node.name not in self.plan.static:
                    now.update(self._advance(node, now, before, 1, counters))
                elif t == 0:
                    now.update(self._advance(node, now, before, self.plan.graph.steps, counters))
                else:
                    now[node.name, "out"] = before[node.name, "out"]
            yield now
            before = now

    def _first(self, pixels: Array) -> Array:
        return pixels.astype(np.bool_) if self.plan.input_node.bits == 1 else pixels

    def _advance(
        self,
        node: Node,
        now: dict[Port, Array],
        before: dict[Port, Array],
        steps: int,
        counters: dict[str, NodeCounter],
    ) -> dict[Port, Array]:
        inputs: dict[str, list[Array]] = {}
        spiking = self.spiking.get(node.name)
        for edge in self.plan.graph.into(spiking.node_name if spiking else node.name):
            port = (edge.source, edge.source_port)
            if edge.source in self.readouts:
                continue  # its value is known only after the last step, see `_finish`
            if not edge.lag:
                value = now[port]
            elif port in before:
                value = before[port]
            else:
                images = now[self.plan.input_node.name, "out"].shape[1]
                value = np.zeros((1, images, *self.plan.shapes[port]), np.int64)
            inputs.setdefault(edge.target_port, []).append(value)
        absorbed = spiking.node_name if spiking else node.name
        if absorbed in self.plan.attention_gates:
            inputs["gate"] = [now[self.plan.attention_gates[absorbed]]]
        if spiking:
            fired = spiking.run(
                inputs, steps, counters.get(spiking.node_name), counters.get(node.name)
            )
            return {(node.name, "out"): fired["out"]}
        outputs = self.executors[node.name].advance(inputs, steps, counters.get(node.name))
        return {(node.name, port): value for port, value in outputs.items()}

    def _finish(self, counters: dict[str, NodeCounter]) -> npt.NDArray[np.float64]:
        output = next(iter(self.plan.graph.of_kind(Output)))
        last = self.executors[self.plan.edges(output.name, "in")[0].source]
        if isinstance(last, ReadoutExecutor):
            return last.finish(counters.get(last.node_name))
        counted = self.executors[output.name]
        assert isinstance(counted, OutputExecutor)
        return counted.total.astype(np.float64)

    def result(self) -> EngineResult:
        """Join the batches."""
        graph = self.plan.graph
        logits = np.concatenate(self.logits)
        trace = {name: self.traces[name] for name in self.recorded.values()}
        labels = [
            NodeLabel(
                node.name,
                node.kind,
                node.source,
                graph.blocks.get(node.name, ""),
                dense_macs(self.plan, node),
            )
            for node in self.nodes
        ]
        return EngineResult(
            logits=logits,
            trace={**trace, LOGITS: logits},
            gates={name: self.traces[name] for name in graph.block_gates},
            events=collect(labels, self.counters, graph.steps) if self.count_events else None,
            ranges=tuple(self._range(node) for node in graph.of_kind(LIF)),
            steps=graph.steps,
        )

    def _range(self, node: Node) -> LayerRange:
        executor = self.executors[node.name]
        assert isinstance(executor, LIFExecutor | SpikingSynapseExecutor | SpikingAttentionExecutor)
        return LayerRange(node.name, node.source, executor.wraps, executor.saturations)


def _recorded_ports(plan: Plan, record: Record) -> dict[Port, str]:
    """Which output ports to keep, and under which name."""
    nodes = [n for n in plan.graph.nodes if not isinstance(n, Readout | Output | Selection)]
    ports = {
        (node.name, port): node.name if port == "out" else f"{node.name}:{port}"
        for node in nodes
        for port in node.outputs
    }
    if record == "all":
        return ports
    if record == "none":
        return {}
    if record == "spikes":
        wanted: set[str] = {node.name for node in nodes if isinstance(node, LIF | OrPool | Gate)}
    else:
        wanted = {record} if isinstance(record, str) else set(record)
    unknown = wanted - set(ports.values())
    if unknown:
        raise EngineError(
            f"record: the graph has no node {sorted(unknown)[0]} with values over time; "
            "use node names, or 'spikes', 'all' or 'none'"
        )
    return {port: name for port, name in ports.items() if name in wanted}
