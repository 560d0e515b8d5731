"""Nearest class means: distances, gaps in the class ids, states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.models import NCMClassifier, SCRModel
from torch import nn
from torch.nn import functional as F

from avalanche_firn.evaluation.fine_tuning import adapted_copy
from avalanche_firn.models import find_parts
from avalanche_firn.models.heads import UNSEEN_LOGIT
from avalanche_firn.models.nearest_mean import NearestMeanHead, NearestMeanNetwork


def experience(*classes: int) -> Any:
    return SimpleNamespace(classes_in_this_experience=set(classes))


def filled(*classes: int) -> tuple[NearestMeanHead, dict[int, torch.Tensor]]:
    torch.manual_seed(0)
    means = {c: F.normalize(torch.randn(5), dim=0) for c in classes}
    head = NearestMeanHead()
    head.replace_class_means_dict(means)
    return head, means


def test_distances_to_the_means_by_class_id() -> None:
    head, means = filled(6, 2)
    x = 3 * torch.randn(4, 5)
    output = head(x)
    assert output.shape == (4, 7) and head.known_classes == (2, 6)
    for b in range(4):
        for c in range(7):
            expected = -float((x[b] / x[b].norm() - means[c]).norm()) if c in means else UNSEEN_LOGIT
            assert float(output[b, c]) == pytest.approx(expected, rel=1e-5)


def test_a_class_without_a_mean_is_never_predicted() -> None:
    """Avalanche's classifier predicts class 0, of which it knows nothing, for a feature far from the only mean."""
    mean = torch.tensor([1.0, 0.0])
    far = torch.tensor([[0.1, 1.0]])
    theirs, ours = NCMClassifier(normalize=True), NearestMeanHead()
    for head in (theirs, ours):
        head.replace_class_means_dict({3: mean})
    assert int(theirs(far).argmax()) == 0 and int(ours(far).argmax()) == 3


def test_evaluated_classes_widen_the_output_and_nothing_else() -> None:
    head, _ = filled(1, 4)
    x = torch.randn(3, 5)
    before, state = head(x), {k: v.clone() for k, v in head.state_dict().items()}
    for mode in (True, False):
        head.train(mode).adaptation(experience(2, 8))
        assert torch.equal(head(x)[:, :5], before) and (head(x)[:, 5:] == UNSEEN_LOGIT).all()
        assert head(x).shape == (3, 9) and head.known_classes == (1, 4)
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
    head.adaptation(experience(0))
    assert head(x).shape == (3, 9)


def test_without_means_all_outputs_are_equal() -> None:
    head = NearestMeanHead()
    head.adaptation(experience(3))
    assert torch.equal(head(torch.randn(2, 5)), torch.full((2, 4), UNSEEN_LOGIT))


def test_states_of_any_size_fit() -> None:
    x = torch.randn(4, 5)
    small, large, empty = filled(1)[0], filled(2, 7)[0], NearestMeanHead()
    fresh = nn.Sequential(NearestMeanHead())
    for source in (small, large, empty, small):
        fresh.load_state_dict(nn.Sequential(source).state_dict())
        assert fresh[0].known_classes == source.known_classes
        if source is not empty:
            assert torch.equal(fresh(x)[:, : source.max_class + 1], source(x))
    fresh[0].replace_class_means_dict({2: torch.ones(5)})
    assert fresh[0].known_classes == (2,)


def test_network_is_avalanche_s_kind_and_its_parts_are_found() -> None:
    torch.manual_seed(0)
    model = NearestMeanNetwork(nn.Linear(8, 6), 6, projection_size=3)
    assert isinstance(model, SCRModel) and find_parts(model).head is model.head is model.eval_classifier
    assert model.feature_extractor is model.backbone and model.train_classifier is model.projector
    x = torch.randn(5, 8)
    projected = model.train()(x)
    torch.testing.assert_close(projected, F.normalize(model.projector(model.backbone(x)), dim=1))
    assert projected.shape == (5, 3)
    model.head.replace_class_means_dict({1: torch.randn(6)})
    assert torch.equal(model.eval()(x), model.head(model.backbone(x)))
    assert not any("ncm" in name or "classifier" in name for name in model.state_dict())


def test_a_probe_can_train_a_linear_classifier_in_the_place_of_the_means() -> None:
    """Fine-tuning with the network in training mode sees logits, not projections."""
    model = NearestMeanNetwork(nn.Linear(8, 6), 6, projection_size=3).train()
    weight, bias = torch.randn(4, 6), torch.randn(4)
    x = torch.randn(5, 8)
    tuned = adapted_copy(model, weight, bias)
    torch.testing.assert_close(tuned.train()(x), F.linear(model.backbone(x), weight, bias))
    assert model(x).shape == (5, 3)


def test_bf16_backbone_float32_distances() -> None:
    model = NearestMeanNetwork(nn.Linear(8, 6), 6, projection_size=3)
    model.head.replace_class_means_dict({1: F.normalize(torch.randn(6), dim=0)})
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(torch.randn(5, 8)).dtype == torch.float32
        assert model.eval()(torch.randn(5, 8)).dtype == torch.float32
