"""A network of 300 weights, streams of a few vectors-as-images, and every method of the registry built on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.scenarios.generic_scenario import CLScenario
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import Dataset

from avalanche_firn.benchmarks.streams import Stream, avalanche_dataset, eager_stream
from avalanche_firn.evaluation.device_metrics import device_accuracy_metrics, device_loss_metrics
from avalanche_firn.evaluation.metrics import continual_metrics
from avalanche_firn.experiments.config import validate
from avalanche_firn.experiments.environment import seed_everything
from avalanche_firn.experiments.methods import METHODS, Ingredients, build_strategy
from avalanche_firn.models.backbones import Backbone
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.plugins import FastPathPlugin, FiniteGuardPlugin

A, B = [0, 0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3, 3]
VIEWS = {"jitter": None, "grey": 0.0, "flip": 0.0, "crop_scale": [0.9, 1.0], "blur": 0.0}
CONTRASTIVE = {"classifier": {"epochs": 1}, "rehearsal": {"mem_size": 8}, "augmentation": VIEWS}
SETTINGS: dict[str, dict[str, Any]] = {
    "slca": {"alignment": {"epochs": 1, "samples_per_class": 8}},
    "slca_plus_plus": {
        "lora_targets": ["mix"], "lora_rank": 2,
        "alignment": {"epochs": 1, "samples_per_class": 8, "scaling": "feature"},
    },
    "lora": {"lora": {"targets": ["mix"], "rank": 2}},
    "lorac_ipc": {
        "lora": {"targets": ["mix"], "rank": 2}, "importance": {"threshold": 1.0}, "task_inference": {"clusters": 2},
        "alignment": {"epochs": 1, "samples_per_class": 8, "clusters": 2},
    },
    "lp_ft": {"linear_probe": {"max_iter": 20}},
    "replay": {"rehearsal": {"mem_size": 8}},
    "co2l": CONTRASTIVE,
    "cila": CONTRASTIVE,
    "der": {"rehearsal": {"mem_size": 8}},
    "scr": {"rehearsal": {"mem_size": 8, "batch_size_mem": 4}, "augmentation": VIEWS},
    "avalanche_replay": {"rehearsal": {"mem_size": 8}},
}  # fmt: skip


class Tiny(nn.Module):
    """Convolution, BatchNorm and a linear layer; ``maps=1`` leaves BatchNorm one value per image and channel."""

    num_features = 12

    def __init__(self, maps: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1) if maps == 4 else nn.Conv2d(3, 4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.Linear(4 * maps, 12)

    def forward(self, x):
        return self.mix(torch.relu(self.norm(self.conv(x))).flatten(1))


class Images(Dataset):
    """Images (N, 3, 4, 4) and their labels."""

    def __init__(self, x: torch.Tensor, targets: Sequence[int]) -> None:
        self.x, self.targets = x, list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index):
        return self.x[index], self.targets[index]


def images(labels: Sequence[int], seed: int, constant: bool = False) -> torch.Tensor:
    """One centre per class and noise, or the same grey image for all."""
    if constant:
        return torch.full((len(labels), 3, 4, 4), 0.5)
    centres = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return centres[torch.tensor(list(labels), dtype=torch.long)] + 0.3 * noise


def stream_of_labels(
    train: Sequence[Sequence[int]], test: Sequence[Sequence[int]], *, constant: bool = False
) -> Stream:
    """One experience per list of labels, of which some may be empty."""
    parts = {"train": train, "test": test}
    if all(labels for part in parts.values() for labels in part):
        streams = [
            eager_stream(
                name,
                [avalanche_dataset(Images(images(y, i, constant), y), name, None, None) for i, y in enumerate(part)],
            )
            for name, part in parts.items()
        ]
        benchmark = CLScenario(streams)
    else:
        data = {
            name: [
                as_classification_dataset(Images(images(y or A, i, constant), y or A)).subset(list(range(len(y))))
                for i, y in enumerate(part)
            ]
            for name, part in parts.items()
        }
        benchmark = with_classes_timeline(benchmark_from_datasets(**data))
    classes = sorted({c for labels in train for c in labels})
    sizes = tuple(len(set(labels)) for labels in train)
    return Stream("tiny", benchmark, tuple(classes), sizes, tuple(map(str, classes)), "tiny")


def build(method: str, *plugins: Any, maps: int = 4, guard: bool = True, batch: int = 4, **more: Any) -> Any:
    """The strategy of a method, two epochs of batches of four, with ``plugins`` last.

    :param more: sections of the configuration, or settings of the method.
    """
    sections = {name: more.pop(name) for name in ("training", "performance", "precision") if name in more}
    training = {"epochs": 2, "batch_size": batch, "optimizer": {"lr": 0.01}, **sections.pop("training", {})}
    config = validate(
        {
            "name": "tiny", "seeds": [0], "device": "cpu", "stream": {"name": "digits", "tasks": 5},
            "training": training, "methods": [{"strategy": method, **SETTINGS.get(method, {}), **more}], **sections,
        }
    )  # fmt: skip
    seed_everything(0)
    data_config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 4, 4)}
    backbone = Backbone(Tiny(maps), 12, data_config, "tiny", "random", "0")
    metrics = [*continual_metrics(image=False), *device_accuracy_metrics(), *device_loss_metrics()]
    evaluator = EvaluationPlugin(*metrics, loggers=[BaseLogger()], collect_all=False)
    own = [FastPathPlugin(), *plugins]
    strategy = build_strategy(Ingredients(config, backbone, torch.device("cpu"), own, evaluator, FeatureCache()))
    if guard:
        strategy.plugins.insert(0, FiniteGuardPlugin())
    return strategy


def run(strategy: Any, stream: Stream, start: int = 0, *, method: str = "naive") -> None:
    """Train on everything from an experience on; evaluate on everything after each."""
    stream = stream.joint() if METHODS[method].joint else stream
    for experience in stream.train[start:]:
        strategy.train(experience, eval_streams=[], num_workers=0)
        strategy.eval(stream.test, num_workers=0)


def state(strategy: Any) -> dict[str, torch.Tensor]:
    """Copies of all tensors of the model, and all figures."""
    tensors = {name: tensor.clone() for name, tensor in strategy.model.state_dict().items()}
    last = strategy.evaluator.get_last_metrics()
    figures = {k: v for k, v in last.items() if isinstance(v, float) and not k.startswith("efficiency/")}
    return tensors | {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and the same bits."""
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different, different
