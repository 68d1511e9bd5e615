"""Data sets in memory: splits of labelled images, and batches in [0, 1]. Import from here, not from the modules."""

from atmc.data.batches import Batch, batch_count, batches
from atmc.data.datasets import Data, load_data, mixed_order
from atmc.data.images import Images, as_images

__all__ = ["Batch", "Data", "Images", "as_images", "batch_count", "batches", "load_data", "mixed_order"]
