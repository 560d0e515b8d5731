"""Training throughput: Avalanche's ``Naive``, SLCA's stage 1 and a hand-written PyTorch loop, interleaved.

Same model, images, batch size, optimizer and learning rates in every contestant, so the ratios are what the frameworks
cost. Only training epochs are timed (no set-up, no statistics, no alignment). Run on an idle machine:

    python speed/throughput.py                      # the embedded transformer and a small perceptron
    python speed/throughput.py --model vit_base_patch16_224 --image-size 224 --precision bf16    # on a GPU

Prints a table and where an iteration's time goes; writes speed/results/throughput.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import avalanche_firn.models  # noqa: F401  (registers the embedded backbone)
from avalanche_firn.models.parts import FeatureClassifier, find_parts, with_taskwise_head
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.strategies.slca import SLCA

CLASSES = 10


class Stopwatch(SupervisedPlugin):
    """Seconds per epoch and, per part of an iteration, from the strategy's own hooks."""

    def __init__(self, device: torch.device, parts: bool) -> None:
        super().__init__()
        self.device, self.parts = device, parts
        self.epochs: list[float] = []
        self.seconds: dict[str, float] = defaultdict(float)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _lap(self, part: str) -> None:
        if self.parts:
            now = self._now()
            self.seconds[part] += now - self.last
            self.last = now

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.start = self.last = self._now()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self.epochs.append(self._now() - self.start)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("fetch a batch")

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("hooks, zero_grad")

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("forward")

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("loss")

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("backward")

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("hooks, zero_grad")

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("optimizer")

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self._lap("hooks, zero_grad")


def make_model(name: str, image_size: int) -> nn.Module:
    """The contestants' model, freshly built: ``mlp`` or a timm name, with a classifier of one task."""
    torch.manual_seed(0)
    if name == "mlp":
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 64), nn.ReLU(), nn.Linear(64, 64))
        return with_taskwise_head(backbone, feature_size=64)
    size = {"img_size": image_size} if "vit" in name else {}
    return with_taskwise_head(timm.create_model(name, num_classes=0, **size))


def raw_epoch(model: FeatureClassifier, data: TensorDataset, args: argparse.Namespace) -> float:
    """One epoch as a person would write it: two rates, shuffled ``DataLoader``, nothing else."""
    model.head.add_task(range(CLASSES))
    model.to(args.device).train()
    head = [p for _, p in find_parts(model).head_parameters()]
    groups = [{"params": list(model.backbone.parameters()), "lr": 1e-4}, {"params": head}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True, pin_memory=args.device.type == "cuda")
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for x, y in loader:
        x, y = x.to(args.device, non_blocking=True), y.to(args.device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def strategy_epoch(kind: str, model: nn.Module, experience: Any, args: argparse.Namespace, parts: bool) -> Stopwatch:
    """One epoch of a strategy over the same images."""
    watch = Stopwatch(args.device, parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    metrics = [accuracy_metrics(epoch=True), loss_metrics(epoch=True)] if kind.endswith("metrics") else []
    shared: dict[str, Any] = dict(
        model=model,
        optimizer=optimizer,
        train_mb_size=args.batch_size,
        eval_mb_size=256,
        device=args.device,
        plugins=[watch, MixedPrecisionPlugin(args.precision)],
        evaluator=EvaluationPlugin(*metrics, loggers=[_Silent()], collect_all=False),
    )
    if kind.startswith("SLCA"):
        strategy = SLCA(**shared, alignment=ClassifierAlignmentPlugin(epochs=0), fresh_final_norm=False)
    else:
        strategy = Naive(**shared)
    # first in line: SLCA measures its class statistics at the end of the last epoch, which is not training
    strategy.plugins.remove(watch)
    strategy.plugins.insert(0, watch)
    strategy.train(experience, eval_streams=[])
    return watch


class _Silent:
    def log_metrics(self, values: Any) -> None:
        """Drop the values."""


CONTESTANTS = ("Naive", "Naive, epoch metrics", "SLCA stage 1", "SLCA stage 1, epoch metrics")


def measure(name: str, image_size: int, samples: int, args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of all contestants, one epoch each in turn, ``args.rounds`` times."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, image_size, image_size, generator=generator)
    data = TensorDataset(images, torch.arange(samples) % CLASSES)
    data.targets = data.tensors[1].tolist()  # type: ignore[attr-defined]
    dataset = as_classification_dataset(data)
    experience = with_classes_timeline(benchmark_from_datasets(train=[dataset])).train_stream[0]
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.rounds + 1):  # the first turn warms up
        took = {"hand-written loop": raw_epoch(make_model(name, image_size), data, args)}
        for kind in CONTESTANTS:
            watch = strategy_epoch(kind, make_model(name, image_size), experience, args, parts=False)
            took[kind] = watch.epochs[0]
        for kind, value in took.items():
            if turn:
                seconds[kind].append(value)
    parts = {
        kind: strategy_epoch(kind, make_model(name, image_size), experience, args, parts=True).seconds
        for kind in CONTESTANTS
    }
    iterations = -(-samples // args.batch_size)
    return {
        "model": name,
        "image_size": image_size,
        "samples": samples,
        "batch_size": args.batch_size,
        "images_per_second": {k: round(samples / statistics.median(v), 1) for k, v in seconds.items()},
        "time_ratio_to_hand_written": {
            k: round(statistics.median(a / b for a, b in zip(v, seconds["hand-written loop"], strict=True)), 3)
            for k, v in seconds.items()
        },
        "microseconds_per_iteration": {
            kind: {part: round(1e6 * value / iterations, 1) for part, value in laps.items()}
            for kind, laps in parts.items()
        },
    }


def show(result: dict[str, Any]) -> None:
    """Print one model's table."""
    print(f"\n{result['model']}, {result['image_size']} px, batch {result['batch_size']}")
    for kind, speed in result["images_per_second"].items():
        print(f"  {kind:<30}{speed:>10.1f} images/s   {result['time_ratio_to_hand_written'][kind]:.3f} x the time")
    columns = list(result["microseconds_per_iteration"]["Naive"])
    print("  microseconds per iteration    " + "".join(f"{c:>18}" for c in columns))
    for kind, laps in result["microseconds_per_iteration"].items():
        print(f"  {kind:<30}" + "".join(f"{laps.get(c, 0):>18.0f}" for c in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a timm name or mlp; default: vit_firn_32 and mlp in turn")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument(
        "--samples", type=int, default=1024, help="images per epoch (default 1024; mlp: 8 times as many)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")
    parser.add_argument("--rounds", type=int, default=7, help="counted turns (default 7)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default fp32")
    parser.add_argument("--device", type=torch.device, default=None, help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    args = parser.parse_args()
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for name in [args.model] if args.model else ["vit_firn_32", "mlp"]:
        results.append(measure(name, args.image_size, args.samples * (8 if name == "mlp" else 1), args))
        show(results[-1])
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report = {
        "device": device,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "precision": args.precision,
        "rounds": args.rounds,
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{device}; written to {args.output}")


if __name__ == "__main__":
    main()
