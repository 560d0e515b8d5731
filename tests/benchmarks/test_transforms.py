"""Transforms from a data configuration and the papers' presets."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.transforms import TRANSFORM_PRESETS, preset_transforms, timm_transforms

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
    assert set(TRANSFORM_PRESETS) == set(STATISTICS)
