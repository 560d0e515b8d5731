"""The classifier by least squares: normal equations, minimum norm, dtypes, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalanche_firn.models.least_squares import least_squares_head


def problem(samples, width, classes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, width, generator=generator, dtype=dtype)
    return features, torch.randint(classes, (samples,), generator=generator)


def with_ones(features):
    return np.hstack([features.double().numpy(), np.ones((len(features), 1))])


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(1, 25), width=st.integers(1, 8), classes=st.integers(1, 4), seed=st.integers(0, 999))
def test_equals_the_pseudo_inverse(samples, width, classes, seed):
    """The minimum-norm solution, one output at a time; more outputs than there are classes."""
    features, labels = problem(samples, width, classes, seed)
    weight, bias = least_squares_head(features, labels, classes + 2)
    assert weight.shape == (classes + 2, width) and bias.shape == (classes + 2,)
    inverse = np.linalg.pinv(with_ones(features), rcond=1e-12)
    for output in range(classes + 2):
        solution = inverse @ (labels.numpy() == output).astype(float)
        scale = 1 + np.abs(solution).max()
        np.testing.assert_allclose(weight[output], solution[:-1], rtol=0, atol=1e-8 * scale)
        np.testing.assert_allclose(bias[output], solution[-1], rtol=0, atol=1e-8 * scale)


def test_the_residual_is_orthogonal_to_the_features():
    features, labels = problem(60, 5, 3)
    weight, bias = least_squares_head(features, labels, 3)
    residual = features @ weight.T + bias - torch.nn.functional.one_hot(labels, 3)
    assert (torch.from_numpy(with_ones(features)).T @ residual).abs().max() < 1e-11
    torch.testing.assert_close((features @ weight.T + bias).sum(1), torch.ones(60, dtype=torch.float64))


def test_fewer_samples_than_features_are_fitted_exactly_with_the_smallest_norm():
    features, labels = problem(4, 9, 4, seed=2)
    weight, bias = least_squares_head(features, labels, 5)
    fitted = features @ weight.T + bias
    torch.testing.assert_close(fitted, torch.nn.functional.one_hot(labels, 5).double(), rtol=0, atol=1e-10)
    rows = with_ones(features)
    whole = torch.cat([weight, bias[:, None]], 1).numpy()  # in the span of the samples, or it could be shorter
    np.testing.assert_allclose(whole @ np.linalg.pinv(rows) @ rows, whole, rtol=0, atol=1e-10)
    assert not weight[4].any() and not bias[4].any()


def test_repeated_features_share_their_weight():
    """A rank below the number of columns: the smallest norm spreads evenly."""
    features, labels = problem(30, 3, 2)
    weight, _ = least_squares_head(torch.cat([features, features[:, :1]], 1), labels, 2)
    torch.testing.assert_close(weight[:, 0], weight[:, 3], rtol=0, atol=1e-10)
    alone, _ = least_squares_head(features, labels, 2)
    torch.testing.assert_close(weight[:, 0] + weight[:, 3], alone[:, 0], rtol=0, atol=1e-10)


def test_the_order_of_samples_has_no_influence():
    features, labels = problem(20, 4, 3)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        least_squares_head(features, labels, 3), least_squares_head(features[order], labels[order], 3), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_of_the_dtype_of_the_features(dtype):
    features, labels = problem(30, 4, 3, dtype=torch.float32)
    features = features.to(dtype).requires_grad_()
    weight, bias = least_squares_head(features, labels, 3)
    assert weight.dtype == bias.dtype == dtype and weight.is_contiguous()
    assert not weight.requires_grad
    exact, _ = least_squares_head(features.detach().double(), labels, 3)
    torch.testing.assert_close(weight, exact.to(dtype), rtol=0, atol=0)


def test_one_sample():
    weight, bias = least_squares_head(torch.tensor([[2.0]]), torch.tensor([1]), 2)
    torch.testing.assert_close(weight, torch.tensor([[0.0], [0.4]]))  # (2, 1) / 5
    torch.testing.assert_close(bias, torch.tensor([0.0, 0.2]))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), r"shapes \(3,\) and \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), r"shapes \(3, 2\) and \(2,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.long), r"\(3, 1\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "N >= 1"),
        (torch.zeros(2, 2), torch.tensor([0, 3]), "labels go from 0 to 3; 0 to 2"),
        (torch.zeros(2, 2), torch.tensor([-1, 1]), "labels go from -1 to 1"),
        (torch.tensor([[1.0, float("nan")]]), torch.tensor([0]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), torch.tensor([0]), "NaN or infinite"),
    ],
)
def test_wrong_input(features, labels, message):
    with pytest.raises(ValueError, match=message):
        least_squares_head(features, labels, 3)
