"""ImportanceTracker and select_critical: plain-Python oracles, numbers of the official code, properties, refusals."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avalanche_firn.plugins.importance import ImportanceTracker, select_critical
from avalanche_firn.plugins.plain_state import from_plain, to_plain

Golden = Callable[[str, str], dict[str, Any]]
TYPES = ["q", "k", "v", "out", "fc1", "fc2"]
CASES = [
    "all_types_5pct", "all_types_10pct", "qkvo_5pct", "nine_frozen_5pct", "k_is_zero", "fraction_zero",
    "two_left_k_three", "twelve_left_k_fourteen", "two_positive_rest_zero", "ties_at_cut", "of_remaining_25pct",
    "of_remaining_k_zero", "everything",
]  # fmt: skip
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


def near(actual: Tensor, expected: Any, tolerance: float) -> None:
    """Element-wise relative; zeros exact."""
    wanted = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert actual.shape == wanted.shape
    assert bool(((actual.double() - wanted).abs() <= tolerance * wanted.abs()).all())


def stacked(values: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(values.values()))


# --------------------------------------------------------------------- tracker
def plain_tracker(steps: list[list[float]], beta1: float, beta2: float) -> tuple[list[float], list[float]]:
    s, u = [0.0] * len(steps[0]), [0.0] * len(steps[0])
    for step in steps:
        for i, value in enumerate(step):
            s[i] = beta1 * s[i] + (1 - beta1) * value
            u[i] = beta2 * u[i] + (1 - beta2) * abs(value - s[i])
    return s, u


def plain_mean(weight: Tensor, grad: Tensor) -> float:
    products = [abs(w * g) for w, g in zip(weight.flatten().tolist(), grad.flatten().tolist(), strict=True)]
    return math.fsum(products) / len(products)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_golden_importance(golden: Golden, dtype: torch.dtype, tolerance: float) -> None:
    file = golden("lorac_ipc", "importance_ema")
    tracker = ImportanceTracker(float(file["beta1"]), float(file["beta2"]))
    many = ImportanceTracker()
    names = [f"{block}.{kind}" for kind in TYPES for block in range(2)]
    for step in range(12):
        means = []
        for name in names:
            block, kind = name.split(".")
            weight, grad = (torch.from_numpy(file[f"{x}_{kind}"][step, int(block)]).to(dtype) for x in "WG")
            tracker.update(name, weight, grad)
            means.append((weight * grad).abs().mean())
        many.update_many(names, torch.stack(means))
        for each in (tracker, many):
            for values, letter in ((each.sensitivity(), "S"), (each.uncertainty(), "U")):
                assert list(values) == names and stacked(values).dtype == dtype
                near(stacked(values).view(6, 2), [file[f"{letter}_{kind}"][step] for kind in TYPES], tolerance)
    score = tracker.score()
    assert list(score) == names and all(v.dtype == torch.float64 and v.ndim == 0 for v in score.values())
    near(stacked(score).view(6, 2), [file[f"score_{kind}"] for kind in TYPES], 2 * tolerance)


@pytest.mark.parametrize("beta1, beta2", [(0.85, 0.85), (0.9, 0.3), (0.0, 0.0)])
def test_tracker_is_the_plain_loop(beta1: float, beta2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    names, shapes = ["c", "a", "b"], [(3, 2), (5,), (1, 2, 2)]
    tracker = ImportanceTracker(beta1, beta2)
    steps: list[list[float]] = []
    for _ in range(7):
        pairs = [[torch.randn(s, dtype=torch.float64, generator=generator) for _ in "WG"] for s in shapes]
        steps.append([plain_mean(*pair) for pair in pairs])
        for name, pair in zip(names, pairs, strict=True):
            tracker.update(name, *pair)
    s, u = plain_tracker(steps, beta1, beta2)
    assert list(tracker.score()) == names
    near(stacked(tracker.sensitivity()), s, 1e-12)
    near(stacked(tracker.uncertainty()), u, 1e-12)
    near(stacked(tracker.score()), [a * b for a, b in zip(s, u, strict=True)], 1e-12)


def test_any_mixture_of_calls_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    names = list("abcdef")
    single, mixed, whole = ImportanceTracker(), ImportanceTracker(), ImportanceTracker()
    for step in range(5):
        values = torch.rand(6, generator=generator)
        order = torch.randperm(6, generator=generator).tolist() if step else list(range(6))
        for i in range(6):
            single.update(names[i], values[i][None], torch.ones(1))
        cut = step + 1
        mixed.update_many([names[i] for i in order[:cut]], values[order[:cut]])
        mixed.update_many(tuple(names[i] for i in order[cut:]), values[order[cut:]])
        whole.update_many(names, values)
    for read in ("sensitivity", "uncertainty", "score"):
        wanted = getattr(whole, read)()
        for tracker in (single, mixed):
            got = getattr(tracker, read)()
            assert got.keys() == wanted.keys() and all(torch.equal(got[n], wanted[n]) for n in names)


def test_names_may_come_later_and_stay_away() -> None:
    tracker, oracle = ImportanceTracker(), {}
    for present in (["a", "b"], ["a", "b", "c"], ["c", "a"], ["b"], ["d", "a"]):
        tracker.update_many(present, torch.tensor([float(ord(n)) for n in present], dtype=torch.float64))
        for name in present:
            oracle.setdefault(name, []).append([float(ord(name))])
    assert list(tracker.score()) == ["a", "b", "c", "d"]
    for name, steps in oracle.items():
        s, u = plain_tracker(steps, 0.85, 0.85)
        near(tracker.sensitivity()[name], s[0], 1e-12)
        near(tracker.uncertainty()[name], u[0], 1e-12)


def test_the_callers_list_of_names_may_change() -> None:
    tracker, names = ImportanceTracker(), ["a", "b"]
    tracker.update_many(names, torch.tensor([1.0, 2.0]))
    names.reverse()
    tracker.update_many(names, torch.tensor([2.0, 1.0]))
    other = ImportanceTracker()
    for _ in range(2):
        other.update_many(["a", "b"], torch.tensor([1.0, 2.0]))
    assert torch.equal(stacked(tracker.score()), stacked(other.score()))


def test_a_step_that_is_not_valid_changes_nothing() -> None:
    tracker = ImportanceTracker()
    yes, no = torch.tensor(True), torch.tensor(False)
    tracker.update_many(["a", "b"], torch.tensor([1.0, 3.0]), valid=yes)
    plain = ImportanceTracker()
    plain.update_many(["a", "b"], torch.tensor([1.0, 3.0]))
    before = tracker.state_dict()
    tracker.update_many(["a", "b"], torch.tensor([float("inf"), float("nan")]), valid=no)
    tracker.update("a", torch.ones(2), torch.full((2,), float("inf")), valid=no)
    for state in (tracker.state_dict(), plain.state_dict()):
        assert state["names"] == before["names"]
        assert all(torch.equal(state[key], before[key]) for key in ("sensitivity", "uncertainty"))
    tracker.update("new", torch.ones(2), torch.full((2,), float("nan")), valid=no)
    assert tracker.score()["new"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight, grad = torch.full((4, 4), 1e-3, dtype=dtype), torch.full((4, 4), 1e-6, dtype=dtype)
    low, high = ImportanceTracker(), ImportanceTracker()
    low.update("a", weight, grad)
    high.update("a", weight.float(), grad.float())
    assert low.sensitivity()["a"].dtype == torch.float32
    assert torch.equal(low.score()["a"], high.score()["a"]) and low.score()["a"] > 0


def test_small_scores_do_not_vanish_in_float32() -> None:
    tracker = ImportanceTracker()
    tracker.update_many(["a", "b"], torch.tensor([1e-25, 2e-25]))
    assert 0 < tracker.score()["a"] < tracker.score()["b"]


def test_float64_is_taken_up_when_it_comes() -> None:
    tracker = ImportanceTracker()
    tracker.update("a", torch.ones(1), torch.ones(1))
    tracker.update("a", torch.ones(1).double(), torch.ones(1))
    assert tracker.sensitivity()["a"].dtype == torch.float64


def test_inputs_stay_and_results_are_copies() -> None:
    tracker = ImportanceTracker()
    weight, grad = -torch.ones(2, 2, requires_grad=True), -2 * torch.ones(2, 2)
    tracker.update("a", weight, grad)
    assert torch.equal(weight, -torch.ones(2, 2)) and torch.equal(grad, -2 * torch.ones(2, 2))
    state, first = tracker.state_dict(), tracker.sensitivity()["a"]
    kept = first.clone()
    tracker.update("a", weight, grad)
    assert torch.equal(first, kept) and torch.equal(state["sensitivity"][0], kept)
    assert not tracker.sensitivity()["a"].requires_grad


def test_a_step_reads_nothing_from_the_device() -> None:
    """Meta tensors have no values: whoever asked for one would get an error."""
    tracker, flag = ImportanceTracker(), torch.ones((), dtype=torch.bool, device="meta")
    for names in (["a", "b", "c"], ["a", "b", "c"], ["c", "a"]):
        tracker.update_many(names, torch.ones(len(names), device="meta"), valid=flag)
        tracker.update("d", torch.ones(2, 2, device="meta"), torch.ones(2, 2, device="meta"), valid=flag)
    assert tracker.score()["d"].device.type == "meta"


def test_a_loaded_state_is_a_copy_and_moves_to_the_next_update() -> None:
    tracker = ImportanceTracker()
    tracker.update_many(["a", "b", "c"], torch.ones(3))
    tracker.update_many(["c", "a"], torch.ones(2))
    state = tracker.state_dict()
    kept = copy.deepcopy(state)
    tracker.load_state_dict(state)
    tracker.update("b", torch.ones(1), torch.ones(1))
    assert all(torch.equal(state[key], kept[key]) for key in ("sensitivity", "uncertainty"))
    tracker.update_many(["c", "a"], torch.ones(2))
    tracker.update_many(["c", "a"], torch.ones(2, device="meta"))
    assert {value.device.type for value in tracker.uncertainty().values()} == {"meta"}


def test_reset_begins_anew() -> None:
    tracker = ImportanceTracker()
    tracker.update_many(["a", "b"], torch.rand(2).double())
    tracker.reset()
    assert tracker.score() == {} and tracker.state_dict()["names"] == []
    fresh = ImportanceTracker()
    for each in (tracker, fresh):
        each.update_many(["b", "a"], torch.tensor([0.25, 0.5]))
    assert list(tracker.score()) == ["b", "a"] and torch.equal(stacked(tracker.score()), stacked(fresh.score()))
    assert tracker.sensitivity()["a"].dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.lists(st.floats(0, 1e3, width=32), min_size=3, max_size=3), min_size=0, max_size=6),
    later=st.lists(st.floats(0, 1e3, width=32), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_state_round_trip_is_exact(steps: list[list[float]], later: list[float], dtype: torch.dtype) -> None:
    tracker, other = ImportanceTracker(), ImportanceTracker()
    other.update_many(["z", "b"], torch.ones(2))
    for step in steps:
        tracker.update_many(["a", "b", "c"], torch.tensor(step, dtype=dtype))
    other.load_state_dict(from_plain(to_plain(tracker.state_dict())))
    for _ in range(2):
        ours, theirs = tracker.state_dict(), other.state_dict()
        assert ours["names"] == theirs["names"]
        for key in ("sensitivity", "uncertainty"):
            assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
        for each in (tracker, other, copy.deepcopy(tracker)):
            each.update_many(["c", "a", "d"], torch.tensor(later, dtype=dtype))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ImportanceTracker(1.0), "beta1 is 1.0"),
        (lambda: ImportanceTracker(beta2=-0.1), "beta2 is -0.1"),
        (lambda: ImportanceTracker(math.nan), "beta1 is nan"),
        (lambda: ImportanceTracker().update("w", torch.ones(2, 3), torch.ones(3, 2)), r"w: weight \(2, 3\)"),
        (lambda: ImportanceTracker().update("w", torch.ones(0), torch.ones(0)), "non-empty"),
        (lambda: ImportanceTracker().update_many("ab", torch.ones(2)), "single string 'ab'"),
        (lambda: ImportanceTracker().update_many(["a"], torch.ones(2)), r"shape \(2,\)"),
        (lambda: ImportanceTracker().update_many(["a"], torch.ones(())), r"shape \(\)"),
        (lambda: ImportanceTracker().update_many(["a"], torch.ones(1).long()), "int64"),
        (lambda: ImportanceTracker().update_many(["a", "b", "a"], torch.ones(3)), r"\['a'\] occur more than once"),
        (lambda: ImportanceTracker().update_many(["a"], torch.ones(1), valid=torch.ones(1).bool()), "0-dim bool"),
        (lambda: ImportanceTracker().update_many(["a"], torch.ones(1), valid=torch.ones(())), "0-dim bool"),
    ],
)
def test_tracker_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "changes",
    [{"names": ["a"]}, {"names": ["a", "a"]}, {"uncertainty": torch.ones(3)}, {"sensitivity": torch.ones(2).double()}],
)
def test_tracker_refuses_a_state_that_does_not_fit(changes: dict[str, Any]) -> None:
    tracker = ImportanceTracker()
    tracker.update_many(["a", "b"], torch.ones(2))
    before = tracker.state_dict()
    with pytest.raises(ValueError, match="state: "):
        tracker.load_state_dict(before | changes)
    assert tracker.state_dict()["names"] == before["names"]


def test_a_refused_call_leaves_no_trace() -> None:
    tracker = ImportanceTracker()
    tracker.update_many(["a"], torch.ones(1))
    with pytest.raises(ValueError):
        tracker.update_many(["b", "b"], torch.ones(2))
    assert list(tracker.score()) == ["a"]


@pytest.mark.parametrize("decay", [1.0, 5.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_last_150_of_400_steps_suffice(seed: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"{block}.{kind}" for block in range(12) for kind in TYPES]
    level = torch.rand(72, generator=generator, dtype=torch.float64) + 0.1
    noise = torch.rand(400, 72, generator=generator, dtype=torch.float64) + 0.5
    steps = level * noise * torch.linspace(decay, 1, 400, dtype=torch.float64)[:, None]
    scores = {}
    for window in (400, 150, 100):
        tracker = ImportanceTracker()
        for step in steps[-window:]:
            tracker.update_many(names, step)
        scores[window] = stacked(tracker.score())
    near(scores[100], scores[400], 1e-4)
    near(scores[150], scores[400], 1e-7)
    nothing = torch.zeros(72, dtype=torch.bool)
    for fraction in (0.05, 0.1, 0.5):
        assert torch.equal(
            select_critical(scores[150], nothing, fraction), select_critical(scores[400], nothing, fraction)
        )


# --------------------------------------------------------------------- selection
def plain_select(score: list[float], frozen: list[bool], fraction: float, of_remaining: bool, ties: str) -> list[bool]:
    free = [i for i, f in enumerate(frozen) if not f]
    k = int(fraction * (sum(score[i] > 0 for i in free) if of_remaining else len(score)))
    if k == 0:
        return list(frozen)
    if ties == "order":
        chosen = set(sorted(free, key=lambda i: (-score[i], i))[:k])
    else:
        counted = [0.0 if f else s for s, f in zip(score, frozen, strict=True)]
        cut = sorted(counted, reverse=True)[k - 1]
        chosen = {i for i in free if counted[i] >= cut}
    return [f or i in chosen for i, f in enumerate(frozen)]


def test_every_golden_case_is_here(golden: Golden) -> None:
    assert golden("lorac_ipc", "select_critical")["case_names"].tolist() == CASES


@pytest.mark.parametrize("case", CASES)
def test_golden_selection(golden: Golden, case: str) -> None:
    file = {k.split("__")[1]: v for k, v in golden("lorac_ipc", "select_critical").items() if k.startswith(f"{case}__")}
    score, frozen = torch.from_numpy(file["S"] * file["U"]), torch.from_numpy(file["frozen_before"])
    before = score.clone(), frozen.clone()
    given_ = (score, frozen, float(file["fraction"]))
    remaining = bool(file["of_remaining"])
    counted = int(((score > 0) & ~frozen).sum()) if remaining else score.numel()
    assert int(given_[2] * counted) == int(file["k"])
    by_order = select_critical(*given_, of_remaining=remaining)
    everyone = select_critical(*given_, of_remaining=remaining, ties="all")
    assert torch.equal(by_order, torch.from_numpy(file["expected_frozen_after"]))
    if file["official_status"] == 0:
        assert torch.equal(everyone, torch.from_numpy(file["official_frozen_after"]))
    else:  # the official code raises at k = 0
        assert torch.equal(everyone, frozen)
    assert torch.equal(score, before[0]) and torch.equal(frozen, before[1])
    assert by_order.dtype == torch.bool and by_order.data_ptr() != frozen.data_ptr()


@st.composite
def selections(draw: st.DrawFn, few_values: bool = True) -> tuple[list[float], list[bool], float]:
    size = draw(st.integers(1, 20))
    values: st.SearchStrategy[float] = st.sampled_from([0.0, 1e-300, 0.25, 0.5, 1.0])
    if not few_values:
        values = st.floats(1e-6, 1e6)
    score = draw(st.lists(values, min_size=size, max_size=size, unique=not few_values))
    frozen = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return score, frozen, draw(st.sampled_from([0.0, 0.05, 0.1, 0.29, 0.3, 0.5, 0.57, 0.7, 1.0]))


@settings(max_examples=300, deadline=None)
@given(case=selections(), of_remaining=st.booleans(), ties=st.sampled_from(["order", "all"]))
def test_selection_is_the_plain_loop(
    case: tuple[list[float], list[bool], float], of_remaining: bool, ties: Any
) -> None:
    score, frozen, fraction = case
    before = torch.tensor(frozen)
    values = torch.tensor(score, dtype=torch.float64)
    after = select_critical(values, before, fraction, of_remaining=of_remaining, ties=ties)
    assert after.tolist() == plain_select(score, frozen, fraction, of_remaining, ties)
    assert bool((after | ~before).all())  # only grows
    new, free = int(after.sum()) - sum(frozen), len(frozen) - sum(frozen)
    k = int(fraction * (int((values[~before] > 0).sum()) if of_remaining else len(score)))
    assert new == min(k, free) if ties == "order" else new >= min(k, free)


@settings(max_examples=100, deadline=None)
@given(case=selections(few_values=False), seed=st.integers(0, 99), ties=st.sampled_from(["order", "all"]))
def test_selection_follows_a_permutation(case: tuple[list[float], list[bool], float], seed: int, ties: Any) -> None:
    score, frozen = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    order = list(range(len(score)))
    random.Random(seed).shuffle(order)
    after = select_critical(score, frozen, case[2], ties=ties)
    assert torch.equal(select_critical(score[order], frozen[order], case[2], ties=ties), after[order])


def test_selection_over_tasks_takes_k_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    frozen, counts = torch.zeros(6, 12, dtype=torch.bool), []
    for _ in range(26):
        after = select_critical(torch.rand(6, 12, generator=generator), frozen, 0.05)
        assert bool((after | ~frozen).all())
        frozen = after
        counts.append(int(frozen.sum()))
    assert counts == [min(3 * t, 72) for t in range(1, 27)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 2)])
def test_selection_of_any_shape_and_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    frozen = torch.zeros(shape, dtype=torch.bool)
    after = select_critical(score, frozen, 0.5)
    assert after.shape == shape and int(after.sum()) == score.numel() // 2
    assert bool(select_critical(score, frozen, 1.0).all())
    if score.ndim > 1:  # not contiguous: the order is that of the view
        assert torch.equal(select_critical(score.mT, frozen.mT, 0.5), after.mT)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": torch.tensor([[1.0, math.nan], [math.inf, 0.0]])}, r"not finite at \[\(0, 1\), \(1, 0\)\];"),
        ({"score": torch.full((2, 4), math.nan)}, "and 3 more"),
        ({"score": torch.tensor([[1.0, 2.0], [-1.0, 0.0]])}, r"negative at \[\(1, 0\)\]"),
        ({"frozen": torch.zeros(4, dtype=torch.bool)}, r"of shape \(4,\)"),
        ({"frozen": torch.zeros(2, 2)}, "float32"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"fraction": -0.1}, "fraction is -0.1"),
        ({"fraction": math.nan}, "fraction is nan"),
        ({"ties": "first"}, "ties is 'first'"),
    ],
)
def test_selection_refuses(changes: dict[str, Any], message: str) -> None:
    score = changes.get("score", torch.ones(2, 2))
    arguments = {"frozen": torch.zeros(score.shape, dtype=torch.bool), "fraction": 0.5} | changes | {"score": score}
    with pytest.raises(ValueError, match=message):
        select_critical(**arguments)


def test_a_nan_at_a_frozen_position_is_refused_too() -> None:
    with pytest.raises(ValueError, match="not finite"):
        select_critical(torch.tensor([math.nan, 1.0]), torch.tensor([True, False]), 0.5)
