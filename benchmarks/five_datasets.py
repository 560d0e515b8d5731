"""5-Datasets: SVHN, MNIST, CIFAR-10, NotMNIST, FashionMNIST one after the other, ten classes each and no class twice.

From Adversarial Continual Learning (Ebrahimi et al., ECCV 2020, arXiv 2003.09553); LoRAC-IPC (arXiv 2504.13407) takes
the five in this order. Images come as RGB in their own size, 28x28 or 32x32; the papers' transforms scale them.

Three come through torchvision, with its files and checksums. MNIST and FashionMNIST are read from the unpacked idx
files, which have no checksum, and never from the `processed` files that old versions of torchvision wrote. CIFAR-10 is
read by `cifar`, from the binary version or, without unpickling, from the Python version that torchvision has.

NotMNIST is the archive of the Adversarial Continual Learning repository: `root/notMNIST/{Train,Test}/{A..J}/*.png`. No
MD5 of it is published; known is its name inside git, a SHA-1 of its content, and a download is checked against that.
Two of its files are empty (`NOTMNIST_BROKEN`) and left out. The LoRAC-IPC code leaves out whatever doesn't open and
prints its name; here any other such file is an error. Files come in the order of their names, there of the disk.

Cost, an estimate: 600 MB of memory for all five, a few seconds to read and hash; 0.5 GB to download.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from torchvision import datasets as vision
from torchvision.datasets.mnist import read_image_file, read_label_file
from tqdm import tqdm

from avalanche_firn.benchmarks.cifar import ArrayImages, read_cifar
from avalanche_firn.benchmarks.downloads import DownloadError, RemoteFile, default_root, fetch, unpack
from avalanche_firn.benchmarks.image_files import ImageFiles, check_files, check_transforms, list_classes
from avalanche_firn.benchmarks.streams import (
    Digest,
    Stream,
    StreamError,
    Transform,
    build_stream,
    stratified_split,
)

FIVE_DATASETS = ("svhn", "mnist", "cifar10", "notmnist", "fashion_mnist")  # the LoRAC-IPC code: this order
NOTMNIST = RemoteFile(
    "https://github.com/facebookresearch/Adversarial-Continual-Learning/raw/main/data/notMNIST.zip", "notMNIST.zip"
)
NOTMNIST_GIT_BLOB = "3e15e76aba58fdd8ea2fe95180192c104b62f0f2"  # in that repository since its first commit
NOTMNIST_BROKEN = frozenset(  # empty in the original notMNIST_small too
    {"A/RGVtb2NyYXRpY2FCb2xkT2xkc3R5bGUgQm9sZC50dGY=.png", "F/Q3Jvc3NvdmVyIEJvbGRPYmxpcXVlLnR0Zg==.png"}
)
# what torchvision raises for a failed download, a wrong checksum and a damaged file
_BROKEN = (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError)
_LETTERS = tuple("ABCDEFGHIJ")
_DIGITS = tuple("0123456789")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CLASSES = {"svhn": _DIGITS, "mnist": _DIGITS, "cifar10": _CIFAR10, "notmnist": _LETTERS, "fashion_mnist": _FASHION}


class JoinedImages(Dataset):
    """Chosen images of several data sets, one set after the other; nothing is copied.

    Args:
        members: (data set with `targets`, positions in it, what is added to its class ids) of each.
    """

    def __init__(self, members: Sequence[tuple[Any, np.ndarray, int]]) -> None:
        self._members = [(data, rows.tolist(), shift) for data, rows, shift in members]
        self._ends = np.cumsum([len(rows) for _, rows, _ in self._members]).tolist()
        self.targets = [data.targets[i] + shift for data, rows, shift in self._members for i in rows]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        index %= len(self)
        member = bisect.bisect_right(self._ends, index)
        data, rows, _ = self._members[member]
        start = self._ends[member - 1] if member else 0
        return data[rows[index - start]][0], self.targets[index]


class _Part(NamedTuple):
    """Train or test part of one data set and a digest of its content."""

    data: Any
    digest: bytes


def five_datasets_stream(
    root: str | Path | None = None,
    *,
    datasets: Sequence[str] = FIVE_DATASETS,
    train_transform: Transform,
    eval_transform: Transform,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    download: bool = False,
    name: str | None = None,
) -> Stream:
    """One data set after the other: class-incremental, a data set per task.

    Args:
        root: the folder with torchvision's files (`train_32x32.mat`, `MNIST/raw/...`, `FashionMNIST/raw/...`),
            `cifar-10-batches-bin/` or `cifar-10-batches-py/`, and `notMNIST/`; what `datasets` doesn't name isn't
            needed. None: `five_datasets` in Avalanche's folder for data.
        datasets: some of `FIVE_DATASETS`, in the order of the tasks. The first has the class ids 0..9, the second
            10..19, and so on; a class is called "svhn/0" or "cifar10/airplane".
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        validation_fraction: part of each class's training images that becomes the validation stream. 0: there is none,
            the LoRAC-IPC code trains on all.
        split_seed: of that part. Each data set is split for itself, so the order of the tasks doesn't matter.
        download: fetches what isn't there. NotMNIST's archive is checked and unpacked below `root`.
        name: of the stream; "five-datasets" by default.

    Raises:
        StreamError: an unknown or repeated data set, files that are absent, of the wrong checksum or broken (with their
            names), a wrong fraction or seed.
        DownloadError: a download that fails, with its address and where to put the file.
    """
    check_transforms(train_transform, eval_transform)
    chosen = _check_names(datasets)
    # on no samples: a wrong fraction or seed is refused before anything is read or fetched
    stratified_split([], validation_fraction=validation_fraction, test_fraction=0, seed=split_seed)
    folder = default_root("five_datasets") if root is None else Path(root).expanduser()
    members: dict[str, list[tuple[Any, np.ndarray, int]]] = {"train": [], "valid": [], "test": []}
    digest = Digest()
    for position, key in enumerate(chosen):
        shift = 10 * position
        train, test = (_READERS[key](folder, part, download) for part in ("train", "test"))
        split = stratified_split(
            train.data.targets,
            validation_fraction=validation_fraction,
            test_fraction=0,
            seed=split_seed,
            class_names=[f"{key}/{label}" for label in _CLASSES[key]],
        )
        members["train"].append((train.data, split.train, shift))
        members["valid"].append((train.data, split.valid, shift))
        members["test"].append((test.data, np.arange(len(test.data)), shift))
        for part, read in (("train", train), ("test", test)):
            digest.add(f"{key}/{part}", read.digest)
            digest.add(f"{key}/{part}/labels", np.asarray(read.data.targets, dtype=np.int64))
        digest.add(f"{key}/valid", split.valid)
    joined = {part: JoinedImages(listed) for part, listed in members.items()}
    return build_stream(
        name or "five-datasets",
        train=joined["train"],
        valid=joined["valid"] if len(joined["valid"]) else None,
        test=joined["test"],
        class_order=range(10 * len(chosen)),
        task_sizes=[10] * len(chosen),
        class_names=[f"{key}/{label}" for key in chosen for label in _CLASSES[key]],
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def git_blob(content: bytes) -> str:
    """The name that git gives to a file with this content: a SHA-1, 40 hexadecimal digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    accepted = f"accepted: some of {', '.join(FIVE_DATASETS)}, each once"
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise StreamError(f"datasets is {names!r}; {accepted}")
    for i, key in enumerate(names):
        if key not in FIVE_DATASETS:
            raise StreamError(f"datasets names {key!r}; {accepted}")
        if key in names[:i]:
            raise StreamError(f"datasets names {key!r} twice; {accepted}")
    return tuple(names)


def _svhn(root: Path, part: str, download: bool) -> _Part:
    url, file, _ = vision.SVHN.split_list[part]
    data = _torchvision("SVHN", root, [file], url, download, lambda get: vision.SVHN(root, split=part, download=get))
    return _from_arrays(data.data.transpose(0, 2, 3, 1), data.labels)  # (N, 3, H, W) there


def _cifar10(root: Path, part: str, download: bool) -> _Part:
    return _from_arrays(*read_cifar(10, root, part, download=download))


def _mnist(root: Path, part: str, download: bool) -> _Part:
    return _idx(vision.MNIST, root, part, download)


def _fashion_mnist(root: Path, part: str, download: bool) -> _Part:
    return _idx(vision.FashionMNIST, root, part, download)


def _idx(kind: Any, root: Path, part: str, download: bool) -> _Part:
    """MNIST's format. torchvision downloads and unpacks; the files are read here, see above."""
    label, stem = kind.__name__, {"train": "train", "test": "t10k"}[part]
    images, labels = (f"{label}/raw/{stem}-{what}-ubyte" for what in ("images-idx3", "labels-idx1"))

    def read(get: bool) -> tuple[np.ndarray, np.ndarray]:
        if get:
            old = root / label / "processed"
            if old.exists():  # torchvision would unpickle what lies there, and fetch nothing
                raise RuntimeError(f"{old} is of an old version of torchvision, remove it")
            kind(root, train=part == "train", download=True)
        return read_image_file(str(root / images)).numpy(), read_label_file(str(root / labels)).numpy()

    pixels, targets = _torchvision(label, root, [images, labels], kind.mirrors[0], download, read)
    if len(pixels) != len(targets):
        raise StreamError(f"{root / images} has {len(pixels)} images, {labels} {len(targets)}; accepted: equal numbers")
    return _from_arrays(pixels, targets)


def _torchvision(
    label: str, root: Path, files: Sequence[str], url: str, download: bool, build: Callable[[bool], Any]
) -> Any:
    """What `build` reads, which gets True if it has to download first. Errors say which file, and what to do."""
    absent = [file for file in files if not (root / file).is_file()]
    if absent and not download:
        raise StreamError(f"{root / absent[0]} is absent, {label} needs it; download=True fetches {label} from {url}")
    try:
        return build(bool(absent))
    except _BROKEN as error:
        if absent:
            raise DownloadError(
                f"{label} could not be fetched from {url} to {root}: {error}; {absent[0]} can be put there by hand"
            ) from error
        raise StreamError(
            f"{label} in {root} ({', '.join(files)}) cannot be read: {error}; a file is damaged or of the wrong "
            "checksum: remove it and pass download=True"
        ) from error


def _from_arrays(images: np.ndarray, targets: Any) -> _Part:
    content = np.ascontiguousarray(images)
    return _Part(ArrayImages(content, targets), hashlib.sha256(content.data).digest())


def _notmnist(root: Path, part: str, download: bool) -> _Part:
    folder = root / "notMNIST" / part.capitalize()
    if not folder.is_dir():
        if not download or folder.parent.is_dir():
            raise StreamError(
                f"{folder} is absent; accepted: root/notMNIST/{{Train,Test}}/{{A..J}}/*.png, from {NOTMNIST.url} or by "
                "download=True where there is no root/notMNIST"
            )
        archive = fetch(NOTMNIST, root)
        found = git_blob(archive.read_bytes())
        if found != NOTMNIST_GIT_BLOB:
            raise DownloadError(
                f"{archive} has the git SHA-1 {found}; accepted: {NOTMNIST_GIT_BLOB}; remove it and try again "
                f"({NOTMNIST.url}), or unpack a copy of your own to {folder.parent}"
            )
        unpack(archive, root, marker="notMNIST")
    listing = list_classes(folder)
    if tuple(listing) != _LETTERS:
        raise StreamError(f"{folder} holds the folders {', '.join(listing)}; accepted: A to J")
    ids = {letter: c for c, letter in enumerate(_LETTERS)}
    digest = Digest()
    images, broken = [], []
    total = sum(len(paths) for paths in listing.values())
    with tqdm(total=total, desc=f"checking {folder}", unit="file", disable=None, leave=False) as progress:
        for letter, paths in listing.items():
            for path in paths:
                try:
                    images += check_files({letter: [path]}, ids, progress)
                except StreamError:
                    if f"{letter}/{path.name}" not in NOTMNIST_BROKEN:
                        broken.append(f"{letter}/{path.name}")
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise StreamError(
            f"{len(broken)} file(s) of {folder} cannot be read as images: {', '.join(broken[:5])}{more}; accepted: "
            f"broken are only those of the public archive, {', '.join(sorted(NOTMNIST_BROKEN))}"
        )
    for file in images:
        digest.add(file.key, file.digest)
    data = ImageFiles([file.path for file in images], [file.label for file in images])
    return _Part(data, bytes.fromhex(digest.hexdigest()))


_READERS: dict[str, Callable[[Path, str, bool], _Part]] = {
    "svhn": _svhn,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "notmnist": _notmnist,
    "fashion_mnist": _fashion_mnist,
}

__all__ = [
    "FIVE_DATASETS",
    "NOTMNIST",
    "NOTMNIST_BROKEN",
    "NOTMNIST_GIT_BLOB",
    "ArrayImages",
    "JoinedImages",
    "five_datasets_stream",
    "git_blob",
]
