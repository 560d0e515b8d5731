"""Random views on the device: drawn per image, of the right image, in the right range, from the global generator."""

import copy
import pickle

import numpy as np
import pytest
import torch
from kornia.augmentation import ColorJitter, RandomGaussianBlur, RandomGrayscale, RandomHorizontalFlip
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as vision

from avalanche_firn.benchmarks.augmentation import (
    AUGMENTATION_PRESETS,
    ContrastiveAugmentation,
    TwoViews,
    crop_boxes,
    resized_crops,
)
from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.transforms import preset_transforms

NOTHING = {"crop_scale": (1.0, 1.0), "flip": 0.0, "jitter": None, "grey": 0.0, "mean": 0.0, "std": 1.0}


def only(**options):
    """An augmentation that does nothing but what is named."""
    return ContrastiveAugmentation(**{**NOTHING, **options})


def images(count=6, channels=3, size=16, seed=0):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def repeated(count, size=16):
    return images(1, size=size).repeat(count, 1, 1, 1)


def distinct(views):
    return len(torch.unique(views.flatten(0, 1).flatten(1), dim=0))


def part_changed(augment, count=2000):
    """Part of the views that differ from their image."""
    torch.manual_seed(0)
    x = images(count, size=8)
    views = augment(x, views=1)[:, 0]
    return float(((views - x).abs().amax((1, 2, 3)) > 1e-4).float().mean())


def chance(probability, count=2000):
    return pytest.approx(probability, abs=4 * (probability * (1 - probability) / count) ** 0.5)


def test_nothing_gives_the_images_back():
    x = images()
    torch.testing.assert_close(only()(x), x[:, None].expand(-1, 2, -1, -1, -1), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": (0.2, 0.9)},
        {"jitter": (0.4, 0.0, 0.0, 0.0), "jitter_probability": 1.0},
        {"jitter": (0.0, 0.4, 0.0, 0.0), "jitter_probability": 1.0},
        {"jitter": (0.0, 0.0, 0.4, 0.0), "jitter_probability": 1.0},
        {"jitter": (0.0, 0.0, 0.0, 0.1), "jitter_probability": 1.0},
        {"blur": (7, (0.1, 2.0), 1.0)},
    ],
    ids=["crop", "brightness", "contrast", "saturation", "hue", "blur"],
)
def test_parameters_are_drawn_per_image_and_view(options):
    torch.manual_seed(0)
    assert distinct(only(**options)(repeated(40, size=32))) >= 76  # of 80; two crops may be the same


@pytest.mark.parametrize("options", [{"flip": 0.5}, {"grey": 0.5}], ids=["flip", "grey"])
def test_switches_are_drawn_per_image_and_view(options):
    torch.manual_seed(0)
    x = repeated(40)
    assert distinct(only(**options)(x)) == 2
    first, second = only(**options)(x).unbind(1)
    assert 5 < sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)) < 35


def test_probabilities():
    assert part_changed(only(flip=0.5)) == chance(0.5)
    assert part_changed(only(grey=0.2)) == chance(0.2)
    assert part_changed(only(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8)) == chance(0.8)
    assert part_changed(only(blur=(3, (1.0, 2.0), 0.3))) == chance(0.3)
    assert part_changed(only(flip=1.0)) == 1.0
    mirrored = only(flip=1.0)(images(), views=1)[:, 0]
    torch.testing.assert_close(mirrored, images().flip(-1), rtol=0, atol=2e-6)


def test_views_are_of_their_own_image():
    torch.manual_seed(0)
    colours = torch.rand(20, 3, 1, 1)
    augment = only(crop_scale=(0.2, 1.0), flip=0.5, blur=(3, (0.1, 2.0), 0.5))
    views = augment(colours.expand(-1, -1, 12, 10), views=3)
    assert views.shape == (20, 3, 3, 12, 10)
    torch.testing.assert_close(views, colours[:, None].expand_as(views), rtol=0, atol=1e-5)
    flat = views.transpose(0, 1).flatten(0, 1)  # all first views, then all second ones, ...
    torch.testing.assert_close(flat[20:40, :, 0, 0], colours[:, :, 0, 0], rtol=0, atol=1e-5)
    assert flat.data_ptr() == views.data_ptr()  # no copy


@pytest.mark.parametrize("size", [None, (40, 24)])
def test_crops_equal_torchvision_s_for_the_boxes_drawn(size):
    x = images(12, size=24)
    torch.manual_seed(3)
    boxes = crop_boxes(24, (24, 24), (0.2, 1.0)).int().tolist()
    torch.manual_seed(3)
    views = only(size=size, crop_scale=(0.2, 1.0))(x)  # the first draw is the crop's
    for row, (left, top, width, height) in enumerate(boxes):
        expected = vision.resized_crop(x[row % 12], top, left, height, width, size or (24, 24), antialias=False)
        torch.testing.assert_close(views[row % 12, row // 12], expected, rtol=0, atol=1e-5)
    assert len({tuple(box) for box in boxes}) > 20


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), (0.2, 1.0)), ((28, 28), (0.7, 1.0)), ((20, 40), (0.1, 1.0)), ((40, 20), (0.5, 1.0))]
)
def test_boxes_have_torchvision_s_distribution(size, scale):
    torch.manual_seed(0)
    count = 4000
    found = crop_boxes(count, size, scale)
    left, top, width, height = found.unbind(1)
    assert min(left.min(), top.min()) >= 0 and (left + width).max() <= size[1] and (top + height).max() <= size[0]
    like = torch.zeros(1, *size)
    drawn = [RandomResizedCrop.get_params(like, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    expected = torch.tensor(drawn).float()[:, [1, 0, 3, 2]]
    for a, b in zip(found.T, expected.T, strict=True):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3
    whole = [float(((box[:, 2] == size[1]) | (box[:, 3] == size[0])).float().mean()) for box in (found, expected)]
    assert whole[0] == pytest.approx(whole[1], abs=0.03) and whole[0] > 0.04


@pytest.mark.parametrize("size", [(10, 60), (60, 10), (9, 8)])
def test_boxes_of_images_in_which_no_try_fits(size):
    like = torch.zeros(1, *size)
    torch.manual_seed(0)
    top, left, height, width = RandomResizedCrop.get_params(like, [2.0, 2.0], [3 / 4, 4 / 3])  # more than the image
    assert (crop_boxes(5, size, (2.0, 2.0)) == torch.tensor([left, top, width, height])).all()


def test_resized_crops_at_the_edges():
    x = images(1, size=9)[:, :, :, :7].double()
    for left, top, width, height in ((0, 0, 7, 9), (6, 8, 1, 1), (0, 3, 1, 4), (2, 5, 5, 4), (3, 0, 2, 9)):
        for size in ((9, 7), (1, 1), (5, 20)):
            found = resized_crops(x, torch.tensor([[left, top, width, height]]), size)
            expected = vision.resized_crop(x[0], top, left, height, width, size, antialias=False)
            torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    assert torch.equal(
        resized_crops(x[..., :1, :1], torch.tensor([[0, 0, 1, 1]]), (3, 3)).unique(), x[0, :, 0, 0].sort()[0]
    )


def test_jitter_equals_torchvision_s_in_one_order_per_call():
    steps = (
        ("brightness_factor", vision.adjust_brightness),
        ("contrast_factor", vision.adjust_contrast),
        ("saturation_factor", vision.adjust_saturation),
        ("hue_factor", vision.adjust_hue),
    )
    augment, orders = only(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=1.0), set()
    for seed in range(4):
        torch.manual_seed(seed)
        x = images(5, seed=seed)
        views = augment(x)
        drawn = augment._operations[0]._params
        order = drawn["order"].tolist()
        orders.add(tuple(order))
        for row in range(10):
            expected = x[row % 5]
            for step in order:
                name, adjust = steps[step]
                expected = adjust(expected, float(drawn[name][row]))
            torch.testing.assert_close(views[row % 5, row // 5], expected, rtol=0, atol=1e-4)
    assert len(orders) > 1


@pytest.mark.parametrize("name", AUGMENTATION_PRESETS)
def test_range_shape_and_seed_of_the_presets(name):
    augment = ContrastiveAugmentation.preset(name)
    channels = 1 if name == "rotated_mnist" else 3
    mean, std = (torch.tensor(AUGMENTATION_PRESETS[name][key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = (images(16, channels, size=32) - mean) / std
    torch.manual_seed(5)
    views = augment(x)
    assert views.shape == (16, 2, channels, 32, 32) and not torch.equal(views[:, 0], views[:, 1])
    plain = views * std + mean
    assert plain.min() >= -1e-5 and plain.max() <= 1 + 1e-5 and plain.std() > 0.05
    torch.manual_seed(5)
    assert torch.equal(augment(x), views)
    assert not torch.equal(augment(x), views)
    torch.manual_seed(5)
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(augment)))(x), views)


def test_presets_have_the_values_of_the_code():
    def facts(name):
        augment = ContrastiveAugmentation.preset(name)
        assert augment.size is None and augment.views == 2
        return augment.crop_scale, {type(o): o for o in augment._operations}

    scale, cifar = facts("seq_cifar10")
    assert scale == (0.2, 1.0) and list(cifar) == [RandomHorizontalFlip, ColorJitter, RandomGrayscale]
    scale, tiny = facts("seq_tiny_imagenet")
    assert scale == (0.1, 1.0)
    assert list(tiny) == [RandomHorizontalFlip, ColorJitter, RandomGrayscale, RandomGaussianBlur]
    for operations in (cifar, tiny):
        assert (operations[RandomHorizontalFlip].p, operations[RandomGrayscale].p) == (0.5, 0.2)
        jitter = operations[ColorJitter]
        assert (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
            0.8,
            0.4,
            0.4,
            0.4,
            0.1,
        )
    blur = tiny[RandomGaussianBlur]
    assert (blur.p, blur.flags["kernel_size"], blur._param_generator.sigma) == (0.5, (7, 7), (0.1, 2.0))
    scale, digits = facts("rotated_mnist")
    assert scale == (0.7, 1.0) and digits == {}
    for name, transforms in (("seq_cifar10", "co2l_cifar"), ("seq_tiny_imagenet", "co2l_tiny")):
        normalise = preset_transforms(transforms).train.transforms[-1]
        preset = AUGMENTATION_PRESETS[name]
        assert (tuple(normalise.mean), tuple(normalise.std)) == (preset["mean"], preset["std"])
    assert AUGMENTATION_PRESETS["seq_cifar10"]["mean"] == (0.4914, 0.4822, 0.4465)
    assert AUGMENTATION_PRESETS["seq_cifar10"]["std"] == (0.2023, 0.1994, 0.2010)
    assert AUGMENTATION_PRESETS["seq_tiny_imagenet"]["mean"] == (0.4802, 0.4480, 0.3975)
    assert AUGMENTATION_PRESETS["seq_tiny_imagenet"]["std"] == (0.2770, 0.2691, 0.2821)
    assert ContrastiveAugmentation.preset("rotated_mnist", views=3, flip=1.0)(images(2, 1)).shape[1] == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_the_arithmetic_is_float32(dtype):
    augment = ContrastiveAugmentation.preset("seq_tiny_imagenet")
    x = images(8, size=32).to(dtype)
    torch.manual_seed(1)
    views = augment(x)
    torch.manual_seed(1)
    assert views.dtype == dtype and torch.equal(views, augment(x.float()).to(dtype))


def test_autocast_and_gradients_stay_outside():
    augment = ContrastiveAugmentation.preset("seq_tiny_imagenet")
    x = images(8, size=32).requires_grad_()
    torch.manual_seed(1)
    views = augment(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(x), views)
    assert not views.requires_grad and augment.state_dict() == {} and not list(augment.parameters())


def test_drawing_stays_on_the_cpu_s_global_generator():
    """kornia would move it with the module, and then another device gives other views."""
    augment = ContrastiveAugmentation.preset("seq_tiny_imagenet")
    x = images(8, size=32)
    torch.manual_seed(1)
    views = augment(x)
    moved = copy.deepcopy(augment).to(torch.float64)
    torch.manual_seed(1)
    assert torch.equal(moved(x), views)
    for operation in moved.to("meta")._operations:
        assert operation.device == torch.device("cpu") and operation.dtype == torch.float32
    state = torch.get_rng_state()
    augment(x)
    assert not torch.equal(torch.get_rng_state(), state)
    np.random.seed(0)
    torch.manual_seed(1)
    assert torch.equal(augment.eval()(x), views)  # neither numpy nor the mode matters


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_equal_seeds_give_equal_views_on_cuda():
    augment = ContrastiveAugmentation.preset("seq_tiny_imagenet")
    x = images(64, size=64)
    torch.manual_seed(1)
    views = augment(x)
    torch.manual_seed(1)
    torch.testing.assert_close(augment.cuda()(x.cuda()).cpu(), views, rtol=0, atol=2e-2)


def test_two_views_of_a_cpu_transform():
    stacked = TwoViews(lambda image: image * torch.rand(()))(torch.ones(3, 4, 4))
    assert stacked.shape == (2, 3, 4, 4) and not torch.equal(stacked[0], stacked[1])
    pair = TwoViews(preset_transforms("ucl_cifar").train)
    image = vision.to_pil_image(images(1, size=32)[0])
    torch.manual_seed(0)
    first, second = pair(image)
    torch.manual_seed(0)
    assert torch.equal(preset_transforms("ucl_cifar").train(image), first) and not torch.equal(first, second)
    with pytest.raises(StreamError, match="transform is 3"):
        TwoViews(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": (8, 8, 8)}, r"size is \(8, 8, 8\)"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale is \(0.0, 1.0\); accepted: 0 < smallest"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale"),
        ({"flip": 1.5}, r"flip is 1.5; accepted: a probability, 0\.\.1"),
        ({"grey": True}, "grey is True"),
        ({"jitter_probability": -0.1}, "jitter_probability is -0.1"),
        ({"jitter": (0.4, 0.4, 0.4)}, r"jitter is .*brightness, contrast, saturation, hue"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6), "jitter_probability": 0.0}, "hue up to 0.5"),
        ({"blur": 7}, "blur is 7"),
        ({"blur": (6, (0.1, 2.0), 0.5)}, "kernel of blur is 6; accepted: an odd number"),
        ({"blur": (7, (0.0, 2.0), 0.5)}, "sigma of blur"),
        ({"blur": (7, (0.1, 2.0), 2)}, "probability of blur is 2"),
        ({"mean": "0.5"}, "mean is '0.5'"),
        ({"mean": ()}, r"mean is \(\)"),
        ({"std": (0.2, 0.0, 0.2)}, r"std is \(0.2, 0.0, 0.2\); accepted: figures above 0"),
        ({"views": 0}, "views is 0; accepted: a whole number, at least 1"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(StreamError, match=message):
        ContrastiveAugmentation(**options)


def test_images_that_are_refused():
    grey = images(2, channels=1)
    for options in ({"grey": 0.2}, {"jitter": (0.4, 0.4, 0.4, 0.1)}):
        with pytest.raises(StreamError, match=r"images have 1 channel\(s\); accepted: 3, or jitter=None and grey=0"):
            only(**options)(grey)
    only(grey=0.0, jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.0)(grey)  # never applied: nothing to refuse
    for wrong in (images()[0], images().mul(255).byte(), images()[:0]):
        with pytest.raises(StreamError, match=r"accepted: floats \(N, C, H, W\), N at least 1"):
            only()(wrong)
    with pytest.raises(StreamError, match=r"mean has 3 figures for 1 channel\(s\)"):
        only(mean=(0.1, 0.2, 0.3))(grey)
    with pytest.raises(StreamError, match=r"blur has a kernel of 7 for views of \(3, 3\)"):
        only(size=3, blur=(7, (0.1, 2.0), 0.5))(images())
    assert only(size=4, blur=(7, (0.1, 2.0), 0.5))(images()).shape == (6, 2, 3, 4, 4)
    with pytest.raises(StreamError, match=r"views is 1\.5"):
        only()(images(), views=1.5)
    with pytest.raises(StreamError, match="'seq_cifar' is unknown; accepted: rotated_mnist, seq_cifar10"):
        ContrastiveAugmentation.preset("seq_cifar")
