"""Models of halting score, token gate and token merge."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.arrivals import ArrivalsModel
from export.lava.kernels import Matching, combine, match, merged_sizes
from export.lava.processes.token.process import HaltingScore, TokenGate, TokenMerge


@implements(proc=HaltingScore, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyHaltingScoreModel(ArrivalsModel):
    """One table look-up for each token."""

    x_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    h_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    table: Any = LavaPyType(np.ndarray, np.int32, precision=16)

    def run_spk(self) -> None:
        self.h_out.send(self.table[self.take("x_in")[:, 0, 0]])


@implements(proc=TokenGate, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyTokenGateModel(ArrivalsModel):
    """A neuron without leak and reset that is open until it reaches its threshold."""

    h_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    alive_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    gate_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=1)
    total: Any = LavaPyType(np.ndarray, np.int32, precision=24)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.accumulate, self.threshold = proc_params["accumulate"], proc_params["threshold"]
        self.steps, self.depth = proc_params["steps"], proc_params["depth"]

    def run_spk(self) -> None:
        score = self.take("h_in")
        alive = self.take_or("alive_in", np.ones_like(score))
        if not self.accumulate or (self.time_step - 1 - self.depth) % self.steps == 0:
            self.total[:] = 0
        self.total += score
        self.gate_out.send(((self.total < self.threshold) * alive).astype(np.int32))


@implements(proc=TokenMerge, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyTokenMergeModel(ArrivalsModel):
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
        self.node = proc_params["node"]
        self.steps, self.depth = proc_params["steps"], proc_params["depth"]

    def run_spk(self) -> None:
        wire, gate = self.take("x_in"), self.take("gate_in")
        stream, keys = wire[:, 0, :], self.take_or("keys_in", wire)[:, 0, :]
        ones = np.ones_like(gate)
        alive, size = self.take_or("alive_in", ones), self.take_or("size_in", ones)
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
