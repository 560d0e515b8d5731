"""The buffer of places: Avalanche's own policies draw the same samples, and images are found again."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ClassBalancedBuffer, ExperienceBalancedBuffer, ReservoirSamplingBuffer

from avalanche_firn.plugins.placed_buffer import PlacedBuffer, ResumableReplayPlugin
from avalanche_firn.plugins.plain_state import differing_state, from_plain, to_plain

sys.path.append(str(Path(__file__).parent))
from checkpoint_recipes import Noisy, domains, mlp, noisy_view, sgd, stream

pytestmark = pytest.mark.filterwarnings("ignore")

POLICIES = {
    "experience_balanced": lambda n: ExperienceBalancedBuffer(n),
    "class_balanced": lambda n: ClassBalancedBuffer(n),
    "reservoir": lambda n: ReservoirSamplingBuffer(n),
}


def samples(data: Any) -> tuple[torch.Tensor, list[int]]:
    found = [data[i] for i in range(len(data))]
    return torch.stack([s[0] for s in found]), [int(s[1]) for s in found]


@pytest.mark.parametrize("repeated", [False, True], ids=["classes", "domains"])
@pytest.mark.parametrize("storage", list(POLICIES))
def test_keeps_what_avalanche_s_policy_keeps(storage: Any, repeated: bool) -> None:
    """The same images in the same order after each experience; before each update the state went through a round trip.

    19 slots leave remainders and, where the classes repeat, groups that meet their own class again.
    """
    train = (domains() if repeated else stream()).train_stream
    ours, theirs = PlacedBuffer(19, storage), POLICIES[storage](19)
    for n, experience in enumerate(train):
        again = PlacedBuffer(19, storage)
        again.load_state_dict(from_plain(to_plain(ours.state_dict())))
        assert differing_state(to_plain(again.state_dict()), to_plain(ours.state_dict())) is None
        ours = again
        torch.manual_seed(n)
        ours.post_adapt(None, experience)
        torch.manual_seed(n)
        theirs.post_adapt(None, experience)
        (images, labels), (expected, wanted) = samples(ours.buffer), samples(theirs.buffer)
        assert torch.equal(images, expected) and labels == wanted == ours.labels.tolist()
        places = [experience.origin_stream[e].dataset[p][0] for e, p in ours.places.tolist()]
        assert torch.equal(torch.stack(places), images)
        assert len(ours.places) == sum(size for _, _, size in ours.groups) == 19


@pytest.mark.parametrize("storage", list(POLICIES))
def test_replay_equals_avalanche_s_plugin(storage: Any) -> None:
    """To the bit, three experiences with augmentation and dropout."""

    def trained(plugin: SupervisedPlugin) -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        strategy = sgd(mlp(), [plugin])
        for experience in stream(Noisy).train_stream:
            strategy.train(experience, eval_streams=[])
        return torch.cat([v.double().flatten() for v in strategy.model.state_dict().values()])

    ours = trained(ResumableReplayPlugin(20, batch_size_mem=7, storage=storage))
    assert torch.equal(ours, trained(ReplayPlugin(20, batch_size_mem=7, storage_policy=POLICIES[storage](20))))
    assert not torch.allclose(ours, trained(ReplayPlugin(4)), atol=1e-3)


def test_images_come_under_the_transform_that_is_asked_for() -> None:
    train = domains(lambda x: x + 100).train_stream
    buffer = PlacedBuffer(10)
    assert len(buffer.dataset(train)) == 0
    for experience in train[:2]:
        buffer.post_adapt(None, experience)
    augmented, plain = samples(buffer.buffer)[0], samples(buffer.dataset(train, evaluation=True))[0]
    assert augmented.min() >= 100 and plain.max() <= 1
    torch.testing.assert_close(augmented, plain + 100)


@pytest.mark.parametrize("storage", list(POLICIES))
def test_another_size(storage: Any) -> None:
    train = stream().train_stream
    buffer, policy = PlacedBuffer(20, storage), POLICIES[storage](20)
    torch.manual_seed(0)
    buffer.post_adapt(None, train[0])
    torch.manual_seed(0)
    policy.post_adapt(None, train[0])
    for kept in (buffer, policy):
        kept.resize(SimpleNamespace(experience=train[0]), 6)
    assert torch.equal(samples(buffer.buffer)[0], samples(policy.buffer)[0]) and len(buffer.places) == 6
    torch.manual_seed(1)
    buffer.post_adapt(None, train[1])
    assert len(buffer.places) == 6 == buffer.max_size


def test_batches_have_the_sizes_that_were_asked_for_and_pin_memory_is_passed_on() -> None:
    sizes: list[list[int]] = []
    options: list[Any] = []

    class Look(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            sizes.append([len(batch[1]) for batch in strategy.dataloader])
            options.append(getattr(strategy.dataloader, "loader_kwargs", {}).get("pin_memory"))

    strategy = sgd(mlp(), [ResumableReplayPlugin(20, batch_size_mem=7), Look()], train_epochs=1)
    for experience in stream().train_stream[:2]:
        strategy.train(experience, eval_streams=[], pin_memory=False)
    assert sizes[0][:-1] == [10] * (len(sizes[0]) - 1) and sizes[1][:2] == [17, 17]
    assert options[1] is False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PlacedBuffer(0), "mem_size is 0; 1 and above"),
        (lambda: PlacedBuffer(5, "newest"), r"storage is 'newest'; one of \['experience_balanced', 'class_balanced'"),
        (lambda: ResumableReplayPlugin(5, batch_size_mem=0), "batch_size_mem is 0; 1 and above, or None"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_online_streams_are_refused() -> None:
    online = split_online_stream(stream().train_stream, experience_size=10)
    strategy = sgd(mlp(), [ResumableReplayPlugin(5)])
    with pytest.raises(ValueError, match=r"whole experiences with stream\[i\] are accepted"):
        strategy.train(next(iter(online)), eval_streams=[])


def test_domains_get_equal_shares() -> None:
    strategy = sgd(mlp(), [plugin := ResumableReplayPlugin(9)], train_epochs=1)
    for experience in domains(noisy_view).train_stream:
        strategy.train(experience, eval_streams=[])
    assert plugin.storage_policy.places[:, 0].unique(return_counts=True)[1].tolist() == [3, 3, 3]
