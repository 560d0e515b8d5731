"""Streams: handwritten digits, folders of images and of domains, Avalanche's classic benchmarks. Views for training.

Sets of many classes with few images, one class per experience: Omniglot, mini-ImageNet, OmnImage.
"""

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation, TwoViews
from avalanche_firn.benchmarks.class_files import read_class_images
from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.classic import avalanche_benchmarks, avalanche_stream, cut_benchmark, wrap_benchmark
from avalanche_firn.benchmarks.digits import digit_classes, digits_stream
from avalanche_firn.benchmarks.domains import build_domain_stream, domain_folder_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.mini_imagenet import mini_imagenet_classes, mini_imagenet_stream
from avalanche_firn.benchmarks.omniglot import (
    OMNIGLOT_SMALL_PRETRAIN,
    OMNIGLOT_SMALL_TRANSFER,
    omniglot_classes,
    omniglot_stream,
)
from avalanche_firn.benchmarks.omnimage import omnimage_classes, omnimage_stream, read_test_classes
from avalanche_firn.benchmarks.one_class import check_disjoint, one_class_stream, split_stream
from avalanche_firn.benchmarks.rotations import rotation_angles
from avalanche_firn.benchmarks.streams import Stream, StreamError, build_stream, class_order, task_sizes
from avalanche_firn.benchmarks.tensors import TensorImageDataset
from avalanche_firn.benchmarks.transforms import TransformPair, preset_transforms, timm_transforms

__all__ = [
    "OMNIGLOT_SMALL_PRETRAIN",
    "OMNIGLOT_SMALL_TRANSFER",
    "ClassImages",
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
    "check_disjoint",
    "class_order",
    "cut_benchmark",
    "digit_classes",
    "digits_stream",
    "domain_folder_stream",
    "folder_stream",
    "mini_imagenet_classes",
    "mini_imagenet_stream",
    "omniglot_classes",
    "omniglot_stream",
    "omnimage_classes",
    "omnimage_stream",
    "one_class_stream",
    "preset_transforms",
    "read_class_images",
    "read_test_classes",
    "rotation_angles",
    "split_stream",
    "task_sizes",
    "timm_transforms",
    "wrap_benchmark",
]
