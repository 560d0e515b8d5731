"""Transforms taken apart: exact without chance, and with chance equal to torchvision image by image."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import transforms as timm_steps
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from avalanche_firn.benchmarks.batched_steps import Apply, Blur, Crop, Draw, Flip, Grey, Jitter, ResizedCrop
from avalanche_firn.benchmarks.device_transforms import AsRGB, plan_transform
from avalanche_firn.benchmarks.streams import StreamError
from avalanche_firn.benchmarks.transforms import TRANSFORM_PRESETS, preset_transforms, timm_transforms

CONFIG = {
    "input_size": (3, 48, 48),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
}
TO_TENSOR = [transforms.ToTensor(), transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))]


def picture(height=40, width=36, seed=0, mode="RGB"):
    """Smooth colours with some noise, like a photograph."""
    random = np.random.RandomState(seed)
    coarse = Image.fromarray(random.randint(0, 256, (6, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(int) + random.randint(-12, 13, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def batch(count=6, channels=3, height=20, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def photos(count=6, size=24):
    return torch.stack([vision.pil_to_tensor(picture(size, size + 4, seed)) for seed in range(count)])


def run(step, images, seed=0):
    """What a step makes of a batch, and the table it drew."""
    torch.manual_seed(seed)
    drawn = step.draw(len(images), tuple(images.shape[-2:]))
    assert drawn.table.shape == (len(images), step.columns) and drawn.table.dtype == torch.float32
    before = images.clone()
    result = step.apply(images, drawn.table, drawn.shared)
    assert torch.equal(images, before), "the images were changed in place"
    assert tuple(result.shape[-2:]) == step.size(tuple(images.shape[-2:]))
    return result, drawn


# ---------------------------------------------------------------- without chance


def evaluations():
    pairs = {name: preset_transforms(name) for name in TRANSFORM_PRESETS}
    found = {name: pair.eval for name, pair in pairs.items()}
    found |= {f"{name}-train": pairs[name].train for name in ("co2l_cifar", "co2l_tiny", "co2l_digits")}
    for mode in ("center", "squash", "border"):
        found[f"timm-{mode}"] = timm_transforms({**CONFIG, "crop_mode": mode}).eval
    found["timm-plain"] = timm_transforms(CONFIG, augment=False).train
    return found


@pytest.mark.parametrize("name", sorted(evaluations()))
def test_deterministic_transforms_are_equal_to_the_bit(name):
    transform = evaluations()[name]
    plan = plan_transform(transform)
    images = [picture(40 + 7 * i, 60 - 5 * i, seed=i) for i in range(3)]
    loaded = torch.stack([plan.load(image) for image in images])
    assert plan.exact and loaded.dtype == torch.uint8
    result = plan(loaded)
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert torch.equal(result, torch.stack([transform(image) for image in images]))


def test_grey_images_stored_with_one_channel_give_the_same():
    plan = plan_transform([transforms.Resize(24), transforms.CenterCrop(24), *TO_TENSOR])
    loaded = plan.load(picture(mode="L").convert("RGB"))[None]
    assert torch.equal(plan(loaded[:, :1], channels=3), plan(loaded))
    no_mean = plan_transform([transforms.Resize((24, 24)), transforms.ToTensor()])
    assert torch.equal(no_mean(loaded[:, :1], channels=3), no_mean(loaded))


def test_as_rgb_rotation_and_nesting():
    steps = [
        transforms.RandomRotation((30, 30)),
        AsRGB(),
        transforms.Compose([transforms.Resize((20, 20)), nn.Sequential(transforms.CenterCrop(16))]),
        *TO_TENSOR,
    ]
    plan = plan_transform(steps)
    for image in (picture(mode="L"), picture(), transforms.ToTensor()(picture(mode="L"))):
        torch.manual_seed(0)
        assert torch.equal(plan(plan.load(image)[None])[0], transforms.Compose(steps)(image))
    assert [name for name, *_ in plan.signature] == ["RandomRotation", "AsRGB", "Resize", "CenterCrop"]
    assert plan.signature == plan_transform(copy.deepcopy(steps)).signature
    other = plan_transform([transforms.RandomRotation((31, 31)), *steps[1:]])
    assert plan.signature != other.signature


def test_the_prefix_is_what_comes_before_the_first_random_step():
    pair = preset_transforms("ucl_tiny")
    plan = plan_transform(pair.train)
    assert not plan.exact and plan.signature == plan_transform(pair.eval).signature
    assert [type(step) for step in plan.random] == [Crop, Flip, Apply, Grey, Apply]
    assert torch.equal(plan.mean, torch.tensor((0.4914, 0.4822, 0.4465)))
    timm_plan = plan_transform(timm_transforms(CONFIG).train)
    assert [type(step) for step in timm_plan.random] == [ResizedCrop, Flip, Jitter] and not timm_plan.signature


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([transforms.Resize(8)], "Resize has no ToTensor.*accepted"),
        ([], "no steps has no ToTensor"),
        ([vision.pil_to_tensor], "pil_to_tensor has no ToTensor"),
        ([transforms.AutoAugment(), *TO_TENSOR], "AutoAugment.*not understood.*accepted"),
        ([lambda image: image, *TO_TENSOR], "lambda.*not understood"),
        ([*TO_TENSOR, transforms.RandomErasing()], "after ToTensor come Normalize, RandomErasing"),
        ([transforms.RandomHorizontalFlip(), transforms.Resize(8), *TO_TENSOR], "Resize.*not understood"),
        ([transforms.RandomCrop(8, pad_if_needed=True), *TO_TENSOR], "pad_if_needed"),
        ([transforms.RandomCrop(8, padding=2, padding_mode="reflect"), *TO_TENSOR], "one figure"),
        ([transforms.RandomResizedCrop(8, ratio=(0.5, 2)), *TO_TENSOR], "ratio of 3/4"),
        ([transforms.RandomResizedCrop(8, interpolation=InterpolationMode.NEAREST), *TO_TENSOR], "bilinear or bicubic"),
        ([transforms.RandomRotation(10), *TO_TENSOR], "RandomRotation.*not understood"),
    ],
)
def test_what_is_not_understood_is_named(steps, message):
    with pytest.raises(StreamError, match=message):
        plan_transform(transforms.Compose(steps))


def test_timm_options_that_are_not_understood():
    for options in ({"auto_augment": "rand-m9"}, {"re_prob": 0.5}):
        with pytest.raises(StreamError, match="accepted"):
            plan_transform(timm_transforms(CONFIG, **options).train)
    either = timm_steps.RandomResizedCropAndInterpolation(8, interpolation="random")
    with pytest.raises(StreamError, match="bilinear or bicubic"):
        plan_transform([either, *TO_TENSOR])
    wobbling = timm_steps.ResizeKeepRatio(8, random_scale_prob=0.5)
    with pytest.raises(StreamError, match=r"ResizeKeepRatio.*not understood"):
        plan_transform([wobbling, *TO_TENSOR])


def test_refuses_images_that_do_not_fit():
    plan = plan_transform(TO_TENSOR)
    with pytest.raises(StreamError, match=r"CMYK.*accepted: a PIL image of mode L or RGB"):
        plan.load(picture(mode="CMYK"))
    with pytest.raises(StreamError, match="Tensor"):
        plan.load(torch.zeros(3, 4, 4))
    crop = plan_transform([transforms.RandomCrop(32), *TO_TENSOR])
    with pytest.raises(StreamError, match=r"RandomCrop of \(32, 32\) for images of \(20, 16\)"):
        crop(batch())
    blur = plan_transform([transforms.GaussianBlur(41), *TO_TENSOR])
    with pytest.raises(StreamError, match="GaussianBlur"):
        blur(batch())
    inner = plan_transform([transforms.RandomApply([transforms.RandomCrop(8)]), *TO_TENSOR])
    with pytest.raises(StreamError, match="RandomApply of Crop"):
        inner(batch())


def test_stored_edge():
    plan = plan_transform(preset_transforms("lorac").train).stored(32)
    image = picture(50, 90)
    expected = vision.center_crop(vision.resize(image, 32, InterpolationMode.BILINEAR), 32)
    assert torch.equal(plan.load(image), vision.pil_to_tensor(expected))
    assert plan(plan.load(image)[None]).shape == (1, 3, 224, 224)
    for steps in ([transforms.RandomCrop(8)], []):
        with pytest.raises(StreamError, match="stored_edge is 32"):
            plan_transform([*steps, *TO_TENSOR]).stored(32)


# ---------------------------------------------------------------- step by step, against torchvision


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (4, 4, 4, 4), (1, 2, 3, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_to_the_bit(padding, channels):
    step, images = Crop((14, 12), padding, fill=7), batch(32, channels)
    result, drawn = run(step, images)
    assert result.dtype == torch.uint8
    for image, one, (top, left) in zip(result, images, drawn.table.int().tolist(), strict=True):
        expected = vision.crop(vision.pad(one, list(padding), fill=7), top, left, 14, 12)
        assert torch.equal(image, expected)
    as_float = step.apply(images / 255, drawn.table, None)
    torch.testing.assert_close(as_float * 255, result.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, -2])
def test_flip_to_the_bit(axis):
    images = batch(40)
    result, drawn = run(Flip(0.5, axis), images)
    flipped = drawn.table[:, 0].bool()
    assert 8 < flipped.sum() < 32 and result.dtype == torch.uint8
    for image, one, mirror in zip(result, images, flipped, strict=True):
        mirrored = vision.hflip(one) if axis == -1 else vision.vflip(one)
        assert torch.equal(image, mirrored if mirror else one)


@pytest.mark.parametrize(("name", "filter"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("size", [(48, 40), (9, 7)])  # enlarged, and reduced with antialiasing
def test_resized_crop_equals_torchvision(name, filter, size):
    images = photos(8, 32)
    result, drawn = run(ResizedCrop(size, (0.08, 1.0), name), images)
    mode = InterpolationMode[filter]
    for image, one, box in zip(result, images, drawn.table.int().tolist(), strict=True):
        left, top, width, height = box
        place = (top, left, height, width, list(size), mode)
        expected = vision.resized_crop(one / 255, *place, antialias=True).clamp(0, 1)
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-5)
        decoded = vision.to_tensor(vision.resized_crop(vision.to_pil_image(one), *place))
        assert (image - decoded).abs().max() < 2.1 / 255  # PIL rounds twice


def jitter(**ranges):
    return Jitter(*(ranges.get(name) for name in ("brightness", "contrast", "saturation", "hue")))


@pytest.mark.parametrize(
    ("name", "span", "tolerance"),
    [
        ("brightness", (0.6, 1.4), 1.1),
        ("contrast", (0.6, 1.4), 1.6),
        ("saturation", (0.6, 1.4), 1.6),
        ("hue", (-0.5, 0.5), 16),  # PIL has 256 hues
    ],
)
def test_jitter_of_one_kind(name, span, tolerance):
    images = photos(10)
    result, drawn = run(jitter(**{name: span}), images)
    assert drawn.table.min() >= span[0] and drawn.table.max() <= span[1] and drawn.table.std() > 0.05
    adjust = getattr(vision, f"adjust_{name}")
    for image, one, factor in zip(result, images, drawn.table[:, 0].tolist(), strict=True):
        torch.testing.assert_close(image, adjust(one / 255, factor), rtol=0, atol=3e-4)
        decoded = vision.to_tensor(adjust(vision.to_pil_image(one), factor))
        assert (image - decoded).abs().max() < tolerance / 255  # PIL rounds
        assert (image - decoded).abs().mean() < 2 / 255


def test_jitter_of_all_kinds_in_the_order_drawn():
    step = jitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1))
    images, orders = photos(4), set()
    for seed in range(12):
        result, drawn = run(step, images, seed)
        orders.add(tuple(drawn.shared))
        for image, one, factors in zip(result, images, drawn.table.tolist(), strict=True):
            x = one / 255
            for i in drawn.shared:
                adjust = ("brightness", "contrast", "saturation", "hue")[i]
                x = getattr(vision, f"adjust_{adjust}")(x, factors[i])
            torch.testing.assert_close(image, x, rtol=0, atol=2e-3)
    assert len(orders) > 6 and all(sorted(order) == [0, 1, 2, 3] for order in orders)


def test_jitter_of_grey_images_leaves_them_grey():
    grey = photos(5)[:, :1]
    step = jitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1))
    result, drawn = run(step, grey)
    torch.testing.assert_close(
        result.expand(-1, 3, -1, -1), step.apply(grey.expand(-1, 3, -1, -1), *drawn), rtol=0, atol=1e-5
    )


def test_hue_of_grey_and_pure_colours():
    corners = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]).float().view(1, 3, 8, 1)
    for turn in (1 / 3, -0.25, 0.5, 0.0):
        result = jitter(hue=(0, 0)).apply(corners, torch.tensor([[turn]]), [0])
        torch.testing.assert_close(result, vision.adjust_hue(corners, turn), rtol=0, atol=1e-5)


def test_grey_and_apply():
    images = photos(40)
    result, drawn = run(Grey(0.5), images)
    for image, one, grey in zip(result, images, drawn.table[:, 0].tolist(), strict=True):
        expected = vision.rgb_to_grayscale(one / 255, 3) if grey else one / 255
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-4)
        if grey:
            decoded = vision.to_tensor(vision.to_grayscale(vision.to_pil_image(one), 3))
            assert (image - decoded).abs().max() < 1.1 / 255
    step = Apply(0.5, [jitter(brightness=(0.5, 0.5)), Flip(1.0)])
    result, drawn = run(step, images)
    applied = drawn.table[:, 0].bool()
    assert 8 < applied.sum() < 32
    x = images / 255
    torch.testing.assert_close(result[applied], x[applied].flip(-1) / 2, rtol=0, atol=1e-6)
    assert torch.equal(result[~applied], x[~applied])
    flips, drawn = run(Apply(0.5, [Flip(1.0)]), images)
    assert flips.dtype == torch.uint8 and torch.equal(flips[drawn.table[:, 0] == 0], images[drawn.table[:, 0] == 0])


@pytest.mark.parametrize("kernel", [(7, 7), (3, 5), (1, 1)])
def test_blur_equals_torchvision(kernel):
    images = photos(8)
    result, drawn = run(Blur(kernel, (0.1, 2.0)), images)
    for image, one, sigma in zip(result, images, drawn.table[:, 0].tolist(), strict=True):
        expected = vision.gaussian_blur(one / 255, list(kernel), [sigma, sigma])
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- whole plans


RANDOM = [name for name in TRANSFORM_PRESETS if not plan_transform(preset_transforms(name).train).exact]


@pytest.mark.parametrize("name", RANDOM)
def test_presets_have_the_distribution_of_the_original(name):
    transform = preset_transforms(name).train
    plan = plan_transform(transform)
    image = picture(64, 64)
    torch.manual_seed(0)
    count = 96 if plan(plan.load(image)[None]).shape[-1] < 100 else 40
    torch.manual_seed(0)
    ours = plan(plan.load(image)[None].expand(count, -1, -1, -1))
    theirs = torch.stack([transform(image) for _ in range(count)])
    assert ours.shape == theirs.shape and ours.dtype == torch.float32 and ours.is_contiguous()
    for figure in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)), lambda x: x[:, 0].amax((1, 2))):
        assert stats.ks_2samp(figure(ours).numpy(), figure(theirs).numpy()).pvalue > 1e-3


def test_crop_areas_and_places():
    step = ResizedCrop((8, 8), (0.2, 0.9), "bilinear")
    torch.manual_seed(0)
    table = step.draw(3000, (64, 64)).table
    theirs = [transforms.RandomResizedCrop.get_params(picture(64, 64), (0.2, 0.9), (3 / 4, 4 / 3)) for _ in range(1500)]
    area, left = table[:, 2] * table[:, 3], table[:, 0]
    assert stats.ks_2samp(area.numpy(), [h * w for _, _, h, w in theirs]).pvalue > 1e-3
    assert stats.ks_2samp(left.numpy(), [x for _, x, _, _ in theirs]).pvalue > 1e-3
    crops = Crop((32, 32), (4, 4, 4, 4)).draw(3000, (32, 32)).table
    assert crops.unique().tolist() == list(range(9))
    assert stats.chisquare(torch.bincount(crops[:, 1].int()).numpy()).pvalue > 1e-3
    assert float(Flip(0.3).draw(4000, (8, 8)).table.mean()) == pytest.approx(0.3, abs=0.03)


def test_a_crop_and_flip_pipeline_is_exact_given_the_same_draws():
    transform = preset_transforms("slca_cub").train
    plan, image = plan_transform(transform), picture(64, 80)
    loaded = plan.load(image)[None].repeat(3, 1, 1, 1)
    torch.manual_seed(5)
    result = plan(loaded)
    torch.manual_seed(5)
    crop, flip = (step.draw(3, (300, 300)).table for step in plan.random)
    resized = transform.transforms[0](image)
    for one, (top, left), mirror in zip(result, crop.int().tolist(), flip[:, 0].tolist(), strict=True):
        cut = vision.crop(resized, top, left, 224, 224)
        expected = transforms.Compose(transform.transforms[3:])(vision.hflip(cut) if mirror else cut)
        assert torch.equal(one, expected)


def test_seeds_images_and_gradients():
    plan = plan_transform(preset_transforms("ucl_tiny").train)
    images = torch.stack([plan.load(picture(seed=i)) for i in range(4)])
    before = images.clone()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(plan(images))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(images, before) and not results[0].requires_grad
    assert len(torch.unique(plan(images[:1].repeat(16, 1, 1, 1)), dim=0)) == 16, "one draw per image"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(plan(images), results[0])
    with torch.device("meta"):  # a default device of the user must not catch the draws
        torch.manual_seed(1)
        assert torch.equal(plan_transform(preset_transforms("ucl_tiny").train)(images), results[0])
    twin = pickle.loads(pickle.dumps(plan))
    torch.manual_seed(1)
    assert torch.equal(twin(images), results[0])


def test_all_parameters_travel_in_one_copy(monkeypatch):
    plan = plan_transform(preset_transforms("ucl_tiny").train)
    images = torch.stack([plan.load(picture(seed=i)) for i in range(4)])
    plan(images)
    tables = []
    original = torch.Tensor.to

    def counted(self, *args, **options):
        if args and isinstance(args[0], torch.device):
            tables.append(tuple(self.shape))
        return original(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", counted)
    plan(images)
    assert tables == [(4, sum(step.columns for step in plan.random))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_cpu():
    for name in TRANSFORM_PRESETS:
        pair = preset_transforms(name)
        for transform in pair:
            plan = plan_transform(transform)
            images = torch.stack([plan.load(picture(64, 64, seed=i)) for i in range(4)])
            torch.manual_seed(3)
            on_cpu = plan(images)
            torch.manual_seed(3)
            on_cuda = plan(images.cuda()).cpu()
            if plan.exact or name in ("slca_cub", "slca_cars"):
                assert torch.equal(on_cpu, on_cuda), name
            else:
                torch.testing.assert_close(on_cuda, on_cpu, rtol=0, atol=5e-3)


def test_draw_is_a_pair():
    table, shared = Draw(torch.zeros(1, 2))
    assert table.shape == (1, 2) and shared is None
