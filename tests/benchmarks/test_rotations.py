"""Rotated MNIST with our angles: the draws, and Avalanche's benchmark on a small stand-in in torchvision's layout."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import functional as vision

from avalanche_firn.benchmarks.classic import avalanche_stream
from avalanche_firn.benchmarks.rotations import rotation_angles
from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.experiments.cli import main
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe
from avalanche_firn.experiments.resources import prepare
from avalanche_firn.experiments.task_plan import plan_tasks

IMAGES = {"train": 40, "t10k": 20}


def pixels(part: str) -> np.ndarray:
    """(N, 28, 28) uint8: every grey value occurs, and no image looks like its mirror image."""
    return np.random.RandomState(len(part)).randint(0, 256, (IMAGES[part], 28, 28), dtype=np.uint8)


def originals(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) in 0..1 and labels, in the order of Avalanche's experiences: by class, then as stored."""
    labels = np.arange(IMAGES[part]) % 10
    order = np.argsort(labels, kind="stable")
    return torch.from_numpy(pixels(part)[order]).float()[:, None] / 255, torch.from_numpy(labels[order])


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that torchvision reads as MNIST: raw IDX files, four and two images of every digit."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in IMAGES.items():
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">IIII", 0x0803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels(part).tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x0801, count) + labels.tobytes())
    return root


def recipe(stream: str, *overrides: str):
    fixed = ("methods=[naive]", "seeds=[3]", "backbone={name: digit_convnet, pretrained: false}")
    return load_recipe("digits", [f"stream={stream}", *fixed, *overrides])


def rotated(arguments: str, more: str = "transforms: co2l_digits") -> str:
    return f"{{name: avalanche, benchmark: RotatedMNIST, arguments: {arguments}, {more}}}"


def test_angles() -> None:
    angles = rotation_angles(20, 7)
    assert angles == (np.random.RandomState(7).random_sample(20) * 180).tolist()
    assert all(type(angle) is float and 0 <= angle < 180 and angle != int(angle) for angle in angles)
    assert rotation_angles(5, 7) == angles[:5] and rotation_angles(20, 8) != angles
    state = np.random.get_state()[1].tolist()
    assert stats.kstest(np.array(rotation_angles(3000, 0)) / 180, "uniform").pvalue > 0.01
    assert np.random.get_state()[1].tolist() == state  # the global generator is left alone
    for domains, seed, message in (
        (0, 0, "number of domains is 0; accepted: a whole number, at least 1"),
        (True, 0, "number of domains is True"),
        (2.0, 0, r"number of domains is 2\.0"),
        (3, -1, r"seed of the angles is -1; accepted: 0\.\.4294967295"),
        (3, None, "seed of the angles is None"),
    ):
        with pytest.raises(StreamError, match=message):
            rotation_angles(domains, seed)


def test_avalanche_s_benchmark_takes_them(mnist: Path) -> None:
    angles = rotation_angles(3, 1)
    stream = avalanche_stream(
        "RotatedMNIST",
        n_experiences=3,
        rotations_list=angles,
        dataset_root=mnist,
        train_transform=None,
        eval_transform=None,
    )
    assert stream.task_sizes == (10, 10, 10) and stream.class_order == tuple(range(10)) and stream.num_classes == 10
    for part, name in ((stream.train, "train"), (stream.test, "t10k")):
        for experience, angle in zip(part, angles, strict=True):
            images, labels = originals(name)
            assert [int(y) for _, y, *_ in experience.dataset] == labels.tolist()
            found = torch.stack([x for x, *_ in experience.dataset])
            assert torch.equal(found, vision.rotate(images, angle))
    other = rotation_angles(3, 2)
    options = dict(n_experiences=3, dataset_root=mnist)
    first, second, again = (
        avalanche_stream("RotatedMNIST", rotations_list=a, **options).fingerprint for a in (angles, other, angles)
    )
    assert first == again != second


def test_recipe_draws_them_from_the_run_s_seed(mnist: Path) -> None:
    base = f"n_experiences: 2, dataset_root: {mnist}"
    stream = prepare(recipe(rotated(f"{{{base}}}"))).stream

    def images(stream):
        return torch.stack([x for experience in stream.train for x, *_ in experience.dataset])

    found = images(stream)
    assert found.shape == (80, 1, 28, 28) and found.dtype == torch.float32  # grey again, after RGB in between
    original, _ = originals("train")
    expected = torch.cat([vision.rotate(original, angle) for angle in rotation_angles(2, 3)])
    assert torch.equal(found, expected)
    assert torch.equal(images(prepare(recipe(rotated(f"{{{base}, seed: 3}}"), "seeds=[0]")).stream), found)
    assert not torch.equal(images(prepare(recipe(rotated(f"{{{base}}}"), "seeds=[4]")).stream), found)
    given = images(prepare(recipe(rotated(f"{{{base}, rotations_list: [0, 90]}}"))).stream)
    assert torch.equal(given[:40], original) and torch.equal(given[40:], vision.rotate(original, 90))
    with pytest.raises(ConfigError, match="number of domains is 0"):
        prepare(recipe(rotated(f"{{n_experiences: 0, dataset_root: {mnist}}}")))
    with pytest.raises(ConfigError, match="n_experiences"):
        prepare(recipe(rotated(f"{{dataset_root: {mnist}}}")))


def test_other_benchmarks_of_mnist_with_colour_transforms(mnist: Path) -> None:
    """Avalanche's MNIST has tensors where the transforms want images."""
    stream = f"{{name: avalanche, benchmark: SplitMNIST, arguments: {{n_experiences: 5, dataset_root: {mnist}}}"
    config = load_recipe("digits", [f"stream={stream}, augment: false}}", "methods=[naive]", "seeds=[0]"])
    image, *_ = prepare(config).stream.train[0].dataset[0]
    assert image.shape == (3, 32, 32) and torch.equal(image[0], image[2]) and image.std() > 0.1


def test_twenty_domains_without_data(tmp_path: Path, capsys) -> None:
    plan = plan_tasks(recipe(rotated("{n_experiences: 20}")).stream)
    assert plan.sizes == (10,) * 20 and plan.repeats and plan.num_classes == 10
    path = tmp_path / "rotations.yaml"
    path.write_text(
        "name: rotations\nmethods: [naive]\nthreads: 1\ntraining: {batch_size: 8}\n"
        "backbone: {name: digit_convnet, pretrained: false}\n"
        f"stream: {rotated('{n_experiences: 20}')}\n"
    )
    assert main(["check", str(path), "--dry-run", "--no-data"]) == 0
    told = capsys.readouterr().out
    assert f"RotatedMNIST: 10 classes in tasks of {', '.join(['10'] * 20)}; images not read" in told
    assert "digit_convnet" in told and "naive: " in told


def test_a_run_over_rotations(mnist: Path, tmp_path: Path, capsys) -> None:
    stream = rotated(f"{{n_experiences: 2, dataset_root: {mnist}}}")
    words = ["digits", f"stream={stream}", "methods=[naive]", "seeds=[0]", "training.epochs=1", f"output={tmp_path}"]
    backbone = "backbone={name: digit_convnet, pretrained: false}"
    assert main(["compare", *words, backbone, "--quiet"]) == 0
    assert "1 runs trained" in capsys.readouterr().out
