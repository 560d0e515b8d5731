"""Streams: handwritten digits, folders of images and of domains, Avalanche's classic benchmarks. Views for training.

Sets of many classes with few images, one class per experience: Omniglot, mini-ImageNet, OmnImage.
"""

from avalanche_firn.benchmarks.augmentation import ContrastiveAugmentation, TwoViews
from avalanche_firn.benchmarks.cars196 import cars196_stream
from avalanche_firn.benchmarks.class_files import read_class_images
from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.classic import avalanche_benchmarks, avalanche_stream, cut_benchmark, wrap_benchmark
from avalanche_firn.benchmarks.cub200 import cub200_stream
from avalanche_firn.benchmarks.device_transforms import TransformPlan, plan_transform
from avalanche_firn.benchmarks.digits import digit_classes, digits_stream
from avalanche_firn.benchmarks.domainnet import domainnet_domain_stream, domainnet_stream
from avalanche_firn.benchmarks.domains import build_domain_stream, domain_folder_stream
from avalanche_firn.benchmarks.downloads import DownloadError, RemoteFile
from avalanche_firn.benchmarks.five_datasets import FIVE_DATASETS, five_datasets_stream
from avalanche_firn.benchmarks.fmow import FMOW_REGIONS, fmow_region_stream
from avalanche_firn.benchmarks.folder import folder_stream
from avalanche_firn.benchmarks.huggingface import huggingface_stream
from avalanche_firn.benchmarks.imagenet_r import imagenet_r_stream
from avalanche_firn.benchmarks.listed import listed_domain_stream, listed_stream
from avalanche_firn.benchmarks.memory import MemoryReport, hold_in_memory
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
from avalanche_firn.benchmarks.split_lists import load_or_draw, read_split, write_split
from avalanche_firn.benchmarks.streams import Stream, StreamError, build_stream, class_order, task_sizes
from avalanche_firn.benchmarks.tensors import TensorImageDataset
from avalanche_firn.benchmarks.transforms import TransformPair, preset_transforms, timm_transforms

__all__ = [
    "FIVE_DATASETS",
    "FMOW_REGIONS",
    "OMNIGLOT_SMALL_PRETRAIN",
    "OMNIGLOT_SMALL_TRANSFER",
    "ClassImages",
    "ContrastiveAugmentation",
    "DownloadError",
    "MemoryReport",
    "RemoteFile",
    "Stream",
    "StreamError",
    "TensorImageDataset",
    "TransformPair",
    "TransformPlan",
    "TwoViews",
    "avalanche_benchmarks",
    "avalanche_stream",
    "build_domain_stream",
    "build_stream",
    "cars196_stream",
    "check_disjoint",
    "class_order",
    "cub200_stream",
    "cut_benchmark",
    "digit_classes",
    "digits_stream",
    "domain_folder_stream",
    "domainnet_domain_stream",
    "domainnet_stream",
    "five_datasets_stream",
    "fmow_region_stream",
    "folder_stream",
    "hold_in_memory",
    "huggingface_stream",
    "imagenet_r_stream",
    "listed_domain_stream",
    "listed_stream",
    "load_or_draw",
    "mini_imagenet_classes",
    "mini_imagenet_stream",
    "omniglot_classes",
    "omniglot_stream",
    "omnimage_classes",
    "omnimage_stream",
    "one_class_stream",
    "plan_transform",
    "preset_transforms",
    "read_class_images",
    "read_split",
    "read_test_classes",
    "rotation_angles",
    "split_stream",
    "task_sizes",
    "timm_transforms",
    "wrap_benchmark",
    "write_split",
]
