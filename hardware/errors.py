"""Errors of engine, verification, profiles, placement, energy and GPU measurement."""

from __future__ import annotations

from atsnn.errors import AtsnnError


class ProfileError(AtsnnError):
    """A chip or GPU profile with a missing value, unit, source or grade."""


class EngineError(AtsnnError):
    """Input or graph that the engine cannot run."""


class VerificationError(AtsnnError):
    """A verification that cannot be carried out (a difference is a result, not an error)."""


class GpuMeasurementError(AtsnnError):
    """A GPU trace that cannot be evaluated."""


class PlacementError(AtsnnError):
    """A network that does not fit the cores of a chip: names layer, both numbers and the mend."""


class LavaRuntimeError(AtsnnError, RuntimeError):
    """What the in-process Lava runtime cannot do, or a Lava network that failed in it.

    Also a RuntimeError, which is what Lava's own runtime raises.
    """


class LavaModelError(LavaRuntimeError):
    """A process model raised; what it raised is the cause (`__cause__`).

    Attributes:
        process: name of the process.
        model: class name of its process model.
        phase: what it was doing: "construction", "spiking phase", "learning phase", ...
        time_step: the time step, counted from 1; 0 before the first.
        port: the port at which it happened; None if it happened elsewhere.
    """

    def __init__(
        self, message: str, process: str, model: str, phase: str, time_step: int, port: str | None
    ) -> None:
        super().__init__(message)
        self.process, self.model, self.phase = process, model, phase
        self.time_step, self.port = time_step, port


class LavaDeadlockError(LavaRuntimeError):
    """No process can go on: each waits for a message that no other will send.

    Attributes:
        waiting: a line for each process that waits: its name, the port, and for whom.
    """

    def __init__(self, message: str, waiting: tuple[str, ...]) -> None:
        super().__init__(message)
        self.waiting = waiting
