"""SCR: Avalanche's training to the bit, class means by hand, and what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.models import SCRModel
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import SCR
from torch import nn
from torch.nn import functional as F

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.models.heads import UNSEEN_LOGIT
from avalanche_firn.models.nearest_mean import NearestMeanNetwork
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.strategies.avalanche_scr import ResumableSCR

pytestmark = pytest.mark.filterwarnings("ignore")

ORDER = [7, 3, 9, 1, 0, 2, 8, 4, 6, 5]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits() -> Any:
    return digits_stream(image_size=8, class_order=ORDER)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))


def brighter(images: torch.Tensor) -> torch.Tensor:
    return images * (0.8 + 0.4 * torch.rand(len(images), 1, 1, 1))


def scr(model: nn.Module, *plugins: Any, kind: type = ResumableSCR, **settings: Any) -> Any:
    common = {"train_mb_size": 32, "train_epochs": 2, "eval_mb_size": 7, "evaluator": None, "mem_size": 40}
    common |= {"batch_size_mem": 20, "augmentations": brighter, **settings}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return kind(model=model, optimizer=optimizer, plugins=[FreshOptimizerPlugin(), *plugins], **common)


def train(strategy: Any, experiences: Any) -> Any:
    for experience in experiences:
        torch.manual_seed(int(experience.current_experience))
        strategy.train(experience, eval_streams=[])
    return strategy


def test_training_equals_avalanche_s(digits: Any) -> None:
    """To the bit, on Avalanche's model, over experiences with stored images; also the means of the first one."""
    runs = []
    for kind in (ResumableSCR, SCR):
        torch.manual_seed(0)
        model = SCRModel(encoder(), nn.Linear(16, 8))
        strategy = train(scr(model, kind=kind), digits.train[:1])
        means = {c: v.clone() for c, v in model.eval_classifier.class_means_dict.items()}
        train(strategy, digits.train[1:3])
        runs.append((torch.cat([p.flatten() for p in model.parameters()]), means))
    (ours, means), (theirs, expected) = runs
    assert torch.equal(ours, theirs) and means.keys() == expected.keys() == {3, 7}
    for c, mean in means.items():
        torch.testing.assert_close(mean, expected[c], rtol=1e-4, atol=1e-5)


def test_means_are_those_of_the_present_encoder(digits: Any) -> None:
    """Normalised features of the stored images of a class, summed and normalised, one image after the other; Avalanche
    averages them with those of earlier encoders."""
    strategy = train(scr(NearestMeanNetwork(encoder(), 16, projection_size=8)), digits.train[:3])
    buffer, model = strategy.replay_plugin.storage_policy, strategy.model.eval()
    assert buffer.labels.unique().tolist() == sorted(ORDER[:6]) == list(model.head.known_classes)
    for c in ORDER[:6]:
        features = []
        for row in torch.nonzero(buffer.labels == c).flatten().tolist():
            origin, position = buffer.places[row].tolist()
            with torch.no_grad():
                feature = model.backbone(digits.train[origin].dataset.eval()[position][0][None])[0]
            features.append(feature / feature.norm())
        mean = torch.stack(features).sum(0)
        torch.testing.assert_close(model.head.class_means[c], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert strategy.model.head.class_means.shape == (10, 16)


def test_the_loss_is_that_of_the_paper(digits: Any) -> None:
    """Eq. 5 with nested loops: all images of both views are anchors; times temperature / 0.07, as in Avalanche."""
    found: list[tuple[float, torch.Tensor, torch.Tensor]] = []

    class Look(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            found.append((float(strategy.loss), strategy.mb_output.detach().clone(), strategy.mb_y.clone()))

    model = NearestMeanNetwork(encoder(), 16, projection_size=8)
    train(scr(model, Look(), temperature=0.2, train_epochs=1), digits.train[:2])
    loss, output, targets = found[-2]
    assert output.shape == (52, 2, 8) and len(targets) == 52
    z, labels = torch.cat([output[:, 0], output[:, 1]]), targets.repeat(2).tolist()
    similar = (z @ z.T / 0.2).tolist()
    total = 0.0
    for i in range(104):
        others = [a for a in range(104) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        normaliser = torch.tensor([similar[i][a] for a in others]).logsumexp(0)
        total -= sum(similar[i][p] - float(normaliser) for p in positives) / len(positives)
    assert loss == pytest.approx(0.2 / 0.07 * total / 104, rel=1e-4)


def test_evaluation_before_training_and_of_unseen_classes(digits: Any) -> None:
    strategy = scr(NearestMeanNetwork(encoder(), 16))
    strategy.eval(digits.test)
    train(strategy, digits.train[:2])
    state = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    strategy.eval(digits.test)
    assert all(torch.equal(v, state[k]) for k, v in strategy.model.state_dict().items())
    output = strategy.model.eval()(digits.test[4].dataset[0][0][None])
    assert output.shape == (1, 10) and (output[0, ORDER[4:]] == UNSEEN_LOGIT).all()


def test_bf16_loss_is_float32(digits: Any) -> None:
    kinds: list[torch.dtype] = []

    class Look(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            anchors = F.normalize(strategy.mb_output.detach().double(), dim=2).float()
            exact = strategy.train_loss(anchors, strategy.mb_y)
            assert float(strategy.loss) == pytest.approx(float(exact), rel=1e-4)
            kinds.append(strategy.mb_output.dtype)

    precision = MixedPrecisionPlugin("bf16")
    strategy = train(scr(NearestMeanNetwork(encoder(), 16), precision, Look()), digits.train[:2])
    assert set(kinds) == {torch.float32}
    strategy.eval(digits.test[:2])
    assert strategy.model.head.class_means.dtype == torch.float32


def test_refusals(digits: Any) -> None:
    model = NearestMeanNetwork(encoder(), 16)
    with pytest.raises(ValueError, match="mem_size is 9 with 10 classes, whose means are taken over stored images; 10"):
        train(scr(model, mem_size=9), digits.train[:1])
    for wrong, message in (
        ({"temperature": 0}, "temperature is 0; a number above 0"),
        ({"batch_size_mem": 0}, "batch_size_mem is 0"),
        ({"mem_size": 0}, "mem_size is 0; 1 and above"),
    ):
        with pytest.raises(ValueError, match=message):
            scr(model, **wrong)
    with pytest.raises(ValueError, match="SCRModel"):
        scr(nn.Linear(2, 2))
