"""Models of halting score, token gate and token merge."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.kernels import Matching, combine, match, merged_sizes
from export.lava.processes.token.process import HaltingScore, TokenGate, TokenMerge


@implements(proc=HaltingScore, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyHaltingScoreModel(PyLoihiProcessModel):
    """One table look-up for each token."""

    x_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    h_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    table: Any = LavaPyType(np.ndarray, np.int32, precision=16)

    def run_spk(self) -> None:
        self.h_out.send(self.table[self.x_in.recv()[:, 0, 0]])


@implements(proc=TokenGate, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyTokenGateModel(PyLoihiProcessModel):
    """A neuron without leak and reset that is open until it reaches its threshold."""

    h_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    alive_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    gate_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=1)
    total: Any = LavaPyType(np.ndarray, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.accumulate, self.threshold = proc_params["accumulate"], proc_params["threshold"]
        self.steps, self.depth = proc_params["steps"], proc_params["depth"]
        self.living = proc_params["living"]

    def run_spk(self) -> None:
        score = self.h_in.recv()
        alive = self.alive_in.recv() if self.living else 1
        if not self.accumulate or (self.time_step - 1 - self.depth) % self.steps == 0:
            self.total[:] = 0
        self.total += score
        self.gate_out.send(((self.total < self.threshold) * alive).astype(np.int32))


@implements(proc=TokenMerge, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyTokenMergeModel(PyLoihiProcessModel):
    """Assignment latched at the image's first step; combination at every step."""

    x_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    gate_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    alive_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    size_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=16)
    keys_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    x_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    gate_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=1)
    alive_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=1)
    size_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=16)
    partner: Any = LavaPyType(np.ndarray, np.int32, precision=16)
    size: Any = LavaPyType(np.ndarray, np.int32, precision=16)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.node, self.connected = proc_params["node"], proc_params["connected"]
        self.steps, self.depth = proc_params["steps"], proc_params["depth"]

    def _optional(self, port: str) -> Any:
        if port not in self.connected:
            return np.ones(self.partner.shape, np.int32)
        return getattr(self, f"{port}_in").recv()

    def run_spk(self) -> None:
        stream, gate = self.x_in.recv()[:, 0, :], self.gate_in.recv()
        alive, size = self._optional("alive"), self._optional("size")
        keys = self.keys_in.recv()[:, 0, :] if "keys" in self.connected else stream
        if self.time_step <= self.depth:
            self.partner[:] = -1
            self.size[:] = 1
        elif (self.time_step - 1 - self.depth) % self.steps == 0:
            features = keys if self.node.similarity == "keys" else stream
            eligible = (gate > 0) & (alive > 0)
            self.partner[:] = match(
                features, eligible, self.node.count, self.node.minimum_similarity
            ).partner
            self.size[:] = size
        matching = Matching(self.partner)
        merged = combine(matching, stream, self.size, self.node.combine)
        self.x_out.send(merged.astype(np.int32)[:, None, :])
        self.gate_out.send((gate * matching.stays).astype(np.int32))
        self.alive_out.send((alive * matching.stays).astype(np.int32))
        self.size_out.send(merged_sizes(matching, self.size).astype(np.int32))
