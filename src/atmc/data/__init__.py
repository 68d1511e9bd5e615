"""Load data sets into memory, as splits of labeled images, and serve batches; import from here, not the modules."""

from atmc.data.augment import AUGMENTATIONS
from atmc.data.batches import Batch, batch_count, batches
from atmc.data.datasets import Data, load_data, mix_classes
from atmc.data.images import Images, as_images

__all__ = [
    "AUGMENTATIONS",
    "Batch",
    "Data",
    "Images",
    "as_images",
    "batch_count",
    "batches",
    "load_data",
    "mix_classes",
]
