"""Transforms from a data configuration and the papers' presets."""

import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.transforms import (
    PRESET_NORMALIZATION,
    TRANSFORM_PRESETS,
    preset_transforms,
    timm_transforms,
)
from avalanche_firn.experiments.stream_rules import Transforms

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
STATISTICS = {"slca_cifar": CIFAR, "slca_imagenet_r": IMAGENET, "slca_cub": IMAGENET, "slca_cars": IMAGENET}

UCL = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615))
UCL_SIZES = {"ucl_cifar": 32, "ucl_tiny": 64}

CO2L = {
    "co2l_cifar": (32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "co2l_tiny": (64, (0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)),
}


def picture(width=80, height=60):
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def normalised(image, mean, std):
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255
    return (array - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)


def steps(transform, kind):
    return next(step for step in transform.transforms if type(step) is kind)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_evaluation_presets_by_hand(name):
    image = picture()
    result = preset_transforms(name).eval(image)
    resized = image.resize((int(256 * 80 / 60), 256), Image.Resampling.BICUBIC)  # the shorter edge becomes 256
    left, top = round((resized.width - 224) / 2), 16
    expected = normalised(resized.crop((left, top, left + 224, top + 224)), *STATISTICS[name])
    assert result.dtype == torch.float32 and result.shape == (3, 224, 224)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_training_presets(name):
    pair = preset_transforms(name)
    torch.manual_seed(0)
    first, second = pair.train(picture()), pair.train(picture())
    assert first.shape == (3, 224, 224) and not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(pair.train(picture()), first)
    assert steps(pair.train, transforms.RandomHorizontalFlip).p == 0.5
    norm = steps(pair.train, transforms.Normalize)
    assert (tuple(norm.mean), tuple(norm.std)) == STATISTICS[name]
    assert pickle.loads(pickle.dumps(pair)).eval(picture()).shape == (3, 224, 224)


def test_lorac_images_are_not_normalised():
    pair, image = preset_transforms("lorac"), picture()
    resized = image.resize((int(256 * 80 / 60), 256), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), 16
    expected = torch.from_numpy(np.array(resized.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1) / 255
    assert pair.eval(image).dtype == torch.float32 and torch.equal(pair.eval(image), expected)
    torch.manual_seed(0)
    first, second = pair.train(image), pair.train(image)
    assert first.shape == (3, 224, 224) and not torch.equal(first, second)
    assert all(view.min() >= 0 and view.max() <= 1 for view in (first, second))
    torch.manual_seed(0)
    assert torch.equal(pair.train(image), first)
    crop = steps(pair.train, transforms.RandomResizedCrop)
    assert tuple(crop.size) == (224, 224) and tuple(crop.scale) == (0.05, 1.0) and tuple(crop.ratio) == (3 / 4, 4 / 3)
    assert crop.interpolation == transforms.InterpolationMode.BILINEAR  # what torchvision takes if nothing is said
    assert steps(pair.train, transforms.RandomHorizontalFlip).p == 0.5
    assert not any(isinstance(step, (transforms.Normalize, transforms.ColorJitter)) for step in pair.train.transforms)
    assert pickle.loads(pickle.dumps(pair)).eval(image).equal(pair.eval(image))


def test_training_presets_have_the_parameters_of_the_card():
    cifar, rendition, birds = (preset_transforms(n).train for n in ("slca_cifar", "slca_imagenet_r", "slca_cub"))
    for transform in (cifar, rendition):
        crop = steps(transform, transforms.RandomResizedCrop)
        assert tuple(crop.size) == (224, 224) and tuple(crop.scale) == (0.08, 1.0)
        assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    jitter = steps(cifar, transforms.ColorJitter)
    assert jitter.brightness == pytest.approx((1 - 63 / 255, 1 + 63 / 255))
    assert jitter.contrast is None and jitter.saturation is None and jitter.hue is None
    assert not any(isinstance(step, transforms.ColorJitter) for step in rendition.transforms)
    resize, crop = steps(birds, transforms.Resize), steps(birds, transforms.RandomCrop)
    assert tuple(resize.size) == (300, 300) and resize.interpolation == transforms.InterpolationMode.BICUBIC
    assert tuple(crop.size) == (224, 224)


@pytest.mark.parametrize(("name", "size"), UCL_SIZES.items())
def test_ucl_presets(name, size):
    pair = preset_transforms(name)
    image = picture(size, size)
    torch.testing.assert_close(pair.eval(image).double(), normalised(image, *UCL), rtol=0, atol=1e-6)  # not resized
    assert pair.eval(picture(80, 60)).shape == (3, size, size)
    torch.manual_seed(0)
    first, second = pair.train(image), pair.train(image)
    assert first.shape == (3, size, size) and first.dtype == torch.float32 and not torch.equal(first, second)
    assert pickle.loads(pickle.dumps(pair)).eval(image).equal(pair.eval(image))


def test_ucl_presets_have_the_parameters_of_the_code():
    for name, size in UCL_SIZES.items():
        train = preset_transforms(name).train
        crop = steps(train, transforms.RandomCrop)
        assert tuple(crop.size) == (size, size) and crop.padding == 4
        assert steps(train, transforms.RandomHorizontalFlip).p == 0.5
        assert steps(train, transforms.RandomGrayscale).p == 0.2
        norm = steps(train, transforms.Normalize)
        assert (tuple(norm.mean), tuple(norm.std)) == UCL
        applied = [step for step in train.transforms if isinstance(step, transforms.RandomApply)]
        jitter = applied[0].transforms[0]
        assert applied[0].p == 0.8 and jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4)
        assert tuple(jitter.hue) == (-0.1, 0.1)
        assert len(applied) == (2 if name == "ucl_tiny" else 1)
    blur = applied[1].transforms[0]
    assert applied[1].p == 0.5 and tuple(blur.kernel_size) == (7, 7) and tuple(blur.sigma) == (0.1, 2.0)


def test_ucl_crop_moves_by_at_most_four_pixels_into_a_black_border():
    """With the colour steps left out, a training view is a window of the padded image, perhaps mirrored."""
    train = preset_transforms("ucl_cifar").train
    spatial = transforms.Compose([step for step in train.transforms if "Apply" not in type(step).__name__][:3])
    image = picture(32, 32)
    padded = np.pad(np.array(image), ((4, 4), (4, 4), (0, 0)))
    windows = {padded[top : top + 32, left : left + 32].tobytes() for top in range(9) for left in range(9)}
    torch.manual_seed(0)
    views = [np.array(spatial(image)) for _ in range(20)]
    mirrored = [view.tobytes() not in windows for view in views]
    assert any(mirrored) and not all(mirrored)
    assert all(np.ascontiguousarray(v[:, ::-1]).tobytes() in windows for v, m in zip(views, mirrored, strict=True) if m)


@pytest.mark.parametrize("name", CO2L)
def test_co2l_presets_normalise_and_nothing_else(name):
    size, *statistics = CO2L[name]
    pair, image = preset_transforms(name), picture(size, size)
    torch.testing.assert_close(pair.eval(image).double(), normalised(image, *statistics), rtol=0, atol=1e-6)
    assert torch.equal(pair.train(image), pair.eval(image))
    resized = image.resize((80, 60)).resize((size, size), Image.Resampling.BILINEAR)
    expected = normalised(resized, *statistics)
    torch.testing.assert_close(pair.train(image.resize((80, 60))).double(), expected, rtol=0, atol=1e-6)
    assert pickle.loads(pickle.dumps(pair)).eval(image).equal(pair.eval(image))
    assert tuple(map(tuple, PRESET_NORMALIZATION[name])) == tuple(statistics)


def test_co2l_digits_are_one_grey_channel():
    pair, grey = preset_transforms("co2l_digits"), picture(28, 28).convert("L")
    expected = torch.from_numpy(np.array(grey)).float()[None] / 255
    for image in (grey, grey.convert("RGB")):  # a run makes MNIST RGB first, and nothing is lost on the way
        assert torch.equal(pair.train(image), expected) and torch.equal(pair.eval(image), expected)
    assert pair.eval(picture()).shape == (1, 28, 28)
    assert PRESET_NORMALIZATION["co2l_digits"] == ((0.0,), (1.0,))


def test_timm_transforms_follow_the_configuration():
    pair = timm_transforms(CONFIG, scale=(0.5, 1.0), hflip=0.0, color_jitter=0.0)
    image = picture(40, 40)
    result = pair.eval(image)
    resized = image.resize((36, 36), Image.Resampling.BICUBIC)  # floor(32 / 0.875)
    expected = normalised(resized.crop((2, 2, 34, 34)), CONFIG["mean"], CONFIG["std"])
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)
    trained = pair.train(image)
    assert trained.shape == (3, 32, 32) and trained.dtype == torch.float32 and not torch.equal(trained, result)
    assert pickle.loads(pickle.dumps(pair)).eval(image).equal(result)


def test_without_augmentation_training_equals_evaluation():
    pair = timm_transforms(CONFIG, augment=False)
    assert torch.equal(pair.train(picture()), pair.eval(picture()))


def test_configuration_is_not_changed_and_may_hold_more():
    config = CONFIG | {"num_classes": 10, "pool_size": None}
    before = dict(config)
    timm_transforms(config)
    assert config == before


def test_refuses():
    with pytest.raises(StreamError, match="data_config lacks mean, std"):
        timm_transforms({"input_size": (3, 32, 32), "interpolation": "bicubic"})
    with pytest.raises(StreamError, match=r"input_size is \(1, 32, 32\)"):
        timm_transforms(CONFIG | {"input_size": (1, 32, 32)})
    with pytest.raises(StreamError, match="'colour_jitter' is unknown; nearest: color_jitter"):
        timm_transforms(CONFIG, colour_jitter=0.1)
    with pytest.raises(StreamError, match="augment=False"):
        timm_transforms(CONFIG, augment=False, hflip=0.1)
    with pytest.raises(StreamError, match="'slca_cifr' is unknown; nearest: slca_cifar"):
        preset_transforms("slca_cifr")
    assert set(TRANSFORM_PRESETS) == {*STATISTICS, "lorac", *UCL_SIZES, *CO2L, "co2l_digits"}
    assert set(TRANSFORM_PRESETS) < set(get_args(Transforms))  # what a recipe may name


@pytest.mark.parametrize("name", TRANSFORM_PRESETS)
def test_the_normalisation_of_a_preset_is_known(name: str) -> None:
    """A black and a white image come out as the mean and the deviation say."""
    mean, std = (np.asarray(values) for values in PRESET_NORMALIZATION[name])
    for shade in (0, 255):
        image = preset_transforms(name).eval(Image.new("RGB", (300, 300), (shade,) * 3))
        expected = (shade / 255 - mean) / std
        assert np.allclose(image.numpy(), expected[:, None, None], atol=1e-5)
