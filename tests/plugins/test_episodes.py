"""Episodes: which images they hold, how they depend on the seed, and what the loader knows about them."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from avalanche_firn.plugins.episodes import EpisodeLoader, EpisodeSampler, draw_episode
from avalanche_firn.plugins.loader_replay import LoaderReplay
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.random_state import capture_random_state, restore_random_state

SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def shuffled_labels(sizes, seed=0):
    """Class ids with gaps, in mixed order."""
    labels = np.repeat(3 * np.arange(len(sizes)) + 2, sizes)
    return np.random.default_rng(seed).permutation(labels)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, inner_steps=st.integers(1, 15), data=st.data())
def test_what_an_episode_holds(sizes, inner_steps, data):
    labels = shuffled_labels(sizes)
    remember_size = data.draw(st.integers(1, len(labels)))
    seed = data.draw(st.integers(0, 2**40))
    sampler = EpisodeSampler(
        labels, episodes=4, inner_steps=inner_steps, remember_size=remember_size, seed=seed
    )  # fmt: skip
    batches = list(sampler)
    assert len(batches) == len(sampler) == 4
    assert sampler.classes.tolist() == sorted(set(labels.tolist()))
    for batch in batches:
        sequence, remember = batch[:inner_steps], batch[inner_steps:]
        classes = {int(labels[i]) for i in sequence}
        assert len(classes) == 1
        pool = np.flatnonzero(labels == classes.pop())
        if inner_steps <= len(pool):
            assert len(set(sequence)) == inner_steps
        assert len(remember) == len(set(remember)) == remember_size
        assert set(remember) <= set(range(len(labels)))
        assert all(type(i) is int for i in batch)  # what torch's fetchers and Avalanche's data sets take


@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**32))
def test_the_sampler_draws_episode_by_episode_from_one_generator(sizes, seed):
    labels = shuffled_labels(sizes)
    pools = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    rng = np.random.default_rng(seed)
    sampler = EpisodeSampler(labels, episodes=3, inner_steps=4, remember_size=len(labels), seed=seed)
    for batch in sampler:
        chosen, inner, remember = draw_episode(pools, 4, len(labels), rng)
        assert batch == [*inner.tolist(), *remember.tolist()]
        assert set(labels[batch[:4]]) == {np.unique(labels)[chosen]}


def test_classes_and_images_are_drawn_evenly():
    """4,000 episodes: four standard errors around 1/4 of the classes and 1/10 of the images of one."""
    labels = np.repeat(np.arange(4), 10)
    count = 4000
    batches = list(EpisodeSampler(labels, episodes=count, inner_steps=1, remember_size=1, seed=1))
    classes = Counter(int(labels[b[0]]) for b in batches)
    assert all(abs(n / count - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5 for n in classes.values()) and len(classes) == 4
    images = Counter(b[1] for b in batches)
    assert len(images) == 40
    assert all(abs(n / count - 1 / 40) < 5 * (1 / 40 / count) ** 0.5 for n in images.values())


def test_a_class_with_exactly_enough_images_is_not_drawn_with_replacement():
    labels = np.repeat([0, 1], 5)
    for batch in EpisodeSampler(labels, episodes=20, inner_steps=5, remember_size=1):
        assert sorted(batch[:5]) in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    batches = list(EpisodeSampler(labels, episodes=20, inner_steps=6, remember_size=1))
    assert all(len(set(batch[:6])) < 6 for batch in batches)
    assert any(len(set(batch[:6])) < 5 for batch in batches)


def test_remembered_images_may_be_of_the_class_and_of_the_sequence():
    labels = np.repeat([0, 1], 4)
    batches = list(EpisodeSampler(labels, episodes=10, inner_steps=2, remember_size=8))
    assert all(sorted(batch[2:]) == list(range(8)) and set(batch[:2]) <= set(batch[2:]) for batch in batches)


def test_a_pass_depends_on_its_seed_alone():
    labels = shuffled_labels([6, 6, 6])
    sampler = EpisodeSampler(labels, episodes=5, inner_steps=3, remember_size=4, seed=7)
    first = list(sampler)
    before = capture_random_state()
    assert list(sampler) == first
    assert differing_state(to_plain(before), to_plain(capture_random_state())) is None
    others = []
    for seed in (8, [7, 0, 1], [7, 1, 0], [7, 1, 1]):
        sampler.seed = seed
        others.append(list(sampler))
    assert all(a != b for i, a in enumerate([first, *others]) for b in others[i:])


# ------------------------------------------------------------------- the loader
class Numbers(TensorDataset):
    """Image i is the number i."""

    def __init__(self, labels):
        super().__init__(torch.arange(len(labels)).float(), torch.as_tensor(labels))


class Noisy(Numbers):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_knows_the_class_of_the_newest_batch(workers):
    """Workers have the next batches ready, but the class is of the one that was handed out."""
    labels = shuffled_labels([4, 9, 2])
    sampler = EpisodeSampler(labels, episodes=12, inner_steps=3, remember_size=5, seed=3)
    loader = EpisodeLoader(Numbers(labels), sampler, num_workers=workers)
    assert len(loader) == 12 and loader.class_id == -1
    seen = []
    for x, y in loader:
        assert set(y[:3].tolist()) == {loader.class_id}
        seen.append(x.int().tolist())
    assert seen == list(sampler)


def test_a_pass_draws_nothing_from_the_global_generators():
    labels = shuffled_labels([4, 4])
    loader = EpisodeLoader(Numbers(labels), EpisodeSampler(labels, episodes=3, inner_steps=2, remember_size=2))
    before = to_plain(capture_random_state())
    assert len(list(loader)) == 3
    assert differing_state(before, to_plain(capture_random_state())) is None


def test_workers_take_their_seeds_from_the_global_generator():
    labels = shuffled_labels([4, 4])
    sampler = EpisodeSampler(labels, episodes=3, inner_steps=2, remember_size=2)

    def images(seed):
        torch.manual_seed(seed)
        return [x for x, _ in EpisodeLoader(Noisy(labels), sampler, num_workers=2)]

    first, again, other = images(0), images(0), images(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_collate_function_of_the_data_set_is_used():
    labels = shuffled_labels([4, 4])
    data = Numbers(labels)
    data.collate_fn = lambda items: [torch.stack([x for x, _ in items]) * 10, torch.stack([y for _, y in items])]
    sampler = EpisodeSampler(labels, episodes=1, inner_steps=2, remember_size=2)
    (batch,) = EpisodeLoader(data, sampler)
    assert batch[0].tolist() == [10 * i for i in next(iter(sampler))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_replay_gives_the_rest_of_the_episodes_and_no_state_per_batch(workers):
    """Without a random state for each fetch; augmentation inside workers comes back too."""
    labels = shuffled_labels([6, 6, 6])

    def loader():
        sampler = EpisodeSampler(labels, episodes=9, inner_steps=3, remember_size=4, seed=5)
        return EpisodeLoader(Noisy(labels), sampler, num_workers=workers)

    torch.manual_seed(0)
    whole = LoaderReplay()
    whole.begin(loader())
    run = whole.batches()
    for _ in range(4):
        next(run)
    state = whole.state()
    recorded = [dict(epoch) for epoch in state["epochs"]]
    assert len(recorded) == 1 and recorded[0]["fetches"] is None and recorded[0]["fetched"] == 4
    random = capture_random_state()
    rest = list(run)

    torch.manual_seed(99)
    resumed = LoaderReplay()
    resumed.repeat(loader(), {"epochs": recorded, "generators": state["generators"]})
    restore_random_state(random)
    again = list(resumed.batches())
    assert len(rest) == len(again) == 5
    for a, b in zip(rest, again, strict=True):
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[0], b[0])


@pytest.mark.parametrize("declared", [True, False])
def test_a_loader_may_say_whether_it_draws(declared):
    class Loader:
        draws_while_iterating = declared

        def __iter__(self):
            yield [torch.zeros(1), torch.zeros(1, dtype=torch.int64)]

    replay = LoaderReplay()
    replay.begin(Loader())
    assert len(list(replay.batches())) == 1
    assert (replay.state()["epochs"][0]["fetches"] is not None) == declared


# ----------------------------------------------------------------------- errors
@pytest.mark.parametrize("field", ["episodes", "inner_steps", "remember_size"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, None, "4"])
def test_numbers_out_of_range(field, value):
    settings = {"episodes": 1, "inner_steps": 1, "remember_size": 1} | {field: value}
    with pytest.raises(ValueError, match=f"{field} is .*at least 1"):
        EpisodeSampler([0, 1], **settings)


@pytest.mark.parametrize("seed", [-1, [3, -1]])
def test_a_seed_below_zero(seed):
    with pytest.raises(ValueError, match=r"seed is .* 0 and above"):
        EpisodeSampler([0, 1], episodes=1, remember_size=1, seed=seed)


def test_too_few_images():
    with pytest.raises(ValueError, match="empty"):
        EpisodeSampler([], episodes=1, remember_size=1)
    with pytest.raises(ValueError, match="remember_size is 4; the data set has 3 images"):
        EpisodeSampler([0, 1, 1], episodes=1, remember_size=4)


def test_one_image_is_enough():
    (batch,) = EpisodeSampler([5], episodes=1, inner_steps=3, remember_size=1)
    assert batch == [0, 0, 0, 0]
