"""DomainNet: 345 classes in six domains, class after class or domain after domain.

From Peng et al., ICCV 2019 (arXiv 1812.01754), in the cleaned version with the official lists: 409,832 training and
176,743 test images. Lines of a list: "clipart/aircraft_carrier/clipart_001_000001.jpg 0". Class ids are those of the
lists, class names the folders' names.

Accepted layouts: `root/domainnet/{clipart,...}/CLASS/*.jpg` with the lists `clipart_train.txt`, `clipart_test.txt`, ...
beside those folders or in a folder `splits` or `txt` there; or the same with root as that folder.

The official lists of painting have no training image of t-shirt and no test image of syringe, so painting alone makes
no class-incremental stream. Other projects put files of those classes back; lists of any kind are taken with
complete=False. The LoRAC-IPC code (345 classes in five tasks) reads two lists of its own, which its repository doesn't
ship; whether they are the official ones is open.

Cost: 586,575 files are looked up in 5 s on a warm local disk, none is opened. 17.5 GB to download, as much again for
the unpacked images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from avalanche_firn.benchmarks.downloads import RemoteFile, default_root, fetch, unpack
from avalanche_firn.benchmarks.image_files import check_transforms
from avalanche_firn.benchmarks.listed import listed_domain_stream, listed_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform, stratified_split, task_sizes
from avalanche_firn.benchmarks.streams import class_order as natural_or_seeded

DOMAINNET_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DOMAINNET_CLASSES = 345
DOMAINNET_IMAGES = {  # training and test images of the cleaned version
    "clipart": (33525, 14604),
    "infograph": (36023, 15582),
    "painting": (50416, 21850),
    "quickdraw": (120750, 51750),
    "real": (120906, 52041),
    "sketch": (48212, 20916),
}
_PARTS = ("train", "test")
_LIST_FOLDERS = ("", "splits", "txt")
_BASE = "https://csr.bu.edu/ftp/visda/2019/multi-source"
_ARCHIVES = {  # folder on the server, MD5 of the archive, of the training and of the test list
    "clipart": (
        "groundtruth/",  # the cleaned version of these two stands there
        "cd0d8f2d77a4e181449b78ed62bccf1e",
        "b4349693a7f9c05c53955725c47ed6cb",
        "f5ddbcfd657a3acf9d0f7da10db22565",
    ),
    "infograph": (
        "",
        "720380b86f9e6ab4805bb38b6bd135f8",
        "379b50054f4ac2018dca4f89421b92d9",
        "779626b50869edffe8ea6941c3755c71",
    ),
    "painting": (
        "groundtruth/",
        "1ae32cdb4f98fe7ab5eb0a351768abfd",
        "7db0e7ca73ad9982f6e1f7f3ef372c0a",
        "232b35dc53f26d414686ae579e38d9b5",
    ),
    "quickdraw": (
        "",
        "bdc1b6f09f277da1a263389efe0c7a66",
        "b732ced3939ac8efdd8c0a889dca56cc",
        "c1a828fdfe216fb109f1c0083a252c6f",
    ),
    "real": (
        "",
        "dcc47055e8935767784b7162e7c7cca6",
        "8ebf02c2075fadd564705f0dc7cd6291",
        "6098816791c3ebed543c71ffa11b9054",
    ),
    "sketch": (
        "",
        "658d8009644040ff7ce30bb2e820850f",
        "1233bd18aa9a8a200bf4cecf1c34ef3e",
        "d8a222e4672cfd585298aa14d02ea441",
    ),
}

Lists = dict[str, dict[str, list[tuple[str, int]]]]


def domainnet_stream(
    root: str | Path | None = None,
    *,
    tasks: int | Sequence[int] = 5,
    domains: Sequence[str] | None = None,
    train_transform: Transform,
    eval_transform: Transform,
    class_order: Sequence[int] | Sequence[str] | None = None,
    seed: int | None = None,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    complete: bool = True,
    download: bool = False,
    name: str | None = None,
) -> Stream:
    """Class-incremental DomainNet: the images of all domains together.

    Args:
        root: a folder in one of the layouts above; None: `domainnet` in Avalanche's folder for data.
        tasks: number of tasks or their class counts. 5: the LoRAC-IPC code, 69 classes each.
        domains: those that take part; None: all six.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        class_order: class ids or names in order of appearance; None: the lists' numbering, as in the LoRAC-IPC code, or
            the order of `seed`.
        seed: makes the class order (`streams.class_order`).
        validation_fraction: part of each class's training images, over all domains, that becomes the validation stream.
            0: there is none, the LoRAC-IPC code trains on all.
        split_seed: of that part.
        complete: True demands 345 classes and the official numbers of images in each list; False takes any lists.
        download: fetches the archives and lists that aren't there (checked by MD5) and unpacks them.
        name: of the stream; "domainnet" by default.

    Raises:
        StreamError: unknown domains, absent or malformed lists, a class id with two names or a name with two ids, other
            numbers than the official ones, a class without training or test images, absent files, an order or sizes
            that don't fit.
        DownloadError: see `downloads.fetch`.
    """
    check_transforms(train_transform, eval_transform)
    chosen = _check_domains(DOMAINNET_DOMAINS if domains is None else domains)
    _check_split(validation_fraction, split_seed)
    if complete:  # then the number of classes is known before anything is fetched
        task_sizes(DOMAINNET_CLASSES, tasks)
        natural_or_seeded(DOMAINNET_CLASSES, seed)
    base = _prepare(root, chosen, download)
    lists, class_names = _read_lists(base, chosen, complete)
    return listed_stream(
        name or "domainnet",
        base,
        files={part: [row for domain in chosen for row in lists[domain][part]] for part in _PARTS},
        class_names=class_names,
        tasks=tasks,
        train_transform=train_transform,
        eval_transform=eval_transform,
        class_order=class_order,
        seed=seed,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
    )


def domainnet_domain_stream(
    root: str | Path | None = None,
    *,
    domains: Sequence[str] = DOMAINNET_DOMAINS,
    train_transform: Transform,
    eval_transform: Transform,
    validation_fraction: float = 0.0,
    split_seed: int = 0,
    complete: bool = True,
    download: bool = False,
    name: str | None = None,
) -> Stream:
    """Domain-incremental DomainNet: one domain after the other, over shared classes.

    The setting that the abstract of SLCA++ (arXiv 2408.08295) announces; no configuration of it is released, so its
    order of domains is open.

    Args:
        domains: in order of appearance, each an experience of every stream. The six in the order of their names: our
            choice.
        validation_fraction, split_seed: as in `domainnet_stream`, for each domain by itself.
        root, train_transform, eval_transform, complete, download: as in `domainnet_stream`.
        name: of the stream; "domainnet-domains" by default.

    Returns:
        A stream with one experience per domain, see `domains.build_domain_stream`. A domain may lack classes.

    Raises:
        StreamError, DownloadError: as in `domainnet_stream`; a class that no domain trains.
    """
    check_transforms(train_transform, eval_transform)
    chosen = _check_domains(domains)
    _check_split(validation_fraction, split_seed)
    base = _prepare(root, chosen, download)
    lists, class_names = _read_lists(base, chosen, complete)
    return listed_domain_stream(
        name or "domainnet-domains",
        base,
        domains=lists,
        class_names=class_names,
        train_transform=train_transform,
        eval_transform=eval_transform,
        validation_fraction=validation_fraction,
        split_seed=split_seed,
    )


def _check_domains(domains: Sequence[str]) -> tuple[str, ...]:
    accepted = f"accepted: some of {', '.join(DOMAINNET_DOMAINS)}, each once"
    if isinstance(domains, str) or not isinstance(domains, Sequence) or not domains:
        raise StreamError(f"domains is {domains!r}; {accepted}")
    for i, domain in enumerate(domains):
        if domain not in DOMAINNET_DOMAINS:
            raise StreamError(f"domains names {domain!r}; {accepted}")
        if domain in domains[:i]:
            raise StreamError(f"domains names {domain!r} twice; {accepted}")
    return tuple(domains)


def _check_split(validation_fraction: float, split_seed: int) -> None:
    # on no samples: a wrong fraction or seed is refused before anything is fetched
    stratified_split([], validation_fraction=validation_fraction, test_fraction=0, seed=split_seed)


def _prepare(root: str | Path | None, domains: Sequence[str], download: bool) -> Path:
    """The folder of the domains' folders, with what was asked for fetched into it."""
    base = _base(default_root("domainnet") if root is None else Path(root).expanduser())
    for domain in domains:
        folder, *sums = _ARCHIVES[domain]
        archive = RemoteFile(f"{_BASE}/{folder}{domain}.zip", f"{domain}.zip", sums[0])
        if not (base / domain).is_dir():
            if not download:
                raise StreamError(
                    f"{base / domain} is absent; accepted: root/domainnet/DOMAIN/CLASS/*.jpg, root/DOMAIN/CLASS/*.jpg, "
                    f"or download=True, which fetches {archive.url}"
                )
            unpack(fetch(archive, base), base, marker=domain)
        for part, md5 in zip(_PARTS, sums[1:], strict=True):
            file = f"{domain}_{part}.txt"
            if _find_list(base, file) is None:
                url = f"{_BASE}/domainnet/txt/{file}"
                if not download:
                    raise StreamError(f"{base / file} is absent; accepted: the official list, {url}, or download=True")
                fetch(RemoteFile(url, file, md5), base)
    return base


def _base(root: Path) -> Path:
    inside = root / "domainnet"
    if inside.is_dir():
        return inside
    here = root.name == "domainnet" or any((root / domain).is_dir() for domain in DOMAINNET_DOMAINS)
    return root if here else inside


def _find_list(base: Path, file: str) -> Path | None:
    return next((path for folder in _LIST_FOLDERS if (path := base / folder / file).is_file()), None)


def _read_lists(base: Path, domains: Sequence[str], complete: bool) -> tuple[Lists, tuple[str, ...]]:
    """Domain -> part -> (path, class id), and the names of the classes 0..C-1."""
    lists: Lists = {}
    names: dict[int, str] = {}
    for domain in domains:
        lists[domain] = {}
        for part, official in zip(_PARTS, DOMAINNET_IMAGES[domain], strict=True):
            path = _find_list(base, f"{domain}_{part}.txt")
            assert path is not None  # _prepare looked
            rows = _read_list(path, domain, names)
            if complete and len(rows) != official:
                raise StreamError(
                    f"{path} lists {len(rows)} images; accepted: {official}, the cleaned version, or complete=False"
                )
            lists[domain][part] = rows
    if complete and len(names) != DOMAINNET_CLASSES:
        raise StreamError(f"{base} lists {len(names)} classes; accepted: {DOMAINNET_CLASSES}, or complete=False")
    return lists, _class_names(base, names)


def _read_list(path: Path, domain: str, names: dict[int, str]) -> list[tuple[str, int]]:
    """The pairs of one list; `names` collects the name of each class id."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        parts = file.split("/")
        if len(parts) != 3 or parts[0] != domain or not (label.isascii() and label.isdigit()):
            raise StreamError(f"{path}, line {number}, is {line!r}; accepted: '{domain}/CLASS/FILE NUMBER'")
        c = int(label)
        if names.setdefault(c, parts[1]) != parts[1]:
            raise StreamError(f"{path}, line {number}, calls class {c} {parts[1]!r}, before it was {names[c]!r}")
        rows.append((file, c))
    return rows


def _class_names(base: Path, names: Mapping[int, str]) -> tuple[str, ...]:
    ids: dict[str, int] = {}
    for c, label in sorted(names.items()):
        if label in ids:
            raise StreamError(f"{base}: the lists give {label!r} the ids {ids[label]} and {c}; accepted: one")
        ids[label] = c
    absent = sorted(set(range(len(ids))) - set(names))
    if absent:
        raise StreamError(
            f"{base}: the lists have ids up to {max(names)} and none is {absent[0]}; accepted: 0, 1, 2, ..."
        )
    return tuple(ids)


__all__ = [
    "DOMAINNET_CLASSES",
    "DOMAINNET_DOMAINS",
    "DOMAINNET_IMAGES",
    "domainnet_domain_stream",
    "domainnet_stream",
]
