"""Time and memory of a training step and of an evaluation of LoRA composition at its tenth task.

    python speed/lora.py            # width 384, 224 px, two blocks; several minutes on one core of a CPU
    python speed/lora.py --quick    # width 64, seconds, nothing recorded

Training, one step of a vision transformer with rank-16 pairs on q, k, v, out, fc1, fc2 and Adam, batch 64:

* ``plain``: one pair per matrix beside the frozen layer, ``W x + s (x A) B``, the usual LoRA layer; its first task.
* ``dense``: how LoRAC-IPC's public code composes, in our own words: all past updates as dense matrices, one product per
  task, summed with their scalars, everything by automatic differentiation, penalty included.
* ``ours``: ``ComposedLoRALinear``, penalty included. ``ours, importance``: in the last steps of a task, with the
  importance of all matrices. ``ours, first task``: without a history.

Evaluation of a batch of 64 whose samples belong to ten tasks, task inference included (100 classes of 4 clusters):

* ``forward``: one forward pass of the plain backbone; what the others are measured in.
* ``ours``: ``TaskInferencePlugin.predict``: a pass as the first task, distances, then one pass per task of the batch on
  a CPU, one mixed pass elsewhere; ``ours, one pass``: one mixed pass everywhere.
* ``one by one``: as the public code with batches of one image: dense composition in each pass, two passes an image.

Seconds: medians of interleaved rounds after a warm-up; ratios are medians within a round. Memory: growth of a fresh
process in one step (``VmHWM - VmRSS`` after resetting the mark, Linux), or CUDA's peak; ``extra``: above ``plain``'s.
The three ways of training give the same gradients at 1e-5 (checked first, at the same weights).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a waiting thread leaves its core to others; before torch starts

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from avalanche_firn.models import LoRAComposition, add_composed_lora, with_taskwise_head
from avalanche_firn.models.composed_linear import ComposedLoRALinear
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

RESULTS = Path(__file__).parent / "results" / "lora.json"
RANK, TASKS, CLASSES, LAMBDA = 16, 10, 100, 0.5
TRAINING = ("plain", "dense", "ours", "ours, importance", "ours, first task")
EVALUATION = ("forward", "ours", "ours, one pass", "one by one")


class PlainLoRA(nn.Module):
    """The usual layer: the frozen one, and a pair per part beside it."""

    def __init__(self, layer: ComposedLoRALinear) -> None:
        super().__init__()
        self.base, self.scale = layer.base, layer.scale
        self.A = nn.ParameterList([a[-1].detach().clone() for a in layer.A.values()])
        self.B = nn.ParameterList([b[-1].detach().clone() for b in layer.B.values()])

    def forward(self, x: Tensor) -> Tensor:
        updates = [(x @ a) @ b for a, b in zip(self.A, self.B, strict=True)]
        update = updates[0] if len(updates) == 1 else torch.cat(updates, -1)
        return self.base(x) + self.scale * update


class DenseComposition(nn.Module):
    """All past updates as dense matrices."""

    def __init__(self, layer: ComposedLoRALinear) -> None:
        super().__init__()
        self.base, self.scale, self.view = layer.base, layer.scale, None
        self.parts = list(layer.parts)
        self.A = nn.ModuleDict({p: nn.ParameterList([a.detach().clone() for a in layer.A[p]]) for p in self.parts})
        self.B = nn.ModuleDict({p: nn.ParameterList([b.detach().clone() for b in layer.B[p]]) for p in self.parts})
        self.omega = nn.ParameterDict({p: o.detach().clone() for p, o in layer.omega.items()})
        self.snapshots = layer.snapshots.clone()
        for part in self.parts:
            for task in range(len(self.A[part]) - 1):
                self.A[part][task].requires_grad_(False)
                self.B[part][task].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        deltas = []
        for index, part in enumerate(self.parts):
            last = len(self.A[part]) - 1 if self.view is None else self.view
            scalars = self.omega[part] if self.view is None else self.snapshots[last, index]
            update = torch.stack([self.A[part][i] @ self.B[part][i] for i in range(last + 1)])
            weights = torch.cat([scalars[:last], scalars.new_ones(1)])
            deltas.append((weights[:, None, None] * update).sum(0))
        return F.linear(x, self.base.weight + self.scale * torch.cat(deltas, 1).T, self.base.bias)

    def penalty(self) -> Tensor:
        total = self.base.weight.new_zeros(())
        for part in self.parts:
            A = torch.cat([*(a.detach() for a in self.A[part][:-1]), self.A[part][-1]], 1)
            total = total + torch.linalg.matrix_norm(A.T @ A - torch.eye(A.shape[1], device=A.device))
        return total


def composed(args: argparse.Namespace, tasks: int, *, closed: bool = False) -> nn.Module:
    """A transformer with so many tasks, the newest one open unless `closed`; all pairs and scalars random."""
    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_small_patch16_224", num_classes=0, img_size=args.size, patch_size=args.patch, embed_dim=args.width,
        depth=args.depth, num_heads=args.width // 64,
    )  # fmt: skip
    model = with_taskwise_head(backbone)
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    for task in range(TASKS):
        model.head.add_task(range(10 * task, 10 * task + 10))
    add_composed_lora(model, rank=RANK)
    layers, generator = LoRAComposition(model), torch.Generator().manual_seed(1)
    for task in range(tasks):
        layers.open_task(generator)
        with torch.no_grad():
            for layer in layers.layers.values():
                for part in layer.parts:
                    layer.B[part][-1].normal_(0, 0.3, generator=generator)
                    if part in layer.omega:
                        layer.omega[part].uniform_(0.5, 1.5, generator=generator)
        if closed or task + 1 < tasks:
            layers.close_task()
    return model.to(args.device)


def replaced(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The model with other layers of the same weights."""
    for name, layer in LoRAComposition(model).layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, kind(layer))
    return model.to(next(model.parameters()).device)


def training(way: str, args: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """The model and one training step of it."""
    first = way in ("plain", "ours, first task")
    model = composed(args, 1 if first else TASKS)
    if way == "plain":
        model = replaced(model, PlainLoRA)
    if way == "dense":
        model = replaced(model, DenseComposition)
    layers = LoRAComposition(model) if way.startswith("ours") else None
    if layers is not None and way == "ours, importance":
        layers.record({name: lambda value: None for name in layers.positions})
    dense = [m for m in model.modules() if isinstance(m, DenseComposition)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(args.device)
    y = torch.randint(90, 100, (args.batch,), generator=generator).to(args.device)
    model.train()

    def step(update: bool = True) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if layers is not None:
            loss = loss + LAMBDA * layers.orthogonality()
        if dense:
            loss = loss + LAMBDA * torch.stack([layer.penalty() for layer in dense]).sum()
        loss.backward()
        if update:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    return model, step


def check(args: argparse.Namespace) -> float:
    """Largest difference of gradients between ``dense`` and ``ours``, relative to the largest entry of each."""
    gradients = []
    for way in ("dense", "ours"):
        model, step = training(way, args)
        step(update=False)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
    ours, dense = gradients[1], gradients[0]
    if set(ours) != set(dense):
        raise SystemExit(f"other gradients: {sorted(set(ours) ^ set(dense))[:5]}")
    return max(float((ours[n] - dense[n]).abs().max() / dense[n].abs().max()) for n in ours)


def evaluation(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """The ways, as functions without arguments."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(args.device)
    plain = composed(args, 0).eval()
    model = composed(args, TASKS, closed=True).eval()
    plugin = TaskInferencePlugin(inference=MahalanobisTaskInference(4).to(args.device))
    together = TaskInferencePlugin(inference=plugin.inference, mixed="one_pass")
    for class_id in range(CLASSES):
        rows = torch.randn(500, args.width, generator=generator).to(args.device)  # images per class of CIFAR-100
        labels = torch.arange(len(rows)) % 4
        plugin.inference.add(class_id, rows, class_id // 10, labels=labels)
    single = replaced(composed(args, TASKS, closed=True), DenseComposition).eval()
    layers = [m for m in single.modules() if isinstance(m, DenseComposition)]

    @torch.no_grad()
    def forward() -> Tensor:
        return plain(x)

    @torch.no_grad()
    def one_by_one() -> Tensor:
        outputs = []
        for image in x.split(1):
            for layer in layers:
                layer.view = 0
            features = single.backbone(image)
            task = int(plugin.inference.infer(features))
            for layer in layers:
                layer.view = task
            outputs.append(single(image))
        return torch.cat(outputs)

    return {
        "forward": forward,
        "ours": lambda: plugin.predict(model, x),
        "ours, one pass": lambda: together.predict(model, x),
        "one by one": one_by_one,
    }


def timed(ways: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way in interleaved rounds, after one round for warming up."""
    took: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, function in ways.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                took[way].append(time.perf_counter() - start)
    return took


def growth(way: str, args: argparse.Namespace) -> float:
    """MiB by which the third step raised the peak above what was resident before it."""
    _, step = training(way, args)
    step()
    step()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    step()
    return (_kilobytes("VmHWM") - before) / 1024


def _kilobytes(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1])
    raise KeyError(field)


def measured_growth(way: str, args: argparse.Namespace) -> float:
    """The same in a fresh process."""
    options = [f"--{name}={getattr(args, name)}" for name in ("width", "depth", "size", "patch", "batch", "device")]
    command = [sys.executable, __file__, "--memory-of", way, *options]
    # glibc gives freed blocks back at once, so that what earlier steps left behind hides nothing
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return float(output.split()[-1])


def machine(device: str) -> dict[str, Any]:
    cpu, name = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        name = next((row.split(":")[1].strip() for row in cpu.read_text().splitlines() if "model name" in row), name)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {name}",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def ratio(took: dict[str, list[float]], way: str, against: str) -> float:
    return statistics.median(a / b for a, b in zip(took[way], took[against], strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and record; returns what is recorded, under its key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 64, one round, recorded nowhere")
    parser.add_argument("--width", type=int, default=384, help="of the transformer (default 384: ViT-S)")
    parser.add_argument("--depth", type=int, default=2, help="blocks (default 2; all blocks are alike)")
    parser.add_argument("--size", type=int, default=224, help="pixels (default 224)")
    parser.add_argument("--patch", type=int, default=16, help="pixels (default 16: 197 tokens)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of timing (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip", choices=("training", "evaluation"), help="leave one part out")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory, and its processes")
    parser.add_argument("--name", default="", help="key of the record, default: the sizes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=TRAINING, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.quick:
        args.width, args.depth, args.size, args.batch, args.rounds = 64, 1, 64, 8, 1
    if args.memory_of:
        print(growth(args.memory_of, args))
        return {}
    setting = {n: getattr(args, n) for n in ("width", "depth", "size", "patch", "batch", "rounds")}
    report: dict[str, Any] = {**machine(args.device), **setting, "rank": RANK, "tasks": TASKS}
    if args.skip != "training":
        report["gradient_deviation"] = check(args)
        took = timed({way: training(way, args)[1] for way in TRAINING}, args.rounds, args.device)
        memory = {way: math.nan if args.no_memory else measured_growth(way, args) for way in TRAINING}
        report["training"] = {
            way: {
                "seconds": statistics.median(took[way]),
                "times_plain": ratio(took, way, "plain"),
                "times_dense": ratio(took, way, "dense"),
                "memory_MiB": memory[way],
                "extra_MiB": memory[way] - memory["plain"],
            }
            for way in TRAINING
        }
        for way, row in report["training"].items():
            print(
                f"{way:<18}{row['seconds']:8.3f} s   {row['times_plain']:.2f} x plain"
                f"   {row['times_dense']:.2f} x dense   {row['memory_MiB']:8.1f} MiB, {row['extra_MiB']:+.1f}"
            )
    if args.skip != "evaluation":
        took = timed(evaluation(args), args.rounds, args.device)
        report["evaluation"] = {
            way: {
                "seconds": statistics.median(took[way]),
                "times_forward": ratio(took, way, "forward"),
                "times_faster_than_one_by_one": ratio(took, "one by one", way),
            }
            for way in EVALUATION
        }
        for way, row in report["evaluation"].items():
            print(f"{way:<18}{row['seconds']:8.3f} s   {row['times_forward']:.2f} x forward", end="")
            print(f"   {row['times_faster_than_one_by_one']:.1f} x faster than one by one")
    key = args.name or f"width {args.width}, {args.size} px, patch {args.patch}, {args.device}"
    if not args.quick:
        known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**known, key: report}, indent=2) + "\n", encoding="utf-8")
        print(f"written to {args.output}")
    return {key: report}


if __name__ == "__main__":
    main()
