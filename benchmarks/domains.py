"""A domain-incremental stream from a folder of domain folders: the same classes, pictured differently in each task.

Accepted layouts: `root/DOMAIN/CLASS/image`, or `root/DOMAIN/train/CLASS/image` with `root/DOMAIN/test/CLASS/image` and
perhaps one of `val`, `valid`, `validation`, in every domain alike. Each domain is one experience of every stream. What
is not there as a folder is drawn from the domain's training images as in `folder`.

Classes are shared: a class id is the position of the folder's name in the sorted union over all domains of the stream.
A domain may lack classes, and its test part may lack or add some, as regions of the world do; a class without training
images in any domain is refused. Nothing else is skipped either, see `image_files`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avalanche.benchmarks.scenarios.generic_scenario import CLScenario
from tqdm import tqdm

from avalanche_firn.benchmarks.image_files import (
    IMAGE_EXTENSIONS,
    VALIDATION_FOLDERS,
    ImageFiles,
    check_transforms,
    draw_split,
    find_parts,
    list_classes,
    read_parts,
    visible,
)
from avalanche_firn.benchmarks.streams import (
    Digest,
    Stream,
    StreamError,
    Transform,
    avalanche_dataset,
    eager_stream,
)

LAYOUTS = (
    "accepted: root/DOMAIN/CLASS/image files, or root/DOMAIN/train/CLASS/... with root/DOMAIN/test/CLASS/... "
    f"(and perhaps one of root/DOMAIN/{', root/DOMAIN/'.join(VALIDATION_FOLDERS)})"
)
_PART_NAMES = frozenset({"train", "test", *VALIDATION_FOLDERS})


def domain_folder_stream(
    root: str | Path,
    *,
    train_transform: Transform,
    eval_transform: Transform,
    domains: Sequence[str] | None = None,
    validation_fraction: float = 0.2,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    name: str | None = None,
) -> Stream:
    """A domain-incremental stream over a folder of domain folders.

    Args:
        root: the folder, in one of the layouts above.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        domains: names of the domain folders in order of appearance; folders that are not named take no part. None:
            all of them, sorted as text.
        validation_fraction, test_fraction, split_seed: as in `folder_stream`, for each domain by itself.
        name: of the stream; the folder's name by default.

    Returns:
        A stream with one experience per domain, all of task label 0. `Stream.class_order` has the classes as the
        domains bring them, `Stream.task_sizes` the number of classes of each domain.

    Raises:
        StreamError: no such folder or domain, a domain named twice, domains in different layouts, a class without
            training images, too few images for a split, or a file that is no image.
    """
    check_transforms(train_transform, eval_transform)
    root = Path(root)
    chosen = _find_domains(root, domains)
    folders = {domain: find_parts(path, LAYOUTS) for domain, path in chosen.items()}
    first, parts = next((domain, set(found)) for domain, found in folders.items())
    for domain, found in folders.items():
        for part in sorted(parts ^ set(found)):
            owner, other = (domain, first) if part in found else (first, domain)
            raise StreamError(f"domain {owner!r} has a folder for {part} and {other!r} has none; {LAYOUTS}, all alike")
    listings = {
        domain: {part: list_classes(path, LAYOUTS) for part, path in found.items()} for domain, found in folders.items()
    }
    class_names = sorted({label for found in listings.values() for listing in found.values() for label in listing})
    ids = {label: c for c, label in enumerate(class_names)}
    untrained = sorted(set(class_names) - {label for found in listings.values() for label in found["train"]})
    if untrained:
        raise StreamError(f"class {untrained[0]!r} has no training images in any domain; accepted: some in one domain")
    splits = {}
    for domain, listed in listings.items():
        try:
            splits[domain] = draw_split(
                listed, ids, validation_fraction=validation_fraction, test_fraction=test_fraction, seed=split_seed
            )
        except StreamError as error:
            raise StreamError(f"domain {domain!r}: {error}") from error
        if "test" not in listed and not len(splits[domain].test):
            raise StreamError(f"{chosen[domain]} has no folder test and test_fraction is 0; accepted: one of both")
    total = sum(len(paths) for found in listings.values() for part in found.values() for paths in part.values())
    digest = Digest()
    datasets: dict[str, list[ImageFiles]] = {"train": [], "valid": [], "test": []}
    with tqdm(total=total, desc=f"checking {root.name}", unit="file", disable=None, leave=False) as progress:
        for domain, listed in listings.items():
            for part, files in read_parts(listed, ids, splits[domain], progress).items():
                digest.add("domain", domain)
                for file in files:
                    digest.add(f"{part}/{file.key}", file.digest)
                datasets[part].append(ImageFiles([f.path for f in files], [f.label for f in files]))
    return build_domain_stream(
        name or root.resolve().name,
        train=datasets["train"],
        valid=datasets["valid"] if len(datasets["valid"][0]) else None,
        test=datasets["test"],
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def build_domain_stream(
    name: str,
    *,
    train: Sequence[Any],
    test: Sequence[Any],
    valid: Sequence[Any] | None = None,
    class_names: Sequence[str],
    fingerprint: str,
    train_transform: Transform | None = None,
    eval_transform: Transform | None = None,
) -> Stream:
    """A domain-incremental stream: one experience per data set, over classes that come again.

    Args:
        train, test, valid: data sets as in `build_stream`, one per domain and in the same order. None needs to hold
            every class; together the training data sets do. `valid` may be None.
        class_names: (C,) names; labels are positions in it.
        name, fingerprint, train_transform, eval_transform: as in `build_stream`.

    Returns:
        A stream whose task label is always 0, with the classes in order of appearance (ascending inside a domain) and
        as task sizes the number of classes of each training experience, which sum to more than C where classes come
        again.

    Raises:
        StreamError: streams of different lengths, an empty data set, a label outside 0..C-1, or a class that no
            training data set holds.
    """
    parts = {"train": train, "test": test} if valid is None else {"train": train, "valid": valid, "test": test}
    lengths = {part: len(datasets) for part, datasets in parts.items()}
    if not train or len(set(lengths.values())) != 1:
        raise StreamError(f"{name} has {lengths} domains; accepted: equally many in each part, at least one")
    order: dict[int, None] = {}
    for part, datasets in parts.items():
        for i, data in enumerate(datasets):
            classes = sorted(set(data.targets))
            if not classes or not 0 <= classes[0] <= classes[-1] < len(class_names):
                held = ", ".join(map(str, classes)) or "no images"
                raise StreamError(
                    f"{name}: {part} data {i} holds {held}; accepted: labels among 0..{len(class_names) - 1}"
                )
            if part == "train":
                order.update(dict.fromkeys(classes))
    absent = [class_names[c] for c in range(len(class_names)) if c not in order]
    if absent:
        raise StreamError(
            f"{name}: the classes {', '.join(absent)} have no training images; accepted: some in one domain"
        )
    benchmark = CLScenario(
        [
            eager_stream(part, [avalanche_dataset(data, part, train_transform, eval_transform) for data in datasets])
            for part, datasets in parts.items()
        ]
    )
    sizes = tuple(len(set(data.targets)) for data in train)
    return Stream(name, benchmark, tuple(order), sizes, tuple(class_names), fingerprint)


def _find_domains(root: Path, domains: Sequence[str] | None) -> dict[str, Path]:
    """The folders of the domains, in order."""
    if not root.is_dir():
        raise StreamError(f"{root} is {'not a folder' if root.exists() else 'absent'}; {LAYOUTS}")
    folders, files = visible(root)
    loose = [path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS]
    if loose:
        raise StreamError(f"{loose[0]} is an image outside any domain folder; {LAYOUTS}")
    named = {path.name: path for path in folders}
    if not named:
        raise StreamError(f"{root} holds no domain folders; {LAYOUTS}")
    if domains is None:
        parts = sorted(_PART_NAMES & set(named))
        if parts:  # a folder of classes, or a domain of that name: only the user knows
            raise StreamError(
                f"{named[parts[0]]} is named like a part and not like a domain; {LAYOUTS}; a domain of that name has "
                "to be named in domains, and a folder without domains is for folder_stream"
            )
        return named
    if isinstance(domains, str) or not isinstance(domains, Sequence) or not domains:
        raise StreamError(f"domains is {domains!r}; accepted: None or a sequence of folder names")
    unknown = [domain for domain in domains if domain not in named]
    if unknown:
        raise StreamError(f"domain {unknown[0]!r} is no folder of {root}; accepted: {', '.join(named)}")
    repeated = [domain for i, domain in enumerate(domains) if domain in domains[:i]]
    if repeated:
        raise StreamError(f"domain {repeated[0]!r} is named twice; accepted: each domain once")
    return {domain: named[domain] for domain in domains}


__all__ = ["build_domain_stream", "domain_folder_stream"]
