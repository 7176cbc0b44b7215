"""A faster process model of Lava's own `Conv`: one matrix product instead of a loop over channels.

Lava's fixed-point model convolves every pair of input and output channel by itself (scipy), which
takes 0.4 s for one step of a block with 64 features. Process, weights, ports and results are those
of Lava.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
from lava.proc.conv.models import PyConvModelFixed
from lava.proc.conv.process import Conv
from lava.proc.conv.utils import signed_clamp

from export.lava.kernels import convolve
from export.lava.wire import map_from_wire, to_wire


@implements(proc=Conv, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyConvModelMatmul(PyConvModelFixed):
    """Bit-identical to `PyConvModelFixed`; chosen through a run configuration's exception map."""

    s_in: Any
    a_out: Any
    weight: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    num_message_bits: Any

    def run_spk(self) -> None:
        self.a_out.send(self.a_buf)
        maps = self.s_in.recv()
        if self.num_message_bits.item() == 0:
            maps = maps.astype(bool)
        weight = self.weight[:, ::-1, ::-1].transpose(0, 3, 2, 1)
        sums = convolve(
            map_from_wire(maps),
            weight,
            _vertical_first(self.stride),
            _vertical_first(self.padding),
            _vertical_first(self.dilation),
            int(self.groups[0]),
        )
        self.a_buf = signed_clamp(to_wire(sums), bits=24)


def _vertical_first(pair: np.ndarray) -> tuple[int, int]:
    return int(pair[1]), int(pair[0])
