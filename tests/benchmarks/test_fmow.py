"""FMoW by region on a miniature tree in the layout of `wilds`. Pixels say category and row."""

import csv
import shutil
from collections import Counter

import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from avalanche_firn.benchmarks import fmow as module
from avalanche_firn.benchmarks.fmow import FMOW_REGIONS, fmow_region_stream
from avalanche_firn.benchmarks.streams import StreamError

CATEGORIES = ("zoo", "airport", "dam")  # ids are positions of the sorted names: 2, 0, 1
COUNTRIES = {"Asia": "IND", "Europe": "FRA", "Africa": "KEN", "Americas": "BRA", "Oceania": "AUS", "Other": "XKX"}
COLUMNS = ("split", "img_filename", "category", "country_code", "timestamp")


def to_tensor(image):
    assert image.mode == "RGB"
    return pil_to_tensor(image).float()


def to_negative(image):
    return -to_tensor(image)


def default_rows():
    """(split, category, country, time) of every row, rows of all regions mixed."""
    rows = []
    for split, years in (("train", (2005, 2012)), ("seq", (2010,)), ("val", (2011,)), ("test", (2012, 2014, 2017))):
        for category in CATEGORIES:
            for region, country in COUNTRIES.items():
                if (region, category) != ("Oceania", "dam"):  # a region may lack a category
                    rows += [(split, category, country, f"{year}-06-30T12:34:56Z") for year in years]
    return rows


def write_tables(base, rows):
    base.mkdir(parents=True, exist_ok=True)
    with open(base / "rgb_metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for i, (split, category, country, taken) in enumerate(rows):
            table.writerow((split, f"{category}_{i},rgb.jpg", category, country, taken))  # a comma inside a field
    with open(base / "country_code_mapping.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("name", "alpha-2", "alpha-3", "region"))
        for region, country in COUNTRIES.items():
            if region != "Other":
                table.writerow((f"Land, {region}", country[:2], country, region))
        table.writerow(("Antarctica", "AQ", "ATA", ""))


def write_images(base, rows, order=None):
    (base / "images").mkdir(parents=True, exist_ok=True)
    for number in order or range(len(rows)):
        mode = "RGBA" if number % 2 else "RGB"  # as some of the real files
        colour = (CATEGORIES.index(rows[number][1]) + 1, number // 250, number % 250)
        Image.new(mode, (2, 2), colour).save(base / "images" / f"rgb_img_{number}.png")


@pytest.fixture
def root(tmp_path):
    rows = default_rows()
    write_tables(tmp_path / "data" / "fmow_v1.1", rows)
    write_images(tmp_path / "data" / "fmow_v1.1", rows)
    return tmp_path / "data"


def build(root, **options):
    settings = {"train_transform": to_tensor, "eval_transform": to_tensor, "complete": False}
    return fmow_region_stream(root, **{**settings, **options})


def samples(experience):
    """(row of the table, category in the pixels, target) of every sample."""
    found = []
    for x, y, t in experience.dataset:
        category, high, low = (abs(int(v)) for v in x[:, 0, 0])
        assert t == 0
        found.append((250 * high + low, CATEGORIES[category - 1], int(y)))
    return found


def test_regions_one_after_the_other_before_2013(root):
    stream = build(root)
    assert stream.name == "fmow-regions" and stream.class_names == ("airport", "dam", "zoo")
    assert stream.task_sizes == (3, 3, 3, 3, 2) and stream.class_order == (0, 1, 2)
    table = default_rows()
    for part, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        for region, experience in zip(FMOW_REGIONS, stream.benchmark.streams[part], strict=True):
            expected = [
                (i, row[1], sorted(CATEGORIES).index(row[1]))
                for i, row in enumerate(table)
                if row[0] == split and row[2] == COUNTRIES[region] and int(row[3][:4]) < 2013
            ]
            assert samples(experience) == expected and expected


def test_years_and_order_of_regions_are_the_users(root):
    stream = build(root, until_year=None, regions=("Oceania", "Asia"), name="two")
    assert stream.name == "two" and stream.class_order == (0, 2, 1)
    assert [Counter(row[2] for row in samples(e)) for e in stream.test] == [{0: 3, 2: 3}, {0: 3, 1: 3, 2: 3}]
    late = build(root, until_year=2015, regions=("Oceania", "Asia"))
    assert [len(e.dataset) for e in late.test] == [4, 6]
    assert stream.fingerprint != late.fingerprint
    with pytest.raises(StreamError, match="domain 'Asia' has no files in 'test'"):
        build(root, until_year=2012, regions=("Asia",))


def test_other_is_a_region_for_countries_that_are_not_listed(root):
    stream = build(root, regions=("Other",))
    rows = default_rows()
    assert all(rows[i][2] == "XKX" for i, *_ in samples(stream.train[0])) and len(stream.train[0].dataset) == 6


def test_transform_groups(root):
    stream = build(root, eval_transform=to_negative)
    assert max(x.max() for x, *_ in stream.valid[0].dataset) <= 0 < max(x.max() for x, *_ in stream.train[0].dataset)


def test_root_may_be_the_folder_itself(root):
    assert build(root / "fmow_v1.1").fingerprint == build(root).fingerprint


def test_order_of_the_file_system_does_not_matter(root):
    before = build(root)
    shutil.rmtree(root / "fmow_v1.1" / "images")
    rows = default_rows()
    write_images(root / "fmow_v1.1", rows, order=list(reversed(range(len(rows)))))
    assert build(root).fingerprint == before.fingerprint and samples(build(root).test[1]) == samples(before.test[1])


def test_a_year_begins_in_utc(root):
    base = root / "fmow_v1.1"
    times = [
        "2012-12-31T23:59:59Z",
        "2013-01-01T00:00:00Z",
        "2012-12-31 23:59:59.123+00:00",
        "2012-12-31T22:00:00-05:00",  # 3 hours into 2013
        "2013-01-01T03:00:00+05:00",  # 2 hours before 2013
    ]
    rows = [(split, "zoo", "IND", taken) for split in ("train", "val", "test") for taken in times]
    write_tables(base, rows)
    write_images(base, rows)
    stream = build(root, regions=["Asia"])
    assert [[row[0] for row in samples(s[0])] for s in (stream.train, stream.valid, stream.test)] == [
        [0, 2, 4],
        [5, 7, 9],
        [10, 12, 14],
    ]


def test_empty_lines_of_the_table_do_not_count(root):
    path = root / "fmow_v1.1" / "rgb_metadata.csv"
    before = build(root).fingerprint
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "", *lines[3:], ""]) + "\n")
    assert build(root).fingerprint == before


def test_complete_demands_62_categories(root, monkeypatch):
    with pytest.raises(StreamError, match=r"rgb_metadata\.csv has 3 categories; accepted: 62, or complete=False"):
        build(root, complete=True)
    monkeypatch.setattr(module, "FMOW_CLASSES", 3)
    with pytest.raises(StreamError, match=r"class 'dam' without files in any domain's 'train'"):
        build(root, complete=True, regions=["Oceania"])
    assert build(root, regions=["Oceania"]).class_names == ("airport", "zoo")
    assert build(root, complete=True).class_names == ("airport", "dam", "zoo")


def test_absent_data_comes_with_the_ways_to_get_it(tmp_path, root, monkeypatch):
    with pytest.raises(StreamError, match=r"nowhere/fmow_v1\.1/rgb_metadata\.csv is absent.*54 GB.*wilds.*codalab"):
        build(tmp_path / "nowhere")
    monkeypatch.setattr(module, "default_root", lambda name: tmp_path / "default" / name)
    with pytest.raises(StreamError, match=r"default/fmow/fmow_v1\.1/rgb_metadata\.csv is absent"):
        build(None)
    for needed in ("images", "country_code_mapping.csv"):
        (root / "fmow_v1.1" / needed).rename(tmp_path / "away")
        with pytest.raises(StreamError, match=rf"{needed} is absent; accepted: the whole archive"):
            build(root)
        (tmp_path / "away").rename(root / "fmow_v1.1" / needed)


def test_absent_images_are_named(root):
    (root / "fmow_v1.1" / "images" / "rgb_img_0.png").unlink()
    with pytest.raises(StreamError, match=r"1 of 56 listed files are not in .*: images/rgb_img_0\.png"):
        build(root)


def test_images_that_are_not_used_need_not_be_there(root):
    rows = default_rows()
    for number, (split, _, country, taken) in enumerate(rows):
        if split == "seq" or country == "XKX" or taken > "2013":
            (root / "fmow_v1.1" / "images" / f"rgb_img_{number}.png").unlink()
    assert sum(len(e.dataset) for part in ("train", "valid", "test") for e in build(root).benchmark.streams[part]) == 56


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("dev", "zoo", "IND", "2010-01-01T00:00:00Z"), "row 0, has the split 'dev'; accepted: train, val, test, seq"),
        (("train", "zoo", "IND", "yesterday"), "row 0, has the time 'yesterday'"),
    ],
)
def test_malformed_rows(root, row, message):
    write_tables(root / "fmow_v1.1", [row, *default_rows()[1:]])
    with pytest.raises(StreamError, match=message):
        build(root)


def test_malformed_tables(root):
    path = root / "fmow_v1.1" / "rgb_metadata.csv"
    text = path.read_text()
    path.write_text(text + "train,zoo\n")
    with pytest.raises(StreamError, match=r"row \d+, has 2 columns; accepted: 5"):
        build(root)
    path.write_text(text.replace("country_code", "country"))
    with pytest.raises(StreamError, match=r"has no column 'country_code'; it has split, img_filename"):
        build(root)
    path.write_bytes(b"")
    with pytest.raises(StreamError, match=r"has no column 'split'; it has none"):
        build(root)
    path.write_bytes(text.encode().replace(b"airport", b"\xff\xfe"))
    with pytest.raises(StreamError, match=r"rgb_metadata\.csv cannot be read"):
        build(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": ["Asia", "Mars"]}, "regions names 'Mars'; accepted: some of Africa, Americas, Asia, Europe, Oce"),
        ({"regions": ["Asia", "Asia"]}, "regions names 'Asia' twice"),
        ({"regions": "Asia"}, "regions is 'Asia'"),
        ({"regions": []}, r"regions is \[\]"),
        ({"until_year": "2013"}, "until_year is '2013'"),
        ({"until_year": True}, "until_year is True"),
        ({"until_year": 1990}, r"no row of Asia, Europe, .* before 1990"),
        ({"train_transform": 3}, "train_transform is 3"),
    ],
)
def test_wrong_arguments(root, options, message):
    with pytest.raises(StreamError, match=message):
        build(root, **options)
