"""A part of a network as one Lava process."""

from __future__ import annotations

from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess

from export.lava.partition import MAX_PORTS, Part
from export.lava.wire import Recorder, wire_shape


class Segment(AbstractProcess):
    """The stem, a block or the head, with ports `in0` ... `in15` and `out0` ... `out15`.

    Port `in<i>` takes the part's source i, port `out<i>` gives its sink i; the others stay open.

    Args:
        part: the nodes and edges.
        recorders: by node name, for everything that is probed.
    """

    def __init__(self, *, part: Part, recorders: dict[str, Recorder]) -> None:
        super().__init__(part=part, recorders=recorders, name=part.label)
        for side, ports, kind in (("in", part.sources, InPort), ("out", part.sinks, OutPort)):
            for index in range(MAX_PORTS):
                used = index < len(ports)
                shape = wire_shape(part.shapes[ports[index]]) if used else (1,)
                setattr(self, f"{side}{index}", kind(shape=shape))
