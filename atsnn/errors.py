"""Errors of the model and its training: each names the object, the numbers and the mend."""

from __future__ import annotations


class AtsnnError(Exception):
    """Base of all errors that a user can cause; the command lines print it as one line."""


class ConfigError(AtsnnError):
    """A configuration that cannot be trained or loaded as it stands."""


class DatasetError(AtsnnError):
    """A data set that is missing, empty, damaged or of another shape than the model takes."""


class CheckpointError(AtsnnError):
    """A checkpoint that is missing, damaged or of another configuration."""


class TrainingError(AtsnnError):
    """A training run that cannot go on: its loss is not finite, or its folder is taken."""


class QuantizationError(AtsnnError):
    """A layer that the fixed-point format of the chip cannot hold."""


class ExitError(AtsnnError):
    """An exit over time steps that a network cannot have, or a margin that says nothing."""
