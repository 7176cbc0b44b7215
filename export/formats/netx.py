"""Feed-forward chains of Conv and Linear layers as HDF5 for lava-dl's netx, and run by it on Lava.

netx holds a chain only: no branch, no residual, no pool, no attention, no gate. Each layer is a
synapse and its neurons; a last read-out is kept beside the chain and applied on the host. netx has
one exponent for every bias, 6: quantise with `Quantize(bias_exponent=6)`.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import h5py
import numpy as np
import numpy.typing as npt

from atsnn.files import write_atomically
from atsnn.fixed_point import pixels_to_integers
from export.errors import UnsupportedTargetError
from export.formats import hdf5
from export.graph import LIF, Conv, Graph, Input, Linear, Node, Output, Readout, Reshape
from export.validation import validate

BIAS_EXPONENT = 6
NET_FILE, GRAPH_FILE, IMAGES_FILE, RESULT_FILE = "net.net", "graph.h5", "images.npy", "spikes.h5"


@dataclass(frozen=True)
class ChainLayer:
    """A synapse and its neurons; `flatten` if feature maps become a vector in front of it."""

    synapse: Conv | Linear
    neurons: LIF
    shape: tuple[int, ...]
    flatten: bool


@dataclass(frozen=True)
class Chain:
    """A graph as netx sees it: an input, layers, and perhaps a read-out on the host."""

    entry: Input
    layers: tuple[ChainLayer, ...]
    readout: Readout | None


def chain_of(graph: Graph) -> Chain:
    """The graph as a chain of layers.

    Raises:
        UnsupportedTargetError: names the first node that netx cannot hold.
    """
    from export.shapes import shapes

    validate(graph)
    if not graph.quantized:
        raise UnsupportedTargetError("the graph is a float graph; run the quantize pass first")
    sizes = shapes(graph)
    node: Node = graph.input
    entry, layers, flatten = graph.input, [], False
    while not isinstance(following := _next(graph, node), Output | Readout):
        if isinstance(following, Reshape) and following.to == "flatten":
            node, flatten = following, True
            continue
        if not isinstance(following, Conv | Linear):
            _refuse(following, "netx holds Conv and Linear layers only")
        neurons = _next(graph, following)
        if not isinstance(neurons, LIF):
            _refuse(neurons, f"netx wants neurons directly behind {following.name}")
        _check_layer(following, neurons)
        layers.append(ChainLayer(following, neurons, sizes[neurons.name, "out"], flatten))
        node, flatten = neurons, False
    if not layers:
        _refuse(following, "netx wants at least one layer with neurons before it")
    return Chain(entry, tuple(layers), following if isinstance(following, Readout) else None)


def _next(graph: Graph, node: Node) -> Node:
    edges = graph.out_of(node.name)
    if len(edges) != 1:
        readers = ", ".join(edge.target for edge in edges)
        _refuse(node, f"it is read by {len(edges)} nodes ({readers}), netx holds no branches")
    following = graph[edges[0].target]
    if len(graph.into(following.name)) != 1:
        _refuse(following, "several branches join in it, netx holds no residuals")
    return following


def _refuse(node: Node, reason: str) -> NoReturn:
    origin = f" (torch module {node.source})" if node.source else ""
    raise UnsupportedTargetError(
        f"{node.kind} {node.name}{origin}: {reason}; export this graph to Lava "
        "(`atsnn-export lava`) or ONNX instead"
    )


def _check_layer(synapse: Conv | Linear, neurons: LIF) -> None:
    constants = neurons.constants
    assert constants is not None
    if isinstance(synapse, Conv) and synapse.groups != 1:
        _refuse(synapse, f"it has {synapse.groups} groups, netx holds dense kernels")
    if not synapse.weight.any():
        _refuse(synapse, "all its weights are 0, which netx cannot scale")
    unit = 2**BIAS_EXPONENT
    if (constants.bias % unit).any():
        raise UnsupportedTargetError(
            f"LIF {neurons.name} (torch module {neurons.source}): its bias has exponent "
            f"{constants.bias_exponent}, netx holds multiples of {unit}; quantise with "
            f"Quantize(bias_exponent={BIAS_EXPONENT})"
        )


# --- writing ---


def save_netx(graph: Graph, path: str | os.PathLike[str]) -> Path:
    """Write a chain as netx HDF5, whole or not at all.

    Raises:
        UnsupportedTargetError: the graph is no chain, or the file cannot be written.
    """
    target = Path(path)
    content = encode_netx(graph)
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UnsupportedTargetError(
            f"{target}: cannot be written ({error.strerror or error}); what was there is unchanged"
        ) from None
    return target


def encode_netx(graph: Graph) -> bytes:
    """The netx file of a chain, as bytes."""
    chain = chain_of(graph)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        layers = file.create_group("layer")
        first = layers.create_group("0")
        first["type"] = np.bytes_(b"input")
        first["shape"] = np.array(chain.entry.shape, np.int64)
        for layer in chain.layers:
            if layer.flatten and len(layers) > 1:
                layers.create_group(str(len(layers)))["type"] = np.bytes_(b"flatten")
            _write_layer(layers.create_group(str(len(layers))), layer)
        if chain.readout is not None:
            group = file.create_group("readout")
            for label in ("weight", "bias", "scale"):
                group[label] = getattr(chain.readout, label)
    return buffer.getvalue()


def _write_layer(group: h5py.Group, layer: ChainLayer) -> None:
    synapse, constants = layer.synapse, layer.neurons.constants
    assert constants is not None
    group["type"] = np.bytes_(b"conv" if isinstance(synapse, Conv) else b"dense")
    group["shape"] = np.array(layer.shape, np.int64)
    group["weight"] = synapse.weight.astype(np.float32)
    if constants.bias.any():
        group["bias"] = (constants.bias >> BIAS_EXPONENT).astype(np.float32)
    if isinstance(synapse, Conv):
        group["stride"] = np.array(synapse.stride, np.int64)
        group["padding"] = np.array(synapse.padding, np.int64)
        group["dilation"] = np.array(synapse.dilation, np.int64)
        group["groups"] = synapse.groups
    else:
        group["inFeatures"], group["outFeatures"] = synapse.weight.shape[1], len(synapse.weight)
    neuron = group.create_group("neuron")
    neuron["type"] = np.bytes_(b"CUBA")
    neuron["iDecay"] = constants.du + 1
    neuron["vDecay"] = constants.dv
    neuron["vThMant"] = constants.threshold
    neuron["refDelay"] = 1
    neuron["gradedSpike"] = False


# --- running ---


def netx_trace(
    graph: Graph, images: npt.NDArray[np.uint8], *, timeout: float = 600.0
) -> dict[str, npt.NDArray]:
    """Spikes of every layer from lava-dl's netx on Lava, in a watched child interpreter.

    Args:
        images: uint8 pixels [B, *input shape].
        timeout: seconds.

    Returns:
        LIF nodes: bool [T, B, ...]; `logits`: float64 [B, classes].

    Raises:
        LavaUnavailableError: Lava or lava-dl is missing.
        UnsupportedTargetError: the graph is no chain.
        LavaRunError: the run failed.
    """
    from export.lava.watch import WORK, job_folder, run_watched

    chain = chain_of(graph)
    _check_lava_dl()
    with job_folder() as folder:
        work = folder / WORK
        (work / NET_FILE).write_bytes(encode_netx(graph))
        hdf5.save(graph, work / GRAPH_FILE)
        pixels = pixels_to_integers(images, chain.entry.bits)
        np.save(work / IMAGES_FILE, pixels, allow_pickle=False)
        run_watched("export.formats.netx:run_in_child", {}, folder, timeout=timeout)
        return _read_result(chain, work / RESULT_FILE)


def _check_lava_dl() -> None:
    from importlib.util import find_spec

    from export.errors import LavaUnavailableError
    from export.lava.compat import check_lava

    check_lava()
    if find_spec("lava.lib.dl") is None:
        raise LavaUnavailableError("lava-dl is not installed: pip install 'atsnn[lava]'")


def _read_result(chain: Chain, path: Path) -> dict[str, npt.NDArray]:
    trace: dict[str, npt.NDArray] = {}
    with h5py.File(path, "r") as file:
        for index, layer in enumerate(chain.layers):
            dataset = file[str(index)]
            assert isinstance(dataset, h5py.Dataset)
            trace[layer.neurons.name] = dataset[()].astype(bool)
    counts = trace[chain.layers[-1].neurons.name].sum(axis=0)
    counts = counts.reshape(len(counts), -1)
    readout = chain.readout
    if readout is None:
        return {**trace, "logits": counts.astype(np.float64)}
    summed = counts.astype(np.int64) @ readout.weight.astype(np.int64).T + readout.bias
    return {**trace, "logits": summed.astype(np.float64) / readout.scale}


def run_in_child(work: Path) -> None:
    """What the child does: build netx's network, stream the images, write every layer's spikes."""
    from lava.lib.dl.netx.hdf5 import Network
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.io.sink import RingBuffer as Sink
    from lava.proc.io.source import RingBuffer as Source

    graph = hdf5.load(work / GRAPH_FILE)
    chain = chain_of(graph)
    images = np.load(work / IMAGES_FILE, allow_pickle=False)
    steps, count = graph.steps, len(images)
    total = steps * count + len(chain.layers) + 1
    found: list[npt.NDArray] = []
    for depth in range(1, len(chain.layers) + 1):
        network = Network(
            net_config=str(work / NET_FILE),
            num_layers=_entries(chain, depth),
            input_message_bits=chain.entry.bits if chain.entry.bits > 1 else 0,
            reset_interval=steps,
            reset_offset=1,  # the first layer's neurons see an image one step after its source
        )
        source = Source(data=_stream(chain, images, steps, total))
        sink = Sink(shape=network.out.shape, buffer=total)
        source.s_out.connect(network.inp)
        network.out.connect(sink.a_in)
        network.run(RunSteps(num_steps=total), Loihi2SimCfg(select_tag="fixed_pt"))
        spikes = sink.data.get()[..., depth : depth + steps * count]
        network.stop()
        found.append(_in_graph_order(spikes, chain.layers[depth - 1].shape, count, steps))
    with h5py.File(work / RESULT_FILE, "w") as file:
        for index, spikes in enumerate(found):
            file[str(index)] = spikes.astype(np.uint8)


def _entries(chain: Chain, depth: int) -> int:
    """Entries of the file up to the layer at this depth: the input and the flattenings count."""
    flattenings = sum(
        layer.flatten and index > 0 for index, layer in enumerate(chain.layers[:depth])
    )
    return 1 + depth + flattenings


def _stream(chain: Chain, images: npt.NDArray, steps: int, total: int) -> npt.NDArray[np.int32]:
    """What the source sends, time last: each image `steps` times, then nothing; maps as W, H, C."""
    if chain.layers[0].flatten:
        images = images.reshape(len(images), -1)
    data = np.zeros((*images.shape[:0:-1], total), np.int32)
    for index, image in enumerate(images):
        data[..., index * steps : (index + 1) * steps] = image.T[..., None]
    return data


def _in_graph_order(
    spikes: npt.NDArray, shape: tuple[int, ...], count: int, steps: int
) -> npt.NDArray:
    """[W, H, C, time] or [D, time] -> [T, B, C, H, W] or [T, B, D]."""
    turned = spikes.T.reshape(count, steps, *shape)
    return turned.swapaxes(0, 1)
