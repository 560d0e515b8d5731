"""FMoW-WILDS by region of the world: satellite images of 62 kinds of land use, one region after the other.

Christie et al., CVPR 2018 (arXiv 1711.07846), in the version of WILDS (Koh et al., ICML 2021, arXiv 2012.07421). The
LP-FT paper (arXiv 2302.13289) reports on FMoW; how it cuts it into tasks, their order and the years are open, so those
here are our choice.

Layout, as the package `wilds` leaves it (which isn't needed): `root/fmow_v1.1/{rgb_metadata.csv,
country_code_mapping.csv, images/rgb_img_N.png}`, or root as that folder. N is the row of the first table, from 0. The
region of a row is that of its country (`alpha-3`) in the second table; countries that aren't there are in "Other".

Parts come from the column `split`: train, val and test are the three streams, seq is never used. For WILDS ("official"
split, time_after_2016) rows before 2013 are in distribution (its train, id_val, id_test); rows of 2013-2015 are its
validation and those from 2016 on its test out of distribution. `until_year=2013` takes the first kind, None all years.

Cost: a table of half a million rows is read in 2 s, and the chosen files are looked up (8 us each); none is opened.
54 GB to download, which isn't done from here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from avalanche_firn.benchmarks.downloads import default_root, download_words
from avalanche_firn.benchmarks.image_files import check_transforms
from avalanche_firn.benchmarks.listed import listed_domain_stream
from avalanche_firn.benchmarks.streams import Stream, StreamError, Transform

FMOW_REGIONS = ("Asia", "Europe", "Africa", "Americas", "Oceania")  # our choice: the numbering of WILDS
FMOW_CLASSES = 62
FMOW_URL = "https://worksheets.codalab.org/rest/bundles/0xaec91eb7c9d548ebb15e1b5e60f966ab/contents/blob/"
_FOLDER = "fmow_v1.1"
_PARTS = {"train": "train", "val": "valid", "test": "test"}  # column split -> stream
_OTHER = "Other"


def fmow_region_stream(
    root: str | Path | None = None,
    *,
    regions: Sequence[str] = FMOW_REGIONS,
    until_year: int | None = 2013,
    train_transform: Transform,
    eval_transform: Transform,
    complete: bool = True,
    name: str | None = None,
) -> Stream:
    """Domain-incremental FMoW: one region after the other, over shared classes.

    Args:
        root: a folder in one of the layouts above; None: `fmow` in Avalanche's folder for data.
        regions: in order of appearance, each an experience of every stream. Names of the table of countries, or
            "Other".
        until_year: only images taken before the first day (UTC) of this year; None: all. 2013: in distribution for
            WILDS.
        train_transform, eval_transform: from an RGB PIL image to a tensor, see `benchmarks.transforms`.
        complete: True demands 62 categories in the table and takes their sorted names as classes. False takes those
            that the chosen rows hold.
        name: of the stream; "fmow-regions" by default.

    Returns:
        A stream with one experience per region, see `domains.build_domain_stream`, with the validation stream of the
        data set itself. A region may lack classes.

    Raises:
        StreamError: no data (with the ways to get it), a table that lacks a column or is malformed (with the line), an
            unknown region or one without images in a part, other than 62 categories, a class without training images
            in any region, absent files.
    """
    check_transforms(train_transform, eval_transform)
    if until_year is not None and (isinstance(until_year, bool) or not isinstance(until_year, int)):
        raise StreamError(f"until_year is {until_year!r}; accepted: a year as a whole number, or None")
    base = _find(default_root("fmow") if root is None else Path(root).expanduser())
    countries = {
        code: region or _OTHER
        for _, (code, region) in _read_table(base / "country_code_mapping.csv", ("alpha-3", "region"))
    }
    _check_regions(regions, {*countries.values(), _OTHER})
    categories: set[str] = set()
    used: set[str] = set()
    rows: dict[str, dict[str, list[tuple[str, str]]]] = {r: {part: [] for part in _PARTS.values()} for r in regions}
    table = base / "rgb_metadata.csv"
    for number, (split, category, country, taken) in _read_table(
        table, ("split", "category", "country_code", "timestamp")
    ):
        categories.add(category)
        region = countries.get(country, _OTHER)
        if split == "seq" or region not in rows:
            continue
        if split not in _PARTS:
            raise StreamError(f"{table}, row {number}, has the split {split!r}; accepted: train, val, test, seq")
        if until_year is None or _year(table, number, taken) < until_year:
            rows[region][_PARTS[split]].append((f"images/rgb_img_{number}.png", category))
            used.add(category)
    if complete and len(categories) != FMOW_CLASSES:
        raise StreamError(f"{table} has {len(categories)} categories; accepted: {FMOW_CLASSES}, or complete=False")
    class_names = sorted(categories if complete else used)
    if not class_names:
        raise StreamError(f"{table} has no row of {', '.join(regions)} before {until_year}; accepted: at least one")
    ids = {category: c for c, category in enumerate(class_names)}
    return listed_domain_stream(
        name or "fmow-regions",
        base,
        domains={
            region: {part: [(path, ids[category]) for path, category in listed] for part, listed in parts.items()}
            for region, parts in rows.items()
        },
        class_names=class_names,
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def _find(root: Path) -> Path:
    for base in (root / _FOLDER, root):
        if (base / "rgb_metadata.csv").is_file():
            for needed in ("country_code_mapping.csv", "images"):
                if not (base / needed).exists():
                    raise StreamError(f"{base / needed} is absent; accepted: the whole archive, {FMOW_URL}")
            return base
    words = download_words(
        "FMoW-WILDS",
        reason="its archive has 54 GB",
        source=f"`wilds.get_dataset('fmow', root_dir=..., download=True)` of the package wilds, or {FMOW_URL}",
        place=root / _FOLDER,
    )
    raise StreamError(f"{root / _FOLDER / 'rgb_metadata.csv'} is absent. {words}")


def _check_regions(regions: Sequence[str], known: set[str]) -> None:
    accepted = f"accepted: some of {', '.join(sorted(known))}, each once"
    if isinstance(regions, str) or not isinstance(regions, Sequence) or not regions:
        raise StreamError(f"regions is {regions!r}; {accepted}")
    for i, region in enumerate(regions):
        if region not in known:
            raise StreamError(f"regions names {region!r}; {accepted}")
        if region in regions[:i]:
            raise StreamError(f"regions names {region!r} twice; {accepted}")


def _read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Row number from 0 and the asked columns of every row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            absent = [column for column in columns if column not in header]
            if absent:
                raise StreamError(f"{path} has no column {absent[0]!r}; it has {', '.join(header) or 'none'}")
            places = [header.index(column) for column in columns]
            for number, row in enumerate(row for row in reader if row):  # empty lines don't count, as for wilds
                if len(row) != len(header):
                    raise StreamError(f"{path}, row {number}, has {len(row)} columns; accepted: {len(header)}")
                yield number, [row[place] for place in places]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StreamError(f"{path} cannot be read: {error}") from error


def _year(table: Path, number: int, taken: str) -> int:
    """Year in UTC of a time such as 2012-05-01T10:20:30Z."""
    if re.match(r"\d{4}-\d\d-\d\d.*(Z|\+00:?00)$", taken):
        return int(taken[:4])
    try:
        moment = datetime.fromisoformat(taken)
    except ValueError as error:
        raise StreamError(f"{table}, row {number}, has the time {taken!r}; accepted: 2012-05-01T10:20:30Z") from error
    return (moment.astimezone(timezone.utc) if moment.tzinfo else moment).year


__all__ = ["FMOW_CLASSES", "FMOW_REGIONS", "FMOW_URL", "fmow_region_stream"]
