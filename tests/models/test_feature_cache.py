"""Features kept for one state of the weights: counting, fingerprints, the limit of memory."""

import copy
import hashlib
import pickle

import pytest
import torch
from torch import nn

from avalanche_firn.models.feature_cache import FeatureCache, backbone_sha256
from avalanche_firn.models.parts import find_parts


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 3)
        self.register_buffer("mask", torch.tensor([True, False]), persistent=False)
        self.register_buffer("nothing", torch.empty(0))
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def fingerprint(model):
    return backbone_sha256(find_parts(model))


def entry(n, value=0.0):
    return torch.full((n, 4), value), torch.arange(n)


# ------------------------------------------------------------------- fingerprint
def test_fingerprint_against_its_definition():
    model = Model(torch.float64)
    tensors = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if not n.startswith("head.")}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()
    assert set(tensors) > {"mask", "nothing", "norm.running_mean", "norm.num_batches_tracked", "conv.weight"}


def changes():
    yield "smallest step", lambda m: m.conv.bias[1].copy_(torch.nextafter(m.conv.bias[1], torch.tensor(9.0)))
    yield "order", lambda m: m.conv.weight.copy_(m.conv.weight.flip(0).clone())
    yield "statistics", lambda m: m.norm.running_var.mul_(2)
    yield "counter", lambda m: m.norm.num_batches_tracked.add_(1)
    yield "not persistent", lambda m: m.mask.logical_not_()
    yield "dtype", lambda m: m.double()
    yield "signed zero", lambda m: m.norm.running_mean.neg_()


@pytest.mark.parametrize(("name", "change"), changes(), ids=[name for name, _ in changes()])
def test_fingerprint_sees_the_backbone(name, change):
    model = Model()
    before = fingerprint(model)
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != before


def test_fingerprint_sees_nothing_else():
    model = Model()
    before, random = fingerprint(model), torch.get_rng_state()
    with torch.no_grad():
        model.head.weight.add_(1)
    model.head = nn.Sequential(nn.Linear(2, 7))
    model.eval().requires_grad_(False)
    model.conv.weight.data = model.conv.weight.contiguous(memory_format=torch.channels_last)
    torch.set_rng_state(random)
    assert fingerprint(model) == before == fingerprint(copy.deepcopy(model))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_has_a_fingerprint(dtype):
    model = Model(dtype)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.weight[0].mul_(1.5)
    assert fingerprint(model) != fingerprint(other) and len(fingerprint(model)) == 64


# ------------------------------------------------------------------------- cache
def test_an_entry_is_computed_once_per_state_of_the_weights():
    cache, calls = FeatureCache(), []

    def compute(value):
        return lambda: calls.append(value) or entry(3, value)

    first = cache.get("a", ("train", 0), compute(1.0))
    assert cache.get("a", ("train", 0), compute(2.0))[0] is first[0]
    assert cache.get("a", ("train", 1), compute(3.0))[0][0, 0] == 3
    assert (cache.hits, cache.misses, calls) == (1, 2, [1.0, 3.0])
    assert cache.get("b", ("train", 0), compute(4.0))[0][0, 0] == 4  # never the stale one
    assert cache.get("a", ("train", 0), compute(5.0))[0][0, 0] == 5  # nor after a return
    assert (cache.hits, cache.misses) == (1, 4)
    cache.clear()
    assert cache.get("a", ("train", 0), compute(6.0))[0][0, 0] == 6


def test_an_entry_of_another_length_is_replaced():
    cache = FeatureCache(max_bytes=5 * (16 + 8))
    cache.get("a", "key", lambda: entry(5), rows=5)
    assert len(cache.get("a", "key", lambda: entry(2), rows=5)[0]) == 5
    assert len(cache.get("a", "key", lambda: entry(2, 1.0), rows=2)[0]) == 2
    assert cache.get("a", "key", lambda: entry(2, 2.0), rows=2)[0][0, 0] == 1  # it is the one that is kept now
    assert cache.get("a", "key", lambda: entry(9))[0][0, 0] == 1  # of any length
    assert (cache.hits, cache.misses) == (3, 2)
    cache.get("a", "other", lambda: entry(3))
    assert cache.get("a", "other", lambda: entry(3, 7.0))[0][0, 0] == 0  # the space of the replaced entry was free


def test_memory_has_a_limit():
    one = 3 * (16 + 8)
    cache = FeatureCache(max_bytes=2 * one)
    for key in "xyz":
        cache.get("a", key, lambda: entry(3))
    assert [cache.get("a", key, lambda: entry(3, 9.0))[0][0, 0].item() for key in "xyz"] == [0, 0, 9]
    assert (cache.hits, cache.misses) == (2, 4)
    cache.get("b", "z", lambda: entry(3))  # other weights: everything is free again
    assert cache.get("b", "z", lambda: entry(3, 9.0))[0][0, 0] == 0
    nothing = FeatureCache(max_bytes=0)
    assert [nothing.get("a", "x", lambda v=v: entry(1, v))[0][0, 0].item() for v in (1.0, 2.0)] == [1, 2]
    with pytest.raises(ValueError, match="max_bytes is -1; 0"):
        FeatureCache(max_bytes=-1)


def test_an_error_leaves_no_entry():
    cache = FeatureCache()
    with pytest.raises(ZeroDivisionError):
        cache.get("a", "key", lambda: 1 / 0)
    assert cache.get("a", "key", lambda: entry(1, 4.0))[0][0, 0] == 4


def test_pickle_and_checkpoints():
    cache = FeatureCache()
    cache.get("a", ("train", 0, (1, 2)), lambda: entry(2, 5.0))
    again = pickle.loads(pickle.dumps(cache))
    assert again.get("a", ("train", 0, (1, 2)), lambda: 1 / 0)[0][0, 0] == 5
    assert FeatureCache.stateless is True  # exact resume computes features again
