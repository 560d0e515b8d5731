"""models/contrastive.py: two outputs of one network, its layout of views, its float32 part, what is put together."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from avalanche_firn.models import (
    ContrastiveClassifier,
    DigitConvNet,
    FeatureClassifier,
    ProjectionHead,
    TaskwiseLinearHead,
    extract_features,
    find_parts,
    with_projection_head,
    with_taskwise_head,
)
from avalanche_firn.models.contrastive import check_projecting, flatten_views


def body(width=6):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.Tanh())


def network(normalize=True, dtype=torch.float32):
    torch.manual_seed(0)
    model = ContrastiveClassifier(body(), ProjectionHead(6, 5, 4), nn.Linear(6, 3), normalize=normalize)
    return model.to(dtype)


def images(count=5, views=2, dtype=torch.float32):
    shape = (count, views, 3, 2, 2) if views else (count, 3, 2, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# ----------------------------------------------------------------------- output
def test_projections_in_training_and_logits_in_evaluation():
    model, x = network(), images()
    projections = model(x)
    assert projections.shape == (10, 4)
    torch.testing.assert_close(projections.norm(dim=1), torch.ones(10))
    model.eval()
    single = images(views=0)
    torch.testing.assert_close(model(single), model.head(model.backbone(single)), rtol=0, atol=0)
    assert model(x).shape == (10, 3)
    assert model.project(x).shape == (10, 4)  # whatever the mode


def test_rows_of_the_two_views_are_n_apart():
    model, x = network().eval(), images()
    flat = flatten_views(x)
    assert all(torch.equal(flat[i], x[i, 0]) and torch.equal(flat[i + 5], x[i, 1]) for i in range(5))
    both = model.project(x)
    for view in (0, 1):
        torch.testing.assert_close(both[5 * view : 5 * view + 5], model.project(x[:, view]))
    single = x[:, 0]
    assert flatten_views(single) is single
    assert not torch.equal(both[:5], both[5:])


def test_both_views_share_the_batch_statistics():
    model, x = network(dtype=torch.float64), images(dtype=torch.float64)
    model(x)
    inner = model.backbone[1](torch.cat([x[:, 0], x[:, 1]]).flatten(1))
    torch.testing.assert_close(model.backbone[2].running_mean, 0.1 * inner.mean(0).detach())
    assert int(model.backbone[2].num_batches_tracked) == 1


@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_is_a_choice(normalize):
    model, x = network(normalize).eval(), images()
    raw = model.projector(model.backbone(flatten_views(x)))
    assert (raw.norm(dim=1) - 1).abs().min() > 0.01
    torch.testing.assert_close(model.project(x), F.normalize(raw, dim=1) if normalize else raw, rtol=0, atol=0)


def test_projector_and_norm_stay_in_float32_under_autocast():
    model, x = network().eval(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.backbone(flatten_views(x))
        found = model.project(x)
        rounded = F.normalize(model.projector(features), dim=1)
    assert features.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, F.normalize(model.projector(features.float()), dim=1), rtol=0, atol=0)
    assert (found - rounded).abs().max() > 1e-4  # what the projector would have lost
    found.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.projector.parameters())


def test_a_model_in_float64_stays_there():
    assert network(dtype=torch.float64)(images(dtype=torch.float64)).dtype == torch.float64


def test_the_classifier_gets_no_gradient_from_projections():
    model = network()
    model(images()).sum().backward()
    assert all(p.grad is None for p in model.head.parameters())
    assert all(p.grad is not None for p in [*model.backbone.parameters(), *model.projector.parameters()])


# ------------------------------------------------------------------ construction
@pytest.mark.parametrize(
    ("name", "size", "shape"), [("resnet10t", 512, (2, 3, 32, 32)), ("digit_convnet", 500, (2, 1, 28, 28))]
)
def test_on_a_timm_model(name, size, shape):
    settings = {"num_classes": 7} if name == "resnet10t" else {}
    model = with_projection_head(timm.create_model(name, **settings))
    assert isinstance(model.head, TaskwiseLinearHead) and not model.head.freeze_old
    assert (model.head.in_features, model.projector.in_features, model.projector.out_features) == (size, size, 128)
    assert model.projector.hidden.out_features == size
    assert model(torch.randn(shape)).shape == (2, 128)
    assert with_projection_head(model) is model


def test_widths_are_arguments():
    model = with_projection_head(DigitConvNet(), projection_size=9, hidden_size=11, normalize=False)
    assert (model.projector.hidden.out_features, model.projector.out_features, model.normalize) == (11, 9, False)
    assert with_projection_head(body(), feature_size=6).projector.in_features == 6


def test_on_a_model_that_has_a_classifier_already():
    plain = FeatureClassifier(body(), nn.Linear(6, 3))
    model = with_projection_head(plain, feature_size=6, projection_size=4)
    assert model.backbone is plain.backbone and model.head is plain.head
    grown = with_taskwise_head(body(), feature_size=6)
    model = with_projection_head(grown, projection_size=4)  # the width is the classifier's
    assert model.head is grown.head and model.projector.in_features == 6


def test_an_unknown_feature_size():
    with pytest.raises(ValueError, match="feature size of Sequential is not known; give feature_size"):
        with_projection_head(body())


# ------------------------------------------------------------------------- parts
def test_a_model_without_projections_is_refused():
    with pytest.raises(ValueError, match=r"FeatureClassifier has no project\(images\)"):
        check_projecting(FeatureClassifier(body(), nn.Linear(6, 3)))

    class Headless(nn.Module):
        def project(self, x):
            return x

    with pytest.raises(ValueError, match="classifier of Headless was not found"):
        check_projecting(Headless())
    check_projecting(network())


def test_backbone_and_classifier_are_found():
    model = network()
    parts = find_parts(model)
    assert parts.head is model.head
    assert {name.split(".")[0] for name, _ in parts.backbone_parameters()} == {"backbone", "projector"}
    assert {name for name, _ in parts.head_parameters()} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("training", [True, False])
def test_extracted_features_are_the_backbones(training):
    model, x = network().train(training), images(views=0)
    features, targets = extract_features(model, TensorDataset(x, torch.arange(5)), batch_size=3)
    assert model.training is training and torch.equal(targets, torch.arange(5))
    torch.testing.assert_close(features, model.eval().backbone(x))


@pytest.mark.parametrize("bn", ["train", "new_bn_stats", "refresh"])
def test_features_in_training_mode_are_refused_where_the_classifier_is_not_called(bn):
    model, data = network(), TensorDataset(images(views=0), torch.arange(5))
    if bn == "train":
        with pytest.raises(ValueError, match=r"doesn't call its classifier 'head' with bn='train'"):
            extract_features(model, data, bn=bn)
    else:  # only the statistics come from training mode
        assert extract_features(model, data, bn=bn)[0].shape == (5, 6)
