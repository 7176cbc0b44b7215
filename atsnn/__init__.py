"""Spiking vision transformers with adaptive tokens: model, training, quantisation.

Names are imported when they are first used, so that what needs no torch does not import it.
"""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

# torch and numba would each have an OpenMP pool, whose idle threads spin while others work: on busy
# cores up to thirty times the work itself. Read when torch and numba are loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")

# norse uses torch.jit.script when it is imported; with current torch every command would say so.
warnings.filterwarnings(
    "ignore", message=".torch.jit.script. is deprecated", category=FutureWarning
)

if TYPE_CHECKING:
    from atsnn.augment import to_input
    from atsnn.checkpoint import load_model, read_checkpoint, save_checkpoint
    from atsnn.config import ModelConfig, RunConfig, load_config, load_preset, preset_names
    from atsnn.data import Dataset, load_dataset
    from atsnn.demo import load_demo_images, load_demo_model
    from atsnn.errors import (
        AtsnnError,
        CheckpointError,
        ConfigError,
        DatasetError,
        ExitError,
        QuantizationError,
        TrainingError,
    )
    from atsnn.evaluation import Comparison, Evaluation, compare, evaluate
    from atsnn.exits import first_steps
    from atsnn.quantization import float_twin, quantize_model
    from atsnn.spikformer import ModelOutput, Spikformer, build_model
    from atsnn.training import train

_HOME = {
    "ModelOutput": "atsnn.spikformer",
    "Spikformer": "atsnn.spikformer",
    "build_model": "atsnn.spikformer",
    "first_steps": "atsnn.exits",
    "float_twin": "atsnn.quantization",
    "quantize_model": "atsnn.quantization",
    "load_model": "atsnn.checkpoint",
    "read_checkpoint": "atsnn.checkpoint",
    "save_checkpoint": "atsnn.checkpoint",
    "ModelConfig": "atsnn.config",
    "RunConfig": "atsnn.config",
    "load_config": "atsnn.config",
    "load_preset": "atsnn.config",
    "preset_names": "atsnn.config",
    "Dataset": "atsnn.data",
    "load_dataset": "atsnn.data",
    "to_input": "atsnn.augment",
    "train": "atsnn.training",
    "Comparison": "atsnn.evaluation",
    "Evaluation": "atsnn.evaluation",
    "compare": "atsnn.evaluation",
    "evaluate": "atsnn.evaluation",
    "load_demo_images": "atsnn.demo",
    "load_demo_model": "atsnn.demo",
    "AtsnnError": "atsnn.errors",
    "CheckpointError": "atsnn.errors",
    "ConfigError": "atsnn.errors",
    "DatasetError": "atsnn.errors",
    "ExitError": "atsnn.errors",
    "QuantizationError": "atsnn.errors",
    "TrainingError": "atsnn.errors",
}

__all__ = [
    "ModelOutput",
    "Spikformer",
    "build_model",
    "first_steps",
    "float_twin",
    "quantize_model",
    "load_model",
    "read_checkpoint",
    "save_checkpoint",
    "ModelConfig",
    "RunConfig",
    "load_config",
    "load_preset",
    "preset_names",
    "Dataset",
    "load_dataset",
    "to_input",
    "train",
    "Comparison",
    "Evaluation",
    "compare",
    "evaluate",
    "load_demo_images",
    "load_demo_model",
    "AtsnnError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "ExitError",
    "QuantizationError",
    "TrainingError",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
