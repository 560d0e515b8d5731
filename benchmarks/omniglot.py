"""Omniglot with one character per class: for pre-training on some alphabets and transfer to others.

1,623 characters of 50 alphabets, each drawn by 20 people (Lake et al., github.com/brendenlake/omniglot, MIT licence).
Pixels as in the released code of the zapping paper (arXiv 2310.07996): 28x28, scaled with Lanczos, grey in 0..1, ink
dark on white, not normalised. That code takes characters in the order of the file system; here they are sorted.

Avalanche's `SplitOmniglot` is of no use for this: it pairs the characters of the background set (train) with other
characters of the evaluation set (test) under the same ids.

Accepted layouts, where ALPHABET stands for ALPHABET/CHARACTER/*.png:

- torchvision's and Avalanche's, `root/omniglot-py/images_background/ALPHABET` and `.../images_evaluation/ALPHABET`, or
  the same without the folder omniglot-py, or one of these folders itself as root;
- the two small subsets of the background set, `images_background_small1` and `images_background_small2`, in the same
  places. Greek and Latin are in both and are taken once;
- any `root/ALPHABET`.

Cost: 0.17 ms per image to read; the background set (19,280 images) takes 3 s and 15 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from avalanche_firn.benchmarks.class_files import read_class_images
from avalanche_firn.benchmarks.class_images import ClassImages
from avalanche_firn.benchmarks.downloads import RemoteFile, fetch, unpack
from avalanche_firn.benchmarks.image_files import list_classes, visible
from avalanche_firn.benchmarks.one_class import check_parts, split_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform

OmniglotPart = Literal["background", "evaluation", "small"]

OMNIGLOT_FOLDERS: dict[str, tuple[str, ...]] = {
    "background": ("images_background",),
    "evaluation": ("images_evaluation",),
    "small": ("images_background_small1", "images_background_small2"),
}
OMNIGLOT_CLASSES = {"background": 964, "evaluation": 659, "small": 242}  # characters in all
# A split of the small sets (175 and 67 characters); our choice, and not comparable with the figures on 964 and 659.
OMNIGLOT_SMALL_PRETRAIN = ("Balinese", "Early_Aramaic", "Japanese_(katakana)", "Korean", "Sanskrit")
OMNIGLOT_SMALL_TRANSFER = ("Greek", "Latin", "Tagalog")

_OUTER = "omniglot-py"
_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_MD5 = {  # of the archives
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
    "images_background_small1": "e704a628b5459e08445c13499850abc4",
    "images_background_small2": "b75a71a51d3b13f821f212756fe481fd",
}
_PUBLIC = tuple(folder for folders in OMNIGLOT_FOLDERS.values() for folder in folders)
_LAYOUT = "accepted: ALPHABET/CHARACTER/*.png"


def omniglot_classes(
    root: str | Path,
    part: OmniglotPart | None,
    *,
    alphabets: Sequence[str] | None = None,
    size: int = 28,
    download: bool = False,
) -> ClassImages:
    """Characters as classes named "ALPHABET/CHARACTER", sorted as text.

    Args:
        root: a folder in one of the layouts above.
        part: "background" (964 classes), "evaluation" (659) or "small" (242, the small subsets merged), found under
            `root` and complete; None: the alphabets that lie in `root`, whatever they are.
        alphabets: names of whole alphabets to keep, in any order; None: all.
        size: height and width in pixels. 28: released code.
        download: whether to fetch the part into `root/omniglot-py` if it isn't there (the archives have 9, 6 and
            3 MB and are checked). False works offline.

    Returns:
        Images (N, 1, size, size), mean 0 and std 1.

    Raises:
        StreamError: an unknown part, no such folder, or several that could be meant; a part with a wrong number of
            classes; unknown alphabets; a drawing that differs between the small subsets; files that are no images.
        DownloadError: the part could not be fetched.
    """
    if part is not None and part not in OMNIGLOT_FOLDERS:
        raise StreamError(f"part is {part!r}; accepted: {', '.join(map(repr, OMNIGLOT_FOLDERS))} or None")
    if isinstance(alphabets, str) or (alphabets is not None and not len(alphabets)):
        raise StreamError(f"alphabets is {alphabets!r}; accepted: a sequence of names, at least one, or None")
    if download and part is None:
        raise StreamError("download is True and part None; accepted: a part to fetch")
    root = Path(root)
    if part is None:
        listing = _list_alphabets(_plain_folder(root))
    else:
        listing = _merge([_list_alphabets(folder) for folder in _part_folders(root, part, download)])
        count = sum(len(characters) for characters in listing.values())
        if count != OMNIGLOT_CLASSES[part]:
            raise StreamError(
                f"the part {part!r} in {root} has {count} characters, not {OMNIGLOT_CLASSES[part]}; unpack it again; "
                "part=None with its own folder as root takes what is there"
            )
    if alphabets is not None:
        unknown = sorted(set(alphabets) - set(listing))
        if unknown:
            raise StreamError(f"alphabet {unknown[0]!r} is not there; accepted: {', '.join(sorted(listing))}")
        listing = {name: listing[name] for name in alphabets}
    folders = {f"{a}/{c}": files for a, characters in listing.items() for c, files in characters.items()}
    return read_class_images(folders, size=size, mode="L", resample="lanczos", description="reading omniglot")


def omniglot_stream(
    root: str | Path,
    part: OmniglotPart | None,
    *,
    train_per_class: int = 15,
    test_per_class: int = 5,
    valid_per_class: int = 0,
    alphabets: Sequence[str] | None = None,
    split_seed: int = 0,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    size: int = 28,
    download: bool = False,
    rgb: bool = False,
    allow_shared_images: bool = False,
    name: str | None = None,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """One character per experience, the drawings of every character split into parts.

    Args:
        root, part, alphabets, size, download: see `omniglot_classes`.
        train_per_class, test_per_class: drawings of every character. 15 and 5: released code of arXiv 2310.07996.
        valid_per_class: drawings for a validation stream, on which rates can be chosen; 0: there is none.
        split_seed: see `split_stream`. Drawings beyond the sum of the three numbers are left out.
        class_order, seed, rgb, allow_shared_images, train_transform, eval_transform: see `one_class_stream`.
        name: of the stream; "omniglot" and the part by default.

    Raises:
        StreamError: see `omniglot_classes` and `one_class_stream`; a character with too few drawings.
    """
    check_parts(train_per_class, test_per_class, valid_per_class)
    images = omniglot_classes(root, part, alphabets=alphabets, size=size, download=download)
    return split_stream(
        images,
        name=name or ("omniglot" if part is None else f"omniglot-{part}"),
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        valid_per_class=valid_per_class,
        split_seed=split_seed,
        class_order=class_order,
        seed=seed,
        rgb=rgb,
        allow_shared_images=allow_shared_images,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _plain_folder(root: Path) -> Path:
    _check_folder(root)
    if root.name != _OUTER:
        inside = [name for name in (_OUTER, *_PUBLIC) if (root / name).is_dir()]
    else:
        inside = [name for name in _PUBLIC if (root / name).is_dir()]
    if inside:
        raise StreamError(
            f"{root} holds {inside[0]!r}, so it isn't a folder of alphabets; accepted: a part, one of "
            f"{', '.join(map(repr, OMNIGLOT_FOLDERS))}"
        )
    return root


def _part_folders(root: Path, part: str, download: bool) -> list[Path]:
    found = [_find(root, name) for name in OMNIGLOT_FOLDERS[part]]
    if download and None in found:
        _download(root, part)
        found = [_find(root, name) for name in OMNIGLOT_FOLDERS[part]]
    missing = [name for name, folder in zip(OMNIGLOT_FOLDERS[part], found, strict=True) if folder is None]
    if missing:
        raise StreamError(
            f"{missing[0]} is neither in {root} nor in {root / _OUTER}; accepted: a folder that holds it, or "
            f"download=True ({_URL}/{missing[0]}.zip)"
        )
    return [folder for folder in found if folder is not None]


def _find(root: Path, name: str) -> Path | None:
    """The only folder of that name: `root` itself, in `root`, or in `root/omniglot-py`."""
    places = [root / name, root / _OUTER / name]
    if root.name == name:
        places.append(root)
    elif root.name in _PUBLIC:
        places.append(root.parent / name)  # root is the other one of the small subsets
    there = list({place.resolve(): place for place in places if place.is_dir()}.values())
    if len(there) > 1:
        raise StreamError(f"{there[0]} and {there[1]} are both there; accepted: one {name}")
    return there[0] if there else None


def _download(root: Path, part: str) -> None:
    for name in OMNIGLOT_FOLDERS[part]:
        archive = fetch(RemoteFile(f"{_URL}/{name}.zip", f"{name}.zip", _MD5[name]), root / _OUTER)
        unpack(archive, root / _OUTER, marker=name)


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise StreamError(f"{root} is {'not a folder' if root.exists() else 'absent'}; {_LAYOUT} below it")


def _list_alphabets(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Alphabet -> character -> files, all sorted. Anything else than images in the folder of a character is refused."""
    alphabets, _ = visible(folder)
    if not alphabets:
        raise StreamError(f"{folder} holds no alphabets; {_LAYOUT}")
    return {path.name: list_classes(path, _LAYOUT) for path in alphabets}


def _merge(listings: Sequence[dict[str, dict[str, list[Path]]]]) -> dict[str, dict[str, list[Path]]]:
    """One listing: a file that is in several, under the same alphabet, character and name, is taken once."""
    merged: dict[str, dict[str, dict[str, Path]]] = {}
    for listing in listings:
        for alphabet, characters in listing.items():
            for character, paths in characters.items():
                known = merged.setdefault(alphabet, {}).setdefault(character, {})
                for path in paths:
                    first = known.setdefault(path.name, path)
                    if first is not path and first.read_bytes() != path.read_bytes():
                        raise StreamError(f"{first} and {path} differ; accepted: the same drawing in both, or one file")
    return {a: {c: list(files.values()) for c, files in cs.items()} for a, cs in merged.items()}


__all__ = [
    "OMNIGLOT_CLASSES",
    "OMNIGLOT_FOLDERS",
    "OMNIGLOT_SMALL_PRETRAIN",
    "OMNIGLOT_SMALL_TRANSFER",
    "omniglot_classes",
    "omniglot_stream",
]
