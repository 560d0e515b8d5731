"""Which part is the classifier, feature extraction, modes."""

import pytest
import timm
import torch
from torch import nn

from avalanche_firn.models.heads import TaskwiseLinearHead
from avalanche_firn.models.parts import (
    FeatureClassifier,
    evaluation_mode,
    extract_features,
    find_parts,
    with_taskwise_head,
)


def tiny_vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_heads=2, **kwargs)


class Data:
    """Items (x, y) from tensors, with the attribute that extraction looks for."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (FeatureClassifier(nn.Linear(3, 4), nn.Linear(4, 2)), "head"),
        (tiny_vit(num_classes=5), "head"),
        (timm.create_model("resnet10t", num_classes=5), "fc"),
        (timm.create_model("convnext_atto", num_classes=5), "head.fc"),
        (nn.Sequential(nn.Linear(3, 4), TaskwiseLinearHead(4)), "1"),
        (nn.ModuleDict({"body": nn.Linear(3, 4), "classifier": nn.Linear(4, 2)}), "classifier"),
    ],
)
def test_finds_the_classifier(model, name):
    parts = find_parts(model)
    assert parts.head_name == name
    head = {id(p) for _, p in parts.head_parameters()}
    back = {id(p) for _, p in parts.backbone_parameters()}
    assert not head & back and head | back == {id(p) for p in model.parameters()}


def test_names_given_by_the_user():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert find_parts(model, "1").head is model[1]
    with pytest.raises(ValueError, match="'2' is no module"):
        find_parts(model, "2")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4)), "was not found"),
        (
            nn.ModuleDict({"fc": nn.Linear(3, 4), "classifier": nn.Linear(4, 2)}),
            r"could be any of \['classifier', 'fc'\]",
        ),
        (nn.Sequential(TaskwiseLinearHead(3), TaskwiseLinearHead(3)), "several classifiers"),
        (tiny_vit(num_classes=0), "was not found"),
    ],
)
def test_ambiguous_or_missing(model, message):
    with pytest.raises(ValueError, match=message):
        find_parts(model)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"])
def test_a_taskwise_head_on_any_timm_model(name):
    kwargs = {"img_size": 32} if name.startswith("vit") else {}
    model = with_taskwise_head(timm.create_model(name, num_classes=7, **kwargs))
    assert with_taskwise_head(model) is model
    model.head.add_task([0, 1])
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_unknown_feature_size():
    with pytest.raises(ValueError, match="feature_size"):
        with_taskwise_head(nn.Linear(3, 4))
    assert with_taskwise_head(nn.Linear(3, 4), feature_size=4).head.in_features == 4


def test_features_are_the_input_of_the_classifier_in_evaluation_mode():
    model = timm.create_model("resnet10t", num_classes=5, drop_rate=0.5)
    model.train()
    model.bn1.eval()  # a mode of its own must survive
    modes = {n: m.training for n, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.randn(7, 3, 32, 32), torch.arange(7)
    random_state = torch.get_rng_state()
    features, targets = extract_features(model, Data(x, y), batch_size=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with evaluation_mode(model), torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(targets, y) and not features.requires_grad


def test_extraction_errors():
    with pytest.raises(ValueError, match="empty"):
        extract_features(nn.ModuleDict(), Data([], []))
    model = FeatureClassifier(nn.Identity(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"\(3, 2, 4\)"):
        extract_features(model, Data(torch.randn(3, 2, 4), torch.arange(3)))


def test_frozen_backbone_mode():
    model = FeatureClassifier(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), TaskwiseLinearHead(3))
    model.train()
    find_parts(model).backbone_eval()
    assert model.head.training and not model.backbone[0].training and not model.backbone[1].training


class WithBatchNorm(nn.Module):
    """The golden files' feature extractor: relu(BN(x W' + b)), with a classifier on top."""

    def __init__(self, arrays):
        super().__init__()
        weight = torch.from_numpy(arrays["linear_weight"])
        self.backbone = nn.Sequential(
            nn.Linear(weight.shape[1], weight.shape[0]),
            nn.BatchNorm1d(weight.shape[0], eps=float(arrays["bn_eps"]), momentum=float(arrays["bn_momentum"])),
            nn.ReLU(),
            nn.Dropout(0.0),
        ).double()
        self.head = nn.Linear(weight.shape[0], 2).double()
        linear, norm = self.backbone[0], self.backbone[1]
        values = {
            linear.weight: weight,
            linear.bias: torch.from_numpy(arrays["linear_bias"]),
            norm.weight: torch.from_numpy(arrays["bn_weight"]),
            norm.bias: torch.from_numpy(arrays["bn_bias"]),
        }
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
            norm.running_mean.copy_(torch.from_numpy(arrays["running_mean"]))
            norm.running_var.copy_(torch.from_numpy(arrays["running_var"]))

    def forward(self, x):
        return self.head(self.backbone(x))


class Batches(torch.utils.data.Sampler):
    def __init__(self, sizes):
        self.sizes = sizes

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


@pytest.mark.parametrize("mode", ["eval", "train", "new_bn_stats", "refresh"])
def test_batchnorm_modes_golden(golden, mode, monkeypatch):
    arrays = golden("lp_ft", "bn_feature_modes")
    model = WithBatchNorm(arrays)
    model.train()
    x = torch.from_numpy(arrays["x"])
    sizes = arrays["batch_sizes"].tolist()
    if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:  # batches of the loader have one size; take the golden ones

        def loader(dataset, **kwargs):
            return torch.utils.data.DataLoader(dataset, batch_sampler=Batches(sizes))

        monkeypatch.setattr("avalanche_firn.models.parts.DataLoader", loader)
    features, _ = extract_features(model, Data(x, torch.zeros(len(x)).long()), batch_size=sizes[0], bn=mode)
    norm = model.backbone[1]
    for name, value in (
        ("features", features),
        ("running_mean", norm.running_mean),
        ("running_var", norm.running_var),
    ):
        torch.testing.assert_close(value, torch.from_numpy(arrays[f"{name}_{mode}"]), rtol=0, atol=1e-12)
    if mode != "refresh":
        assert int(norm.num_batches_tracked) == int(arrays[f"num_batches_{mode}"])
    assert model.training and norm.training and norm.momentum == float(arrays["bn_momentum"])


def test_unknown_batchnorm_mode():
    model = FeatureClassifier(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="bn is 'fixed'; one of"):
        extract_features(model, Data(torch.zeros(2, 3), torch.zeros(2).long()), bn="fixed")


def test_models_with_task_labels_get_them():
    from avalanche.models import MTSimpleMLP

    model = MTSimpleMLP(input_size=3, hidden_size=5)
    x = torch.randn(4, 3)
    data = torch.utils.data.TensorDataset(x, torch.tensor([0, 1, 0, 1]), torch.zeros(4).long())
    features, targets = extract_features(model, data)
    model.eval()
    torch.testing.assert_close(features, model.features(x))
    assert targets.tolist() == [0, 1, 0, 1]
