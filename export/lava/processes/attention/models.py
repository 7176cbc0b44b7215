"""Model of spiking attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol

from export.lava.arrivals import ArrivalsModel
from export.lava.kernels import attention_read, attention_table
from export.lava.processes.attention.process import SpikingAttention


@implements(proc=SpikingAttention, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PySpikingAttentionModel(ArrivalsModel):
    """Sends the previous step's result first, as Lava's synapses do."""

    q_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    k_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    v_in: Any = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=1)
    a_out: Any = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    table: Any = LavaPyType(np.ndarray, np.int32, precision=24)
    a_buf: Any = LavaPyType(np.ndarray, np.int32, precision=24)

    def run_spk(self) -> None:
        self.a_out.send(self.a_buf)
        q, k, v = (self.take(port)[:, 0, :] for port in ("q_in", "k_in", "v_in"))
        self.table[:] = attention_table(k, v, self.table.shape[0])
        self.a_buf[:, 0, :] = attention_read(q, self.table)
