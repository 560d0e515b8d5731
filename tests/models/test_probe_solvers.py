"""SGD on cached features, and the parts of the solvers that the probe's own tests don't reach."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avalanche_firn.models.linear_probe import fit_linear_probe, solve_linear_probe
from avalanche_firn.models.probe_solvers import LBFGSPath, SolverOptions, cross_entropy_and_gradient_


def problem(seed, n=60, d=5):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, d, generator=g, dtype=torch.float64) + torch.randn(3, d, generator=g).double()[y] + 2.0, y


def test_sgd_reaches_the_golden_objective(golden):
    arrays = golden("lp_ft", "probe_logreg")
    x, y = torch.tensor(arrays["bal/features"]), torch.tensor(arrays["bal/labels"])
    assert float(arrays["bal/l2"][1]) == 0.01
    for seed in range(5):
        solution = solve_linear_probe(x, y, "sgd", l2=0.01, generator=torch.Generator().manual_seed(seed))
        assert 0 <= solution.objective - float(arrays["bal/objective"][1]) < 1e-3
        assert solution.iterations == 200 and solution.weight.sum(0).abs().max() < 1e-12
        loss = F.cross_entropy(x @ solution.weight.T + solution.bias, y)
        assert solution.objective == pytest.approx(float(loss + 0.005 * solution.weight.square().sum()), abs=1e-12)


def test_sgd_is_decided_by_the_generator():
    x, y = problem(12)
    torch.manual_seed(1)
    first, _ = fit_linear_probe(x, y, "sgd", generator=torch.Generator().manual_seed(3), batch_size=16)
    torch.manual_seed(2)
    again, _ = fit_linear_probe(x, y, "sgd", generator=torch.Generator().manual_seed(3), batch_size=16)
    other, _ = fit_linear_probe(x, y, "sgd", generator=torch.Generator().manual_seed(4), batch_size=16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(fit_linear_probe(x, y, "sgd")[0], fit_linear_probe(x, y, "sgd")[0])


def test_sgd_equals_torch_sgd_with_a_cosine():
    x, y = problem(13, n=50)
    weight, bias = fit_linear_probe(
        x, y, "sgd", l2=0.03, lr=0.2, epochs=4, batch_size=16, momentum=0.8, generator=torch.Generator().manual_seed(5)
    )
    head, g, centred = torch.nn.Linear(5, 3).double(), torch.Generator().manual_seed(5), x - x.mean(0)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    groups = [{"params": [head.weight], "weight_decay": 0.03}, {"params": [head.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    for _ in range(4):
        for rows in torch.randperm(50, generator=g).split(16):
            optimizer.zero_grad()
            F.cross_entropy(head(centred[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(weight, head.weight.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bias, (head.bias - head.weight @ x.mean(0)).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("scale", "batch_size"), [(1e-3, 128), (1.0, 8), (1e3, 8)])
def test_sgd_is_stable_at_its_own_rate(scale, batch_size):
    x, y = problem(14, n=200, d=100)
    start = float(np.log(3))
    solution = solve_linear_probe(x * scale, y, "sgd", l2=0.01, batch_size=batch_size)
    assert np.isfinite(solution.objective) and solution.objective <= start


def test_sgd_divergence_is_named():
    x, y = problem(15)
    with pytest.raises(FloatingPointError, match=r"diverged: lower lr \(1e\+200\)"):
        fit_linear_probe(x, y, "sgd", lr=1e200, l2=1.0)


def test_cross_entropy_of_every_size_of_logits():
    g = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 30.0, 500.0):
        logits, y = scale * torch.randn(50, 4, generator=g, dtype=torch.float64), torch.arange(50) % 4
        expected = logits.clone().requires_grad_()
        F.cross_entropy(expected, y).backward()
        loss, gradient = cross_entropy_and_gradient_(logits.clone(), y)
        assert float(loss) == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-13)
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-10, atol=1e-16)
    tiny, gradient = cross_entropy_and_gradient_(torch.tensor([[100.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert float(tiny) == pytest.approx(math.exp(-100), rel=1e-12)  # torch's own function gives 0
    assert gradient.tolist()[0] == pytest.approx([-math.exp(-100), math.exp(-100)], rel=1e-12)


def path_for(x, y, max_iter=500):
    return LBFGSPath(x, y, 3, SolverOptions(max_iter, None, True, None, 1, 1, 0.0))


@pytest.mark.parametrize("shape", [(60, 5), (20, 45)])
def test_gradient_and_hessian_of_the_preconditioned_problem(shape):
    x, y = problem(1, *shape)
    path = path_for(x - x.mean(0), y, max_iter=2)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        path(0.01)  # leaves it away from the optimum
    u = path.point

    def objective(point):
        v = point * path.scale
        logits = (path.z @ v[:, :-1].T + v[:, -1]) @ path.basis.T
        return F.cross_entropy(logits, y) + 0.005 * v[:, :-1].square().sum()

    gradient = path._evaluate(u)
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(objective, u), rtol=1e-9, atol=1e-12)
    assert path.value == pytest.approx(float(objective(u)), rel=1e-13)
    hessian = torch.autograd.functional.hessian(objective, u).reshape(u.numel(), u.numel())
    expected = torch.linalg.solve(hessian, gradient.flatten()).view_as(u)
    direction = path._newton_direction(gradient)
    assert (direction - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("l2", [1e-4, 1e-8, 1e-12])
def test_separable_data_with_a_weak_penalty_need_new_coordinates_and_get_them(l2):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 300, generator=g, dtype=torch.float64), torch.arange(30) % 3
    solution = solve_linear_probe(x, y, l2=l2)
    weight, bias = solution.weight.clone().requires_grad_(), solution.bias.clone().requires_grad_()
    gradient, bias_gradient = torch.autograd.grad(F.cross_entropy(x @ weight.T + bias, y), (weight, bias))
    assert solution.converged and solution.iterations < 250
    rounding = 1e-16  # of the oracle
    assert (gradient + l2 * solution.weight).abs().max() < 1e-6 * l2 * solution.weight.abs().max() + rounding
    assert bias_gradient.abs().max() < 1e-6 * l2 + rounding


def test_features_of_very_different_scales():
    x, y = problem(2, n=200)
    scales = torch.logspace(-3, 3, 5, dtype=torch.float64)
    solution = solve_linear_probe(x * scales, y, l2=1e-30)
    plain = solve_linear_probe(x, y, l2=0.0)
    torch.testing.assert_close(solution.weight * scales, plain.weight, rtol=1e-6, atol=1e-8)
    assert solution.iterations < 60 and np.isclose(solution.objective, plain.objective)


@pytest.mark.parametrize("normalize", ["none", "scalar"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_constant_features_leave_only_the_class_frequencies(normalize, l2):
    x, y = torch.full((50, 4), 0.1, dtype=torch.float64), torch.arange(50) % 3
    weight, bias = fit_linear_probe(x, y, l2=l2, normalize=normalize)
    frequency = torch.bincount(y).double().log()
    assert not weight.any()
    torch.testing.assert_close(bias, frequency - frequency.mean(), rtol=0, atol=1e-12)
