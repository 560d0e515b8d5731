"""TaskwiseLinearHead: golden numbers, growth, class ids, snapshots, state."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from avalanche_firn.models.heads import UNSEEN_LOGIT, TaskwiseLinearHead


def experience(*classes):
    return SimpleNamespace(classes_in_this_experience=list(classes))


def grown(*tasks, d=4, **kwargs):
    head = TaskwiseLinearHead(d, **kwargs)
    for ids in tasks:
        head.add_task(ids)
    return head


def test_golden_logits_freeze_scales_and_restore(golden):
    g = golden("slca", "taskwise_head")
    x = torch.from_numpy(g["x"])
    head = TaskwiseLinearHead(x.shape[1]).double()
    first = 0
    for t, size in enumerate(g["sizes"].tolist()):
        head.add_task(range(first, first + size))
        first += size
        head.load_weight_matrix(torch.from_numpy(g[f"task{t}_weight"]), torch.from_numpy(g[f"task{t}_bias"]))
        assert [w.requires_grad for w in head.weights] == g[f"task{t}_requires_grad"].tolist()
        assert [b.requires_grad for b in head.biases] == g[f"task{t}_requires_grad"].tolist()
        close = dict(rtol=0, atol=1e-12)
        np.testing.assert_allclose(head(x).detach(), g[f"task{t}_logits"], **close)
        np.testing.assert_allclose(head.input_scales, np.ones(t + 1), **close)

        head.snapshot()
        weight, bias = head.weight_matrix()
        head.load_weight_matrix(weight + 0.5, bias - 0.25)
        head.set_input_scales([1 + float(g["scale_mu"]) * (t - k) for k in range(t + 1)])
        np.testing.assert_allclose(head.input_scales, g[f"task{t}_scales"], **close)
        np.testing.assert_allclose(head(x).detach(), g[f"task{t}_logits_changed_and_scaled"], **close)

        head.restore()
        np.testing.assert_allclose(head(x).detach(), g[f"task{t}_logits_after_restore"], **close)
        np.testing.assert_allclose(head.input_scales, g[f"task{t}_scales_after_restore"], **close)


def test_column_order_and_class_ids():
    head = grown([7, 2], [5])
    assert head.class_ids.tolist() == [7, 2, 5] and head.class_task.tolist() == [0, 0, 1]
    x = torch.randn(3, 4)
    columns = head(x)
    full = head.scatter(columns, 9)
    assert full.shape == (3, 9)
    for column, class_id in enumerate([7, 2, 5]):
        torch.testing.assert_close(full[:, class_id], columns[:, column], rtol=0, atol=0)
    assert (full[:, [0, 1, 3, 4, 6, 8]] == UNSEEN_LOGIT).all()
    with pytest.raises(ValueError, match=r"num_classes is 7.*class 7"):
        head.scatter(columns, 7)


def test_local_targets_of_the_newest_task():
    head = grown([7, 2], [9, 4, 6])
    assert head.local_targets(torch.tensor([4, 9, 6, 7, 0, 100])).tolist() == [1, 0, 2, -100, -100, -100]
    assert TaskwiseLinearHead(4).local_targets(torch.tensor([1])).tolist() == [-100]


def test_adaptation_grows_in_training_only_and_widens_in_evaluation():
    head = TaskwiseLinearHead(4)
    head.eval()
    head.adaptation(experience(3, 8))
    assert head.num_tasks == 0 and head(torch.randn(2, 4)).tolist() == [[UNSEEN_LOGIT] * 9] * 2
    head.train()
    head.adaptation(experience(3, 8))
    head.adaptation(experience(3, 8))
    assert head.known_classes == (3, 8) and head(torch.randn(2, 4)).shape == (2, 9)
    head.adaptation(experience(12, 1))
    assert head.known_classes == (3, 8, 1, 12) and head.num_tasks == 2
    assert not head.weights[0].requires_grad and head.weights[1].requires_grad


def test_growth_without_freezing():
    head = grown([0], [1], freeze_old=False)
    assert all(p.requires_grad for p in head.parameters())


def test_initialisation_is_a_truncated_normal_with_zero_bias():
    torch.manual_seed(0)
    head = grown(range(500), d=100)
    assert head.weights[0].std().item() == pytest.approx(0.02, rel=0.02)
    assert head.biases[0].abs().max() == 0


@pytest.mark.parametrize(
    ("ids", "message"), [([], "empty"), ([1, 1], r"\[1\].*twice"), ([0], r"\[0\] already"), ([-1], "-1")]
)
def test_bad_class_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        grown([0]).add_task(ids)


def test_other_errors():
    with pytest.raises(RuntimeError, match="snapshot"):
        grown([0]).restore()
    with pytest.raises(ValueError, match="in_features is 0"):
        TaskwiseLinearHead(0)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        grown([0, 1]).load_weight_matrix(torch.zeros(3, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="1 tasks"):
        grown([0, 1]).set_input_scales([1.0, 2.0])


def test_second_snapshot_replaces_the_first_and_later_tasks_stay():
    head = grown([0])
    head.snapshot()
    head.load_weight_matrix(torch.ones(1, 4), torch.ones(1))
    head.snapshot()
    head.add_task([1])
    head.load_weight_matrix(torch.full((2, 4), 5.0), torch.zeros(2))
    head.restore()
    assert head.weight_matrix()[0].tolist() == [[1.0] * 4, [5.0] * 4]


def test_weight_matrix_is_a_copy():
    head = grown([0, 1])
    weight, bias = head.weight_matrix()
    weight.fill_(9), bias.fill_(9)
    assert not (head.weights[0] == 9).any() and not (head.biases[0] == 9).any()


@pytest.mark.parametrize("already", [0, 1, 2])
def test_state_dict_grows_an_emptier_head_and_draws_no_random_numbers(already):
    head = grown([3, 1], [6], [2, 5])
    head.snapshot()
    head.load_weight_matrix(torch.randn(5, 4), torch.randn(5))
    head.set_input_scales([1.0, 1.5, 2.0])
    other = grown(*[[3, 1], [6]][:already])
    state = torch.get_rng_state()
    other.load_state_dict(head.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 4)
    assert torch.equal(other(x), head(x))
    assert [p.requires_grad for p in other.weights] == [False, False, True]
    other.restore(), head.restore()
    assert torch.equal(other(x), head(x)) and other.class_task.tolist() == [0, 0, 1, 2, 2]


def test_state_of_other_classes_is_refused():
    with pytest.raises(RuntimeError, match=r"holds classes \[4\], the state \[3, 1\]"):
        grown([4]).load_state_dict(grown([3, 1]).state_dict())


def test_new_layers_follow_device_and_dtype():
    head = TaskwiseLinearHead(4).to(torch.float64)
    head.add_task([0])
    assert head.weights[0].dtype == torch.float64 and head.input_scales.dtype == torch.float64
    assert head(torch.randn(1, 4, dtype=torch.float64)).dtype == torch.float64
