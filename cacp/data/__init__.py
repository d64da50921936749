"""Images: digits, CIFAR-10/100, image folders and ImageNet, splits fixed by a seed, normalisation and augmentation."""

from cacp.data.images import ImageData
from cacp.data.sources import DATASETS, MEMORY_LIMIT_BYTES, load_dataset
from cacp.data.splits import Splits, fingerprint, make_splits, stratified_order
from cacp.data.transforms import augment, channel_statistics, normalise

__all__ = [
    "DATASETS",
    "MEMORY_LIMIT_BYTES",
    "ImageData",
    "Splits",
    "augment",
    "channel_statistics",
    "fingerprint",
    "load_dataset",
    "make_splits",
    "normalise",
    "stratified_order",
]
