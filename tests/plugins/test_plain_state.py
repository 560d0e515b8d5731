"""Objects as plain values: everything comes back, in place, or is refused by name."""

from __future__ import annotations

import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.evaluation.metric_results import AlternativeValues, TensorImage
from avalanche.evaluation.metrics import (
    StreamConfusionMatrix,
    TaskAwareAccuracy,
    TaskAwareLoss,
    accuracy_metrics,
    amca_metrics,
    bwt_metrics,
    cpu_usage_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
    gpu_usage_metrics,
    loss_metrics,
    ram_usage_metrics,
)
from avalanche.evaluation.metrics.mean import Mean
from avalanche.evaluation.metrics.timing import ElapsedTime
from avalanche.training.utils import ParamData
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from avalanche_firn.plugins.plain_state import (
    differing_state,
    from_plain,
    has_state_dict,
    load_plain_state,
    plain_state,
    to_plain,
)
from avalanche_firn.plugins.random_state import capture_random_state, restore_random_state


class Thing:
    """An object with whatever attributes a test gives it."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def rich() -> Thing:
    return Thing(
        none=None,
        flag=True,
        number=-3,
        value=float("nan"),
        text="x",
        raw=b"\x00\xff",
        no_bytes=b"",
        tensor=torch.randn(2, 3),
        array=np.arange(4, dtype=np.int16),
        scalar=np.float32(0.1),
        items=[1, (2, {3}), frozenset({"a", "b"})],
        table={1: {"a": [torch.zeros(0)]}, "b": None, (1, 2): 3},
        ordered=OrderedDict([("z", 1), ("a", 2)]),
        counts=Counter({3: 2, 9: 1}),
        window=deque([1, 2, 3], maxlen=3),
        groups=defaultdict(lambda: defaultdict(Mean)),
        mean=Mean(),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        path=Path("a/b"),
        size=torch.Size([2, 3]),
        function=len,
        kind=Mean,
        generator=torch.Generator().manual_seed(3),
        penalty={"w": ParamData("w", init_tensor=torch.randn(3))},
    )


def test_every_supported_type_comes_back():
    before = rich()
    before.mean.update(0.3, 7)
    before.groups[2]["x"].update(1.0, 3)
    before.generator.seed()
    state = plain_state(before)
    after = rich()
    load_plain_state(after, state)
    assert differing_state(state, plain_state(after)) is None
    assert after.groups[2]["x"].result() == 1.0 and after.groups["new"]["y"].result() == 0.0
    assert type(after.items[1]) is tuple and type(after.items[1][1]) is set and after.window.maxlen == 3
    assert after.scalar.dtype == np.float32 and list(after.ordered) == ["z", "a"] and type(after.counts) is Counter
    assert torch.equal(after.penalty["w"].data, before.penalty["w"].data)
    assert torch.rand(3, generator=after.generator).tolist() == torch.rand(3, generator=before.generator).tolist()


def test_containers_and_objects_are_changed_in_place():
    state = plain_state(rich())
    after = rich()
    held = {k: v for k, v in vars(after).items() if isinstance(v, (list, dict, deque, Mean, torch.Generator))}
    load_plain_state(after, state)
    assert all(getattr(after, k) is v for k, v in held.items())


def test_the_description_does_not_hang_on_the_object():
    before = Thing(items=[1], mean=Mean())
    state = plain_state(before)
    before.items.append(2)
    before.mean.update(1.0)
    after = Thing(items=[], mean=Mean())
    load_plain_state(after, state)
    assert after.items == [1] and after.mean.weight == 0.0


def test_attributes_made_by_hooks_are_added_and_removed():
    state = plain_state(Thing(a=1, late=[2]))
    after = Thing(a=5, extra=3)
    load_plain_state(after, state)
    assert vars(after) == {"a": 1, "late": [2]}
    load_plain_state(after, plain_state(Thing(b=1), skip=("x",)), skip=("a",))
    assert vars(after) == {"a": 1, "b": 1}


def test_references_to_known_objects_are_kept_as_names():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    state = plain_state(Thing(model=model, weights=[model.weight]), known={"model": model, "w": model.weight})
    after = Thing(model=None, weights=[])
    load_plain_state(after, state, known={"model": other, "w": other.weight})
    assert after.model is other and after.weights[0] is other.weight
    with pytest.raises(ValueError, match="reference to 'model', which is not there"):
        load_plain_state(after, state)


def closure():
    count = 0

    def inner():
        return count

    return inner


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (nn.Linear(1, 1), r"Thing\.x: a torch\.nn\.modules\.linear\.Linear"),
        (nn.Parameter(torch.zeros(1)), r"Thing\.x: a torch\.nn\.parameter\.Parameter"),
        (torch.optim.SGD([torch.zeros(1)], 0.1), r"Thing\.x: a torch\.optim\.sgd\.SGD"),
        (closure(), r"Thing\.x: a builtins\.function"),
        (functools.partial(len), r"Thing\.x: a functools\.partial"),
        ([1, {"k": object()}], r"Thing\.x\[1\]\['k'\]: a builtins\.object"),
        ({"k": Mean()}, r"Thing\.x\['k'\]: a avalanche\.evaluation\.metrics\.mean\.Mean"),
        (iter([1]), r"Thing\.x: a builtins\.list_iterator"),
        (random.Random(0), r"Thing\.x: a random\.Random"),
        (Figure(), r"Thing\.x: a matplotlib"),
        (3 + 1j, r"Thing\.x: a builtins\.complex"),
    ],
)
def test_anything_else_is_refused_by_name(value, place):
    with pytest.raises(TypeError, match=place):
        plain_state(Thing(x=value))


def test_an_object_in_itself_is_refused():
    mean = Mean()
    mean.self = mean
    with pytest.raises(TypeError, match="contains itself"):
        plain_state(Thing(m=mean))


def test_settings_must_be_equal_and_counterparts_present():
    state = plain_state(Thing(function=len))
    load_plain_state(Thing(function=len), state)
    with pytest.raises(ValueError, match=r"saved as builtins\.len, now .*max"):
        load_plain_state(Thing(function=max), state)
    state = plain_state(Thing(mean=Mean()))
    with pytest.raises(TypeError, match=r"Thing\.mean: the saved object has no counterpart"):
        load_plain_state(Thing(mean=None), state)
    load_plain_state(Thing(mean=None), state, strict=False)
    with pytest.raises(ValueError, match="saved from a"):
        load_plain_state(Mean(), state)


def test_results_of_metrics_come_back():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    value = AlternativeValues(0.5, TensorImage(torch.rand(3, 2, 2)), picture, torch.eye(2))
    got = from_plain(to_plain({"matrix": value}))["matrix"]
    assert got.alternatives[0] == 0.5 and torch.equal(got.alternatives[1].image, value.alternatives[1].image)
    assert got.alternatives[2].tobytes() == picture.tobytes() and torch.equal(got.alternatives[3], torch.eye(2))


@pytest.mark.parametrize("torch_scheduler", ["StepLR", "MultiStepLR", "CosineAnnealingLR", "OneCycleLR", "LambdaLR"])
def test_schedulers_come_back(torch_scheduler):
    arguments = {
        "StepLR": {"step_size": 2}, "MultiStepLR": {"milestones": [2, 3]}, "CosineAnnealingLR": {"T_max": 5},
        "OneCycleLR": {"max_lr": 1.0, "total_steps": 9}, "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    }  # fmt: skip

    def make():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
        scheduler = getattr(torch.optim.lr_scheduler, torch_scheduler)(optimizer, **arguments[torch_scheduler])
        return Thing(scheduler=scheduler), optimizer

    def step(thing, optimizer, count):
        rates = []
        for _ in range(count):
            optimizer.step()
            thing.scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    (before, first), (after, second) = make(), make()
    step(before, first, 3)
    load_plain_state(after, plain_state(before))
    second.load_state_dict(first.state_dict())
    assert step(after, second, 3) == step(before, first, 3)


def feed(metric: Any, seed: int) -> None:
    """Use a metric as a strategy would, with random predictions."""
    generator = torch.Generator().manual_seed(seed)
    logits, y = torch.randn(8, 4, generator=generator), torch.randint(4, (8,), generator=generator)
    tasks = torch.randint(3, (8,), generator=generator)
    inner = getattr(metric, "_metric", metric)
    if isinstance(inner, TaskAwareLoss):
        inner.update(torch.tensor(0.3), 8, 1)
    elif isinstance(inner, TaskAwareAccuracy):
        inner.update(logits, y, tasks)
    elif isinstance(metric, StreamConfusionMatrix):
        metric._matrix.update(y, logits)
    elif hasattr(inner, "_mean_accuracy"):
        inner.update(logits, y)
    elif hasattr(inner, "update") and type(inner) is Mean:
        inner.update(0.1 * seed, 3)
    elif hasattr(metric, "forgetting"):
        metric.update(seed, 0.5, initial=True)
        metric.update(seed, 0.25)


STOCK = [
    lambda: accuracy_metrics(
        minibatch=True, epoch=True, epoch_running=True, experience=True, stream=True, trained_experience=True
    ),
    lambda: loss_metrics(minibatch=True, epoch=True, epoch_running=True, experience=True, stream=True),
    lambda: forgetting_metrics(experience=True, stream=True),
    lambda: bwt_metrics(experience=True, stream=True),
    lambda: forward_transfer_metrics(experience=True, stream=True),
    lambda: [StreamConfusionMatrix(save_image=False), TaskAwareAccuracy(), TaskAwareLoss()],
]


@pytest.mark.parametrize("make", STOCK)
def test_stock_metrics_go_on_from_their_state(make):
    for before, after in zip(make(), make(), strict=True):
        feed(before, 1)
        feed(after, 5)
        load_plain_state(after, plain_state(before))
        feed(before, 2)
        feed(after, 2)
        assert differing_state(plain_state(before), plain_state(after)) is None
        if not isinstance(before, StreamConfusionMatrix):
            assert before.result() == after.result()


@pytest.mark.parametrize("make", [cpu_usage_metrics, ram_usage_metrics, gpu_usage_metrics])
def test_metrics_of_the_machine_are_refused(make):
    metric = make(*([0] if make is gpu_usage_metrics else []), epoch=True)[0]
    with pytest.raises(TypeError, match="watches the process through handles"):
        plain_state(metric)


def test_averages_over_classes_are_refused_once_they_hold_something():
    metric = amca_metrics()
    plain_state(metric)
    metric._ms_amca._amcas["test"] = Mean()
    with pytest.raises(TypeError, match=r"_amcas\['test'\]"):
        plain_state(metric)


def test_elapsed_time_leaves_out_the_pause(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    before, after = Thing(time=ElapsedTime()), Thing(time=ElapsedTime())
    before.time.update()
    clock[0] = 103.0
    before.time.update()
    state = plain_state(before)
    clock[0] = 5.0  # another process has another clock
    load_plain_state(after, state)
    clock[0] = 7.0
    after.time.update()
    assert after.time.result() == 5.0


def test_tensors_of_a_device_that_is_not_here_go_to_the_one_that_is():
    ones, here = torch.ones(3), torch.device("cpu")
    there = {
        "moment": {"$on": ["cuda:7", ones]},
        "place": {"$device": "cuda:7"},
        "penalty": {"$parameter": {"name": "w", "data": {"$on": ["cuda:7", ones]}}},
    }
    found = from_plain(there, device=here)
    assert torch.equal(found["moment"], ones) and found["place"] == here
    assert found["penalty"].device == here and torch.equal(found["penalty"].data, ones)
    assert differing_state(there, to_plain(found)) is None
    assert differing_state({"a": {"$on": ["cuda:7", ones]}}, {"a": ones + 1}) == "/a"
    # the other way round, on a device that no number reaches: copies of parameters follow the model, others stay
    gpu = torch.device("meta")
    saved = to_plain({"penalty": ParamData("w", init_tensor=ones, device="cpu"), "seen": ones})
    found = from_plain(saved, device=gpu)
    assert found["penalty"].data.device == gpu and found["seen"].device == here


def test_differences_are_found_to_the_bit():
    base = to_plain({"a": [1, 0.0, torch.zeros(2)], "n": float("nan")})
    assert differing_state(base, to_plain({"a": [1, 0.0, torch.zeros(2)], "n": float("nan")})) is None
    for other, place in (
        ({"a": [1, -0.0, torch.zeros(2)], "n": float("nan")}, "/a/1"),
        ({"a": [True, 0.0, torch.zeros(2)], "n": float("nan")}, "/a/0"),
        ({"a": [1, 0.0, torch.tensor([0.0, -0.0])], "n": float("nan")}, "/a/2"),
        ({"a": [1, 0.0, torch.zeros(2).double()], "n": float("nan")}, "/a/2"),
        ({"a": [1, 0.0], "n": float("nan")}, "/a (lengths 3 and 2)"),
        ({"a": [1, 0.0, torch.zeros(2)]}, "/n"),
    ):
        assert differing_state(base, to_plain(other)) == place


def test_has_state_dict():
    assert has_state_dict(torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 1))
    assert not has_state_dict(nn.Linear(1, 1)) and not has_state_dict(Mean())


def draw() -> list[float]:
    values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]
    values += torch.randn(3).tolist() + torch.randperm(5).tolist()
    if torch.cuda.is_available():
        values += torch.randn(3, device="cuda").tolist()
    return values


@pytest.mark.parametrize("warm_up", [0, 1])
def test_global_random_state(warm_up):
    for _ in range(warm_up):
        draw()  # leaves half a pair of normals in the generators of Python and NumPy
    state = from_plain(to_plain(capture_random_state()))
    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


def test_capturing_draws_nothing():
    state = capture_random_state()
    capture_random_state()
    assert differing_state(to_plain(state), to_plain(capture_random_state())) is None


def test_other_devices_are_refused():
    state = capture_random_state()
    state["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 99
    with pytest.raises(ValueError, match="99 CUDA generators"):
        restore_random_state(state)
