"""Figures of single tasks: numbers worked out by hand, nested loops, identities, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.evaluation import loss_forgetting
from avalanche_firn.evaluation.dynamics import Dynamics
from avalanche_firn.evaluation.dynamics_math import (
    EffectTotals,
    block_effects,
    effect_totals,
    forgetting,
    last_ends,
    shock_and_recovery,
    step_effects,
)

NAN = math.nan


# ----------------------------------------------------------------------- golden
def test_numbers_worked_out_by_hand_are_met_exactly(golden):
    g = golden("zapping", "dynamics_by_hand")
    losses, blocks, tasks = g["losses"], g["blocks"], g["block_task"]
    assert np.array_equal(step_effects(losses), g["step_effect"])
    effects = block_effects(losses, blocks)
    assert np.array_equal(effects, g["block_effect"])
    totals = effect_totals(effects, tasks)
    for name in EffectTotals._fields:
        assert getattr(totals, name) == float(g[name]), name
    final, maximal = forgetting(losses, last_ends(blocks, tasks, losses.shape[1]))
    assert np.array_equal(final, g["final_forgetting"]) and np.array_equal(maximal, g["max_forgetting"])
    for fraction, key in ((0.5, "recovery_half"), (0.1, "recovery_tenth")):
        shock, recovery = shock_and_recovery(g["trace"], g["trace_before"][0], fraction)
        assert shock == float(g["shock"]) and recovery == int(g[key][0])
    both = shock_and_recovery(np.stack([g["trace"], g["trace"][0] + 0 * g["trace"]], 1), g["trace_before"][0])
    assert both[0].tolist() == [3.0, 3.0] and both[1].tolist() == [3, -1]


def test_the_result_object_gives_the_same_figures(golden):
    g = golden("zapping", "dynamics_by_hand")
    rows, tasks = g["losses"].shape
    found = Dynamics(
        steps=np.arange(rows) * 10,
        loss=g["losses"],
        accuracy=np.zeros((rows, tasks)),
        blocks=g["blocks"],
        block_tasks=tuple((int(t),) for t in g["block_task"]),
    )
    assert found.totals().learning == float(g["learning"]) and found.ends.tolist() == [2, 4, 6]
    assert np.array_equal(found.final_forgetting, g["final_forgetting"])
    assert np.array_equal(found.max_forgetting, g["max_forgetting"])
    assert np.array_equal(found.step_effect, g["step_effect"]) and found.task_names == ("0", "1", "2")
    assert found.totals(1) == effect_totals(g["block_effect"][:1], [0])
    assert found.totals(0) == EffectTotals(0, 0, 0, 0, 0)
    trace = Dynamics(
        steps=np.arange(7) * 10, loss=g["trace"][:, None], accuracy=np.zeros((7, 1)), blocks=[], block_tasks=()
    )
    assert trace.shock(1.0, fraction=0.1) == (3.0, 6, 60) and trace.shock(1.0, 0) == (3.0, 3, 30)
    assert trace.shock(0.0, 0, fraction=0.0) == (4.0, None, None)
    late = trace.shock(1.0, row=4)
    assert late.size == pytest.approx(1.6) and (late.row, late.iterations) == (2, 20)


# ----------------------------------------------------------------------- oracle
def naive_totals(losses, blocks, block_tasks):
    """The definitions with nested loops; losses with NaN for what was not measured."""
    sums = dict.fromkeys(EffectTotals._fields, 0.0)
    asked, measured = dict.fromkeys(sums, 0), dict.fromkeys(sums, 0)
    trained = set()
    for (start, end), own in zip(blocks, block_tasks, strict=True):
        for j in range(len(losses[0])):
            effect = losses[end][j] - losses[start][j]
            if j in own:
                parts = {"learning": -effect}
            elif j in trained:
                parts = {"interference": max(effect, 0.0), "synergy": max(-effect, 0.0)}
            else:
                parts = {"forward_harm": max(effect, 0.0), "forward_gain": max(-effect, 0.0)}
            for name, value in parts.items():
                asked[name] += 1
                if not math.isnan(effect):
                    measured[name] += 1
                    sums[name] += value
        trained |= set(own)
    return {n: NAN if asked[n] and not measured[n] else value for n, value in sums.items()}


@st.composite
def runs(draw, holes=True):
    """Losses (S + 1, T), blocks without gap or overlap, and the tasks of each; losses are eighths: exact sums."""
    tasks, count = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    borders = np.cumsum([0, *lengths])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    losses = rng.integers(0, 64, (borders[-1] + 1, tasks)) / 8
    if holes:
        losses[rng.random(losses.shape) < 0.2] = NAN
    trained = [sorted(rng.permutation(tasks)[: rng.integers(0, tasks + 1)].tolist()) for _ in range(count)]
    return losses, np.stack([borders[:-1], borders[1:]], 1), trained


@settings(max_examples=80, deadline=None)
@given(runs())
def test_totals_and_forgetting_against_nested_loops(run):
    losses, blocks, trained = run
    totals = effect_totals(block_effects(losses, blocks), trained)
    for name, value in naive_totals(losses.tolist(), blocks.tolist(), trained).items():
        assert getattr(totals, name) == value or (math.isnan(value) and math.isnan(getattr(totals, name))), name
    ends = last_ends(blocks, trained, losses.shape[1])
    final, maximal = forgetting(torch.from_numpy(losses), ends)
    for j in range(losses.shape[1]):
        last = [end for (_, end), own in zip(blocks.tolist(), trained, strict=True) if j in own]
        assert ends[j] == (last[-1] if last else -1)
        if not last or math.isnan(losses[last[-1], j]):
            assert math.isnan(final[j]) and math.isnan(maximal[j])
            continue
        e = last[-1]
        worst = max(losses[s, j] for s in range(e, len(losses)) if not math.isnan(losses[s, j]))
        assert maximal[j] == worst - losses[e, j] >= 0
        expected = losses[-1, j] - losses[e, j]
        assert final[j] == expected or (math.isnan(expected) and math.isnan(final[j]))


@settings(max_examples=60, deadline=None)
@given(runs(holes=False))
def test_effects_of_blocks_without_gaps_add_up_to_the_whole_change(run):
    losses, blocks, trained = run
    effects = block_effects(losses, blocks)
    assert np.array_equal(effects.sum(0), losses[-1] - losses[0])
    assert np.array_equal(step_effects(losses).sum(0), losses[-1] - losses[0])
    totals = effect_totals(effects, trained)
    whole = totals.interference + totals.forward_harm - totals.learning - totals.synergy - totals.forward_gain
    assert whole == effects.sum()
    order = np.random.default_rng(0).permutation(losses.shape[1])  # names of tasks don't matter
    place = np.argsort(order)
    assert effect_totals(effects[:, order], [[place[j] for j in own] for own in trained]) == totals


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(NAN), st.integers(0, 40).map(lambda n: n / 4)), min_size=1, max_size=12), st.data())
def test_shock_and_recovery_against_a_loop(trace, data):
    before, fraction = data.draw(st.integers(0, 20)) / 2, data.draw(st.sampled_from([0, 0.25, 0.5, 1]))
    shock, recovery = shock_and_recovery(trace, before, fraction)
    expected = None
    for s, value in enumerate(trace):
        if trace[0] <= before or value - before <= fraction * (trace[0] - before):
            expected = s
            break
    if math.isnan(trace[0]):
        assert math.isnan(shock) and recovery is None
    else:
        assert shock == trace[0] - before and recovery == expected
    several = shock_and_recovery(torch.tensor([trace, trace], dtype=torch.float64).T, [before, before], fraction)
    assert several[1].tolist() == [-1 if recovery is None else recovery] * 2
    np.testing.assert_array_equal(several[0], [shock, shock])


def test_several_tasks_in_a_block_and_blocks_that_come_again():
    losses = [[4, 4, 4, 4], [2, 3, 5, NAN], [3, 2, 1, 1], [1, 3, 2, 2]]
    blocks, trained = [[0, 1], [1, 2], [2, 3]], [[0, 1], [2, 3], 0]
    totals = effect_totals(block_effects(losses, blocks), trained)
    assert totals == EffectTotals(
        learning=2 + 1 + 4 + 2,  # the last task was not measured where its block began
        interference=1 + 1 + 1 + 1,  # 0 in block 1; 1, 2 and 3 in block 2
        synergy=1,
        forward_harm=1,
        forward_gain=0,
    )
    assert last_ends(blocks, trained, 4).tolist() == [3, 1, 2, 2]
    assert loss_forgetting(losses, [3, 1, 2, 2])[0].tolist() == [0, 0, 1, 1]


def test_what_was_not_measured_is_skipped_or_nan():
    totals = effect_totals([[NAN, 1.0], [2.0, NAN]], [0, 1])
    assert math.isnan(totals.learning) and totals.interference == 2 and totals.forward_harm == 1
    infinite = effect_totals([[math.inf, 1.0]], [1])
    assert infinite.learning == -1 and math.isnan(infinite.forward_harm)
    assert effect_totals(np.zeros((0, 3)), []) == EffectTotals(0, 0, 0, 0, 0)
    assert math.copysign(1, effect_totals([[0.0]], [0]).learning) == 1  # no -0.0
    assert step_effects([[1.0, 2.0]]).shape == (0, 2) and block_effects([[1.0]], []).shape == (0, 1)


# ----------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: step_effects([1.0, 2.0]), ValueError, "losses"),
        (lambda: step_effects(np.zeros((0, 2))), ValueError, "losses"),
        (lambda: block_effects([[1.0], [2.0]], [[0, 2]]), ValueError, "0 <= start <= end <= 1"),
        (lambda: block_effects([[1.0], [2.0]], [[1, 0]]), ValueError, "blocks"),
        (lambda: block_effects([[1.0], [2.0]], [[0.0, 1.0]]), ValueError, "blocks"),
        (lambda: block_effects([[1.0], [2.0]], [0, 1]), ValueError, "blocks"),
        (lambda: effect_totals([[1.0, 2.0]], [2]), ValueError, "0 to 1"),
        (lambda: effect_totals([[1.0, 2.0]], [[-1]]), ValueError, "block_tasks"),
        (lambda: effect_totals([[1.0, 2.0]], [0, 1]), ValueError, "one for each of 1"),
        (lambda: effect_totals([[1.0, 2.0]], [[0.0]]), TypeError, "block_tasks"),
        (lambda: last_ends([[0, 1]], [], 2), ValueError, "block_tasks"),
        (lambda: forgetting([[1.0, 2.0]], [0]), ValueError, "ends"),
        (lambda: forgetting([[1.0, 2.0]], [0, 1]), ValueError, "ends"),
        (lambda: shock_and_recovery([], 1.0), ValueError, "trace"),
        (lambda: shock_and_recovery([1.0], NAN), ValueError, "before"),
        (lambda: shock_and_recovery([[1.0, 2.0]], [1.0, 2.0, 3.0]), ValueError, "before"),
        (lambda: shock_and_recovery([1.0], 1.0, 1.5), ValueError, "fraction"),
        (lambda: shock_and_recovery([1.0], 1.0, NAN), ValueError, "fraction"),
    ],
)
def test_impossible_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ----------------------------------------------------------------- result object
def example(**changes):
    values = dict(
        steps=[0, 4, 9],
        loss=[[2.0, NAN, 1.0], [1.0, 3.0, math.inf], [0.5, NAN, 0.25]],
        accuracy=[[0.0, NAN, 1.0], [0.5, 0.0, 0.0], [1.0, NAN, 1.0]],
        blocks=[[0, 1], [1, 2]],
        block_tasks=[[3], [4, 7, 9]],
        task_ids=[3, 7, 8],
        task_names=["a", "b", "c"],
    )
    return Dynamics(**{**values, **changes})


def test_result_object_with_a_subset_of_tasks_and_a_diverged_loss():
    found = example()
    assert found.diverged.tolist() == [[False] * 3, [False, False, True], [False] * 3]
    assert math.isnan(found.loss[1, 2])
    assert found.block_columns == [(0,), (1,)]  # tasks 4 and 9 are not probed
    np.testing.assert_array_equal(found.mean_loss, [1.5, NAN, 0.375])
    np.testing.assert_array_equal(found.mean_accuracy, [0.5, 0.5 / 3, 1.0])
    np.testing.assert_array_equal(found.ends, [1, 2, -1])
    assert found.shock(1.0, 3) == (1.0, 1, 4)
    assert found.shock(1.0) == (0.5, 2, 9)  # the mean of the tasks measured at first; row 1 has a hole
    with pytest.raises(ValueError, match="probed tasks"):
        found.shock(1.0, 4)
    with pytest.raises(ValueError, match="row"):
        found.shock(1.0, row=3)
    with pytest.raises(ValueError, match="no task was measured"):
        example(loss=np.full((3, 3), NAN)).shock(1.0)
    with pytest.raises(ValueError, match="blocks"):
        found.totals(3)


def test_result_object_survives_json_and_state():
    found = example()
    text = json.dumps(found.to_dict(), allow_nan=False)
    for again in (Dynamics.from_dict(json.loads(text)), Dynamics.from_state_dict(found.state_dict())):
        for name, value in vars(found).items():
            got = getattr(again, name)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(got, value, err_msg=name)
                assert got.dtype == value.dtype
            else:
                assert got == value, name
    assert isinstance(found.state_dict()["loss"], torch.Tensor)
    found.state_dict()["loss"].zero_()
    assert found.loss[0, 0] == 2.0  # a copy was given
    with pytest.raises(ValueError, match="fields"):
        Dynamics.from_dict({"loss": [[1.0]]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [0, 1]}, "steps"),
        ({"steps": [0, 5, 4]}, "steps"),
        ({"loss": [1.0]}, "loss"),
        ({"accuracy": [[1.0]]}, "accuracy"),
        ({"diverged": [[True]]}, "diverged"),
        ({"blocks": [[0, 1], [1, 3]]}, "blocks"),
        ({"block_tasks": [[3]]}, "block_tasks"),
        ({"task_ids": [3, 3, 4]}, "task_ids"),
        ({"task_ids": [3, 4]}, "task_ids"),
        ({"task_names": ["a"]}, "task_names"),
    ],
)
def test_result_object_refuses_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        example(**changes)
