"""Cost of a probe phase: features cached once, against the same probe that runs the frozen backbone in every epoch.

Both probe the same images with the same backbone and evaluation transform. Cached: one pass through the backbone, then
the solver on features, as ``LinearProbePlugin`` does it (extraction, solving, writing, its report). Uncached:
``--epochs`` epochs of SGD on the head in a hand-written loop, forward passes of the frozen backbone without gradients,
which is the cheapest such loop. Interleaved, median of ``--rounds`` turns. Run on an idle machine:

    python speed/linear_probe.py                                        # the embedded transformer, batches of 128
    python speed/linear_probe.py --model vit_base_patch16_224 --image-size 224    # on a GPU

Prints a table; writes speed/results/linear_probe.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import avalanche_firn.models  # noqa: F401  (registers the embedded backbone)
from avalanche_firn.models.parts import FeatureClassifier, extract_features
from avalanche_firn.plugins.head_training import stable_rate
from avalanche_firn.plugins.probe_head import describe_probe, write_probe


def uncached(model: FeatureClassifier, data: TensorDataset, args: argparse.Namespace, lr: float) -> None:
    """Epochs of the head alone, the frozen backbone running for every batch of every epoch."""
    model.eval()
    model.head.train()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=lr, momentum=0.9)
    loader = DataLoader(data, batch_size=args.batch_size, shuffle=True)
    for _ in range(args.epochs):
        for x, y in loader:
            with torch.no_grad():
                features = model.backbone(x.to(args.device, non_blocking=True))
            loss = F.cross_entropy(model.head(features), y.to(args.device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def cached(solver: str) -> Callable[[FeatureClassifier, TensorDataset, argparse.Namespace, float], None]:
    """One pass through the backbone, then the solver."""

    def probe(model: FeatureClassifier, data: TensorDataset, args: argparse.Namespace, lr: float) -> None:
        features, targets = extract_features(model, data, batch_size=args.batch_size, device=args.device)
        options = {"lr": lr, "epochs": args.epochs, "batch_size": args.batch_size} if solver == "sgd" else {}
        write_probe(model.head, features, targets, solver=solver, **options)
        describe_probe(model.head, features, targets)

    return probe


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way, in turns, and the mean loss of the heads that they leave."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.samples, 3, args.image_size, args.image_size)
    targets = torch.arange(args.samples) % args.classes
    # a little of the class in every pixel, so that there is something to fit
    images = torch.randn(shape, generator=generator) + 0.02 * targets[:, None, None, None]
    data = TensorDataset(images, targets)
    torch.manual_seed(0)
    kwargs = {"img_size": args.image_size} if "vit" in args.model else {}
    backbone = timm.create_model(args.model, pretrained=False, num_classes=0, **kwargs)
    model = FeatureClassifier(backbone, nn.Linear(backbone.num_features, args.classes)).to(args.device)
    features, labels = extract_features(model, data, batch_size=args.batch_size, device=args.device)
    lr = stable_rate(features, 0.0)
    ways = {
        f"uncached, {args.epochs} epochs of SGD": uncached,
        f"cached, {args.epochs} epochs of SGD": cached("sgd"),
        "cached, lbfgs to the optimum": cached("lbfgs"),
        "cached, ridge": cached("ridge"),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            model.head.reset_parameters()
            _wait(args.device)
            start = time.perf_counter()
            way(model, data, args, lr)
            _wait(args.device)
            seconds[name].append(time.perf_counter() - start)
            losses[name] = _loss(model.head, features, labels)
    slow = seconds[next(iter(ways))]
    return {
        "seconds": {name: round(statistics.median(took), 3) for name, took in seconds.items()},
        "times_cheaper": {
            name: round(statistics.median(a / b for a, b in zip(slow, took, strict=True)), 2)
            for name, took in seconds.items()
        },
        "mean_loss": {name: round(loss, 4) for name, loss in losses.items()},
    }


@torch.no_grad()
def _loss(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(head(features), labels))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and record; returns what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 images, 2 epochs, one turn, recorded nowhere")
    parser.add_argument("--model", default="vit_firn_32", help="a timm name (default: the embedded transformer)")
    parser.add_argument("--image-size", type=int, default=32, help="pixels (default 32)")
    parser.add_argument("--samples", type=int, default=2000, help="images of the experience (default 2000)")
    parser.add_argument("--classes", type=int, default=5, help="classes of the experience (default 5)")
    parser.add_argument("--batch-size", type=int, default=128, help="default 128")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of SGD (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU (default: torch's own choice)")
    parser.add_argument("--device", type=torch.device, default=None, help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "linear_probe.json")
    args = parser.parse_args(argv)
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.samples, args.epochs, args.rounds = 64, 2, 1
    result = measure(args)
    for name, took in result["seconds"].items():
        ratio, loss = result["times_cheaper"][name], result["mean_loss"][name]
        print(f"{name:<34}{took:>9.3f} s   {ratio:>7.2f} times cheaper   mean loss {loss:.4f}")
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    settings = {
        k: getattr(args, k) for k in ("model", "image_size", "samples", "classes", "batch_size", "epochs", "rounds")
    }
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    report = {"device": device, **versions, **settings, **result}
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"{device}; written to {args.output}")
    return report


if __name__ == "__main__":
    main()
