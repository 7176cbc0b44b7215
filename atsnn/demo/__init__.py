"""The built-in model and test images: a quantised adaptive Spikformer for Fashion-MNIST.

How it was trained: docs/demo_model.md. Reading the images needs no torch.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from atsnn.errors import CheckpointError, DatasetError

if TYPE_CHECKING:
    from atsnn.spikformer import Spikformer

_FOLDER = Path(str(resources.files(__name__)))
MODEL_PATH = _FOLDER / "model.safetensors"
IMAGES_PATH = _FOLDER / "images.safetensors"


def load_demo_model() -> Spikformer:
    """The built-in model, in evaluation mode."""
    from atsnn.checkpoint import load_model

    if not MODEL_PATH.is_file():
        raise CheckpointError(f"{MODEL_PATH}: the built-in model is missing from this installation")
    return load_model(MODEL_PATH)


def load_demo_images() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The built-in test images, uint8 [N, 1, 28, 28], and their labels, int64 [N]."""
    try:
        arrays = load_file(IMAGES_PATH)
        return arrays["images"], arrays["labels"].astype(np.int64)
    except (OSError, KeyError, SafetensorError) as error:
        raise DatasetError(f"{IMAGES_PATH}: the built-in images are missing ({error})") from None
