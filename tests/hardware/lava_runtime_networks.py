"""Networks that run on Lava's own runtime and on the one in process, for comparison.

As a script, in an interpreter of its own: `python lava_runtime_networks.py OUT.npz NAME...` runs
them on Lava's own runtime and saves what `Network.record` gives.
"""

# Not sorted: Lava is imported after its shim.
# ruff: isort: skip_file

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hardware.lava_runtime  # noqa: F401  (Lava's shim)

from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg, RunConfig
from lava.proc.atrlif.process import ATRLIF
from lava.proc.conv.process import Conv
from lava.proc.dense.process import DelayDense, Dense, LearningDense
from lava.proc.graded.process import GradedVec
from lava.proc.io.sink import RingBuffer as Sink
from lava.proc.io.source import RingBuffer as Source
from lava.proc.learning_rules.stdp_learning_rule import STDPLoihi
from lava.proc.lif.process import LIF, LIFRefractory, LIFReset, TernaryLIF
from lava.proc.monitor.process import Monitor
from lava.proc.prodneuron.process import ProdNeuron
from lava.proc.rf.process import RF
from lava.proc.rf_iz.process import RF_IZ
from lava.proc.sdn.process import SigmaDelta
from lava.proc.sparse.process import DelaySparse, Sparse
from lava_runtime_models.processes import Counter, Layer, Phases, Reader, Values
from scipy.sparse import csr_matrix

STEPS = 24


@dataclass
class Network:
    """A network and what is looked at.

    Attributes:
        process: any process of it.
        watched: variables and out-ports that a Monitor records at every step.
        finals: variables that are read at the end, and by `changes` set in between.
        runs: the run is taken in these pieces.
        changes: what is set after the first piece.
    """

    process: AbstractProcess
    watched: dict[str, Any] = field(default_factory=dict)
    finals: dict[str, Var] = field(default_factory=dict)
    tag: str = "fixed_pt"
    runs: tuple[int, ...] = (STEPS,)
    changes: dict[str, Any] = field(default_factory=dict)
    sub_models: bool = False

    def __post_init__(self) -> None:
        self.monitors = {name: Monitor() for name in self.watched}
        for name, monitor in self.monitors.items():
            monitor.probe(self.watched[name], sum(self.runs))

    @property
    def run_cfg(self) -> RunConfig:
        return Loihi2SimCfg(select_tag=self.tag, select_sub_proc_model=self.sub_models)

    def record(self) -> dict[str, np.ndarray]:
        """Run it by Lava's own methods and collect what was watched."""
        for index, steps in enumerate(self.runs):
            self.process.run(RunSteps(num_steps=steps), self.run_cfg)
            if index == 0:
                for name, value in self.changes.items():
                    self.finals[name].set(value)
        found = {}
        for name, monitor in self.monitors.items():
            target = self.watched[name]
            found[name] = monitor.get_data()[target.process.name][target.name]
        for name, var in self.finals.items():
            value = var.get()
            found[name] = value.toarray() if isinstance(value, csr_matrix) else np.asarray(value)
        self.process.stop()
        return found


def weights(*shape: int, seed: int = 0, low: int = -40, high: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape)


def spikes(size: int, seed: int = 0, share: float = 0.3) -> np.ndarray:
    return (np.random.default_rng(seed).random((size, STEPS)) < share).astype(int)


def driven(size: int, tag: str, seed: int = 1) -> LIF:
    """Neurons that fire by their own bias."""
    bias = np.random.default_rng(seed).integers(10, 900, size)
    if tag == "floating_pt":
        return LIF(shape=(size,), vth=10.0, du=0.3, dv=0.1, bias_mant=bias / 200)
    return LIF(shape=(size,), vth=40, du=1024, dv=400, bias_mant=bias)


def chain(tag: str, connect: Callable[[np.ndarray], Any] | None = None) -> Network:
    first, second = driven(20, tag), driven(16, tag, seed=2)
    connect = connect or (lambda w: Dense(weights=w))
    synapse = connect(weights(16, 20) / (40 if tag == "floating_pt" else 1))
    first.s_out.connect(synapse.s_in)
    synapse.a_out.connect(second.a_in)
    watched = {"spikes in": first.s_out, "spikes": second.s_out, "v": second.v}
    return Network(first, watched, {"u": second.u}, tag, runs=(7, 1, STEPS - 8))


def recurrent(tag: str) -> Network:
    first, scale = driven(18, tag), 60 if tag == "floating_pt" else 1
    synapse = Dense(weights=weights(18, 18) / scale)
    first.s_out.connect(synapse.s_in)
    synapse.a_out.connect(first.a_in)
    return Network(first, {"spikes": first.s_out, "v": first.v}, {"u": first.u}, tag)


def two_populations() -> Network:
    """Each inhibits the other, with delays."""
    left, right = driven(12, "fixed_pt"), driven(9, "fixed_pt", seed=5)
    there = DelayDense(weights=-np.abs(weights(9, 12)), delays=weights(9, 12, low=0, high=4))
    back = DelayDense(weights=-np.abs(weights(12, 9)), delays=2)
    left.s_out.connect(there.s_in)
    there.a_out.connect(right.a_in)
    right.s_out.connect(back.s_in)
    back.a_out.connect(left.a_in)
    return Network(left, {"left": left.s_out, "right": right.s_out, "v": right.v})


def convolution(tag: str) -> Network:
    rng = np.random.default_rng(3)
    source = Source(data=rng.integers(0, 2, (8, 7, 2, STEPS)))
    kernel = weights(4, 3, 3, 2) / (40 if tag == "floating_pt" else 1)
    conv = Conv(weight=kernel, input_shape=(8, 7, 2), padding=(1, 1), stride=(2, 1))
    shape = conv.a_out.shape
    lif = (
        LIF(shape=shape, vth=2.0, du=1.0, dv=0.2)
        if tag == "floating_pt"
        else LIF(shape=shape, vth=60, du=4095, dv=900)
    )
    source.s_out.connect(conv.s_in)
    conv.a_out.connect(lif.a_in)
    return Network(source, {"spikes": lif.s_out, "v": lif.v}, tag=tag)


def played(neurons: Any, tag: str, scale: float = 1, bits: int = 0) -> Network:
    """Spikes of a file through a synapse into neurons, and into a sink."""
    source = Source(data=spikes(10))
    synapse = Dense(weights=weights(neurons.s_out.shape[0], 10) / scale, num_message_bits=bits)
    sink = Sink(shape=neurons.s_out.shape, buffer=STEPS)
    source.s_out.connect(synapse.s_in)
    synapse.a_out.connect(neurons.a_in)
    neurons.s_out.connect(sink.a_in)
    finals = {"sink": sink.data}
    watched = {"v": neurons.v} if hasattr(neurons, "v") else {}
    return Network(source, watched, finals, tag)


def resonators(kind: type) -> Network:
    source, neurons = Source(data=spikes(6)), kind(shape=(6,), period=7, alpha=0.07, vth=1.0)
    synapse = Dense(weights=weights(6, 6) / 20)
    sink = Sink(shape=(6,), buffer=STEPS)
    source.s_out.connect(synapse.s_in)
    synapse.a_out.connect(neurons.a_real_in)
    neurons.s_out.connect(sink.a_in)
    return Network(
        source, {"real": neurons.real, "imag": neurons.imag}, {"sink": sink.data}, "floating_pt"
    )


def products() -> Network:
    """Graded vectors multiplied with one another."""
    left, right = Source(data=weights(5, STEPS)), Source(data=weights(5, STEPS, seed=8))
    graded, product = GradedVec(shape=(5,), vth=3), ProdNeuron(shape=(5,), vth=1, exp=2)
    synapses = [
        Dense(weights=2 * np.eye(5, dtype=int), num_message_bits=24, num_weight_bits=8)
        for _ in range(3)
    ]
    left.s_out.connect(synapses[0].s_in)
    synapses[0].a_out.connect(graded.a_in)
    graded.s_out.connect(synapses[1].s_in)
    right.s_out.connect(synapses[2].s_in)
    synapses[1].a_out.connect(product.a_in1)
    synapses[2].a_out.connect(product.a_in2)
    return Network(left, {"graded": graded.s_out, "product": product.s_out, "v": product.v})


def reference_ports() -> Network:
    counter, reader = Counter(), Reader()
    reader.ref.connect_var(counter.v)
    return Network(counter, finals={"seen": reader.seen, "v": counter.v}, runs=(5, 9, 10))


def several_readers() -> Network:
    counter, readers = Counter(shape=(2, 3)), [Reader(shape, False) for shape in ((6,), (2, 3))]
    readers[0].ref.reshape((2, 3)).connect(counter.v_port)
    readers[1].ref.connect_var(counter.v)
    finals = {f"seen {index}": reader.seen for index, reader in enumerate(readers)}
    return Network(counter, {"v": counter.v, "sent": counter.s_out}, finals)


def phases(first: dict[str, Any], second: dict[str, Any]) -> Network:
    """Two processes with guards of their own, in the same domain."""
    one, other = Phases(**first), Phases(**second)
    one.s_out.connect(other.s_in)
    other.s_out.connect(one.s_in)
    return Network(one, finals={"one": one.log, "other": other.log}, runs=(12, 8))


def virtual_ports() -> Network:
    counter = Counter(shape=(2, 3, 4))
    flat, turned = Sink(shape=(24,), buffer=STEPS), Sink(shape=(4, 2, 3), buffer=STEPS)
    counter.s_out.flatten().connect(flat.a_in)
    counter.s_out.transpose((2, 0, 1)).connect(turned.a_in)
    return Network(counter, finals={"flat": flat.data, "turned": turned.data})


def fans() -> Network:
    """Three sources into one port, one source into three."""
    sources = [driven(8, "fixed_pt", seed) for seed in (1, 2, 3)]
    target = driven(8, "fixed_pt", seed=4)
    for seed, source in enumerate(sources):
        synapse = Dense(weights=weights(8, 8, seed=seed))
        source.s_out.connect(synapse.s_in)
        synapse.a_out.connect(target.a_in)
    sinks = [Sink(shape=(8,), buffer=STEPS) for _ in range(3)]
    target.s_out.connect([sink.a_in for sink in sinks])
    finals = {f"sink {index}": sink.data for index, sink in enumerate(sinks)}
    return Network(target, {"v": target.v}, finals)


def hierarchy() -> Network:
    source = Source(data=spikes(7))
    first, second = Layer(weights(9, 7)), Layer(weights(5, 9))
    sink = Sink(shape=(5,), buffer=STEPS)
    source.s_out.connect(first.s_in)
    first.s_out.connect(second.s_in)
    second.s_out.connect(sink.a_in)
    finals = {"sink": sink.data, "v": first.v, "v2": second.v}
    return Network(source, finals=finals, sub_models=True, runs=(9, STEPS - 9))


def learning(tag: str) -> Network:
    """Spike-timing dependent plasticity between two populations."""
    rule = STDPLoihi(learning_rate=1, A_plus=1, A_minus=-2, tau_plus=10, tau_minus=10, t_epoch=4)
    before, after = Source(data=spikes(5, share=0.5)), driven(4, tag)
    synapse = LearningDense(weights=weights(4, 5, low=10), learning_rule=rule)
    before.s_out.connect(synapse.s_in)
    synapse.a_out.connect(after.a_in)
    after.s_out.connect(synapse.s_in_bap)
    return Network(before, {"weights": synapse.weights, "v": after.v}, tag=tag, runs=(10, 14))


def variables() -> Network:
    """Get and set, between runs, of each type of variable."""
    values, counter = Values(), Counter()
    counter.s_out.connect(values.s_in)
    finals = {
        "matrix": values.matrix, "whole": values.whole, "sparse": values.sparse, "v": counter.v
    }  # fmt: skip
    changes = {
        "matrix": np.array([[9, 8, 7], [6, 5, 4]]),
        "sparse": csr_matrix(np.array([[0, 5], [6, 0]])),
        "v": np.array([100, 200, 300]),
    }
    return Network(counter, finals=finals, runs=(4, 6), changes=changes)


def from_netx() -> Network:
    """A chain of lava-dl, read from HDF5 by netx."""
    from tempfile import TemporaryDirectory

    from lava.lib.dl import netx  # brings torch

    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.net"
        _write_netx(path)
        net = netx.hdf5.Network(net_config=str(path))
        net.net_config.f.close()
    source, sink = Source(data=spikes(12)), Sink(shape=net.out.shape, buffer=STEPS)
    source.s_out.connect(net.inp)
    net.out.connect(sink.a_in)
    return Network(source, finals={"sink": sink.data}, sub_models=True)


def _write_netx(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.create_group("layer")
        for index, (size, inputs) in enumerate([(12, 0), (10, 12), (6, 10)]):
            layer = file.create_group(f"layer/{index}")
            if not inputs:
                layer.create_dataset("shape", data=np.array([size]))
                layer.create_dataset("type", data=np.array([b"input"], "S10"))
                continue
            layer.create_dataset("shape", data=np.array([size]))
            layer.create_dataset("type", data=np.array([b"dense"], "S10"))
            layer.create_dataset("inFeatures", data=inputs)
            layer.create_dataset("outFeatures", data=size)
            layer.create_dataset("weight", data=2.0 * weights(size, inputs, seed=index))
            neuron = {"iDecay": 1024, "vDecay": 128, "vThMant": 60, "refDelay": 1, "gradedSpike": 0}
            for name, value in neuron.items():
                layer.create_dataset(f"neuron/{name}", data=value)
            layer.create_dataset("neuron/type", data=np.array([b"CUBA"], "S10"))


FIXED, FLOAT = "fixed_pt", "floating_pt"
NETWORKS: dict[str, Callable[[], Network]] = {
    "chain, fixed": lambda: chain(FIXED),
    "chain, float": lambda: chain(FLOAT),
    "recurrent, fixed": lambda: recurrent(FIXED),
    "recurrent, float": lambda: recurrent(FLOAT),
    "two populations, delays": two_populations,
    "convolution, fixed": lambda: convolution(FIXED),
    "convolution, float": lambda: convolution(FLOAT),
    "sparse, fixed": lambda: chain(FIXED, lambda w: Sparse(weights=csr_matrix(w))),
    "sparse, float": lambda: chain(FLOAT, lambda w: Sparse(weights=csr_matrix(w))),
    "sparse with delays": lambda: chain(
        FIXED, lambda w: DelaySparse(weights=csr_matrix(w), delays=3)
    ),
    "refractory": lambda: played(
        LIFRefractory(shape=(8,), vth=2.0, dv=0.1, refractory_period=3), FLOAT, 30
    ),
    "reset at intervals": lambda: played(
        LIFReset(shape=(8,), vth=60, du=900, dv=200, reset_interval=5, reset_offset=2), FIXED
    ),
    "ternary": lambda: played(
        TernaryLIF(shape=(8,), vth_lo=-2.0, vth_hi=2.0, dv=0.1, du=0.5), FLOAT, 30
    ),
    "adaptive thresholds": lambda: played(ATRLIF(shape=(8,)), FLOAT, 5),
    "sigma-delta": lambda: played(
        SigmaDelta(shape=(8,), vth=4, spike_exp=0, state_exp=0), FIXED, bits=16
    ),
    "resonators": lambda: resonators(RF),
    "Izhikevich resonators": lambda: resonators(RF_IZ),
    "graded products": products,
    "RefPorts": reference_ports,
    "several RefPorts, reshaped": several_readers,
    "learning and management phases": lambda: phases(
        {"learns": 3, "prepares": 2, "reports": 2}, {"learns": 2, "prepares": 4}
    ),
    "virtual ports": virtual_ports,
    "fan-in and fan-out": fans,
    "hierarchical processes": hierarchy,
    "plastic synapses, float": lambda: learning(FLOAT),
    "plastic synapses, fixed": lambda: learning(FIXED),
    "variables set between runs": variables,
    "netx": from_netx,
}


if __name__ == "__main__":
    results = {}
    for wanted in sys.argv[2:]:
        np.random.seed(0)  # noqa: NPY002  (models of Lava's use the global generator)
        for key, array in NETWORKS[wanted]().record().items():
            results[f"{wanted}/{key}"] = array
    np.savez(sys.argv[1], **results)
