"""Images on disk -> uint8 [N, C, H, W] and int64 labels. Nothing is ever downloaded."""

from atsnn.data.images import Dataset, DecodedImages, ImageSet, StoredImages
from atsnn.data.loading import describe, detect, fingerprint, is_built_in, load_dataset

__all__ = [
    "Dataset",
    "DecodedImages",
    "ImageSet",
    "StoredImages",
    "describe",
    "detect",
    "fingerprint",
    "is_built_in",
    "load_dataset",
]
