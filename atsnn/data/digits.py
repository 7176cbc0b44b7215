"""The 1,797 handwritten digits of scikit-learn, 8 × 8 pixels: built in, nothing to put anywhere."""

from __future__ import annotations

import numpy as np

from atsnn.data.images import Dataset, stored


def load() -> Dataset:
    """Every fifth image is for testing: 1,438 for training, 359 for testing."""
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    values, labels = load_digits(return_X_y=True)
    images = np.minimum(np.asarray(values) * 16, 255).astype(np.uint8).reshape(-1, 1, 8, 8)
    held_out = np.arange(len(images)) % 5 == 4
    train = stored(images[~held_out], labels[~held_out], "digits")
    test = stored(images[held_out], labels[held_out], "digits")
    return Dataset("digits", "built in", train, test, tuple("0123456789"))
