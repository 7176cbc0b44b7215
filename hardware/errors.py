"""Errors of engine, verification, profiles, energy and GPU measurement."""

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
