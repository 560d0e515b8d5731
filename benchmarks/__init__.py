"""Streams: handwritten digits, folders of images and of domains, Avalanche's classic benchmarks. Views for training."""

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation, TwoViews
from avalanche_firn.benchmarks.classic import avalanche_benchmarks, avalanche_stream, cut_benchmark, wrap_benchmark
from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.benchmarks.domains import build_domain_stream, domain_folder_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.rotations import rotation_angles
from avalanche_firn.benchmarks.streams import Stream, StreamError, build_stream, class_order, task_sizes
from avalanche_firn.benchmarks.tensors import TensorImageDataset
from avalanche_firn.benchmarks.transforms import TransformPair, preset_transforms, timm_transforms

__all__ = [
    "ContrastiveAugmentation",
    "Stream",
    "StreamError",
    "TensorImageDataset",
    "TransformPair",
    "TwoViews",
    "avalanche_benchmarks",
    "avalanche_stream",
    "build_domain_stream",
    "build_stream",
    "class_order",
    "cut_benchmark",
    "digits_stream",
    "domain_folder_stream",
    "folder_stream",
    "preset_transforms",
    "rotation_angles",
    "task_sizes",
    "timm_transforms",
    "wrap_benchmark",
]
