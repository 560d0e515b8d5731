"""Time, accuracy and memory of the whole alignment stage of SLCA, against the public code's way of sampling.

    python speed/alignment.py            # 200 classes x 768 features, about ten minutes on two cores
    python speed/alignment.py --quick    # a small size, seconds, nothing recorded

Per case (samples a class, form of the factor) one run measures, interleaved:

* ``ours``: ``align_classifier`` on ``gaussian_batches``, 5 epochs x 256 rows a class, every SGD step included.
* ``floor``: the same normals and matrix products alone (drawing, transforming, forward and weight gradient of the
  head), without shuffling, loss or update.
* ``baseline``: what the public code does, in our own words: a ``MultivariateNormal(loc, covariance_matrix=...)`` per
  class and epoch with ``.sample((256,))``, a linear layer and a norm per task, autograd, ``torch.optim.SGD``. Without
  its evaluation passes.

``deviation`` is the largest difference between our aligned classifier (float32) and a float64 run of the baseline's
plain training loop on rows that are built from the definitions with the same normals. ``deviation_from_baseline``
(cholesky only, where both consume the generator alike) is against the float32 baseline itself.

``growth``: by how much the resident memory of a fresh process rises in one epoch of each (Linux), statistics made.

Times are medians over the rounds, ``over_floor`` the median of the ratios of neighbouring runs. Run it on an idle
machine: with every core busy, short parallel operations wait for each other and all times grow many times over.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal
from tqdm import tqdm

from avalanche_firn.plugins.alignment_math import align_classifier, gaussian_batches, mean_scale
from avalanche_firn.plugins.class_statistics import ClassGaussians, class_statistics

RESULTS = Path(__file__).parent / "results" / "alignment.json"
EPOCHS, ROWS, CHUNK, SEED = 5, 256, 16, 1
LR, MOMENTUM, DECAY, TEMPERATURE, JITTER = 0.01, 0.9, 5e-4, 0.1, 1e-4
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


class Problem(NamedTuple):
    features: Tensor  # (C, n, d) float32
    class_task: Tensor  # (C,)
    weight: Tensor  # (C, d)
    bias: Tensor  # (C,)

    @property
    def scale(self) -> Tensor:
        return mean_scale(self.class_task, int(self.class_task[-1]))


def problem(classes: int, samples: int, size: int, tasks: int) -> Problem:
    """Features as after a final LayerNorm (norm about sqrt(size)), overlapping classes, heads of a trained size."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 1, size, generator=generator)
    features = F.layer_norm(centres + 3 * torch.randn(classes, samples, size, generator=generator), (size,))
    weight = 0.02 * torch.randn(classes, size, generator=generator)
    return Problem(features, torch.arange(classes) // (classes // tasks), weight, torch.zeros(classes))


def train_per_task_heads(batches: Batches, p: Problem, dtype: torch.dtype) -> Tensor:
    """Alignment written plainly: a layer and a norm per task, autograd, PyTorch's SGD. Returns (C, d + 1)."""
    heads = []
    for task in range(int(p.class_task[-1]) + 1):
        rows = p.class_task == task
        head = torch.nn.Linear(p.weight.shape[1], int(rows.sum()), dtype=dtype)
        head.load_state_dict({"weight": p.weight[rows], "bias": p.bias[rows]})
        heads.append(head)
    optimizer = torch.optim.SGD(
        [t for head in heads for t in head.parameters()], lr=LR, momentum=MOMENTUM, weight_decay=DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for epoch in range(EPOCHS):
        for features, targets in batches(epoch):
            parts = [head(features) for head in heads]
            norm = torch.stack([part.norm(dim=1, keepdim=True) + 1e-7 for part in parts]).mean(0)
            loss = F.cross_entropy(torch.cat(parts, 1) / norm / TEMPERATURE, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return torch.cat([torch.cat([head.weight, head.bias[:, None]], 1) for head in heads]).detach()


def shuffled(rows: Tensor, order: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    for index in order.split(ROWS):
        yield rows[index], index // ROWS


def baseline(p: Problem, moments: list[tuple[Tensor, Tensor]]) -> Tensor:
    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        if epoch == 0:
            torch.manual_seed(SEED)  # here, because building the layers draws from the same generator
        rows = []
        for scale, (mean, covariance) in zip(p.scale.float(), moments, strict=True):
            rows.append(MultivariateNormal(scale * mean, covariance_matrix=covariance).sample((ROWS,)))
        return shuffled(torch.cat(rows), torch.randperm(len(p.weight) * ROWS))

    return train_per_task_heads(batches, p, torch.float32)


def ours(p: Problem, gaussians: ClassGaussians) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    batches = gaussian_batches(gaussians, gaussians.class_ids, ROWS, ROWS, generator=generator, mean_scale=p.scale)
    weight, bias = align_classifier(
        p.weight,
        p.bias,
        batches,
        p.class_task,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        epochs=EPOCHS,
        temperature=TEMPERATURE,
    )
    return torch.cat([weight, bias[:, None]], 1)


def from_definitions(p: Problem, form: str) -> Tensor:
    """The alignment in float64 on the normals that ``ours`` draws, with factors built entry by entry."""
    classes, samples, size = p.features.shape
    features = p.features.double()
    low_rank = form == "low_rank" and samples <= size
    factors = []
    for rows in features:
        if low_rank:
            contrasts = torch.zeros(samples - 1, samples, dtype=torch.float64)
            for i in range(1, samples):
                contrasts[i - 1, :i] = 1 / math.sqrt(i * (i + 1))
                contrasts[i - 1, i] = -i / math.sqrt(i * (i + 1))
            factors.append(contrasts @ rows / math.sqrt(samples - 1))
        else:
            factors.append(torch.linalg.cholesky(torch.cov(rows.T) + JITTER * torch.eye(size)).T)
    generator = torch.Generator().manual_seed(SEED)

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        z = torch.randn(classes, ROWS, size, generator=generator).double()
        w, noise = z, 0.0
        if low_rank:
            chunks = [len(chunk) for chunk in torch.arange(classes).split(CHUNK)]
            w = torch.cat([torch.randn(k, ROWS, samples, generator=generator)[:, :, :-1] for k in chunks]).double()
            noise = math.sqrt(JITTER)
        rows = [p.scale[c] * features[c].mean(0) + w[c] @ factors[c] + noise * z[c] for c in range(classes)]
        return shuffled(torch.cat(rows), torch.randperm(classes * ROWS, generator=generator))

    return train_per_task_heads(batches, p, torch.float64)


def floor(p: Problem, gaussians: ClassGaussians) -> Callable[[], None]:
    """Only the normals and the products of ``ours``; like there, memory is allocated once a run."""
    classes, _, size = p.features.shape
    stack = gaussians.state_dict()["groups"][0]["rows"]
    triangular, width = stack.shape[1] == size + 1, 192
    generator = torch.Generator().manual_seed(SEED)
    slope = torch.randn(ROWS, classes)

    def run() -> None:
        rows, gradient = torch.empty(classes, ROWS, size), torch.empty_like(p.weight)
        coordinates, column = torch.empty(CHUNK, ROWS, stack.shape[1]), torch.empty(CHUNK, ROWS, width)
        for _ in range(EPOCHS):
            rows.normal_(generator=generator)
            for start in range(0, classes, CHUNK):
                block, factor = rows[start : start + CHUNK], stack[start : start + CHUNK]
                if triangular:
                    for j in range(0, size, width):
                        k = min(j + width, size)
                        torch.bmm(block[:, :, :k], factor[:, :k, j:k], out=column[: len(block), :, : k - j])
                else:
                    w = coordinates[: len(block)].normal_(generator=generator)
                    block.baddbmm_(w, factor, beta=0.01)
            for batch in rows.flatten(0, 1).split(ROWS):
                torch.addmm(p.bias, batch, p.weight.T)
                gradient.addmm_(slope.T, batch, beta=0.0)

    return run


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


class Case:
    """One form of the statistics of one problem, with its timings."""

    def __init__(self, p: Problem, form: str) -> None:
        self.p, self.form, self.gaussians = p, form, ClassGaussians(form, JITTER)
        self.statistics_s, _ = seconds(self._add)
        self.lowest = floor(p, self.gaussians)
        self.times: dict[str, list[float]] = {"floor": [], "ours": []}
        self.lowest(), ours(p, self.gaussians)  # warm-up

    def _add(self) -> None:
        for class_id, rows in enumerate(self.p.features):
            self.gaussians.add(class_id, rows)

    def round(self) -> None:
        self.times["floor"].append(seconds(self.lowest)[0])
        self.times["ours"].append(seconds(lambda: ours(self.p, self.gaussians))[0])

    def result(self, baseline_s: float, theirs: Tensor, moments: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        aligned = ours(self.p, self.gaussians)
        ours_s = statistics.median(self.times["ours"])
        ratios = [a / b for a, b in zip(self.times["ours"], self.times["floor"], strict=True)]
        return {
            "samples": self.p.features.shape[1],
            "form": self.form,
            "baseline_s": baseline_s,
            "ours_s": ours_s,
            "speedup": baseline_s / ours_s,
            "floor_s": statistics.median(self.times["floor"]),
            "over_floor": statistics.median(ratios),
            "deviation": float((aligned.double() - from_definitions(self.p, self.form)).abs().max()),
            "deviation_from_baseline": float((aligned - theirs).abs().max()) if self.form == "cholesky" else None,
            "weights_moved_by": float((aligned[:, :-1] - self.p.weight).abs().max()),
            "statistics_s": self.statistics_s,
            "MB_per_class": self.gaussians.nbytes / len(self.p.features) / 1e6,
            "baseline_MB_per_class": sum(t.numel() * t.element_size() for t in moments[0]) / 1e6,
            "all_s": self.times,
        }


def measure(p: Problem, forms: tuple[str, ...], rounds: int, bar: tqdm) -> list[dict[str, Any]]:
    """All forms of one problem; half of the rounds before the baseline, half after it."""
    cases = [Case(p, form) for form in forms]
    moments = [class_statistics(rows, JITTER) for rows in p.features]
    baseline_s, theirs = 0.0, torch.empty(0)
    for number in range(rounds):
        if number == rounds // 2:
            baseline_s, theirs = seconds(lambda: baseline(p, moments))
        for case in cases:
            case.round()
        bar.update(1)
    return [case.result(baseline_s, theirs, moments) for case in cases]


def one_epoch(way: str, classes: int, size: int, tasks: int, samples: int, form: str) -> Callable[[], Any]:
    """One epoch of ``ours`` or of the ``baseline``, its statistics made before."""
    global EPOCHS
    EPOCHS = 1
    p = problem(classes, samples, size, tasks)
    if way == "baseline":
        moments = [class_statistics(rows, JITTER) for rows in p.features]
        return lambda: baseline(p, moments)
    gaussians = ClassGaussians(form, JITTER)
    for class_id, rows in enumerate(p.features):
        gaussians.add(class_id, rows)
    return lambda: ours(p, gaussians)


def growth(result: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """Peak growth of both, MiB, and their ratio."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from speed.memory import peak_memory

    size = {"classes": setting["classes"], "size": setting["features"], "tasks": setting["tasks"]}
    case = {**size, "samples": result["samples"], "form": result["form"]}
    ours_MiB, baseline_MiB = (peak_memory("speed.alignment:one_epoch", way=way, **case) for way in ("ours", "baseline"))
    ratio = ours_MiB / baseline_MiB if ours_MiB is not None and baseline_MiB else None
    return {"growth_MiB": ours_MiB, "baseline_growth_MiB": baseline_MiB, "growth_ratio": ratio}


def machine() -> dict[str, Any]:
    cpu, model = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        model = next((row.split(":")[1].strip() for row in cpu.read_text().splitlines() if "model name" in row), model)
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and record; returns what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="12 classes x 64 features, recorded nowhere")
    parser.add_argument("--classes", type=int, default=200, help="classes, in tasks of 10 (default 200)")
    parser.add_argument("--no-memory", action="store_true", help="measure no memory, which takes processes of its own")
    parser.add_argument("--rounds", type=int, default=6, help="runs of ours and of the floor per case")
    parser.add_argument("--threads", type=int, help="threads of PyTorch; default: its own choice")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    classes, size, tasks = (12, 64, 3) if options.quick else (options.classes, 768, max(1, options.classes // 10))
    small, large = (6, 40) if options.quick else (30, 500)
    cases = {small: ("low_rank",), large: ("low_rank", "cholesky")}
    results = []
    with tqdm(total=len(cases) * options.rounds, disable=None, leave=False, unit="round") as bar:
        for samples, forms in cases.items():
            results += measure(problem(classes, samples, size, tasks), forms, options.rounds, bar)
    setting = {"classes": classes, "features": size, "tasks": tasks, "epochs": EPOCHS, "rows_per_class": ROWS}
    if not options.quick and not options.no_memory:
        results = [{**result, **growth(result, setting)} for result in results]
    print(f"{classes} classes x {size} features, {EPOCHS} epochs x {ROWS} rows a class, {machine()}")
    shown = ["samples", "form", "baseline_s", "ours_s", "speedup", "floor_s", "over_floor", "deviation", "MB_per_class"]
    shown += [name for name in ("growth_MiB", "baseline_growth_MiB") if name in results[0]]
    print("  ".join(f"{name:>12}" for name in shown))
    for row in results:
        cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown]
        print("  ".join(f"{cell:>12}" for cell in cells))
    report = {"machine": machine(), "setting": setting, "results": results}
    if not options.quick:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {options.output}")
    return report


if __name__ == "__main__":
    main()
