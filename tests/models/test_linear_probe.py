"""The linear probe: optimum, penalties, path, normalisation, SGD, wrong arguments."""

import warnings

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from packaging.version import Version
from sklearn.linear_model import LogisticRegression

from avalanche_firn.models.linear_probe import c_path, fit_linear_probe, l2_from_c, solve_linear_probe


def problem(seed, n=60, d=5, classes=(0, 1, 2), pull=1.0, dtype=torch.float64):
    """Overlapping clusters; every class occurs."""
    g = torch.Generator().manual_seed(seed)
    columns = torch.arange(n) % len(classes)
    centres = pull * torch.randn(len(classes), d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + centres[columns] + 2.0
    order = torch.randperm(n, generator=g)
    return x[order].to(dtype), torch.tensor(classes)[columns[order]]


def objective_by_loops(x, y, weight, bias, l2, loss):
    """Nested Python loops over samples and present classes."""
    present = sorted(set(y.tolist()))
    total = 0.0
    for h, label in zip(x.tolist(), y.tolist(), strict=True):
        z = [sum(w * v for w, v in zip(weight[c].tolist(), h, strict=True)) + float(bias[c]) for c in present]
        if loss == "ridge":
            total += sum(0.5 * ((c == label) - value) ** 2 for c, value in zip(present, z, strict=True))
        else:
            top = max(z)
            total += top + np.log(sum(np.exp(v - top) for v in z)) - z[present.index(label)]
    return total / len(y) + 0.5 * l2 * float(weight.square().sum())


def data_gradient(x, y, weight, bias):
    present = y.unique()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = F.cross_entropy((x @ weight.T + bias)[:, present], torch.searchsorted(present, y))
    return torch.autograd.grad(loss, (weight, bias))


@pytest.mark.parametrize("name", ["bal", "unbal"])
def test_golden_optimum(golden, name):
    arrays = golden("lp_ft", "probe_logreg")
    x, y = torch.tensor(arrays[f"{name}/features"]), torch.tensor(arrays[f"{name}/labels"])
    for i, l2 in enumerate(arrays[f"{name}/l2"]):
        solution = solve_linear_probe(x, y, l2=float(l2))
        weight, bias = torch.tensor(arrays[f"{name}/weight"][i]), torch.tensor(arrays[f"{name}/bias"][i])
        assert solution.converged and solution.iterations < 100 and solution.path == [(float(l2), None)]
        assert solution.objective == pytest.approx(float(arrays[f"{name}/objective"][i]), abs=1e-12)
        assert (solution.weight - weight).abs().max() < 1e-10 * weight.abs().max()
        assert (solution.bias - bias).abs().max() < 1e-10 * bias.abs().max()
        gradient, bias_gradient = data_gradient(x, y, solution.weight, solution.bias)
        assert (gradient + l2 * solution.weight).abs().max() < 1e-11 and bias_gradient.abs().max() < 1e-11
        expected = torch.tensor(arrays[f"{name}/data_grad_weight"][i])
        assert (gradient - expected).abs().max() < 1e-11
        assert solution.weight.sum(0).abs().max() < 1e-12 and abs(float(solution.bias.sum())) < 1e-12


def test_golden_binary(golden):
    arrays = golden("lp_ft", "probe_binary")
    x, y = torch.tensor(arrays["features"]), torch.tensor(arrays["labels"])
    for i, c in enumerate(arrays["C"].tolist()):
        l2 = l2_from_c(c, len(x), 2)
        assert l2 == pytest.approx(float(arrays["l2_equivalent"][i]), rel=1e-14)
        weight, bias = fit_linear_probe(x, y, l2=l2)
        assert np.abs(weight.numpy() - arrays["weight"][i]).max() < 1e-10
        assert np.abs(bias.numpy() - arrays["bias"][i]).max() < 1e-10
        assert np.abs((x @ weight.T + bias).numpy() - arrays["logits"][i]).max() < 1e-9
    shortcut, _ = fit_linear_probe(x, y, l2=1 / (len(x) * float(arrays["C"][0])))
    single_row = (shortcut[1] - shortcut[0]).numpy()
    assert np.abs(single_row - arrays["raw_coef"][0]).max() == pytest.approx(0.08, abs=0.005)  # wrong for two classes


@pytest.mark.parametrize("reverse", [False, True])
def test_golden_path(golden, reverse):
    arrays = golden("lp_ft", "probe_c_path")
    x, y, x_val, y_val = (torch.tensor(arrays[k]) for k in ("x_train", "y_train", "x_val", "y_val"))
    penalties = c_path(len(x), 4, num=len(arrays["C_grid"]))
    given = penalties[::-1] if reverse else penalties
    solution = solve_linear_probe(
        x, y, l2=given, normalize="scalar", num_classes=4, val_features=x_val, val_labels=y_val
    )
    assert [l2 for l2, _ in solution.path] == penalties
    assert [accuracy for _, accuracy in solution.path] == pytest.approx(
        arrays["acc_train_val_shifted"][:, 1], abs=1e-12
    )
    assert solution.l2 == penalties[int(arrays["best_index"])]
    assert solution.l2 == pytest.approx(l2_from_c(float(arrays["best_C"]), len(x), 4), rel=1e-15)
    assert solution.val_accuracy == arrays["acc_train_val_shifted"][arrays["best_index"], 1]
    assert np.abs(solution.weight.numpy() - arrays["weight_padded"]).max() < 5e-3
    assert np.abs(solution.bias.numpy() - arrays["bias_padded"]).max() < 5e-3
    for split, column in (("train", 0), ("shifted", 2)):
        xs, ys = torch.tensor(arrays[f"x_{split}"]), torch.tensor(arrays[f"y_{split}"])
        accuracy = ((xs @ solution.weight.T + solution.bias).argmax(1) == ys).double().mean()
        assert float(accuracy) == pytest.approx(
            arrays["acc_train_val_shifted"][arrays["best_index"], column], abs=1e-12
        )


@pytest.mark.parametrize("solver", ["lbfgs", "ridge"])
def test_golden_matrix(golden, solver):
    arrays = golden("lp_ft", "knn_matrix")
    for t, backbone in enumerate(arrays["backbone_weights"]):
        for i in range(4):
            h, h_test = (torch.tensor(np.maximum(arrays[f"x_{s}_{i}"] @ backbone.T, 0)) for s in ("train", "test"))
            weight, bias = fit_linear_probe(h, torch.tensor(arrays[f"y_train_{i}"]), solver, float(arrays["linear_l2"]))
            present = np.unique(arrays[f"y_train_{i}"])
            predicted = present[(h_test @ weight.T + bias)[:, present].argmax(1).numpy()]
            accuracy = 100 * (predicted == arrays[f"y_test_{i}"]).mean()
            assert abs(accuracy - arrays[f"acc_linear_{solver}"][t, i]) < 1e-9


def test_scalar_normalisation_folds_back_exactly(golden):
    arrays = golden("lp_ft", "probe_c_path")
    x, y = torch.tensor(arrays["x_train"]), torch.tensor(arrays["y_train"])
    mean, std = float(arrays["scalar_mean"]), float(arrays["scalar_std"])
    for solver in ("lbfgs", "ridge"):
        weight, bias = fit_linear_probe(x, y, solver, l2=1.0, normalize="scalar")
        inner, offset = fit_linear_probe((x - mean) / std, y, solver, l2=1.0)
        torch.testing.assert_close(weight, inner / std, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bias, offset - weight.sum(1) * mean, rtol=1e-12, atol=1e-12)
        raw, _ = fit_linear_probe(x, y, solver, l2=1.0)  # the penalty acts on the normalised problem
        assert (weight - raw).abs().max() > 0.1 * raw.abs().max()


@pytest.mark.parametrize("seed", range(20))
def test_random_problems_against_scikit_learn_and_loops(seed):
    rng = np.random.RandomState(seed)
    classes = sorted(rng.choice(12, size=rng.randint(2, 6), replace=False).tolist())
    if len(classes) > 2 and Version(sklearn.__version__) < Version("1.6"):
        pytest.skip("newton-cholesky fits one class against the rest before scikit-learn 1.6")
    x, y = problem(seed, n=rng.randint(20, 80), d=rng.randint(1, 40), classes=classes, pull=rng.uniform(0, 2))
    l2 = float(10 ** rng.uniform(-3, 0.5))
    solution = solve_linear_probe(x, y, l2=l2, num_classes=13)
    c = (2 if len(classes) == 2 else 1) / (len(x) * l2)
    reference = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(x.numpy(), y.numpy())
    coef, intercept = reference.coef_, reference.intercept_
    if len(classes) == 2:
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    assert np.abs(solution.weight[classes].numpy() - coef).max() < 1e-7
    assert np.abs(solution.bias[classes].numpy() - (intercept - intercept.mean())).max() < 1e-6
    absent = [c for c in range(13) if c not in classes]
    assert not solution.weight[absent].any() and not solution.bias[absent].any()
    assert solution.weight.shape == (13, x.shape[1]) and solution.converged
    expected = objective_by_loops(x, y, solution.weight, solution.bias, l2, "cross-entropy")
    assert solution.objective == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(40, 200), (60, 60), (7, 3)])
@pytest.mark.parametrize("l2", [1.0, 1e-3, 1e-7])
def test_optimality_also_with_more_dimensions_than_samples(n, d, l2):
    x, y = problem(5, n=n, d=d)
    solution = solve_linear_probe(x, y, l2=l2)
    gradient, bias_gradient = data_gradient(x, y, solution.weight, solution.bias)
    assert solution.converged
    assert (gradient + l2 * solution.weight).abs().max() < 5e-12 and bias_gradient.abs().max() < 5e-12


def test_default_penalty_and_number_of_rows():
    x, y = problem(0, classes=(1, 4))
    solution = solve_linear_probe(x, y)
    assert solution.l2 == 1 / 60 and solution.weight.shape == (5, 5) and solution.bias.shape == (5,)
    explicit, _ = fit_linear_probe(x, y, l2=1 / 60)
    assert torch.equal(solution.weight, explicit)


def test_shift_of_the_features_only_moves_the_bias():
    x, y = problem(1)
    weight, bias = fit_linear_probe(x, y, l2=0.01)
    moved, moved_bias = fit_linear_probe(x + 1e4, y, l2=0.01)
    torch.testing.assert_close(weight, moved, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(x @ weight.T + bias, (x + 1e4) @ moved.T + moved_bias, rtol=0, atol=1e-7)
    assert abs(float(moved_bias.sum())) < 1e-8


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "sgd"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_dtypes(solver, dtype, expected):
    x, y = problem(2, dtype=dtype)
    weight, bias = fit_linear_probe(x, y.to(torch.uint8), solver, l2=0.1)
    exact, exact_bias = fit_linear_probe(x.double(), y, solver, l2=0.1)
    assert weight.dtype == bias.dtype == expected
    assert torch.equal(weight, exact.to(expected)) and torch.equal(bias, exact_bias.to(expected))


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "sgd"])
def test_modes_of_the_caller_play_no_role_and_nothing_is_touched(solver):
    x, y = problem(3)
    expected, _ = fit_linear_probe(x, y, solver, l2=0.1)
    before, torch_state, numpy_state = x.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    needs_gradient = x.clone().requires_grad_()
    contexts = (torch.no_grad(), torch.inference_mode(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16))
    for context in contexts:
        with context:
            weight, bias = fit_linear_probe(needs_gradient * 1, y, solver, l2=0.1)
        assert torch.equal(weight, expected)
        assert not weight.requires_grad and not bias.requires_grad and not weight.is_inference()
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_single_class_gives_a_zero_head(solver):
    x, y = problem(4, classes=(2,))
    solution = solve_linear_probe(x, y, solver, num_classes=4)
    assert solution.weight.shape == (4, 5) and not solution.weight.any() and not solution.bias.any()
    assert solution.converged and solution.objective == 0 and solution.iterations == 0


def test_class_with_a_single_sample():
    x, y = problem(6, classes=(0, 3))
    x, y = torch.cat([x, x[:1] + 3]), torch.cat([y, torch.tensor([7])])
    solution = solve_linear_probe(x, y)
    gradient, _ = data_gradient(x, y, solution.weight, solution.bias)
    assert solution.converged and (gradient + solution.l2 * solution.weight).abs().max() < 5e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separable_without_penalty_stops_with_a_warning(dtype):
    x, y = problem(7, pull=20, dtype=dtype)
    with pytest.warns(RuntimeWarning, match=r"l2 = 0 did not converge: after 40 iterations \(max_iter = 40\)"):
        solution = solve_linear_probe(x, y, l2=0.0, max_iter=40)
    assert solution.iterations == 40 and not solution.converged
    assert solution.weight.isfinite().all() and solution.bias.isfinite().all()
    assert torch.equal((x @ solution.weight.T + solution.bias).argmax(1), y)
    with pytest.warns(RuntimeWarning, match="did not converge"):
        longer = solve_linear_probe(x, y, l2=0.0)
    assert longer.weight.isfinite().all() and longer.weight.norm() > solution.weight.norm()


def test_no_penalty_on_overlapping_data_converges_with_the_smallest_norm():
    x, y = problem(8, n=200, pull=0.3)
    twice = torch.cat([x, x, torch.full((200, 2), 0.3, dtype=torch.float64)], 1)  # redundant and constant columns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once, both = solve_linear_probe(x, y, l2=0.0), solve_linear_probe(twice, y, l2=0.0)
    assert once.converged and data_gradient(x, y, once.weight, once.bias)[0].abs().max() < 1e-12
    torch.testing.assert_close(both.weight[:, :5], once.weight / 2, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(both.weight[:, 5:10], once.weight / 2, rtol=1e-8, atol=1e-10)
    assert not both.weight[:, 10:].any()


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "sgd"])
def test_without_bias(solver):
    x, y = problem(9, n=300)
    solution = solve_linear_probe(x, y, solver, l2=0.05, bias=False, epochs=300)
    assert not solution.bias.any()
    if solver == "ridge":
        onehot = F.one_hot(y).double()
        gradient = (x @ solution.weight.T - onehot).T @ x / len(x)
    else:
        gradient, _ = data_gradient(x, y, solution.weight, solution.bias)
    tolerance = 1e-2 if solver == "sgd" else 1e-12
    assert (gradient + 0.05 * solution.weight).abs().max() < tolerance
    assert solution.objective > solve_linear_probe(x, y, solver, l2=0.05, epochs=300).objective


def test_the_first_of_the_best_wins_the_strongest_first():
    x, y = problem(10, n=90, pull=12)
    train, validation = (x[:60], y[:60]), (x[60:], y[60:])
    solution = solve_linear_probe(*train, l2=[1e-4, 1e-2, 1e-3], val_features=validation[0], val_labels=validation[1])
    accuracies = [a for _, a in solution.path]
    assert [l2 for l2, _ in solution.path] == [1e-2, 1e-3, 1e-4]
    assert accuracies == [1.0, 1.0, 1.0] and solution.l2 == 1e-2 and solution.val_accuracy == 1.0
    for l2, _ in solution.path:  # warm starts don't change where the path goes
        chosen, _ = fit_linear_probe(*train, l2=np.array([l2, l2 * 10]), val_features=x[60:], val_labels=y[60:])
        alone, _ = fit_linear_probe(*train, l2=l2 * 10)
        torch.testing.assert_close(chosen, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", ["lbfgs", "ridge", "sgd"])
def test_validation_labels_that_do_not_occur_are_errors_and_refit_uses_all_data(solver):
    x, y = problem(11, n=80, pull=0.5)
    x_val, y_val = x[60:], y[60:].clone()
    y_val[:5] = 6
    one = solve_linear_probe(x[:60], y[:60], solver, l2=0.1, val_features=x_val, val_labels=y_val)
    alone = solve_linear_probe(x[:60], y[:60], solver, l2=0.1)
    assert torch.equal(one.weight, alone.weight) and one.weight.shape == (3, 5)
    predicted = (x_val @ one.weight.T + one.bias).argmax(1)
    assert one.val_accuracy == pytest.approx(float((predicted == y_val).double().mean()))
    assert one.path == [(0.1, one.val_accuracy)]
    grid = [0.01, 0.1, 1.0]
    both = solve_linear_probe(x[:60], y[:60], solver, l2=grid, val_features=x_val, val_labels=y_val, refit=True)
    expected = solve_linear_probe(torch.cat([x[:60], x_val]), torch.cat([y[:60], y_val]), solver, l2=both.l2)
    assert both.weight.shape == (7, 5)
    torch.testing.assert_close(both.weight, expected.weight, rtol=1e-9, atol=1e-12)
    assert both.val_accuracy == max(a for _, a in both.path) and both.objective == pytest.approx(expected.objective)


X, Y = problem(0)
NAN = torch.where(torch.arange(60)[:, None] == 3, torch.nan, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(features=X[0]), r"features: got torch.float64 \(5,\); accepted is a floating \(n, d\) tensor"),
        (dict(features=X.long()), r"features: got torch.int64 \(60, 5\)"),
        (dict(features=X.tolist()), "features: got list"),
        (dict(features=NAN), "features: got NaN or infinite values"),
        (dict(features=X / 0), "features: got NaN or infinite values"),
        (dict(features=X[:0], labels=Y[:0]), r"features: got shape \(0, 5\); accepted is at least one row"),
        (dict(features=X[:, :0]), r"features: got shape \(60, 0\)"),
        (dict(labels=Y[:-1]), r"labels: got torch.int64 \(59,\); accepted is an integer tensor of shape \(60,\)"),
        (dict(labels=Y.double()), r"labels: got torch.float64 \(60,\)"),
        (dict(labels=Y.bool()), r"labels: got torch.bool \(60,\)"),
        (dict(labels=Y - 1), "labels: got -1; accepted are class ids >= 0"),
        (dict(solver="newton"), "solver: got 'newton'; accepted are 'lbfgs', 'ridge', 'sgd'"),
        (dict(normalize="std"), "normalize: got 'std'; accepted are 'none', 'scalar'"),
        (dict(normalize="scalar", bias=False), "normalize: 'scalar' shifts the features and needs bias=True"),
        (dict(num_classes=2), "num_classes: got 2, but label 2 occurs"),
        (dict(l2=-1.0), "l2: got -1.0; accepted are finite numbers >= 0"),
        (dict(l2=float("nan")), "l2: got nan"),
        (dict(l2=float("inf")), "l2: got inf"),
        (dict(l2=[0.1, 1.0]), "l2: got 2 values without val_features and val_labels"),
        (dict(l2=[0.1]), "l2: got 1 values without val_features"),
        (dict(l2=[], val_features=X, val_labels=Y), r"l2: got \[\]"),
        (dict(l2=[0.1, -1], val_features=X, val_labels=Y), r"l2: got \[0.1, -1\]"),
        (dict(val_features=X), "val_features, val_labels: got one without the other"),
        (dict(val_labels=Y), "val_features, val_labels: got one without the other"),
        (dict(val_features=X[:, :4], val_labels=Y), r"val_features: got shape \(60, 4\); accepted is \(m, 5\)"),
        (dict(val_features=X[:0], val_labels=Y[:0]), r"val_features: got shape \(0, 5\)"),
        (dict(val_features=NAN, val_labels=Y), "val_features: got NaN"),
        (dict(val_features=X, val_labels=Y[:3]), r"val_labels: got torch.int64 \(3,\)"),
        (
            dict(val_features=X, val_labels=Y + 1, num_classes=3),
            "val_labels: got 3; accepted are ids below num_classes",
        ),
        (dict(refit=True), "refit: got True without val_features"),
        (dict(max_iter=0), "max_iter: got 0; accepted are integers >= 1"),
        (dict(epochs=0), "epochs: got 0"),
        (dict(batch_size=0), "batch_size: got 0"),
        (dict(lr=0.0), "lr: got 0.0; accepted are finite numbers above 0 and None"),
        (dict(lr=float("nan")), "lr: got nan"),
        (dict(momentum=1.0), r"momentum: got 1.0; accepted are numbers in \[0, 1\)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fit_linear_probe(**{"features": X, "labels": Y, **arguments})
