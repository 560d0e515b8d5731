"""Whole batches hold what Avalanche gives sample by sample, to the bit."""

import pytest
import torch
from avalanche.benchmarks.utils import as_classification_dataset, concat_datasets
from torch.utils.data import TensorDataset
from torch.utils.data.dataloader import default_collate

from avalanche_firn.benchmarks import TensorImageDataset, build_stream, digits_stream
from avalanche_firn.benchmarks.batches import JoinedBatches, batched, loader_of


class Doubled:
    """A transform that knows whole batches."""

    def __call__(self, x):
        return 2 * x

    def batch(self, x):
        return 2 * x


def images(count=12, seed=0, storage="uint8"):
    pixels = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return TensorImageDataset(pixels, [i % 4 for i in range(count)], mean=(0.4, 0.5, 0.6), std=0.3, storage=storage)


def stream_of_images(data, **transforms):
    names = [str(c) for c in range(4)]
    return build_stream(
        "s", train=data, test=data, class_order=[2, 0, 3, 1], task_sizes=[2, 2], class_names=names, fingerprint="",
        **transforms,
    )  # fmt: skip


def same(dataset, positions):
    """The batch at some positions against the collated samples."""
    data = batched(dataset)
    assert data is not None and len(data) == len(dataset)
    expected = default_collate([dataset[p] for p in positions])
    found = data.fetch(torch.tensor(positions))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_an_experience_of_images_in_memory(storage):
    for experience in stream_of_images(images(storage=storage)).train:
        same(experience.dataset, [5, 0, 3])
        same(experience.dataset.eval(), [1, 1])


def test_digits():
    for experience in digits_stream(tasks=3).test:
        same(experience.dataset.eval(), [0, 9, 4])


def test_transforms_of_the_group_in_use():
    stream = stream_of_images(images(), train_transform=Doubled(), eval_transform=None)
    experience = stream.train[1]
    same(experience.dataset.train(), [4, 0])
    same(experience.dataset.eval(), [4, 0])
    assert not torch.equal(
        batched(experience.dataset.train()).fetch(torch.tensor([0]))[0],
        batched(experience.dataset.eval()).fetch(torch.tensor([0]))[0],
    )


def test_frozen_and_stacked_transforms():
    dataset = stream_of_images(images(), train_transform=Doubled()).train[0].dataset.train()
    same(dataset.freeze_transforms(), [3, 1])
    same(as_classification_dataset(dataset, transform_groups={"train": Doubled(), "eval": None}).train(), [2, 5])


def test_subsets_of_subsets_and_concatenations():
    first, second = (experience.dataset for experience in stream_of_images(images()).train)
    other = stream_of_images(images(seed=1)).train[0].dataset
    same(first.subset([4, 2, 0]).subset([2, 0]), [1, 0, 1])
    same(first.concat(second), [11, 0, 6])
    same(concat_datasets([first.subset([1]), other, second]), [0, 12, 3, 1, 8])


def test_a_plain_tensor_data_set_with_and_without_task_labels():
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 4)
    data.targets = data.tensors[1].tolist()
    same(stream_of_images(data).train[0].dataset, [3, 0])
    same(as_classification_dataset(data), [7, 7, 2])


def test_task_labels_of_several_tasks():
    first, second = (experience.dataset for experience in stream_of_images(images()).train)
    relabelled = second.update_data_attribute("targets_task_labels", [7] * len(second))
    same(first.concat(relabelled), [0, 11, 3, 8])


class Plain(torch.utils.data.Dataset):
    targets = (0, 1, 2, 3)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.zeros(2), i


def test_what_cannot_be_done_to_the_bit_is_left_alone():
    assert batched(stream_of_images(Plain()).train[0].dataset) is None
    assert batched(stream_of_images(images(), train_transform=lambda x: x + 1).train[0].dataset) is None
    both = as_classification_dataset(images(), transform_groups={"train": (Doubled(), lambda y: y + 1), "eval": None})
    assert batched(both.train()) is None
    assert batched(Plain()) is None
    dataset = stream_of_images(images()).train[0].dataset
    dataset.collate_fn = lambda samples: samples
    assert batched(dataset) is None


def test_joined_parts_keep_their_order_and_their_constant():
    parts = [batched(experience.dataset) for experience in stream_of_images(images()).train]
    joined = JoinedBatches(parts, [30, 40])
    x, y, origin, _ = joined.fetch(torch.tensor([7, 1, 11, 0]))
    assert origin.tolist() == [40, 30, 40, 30]
    assert torch.equal(x[1], parts[0].fetch(torch.tensor([1]))[0][0]) and int(y[2]) == int(
        parts[1].fetch(torch.tensor([5]))[1]
    )


@pytest.mark.parametrize("kept", [True, False], ids=["memory", "samples"])
def test_loader_of_draws_what_torch_draws(kept):
    dataset = (stream_of_images(images()) if kept else stream_of_images(Plain())).train[0].dataset
    torch.manual_seed(3)
    plain = list(torch.utils.data.DataLoader(dataset, 5, shuffle=True, collate_fn=dataset.collate_fn))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    fast = list(loader_of(dataset, batch_size=5, shuffle=True))
    assert torch.equal(after, torch.get_rng_state())
    for mine, theirs in zip(fast, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_data_on_the_gpu_arrives_there():
    data = TensorDataset(torch.randn(8, 5, device="cuda"), (torch.arange(8) % 4).cuda())
    data.targets = data.tensors[1].tolist()
    found = batched(stream_of_images(data).train[0].dataset)
    x, y, t = found.fetch(torch.tensor([1, 0]))
    assert x.is_cuda and y.is_cuda and t.is_cuda and found.device.type == "cuda"


def test_images_and_labels_on_two_devices_are_left_alone():
    data = TensorDataset(torch.empty(8, 5, device="meta"), torch.arange(8) % 4)
    data.targets = data.tensors[1].tolist()
    assert batched(as_classification_dataset(data)) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (2, 5), (4, 9), (6, 12)])
def test_slices_are_fetched_rows(start, stop):
    parts = [batched(experience.dataset) for experience in stream_of_images(images()).train]
    for joined in (JoinedBatches(parts), JoinedBatches(parts, [7, 8])):
        found, expected = joined.slice(start, stop), joined.fetch(torch.arange(start, stop))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
