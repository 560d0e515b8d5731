"""Time and memory of CILA's two losses of one batch, forward and backward, against plain masked matrices.

    python speed/contrastive.py            # 1,024 views x 128 dimensions, about a minute on two cores
    python speed/contrastive.py --quick    # 128 views, seconds, nothing recorded

Three ways to the same numbers from projections that are given (no encoder):

* ``gathered``: how Co2L's public code computes, in our own words. The similarities of the student are made twice, once
  for each loss, and those of the teacher; every softmax of the distillation gathers the entries off the diagonal with
  a boolean mask, once for its numerator and once more for its denominator; masks are filled by scatter; autograd.
* ``log-softmax``: the same matrices without gathers, a masked log-softmax each; autograd.
* ``ours``: ``contrastive_distillation``.

Seconds: medians of interleaved rounds after a warm-up, by the clock and of the processor (all threads together);
``times_faster`` is the median of the clock's ratios within a round. What a second thread gains shows on an idle machine
only. Memory: a fresh process for each figure, which runs a small
problem first, so that libraries are loaded, sets the kernel's high-water mark back (``/proc/self/clear_refs``) and
reports by how much one call raised it above the resident memory before the call (``VmHWM - VmRSS``); Linux only.
``loss_deviation`` and ``gradient_deviation``: largest difference from ``gathered`` in float64, relative to the loss and
to the largest entry of the gradient.

The bf16 row trains the digits' network on scikit-learn's digits, one step at a time, and compares the loss of every
batch of the second task with encoder and losses under bf16 autocast to that in float32, same weights, same teacher.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a waiting thread leaves its core to others; before torch starts

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from avalanche_firn.models.contrastive import ContrastiveClassifier, with_projection_head
from avalanche_firn.models.convnets import digit_convnet
from avalanche_firn.plugins.contrastive_losses import ContrastiveTerms, contrastive_distillation

RESULTS = Path(__file__).parent / "results" / "contrastive.json"
TEMPERATURE, BASE, STUDENT, TEACHER = 0.5, 0.07, 0.2, 0.01  # Co2L on CIFAR-10


class Problem(NamedTuple):
    student: Tensor  # (2N, d) unit rows
    teacher: Tensor  # (2N, d) unit rows
    labels: Tensor  # (2N,)
    anchors: Tensor  # (2N,) bool

    def double(self) -> Problem:
        return Problem(self.student.double(), self.teacher.double(), self.labels, self.anchors)


def problem(views: int, width: int) -> Problem:
    """Ten classes, two of them current (about a fifth of the rows are anchors), two views near each other."""
    generator = torch.Generator().manual_seed(0)

    def projections() -> Tensor:
        samples = torch.randn(views // 2, width, generator=generator).repeat(2, 1)
        return F.normalize(samples + 0.5 * torch.randn(views, width, generator=generator), dim=1)

    labels = torch.randint(10, (views // 2,), generator=generator).repeat(2)
    return Problem(projections(), projections(), labels, labels >= 8)


# -------------------------------------------------------------------------------------------------- three ways
def gathered(p: Problem) -> Tensor:
    count = len(p.student)
    diagonal = torch.arange(count)[:, None]

    def elsewhere(like: Tensor) -> Tensor:
        return torch.ones_like(like).scatter(1, diagonal, 0)

    def softmax(similarities: Tensor, mask: Tensor) -> Tensor:
        similarities = similarities - (similarities * mask).amax(1, keepdim=True).detach()
        numerator = torch.exp(similarities[mask.bool()].view(count, -1))
        denominator = torch.exp(similarities[mask.bool()].view(count, -1)).sum(1, keepdim=True)
        return numerator / denominator

    relations = p.student @ p.student.T / STUDENT
    mask = elsewhere(relations)
    ours = softmax(relations, mask)

    logits = p.student @ p.student.T / TEMPERATURE
    logits = logits - logits.amax(1, keepdim=True).detach()
    partners = (p.labels[:, None] == p.labels).float()
    partners = partners * elsewhere(partners)
    others = torch.exp(logits) * elsewhere(partners)
    log_probability = logits - torch.log(others.sum(1, keepdim=True))
    attraction = (partners * log_probability).sum(1) / partners.sum(1)
    contrastive = (-TEMPERATURE / BASE * attraction * p.anchors).mean()

    with torch.no_grad():
        theirs = softmax(p.teacher @ p.teacher.T / TEACHER, mask)
    return contrastive + (-theirs * torch.log(ours)).sum(1).mean()


def log_softmax(p: Problem) -> Tensor:
    diagonal = torch.eye(len(p.student), dtype=torch.bool)

    def relations(similarities: Tensor, temperature: float) -> Tensor:
        return torch.log_softmax((similarities / temperature).masked_fill(diagonal, -1e9), 1)

    similarities = p.student @ p.student.T
    partners = ((p.labels[:, None] == p.labels) & ~diagonal).to(similarities.dtype)
    attraction = (partners * relations(similarities, TEMPERATURE)).sum(1) / partners.sum(1)
    with torch.no_grad():
        target = relations(p.teacher @ p.teacher.T, TEACHER).exp()
    distillation = -(target * relations(similarities, STUDENT)).sum(1).mean()
    return (-TEMPERATURE / BASE * attraction * p.anchors).mean() + distillation


def ours(p: Problem) -> Tensor:
    return contrastive_distillation(
        p.student,
        p.labels,
        p.anchors,
        temperature=TEMPERATURE,
        base_temperature=BASE,
        teacher_features=p.teacher,
        student_temperature=STUDENT,
        teacher_temperature=TEACHER,
    ).total


WAYS: dict[str, Callable[[Problem], Tensor]] = {"gathered": gathered, "log-softmax": log_softmax, "ours": ours}


def step(way: str, p: Problem) -> tuple[float, Tensor]:
    """Loss and gradient."""
    leaf = p.student.detach().clone().requires_grad_()
    loss = WAYS[way](p._replace(student=leaf))
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


# ------------------------------------------------------------------------------------------------ measurements
def seconds(p: Problem, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """By the clock and of the processor."""
    took: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(2):
        for way in WAYS:
            step(way, p)
    for _ in range(rounds):
        for way in WAYS:
            start, busy = time.perf_counter(), time.process_time()
            step(way, p)
            took[way].append((time.perf_counter() - start, time.process_time() - busy))
    return took


def growth(way: str, p: Problem) -> float:
    """MiB by which one call raises the resident memory of this process at its highest; for a fresh process."""

    def status(field: str) -> int:
        rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith(field + ":"))

    step(way, problem(64, 16))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmRSS")
    step(way, p)
    return (status("VmHWM") - before) / 1024


def memory(way: str, args: argparse.Namespace) -> float:
    """Median over fresh processes, MiB."""
    command = [sys.executable, __file__, "--memory-of", way, "--views", str(args.views), "--width", str(args.width)]
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(args.processes)
    ]
    return statistics.median(float(output.split()[-1]) for output in outputs)


def deviations(way: str, p: Problem) -> dict[str, float]:
    loss, gradient = step("gathered", p.double())
    actual, slope = step(way, p)
    return {
        "loss_deviation": abs(actual - loss) / loss,
        "gradient_deviation": float((slope - gradient).abs().max() / gradient.abs().max()),
    }


def bf16_deviation(steps: int, batch: int) -> dict[str, Any]:
    """Largest relative differences over the batches of the second task."""
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], (28, 28), mode="bilinear")
    targets = torch.tensor(digits.target)
    model, teacher = with_projection_head(digit_convnet()).train(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    worst: dict[str, float] = defaultdict(float)
    for classes, anchors_from in ((5, 0), (10, 5)):  # the second task sees the images of the first again
        rows = (targets < classes).nonzero()[:, 0]
        for _ in range(steps):
            chosen = rows[torch.randint(len(rows), (batch,))].repeat(2)
            views = images[chosen] + 0.2 * torch.randn(2 * batch, 1, 28, 28)
            labels = targets[chosen]
            terms = encoder_losses(model, teacher, views, labels, labels >= anchors_from, bf16=False)
            if teacher is not None:
                with torch.no_grad():
                    narrow = encoder_losses(model, teacher, views, labels, labels >= anchors_from, bf16=True)
                for field, exact, other in zip(terms._fields, terms, narrow, strict=True):
                    worst[field] = max(worst[field], abs(float(other) / exact.item() - 1))
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
        teacher = copy.deepcopy(model).requires_grad_(False)
    return {"network": "digit_convnet", "views": 2 * batch, "steps": steps, "largest_relative_deviation": dict(worst)}


def encoder_losses(
    model: ContrastiveClassifier,
    teacher: ContrastiveClassifier | None,
    views: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    bf16: bool,
) -> ContrastiveTerms:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            relations = None if teacher is None else teacher.project(views)
        return contrastive_distillation(
            model(views),
            labels,
            anchors,
            temperature=TEMPERATURE,
            base_temperature=BASE,
            teacher_features=relations,
            student_temperature=STUDENT,
            teacher_temperature=TEACHER,
        )


def machine() -> dict[str, Any]:
    cpu, model = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        model = next((row.split(":")[1].strip() for row in cpu.read_text().splitlines() if "model name" in row), model)
    return {
        "device": f"CPU, {model}",
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and record; returns what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 views, 3 rounds, recorded nowhere")
    parser.add_argument("--views", type=int, default=1024, help="rows 2N (default 1024: Co2L's batches of 512)")
    parser.add_argument("--width", type=int, default=128, help="of the projections (default 128)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of timing (default 15)")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes a memory figure (default 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch (default 1 2)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory, and its processes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.views, args.rounds, args.processes = 128, 3, 1
    p = problem(args.views, args.width)
    if args.memory_of:
        torch.set_num_threads(1)
        print(growth(args.memory_of, p))
        return {}
    rows: list[dict[str, Any]] = [{"way": way, **deviations(way, p), "threads": {}} for way in WAYS]
    for threads in args.threads:
        torch.set_num_threads(threads)
        took = seconds(p, args.rounds)
        for row in rows:
            own = took[row["way"]]
            row["threads"][str(threads)] = {
                "seconds": statistics.median(clock for clock, _ in own),
                "processor_seconds": statistics.median(busy for _, busy in own),
                "times_faster": statistics.median(a[0] / b[0] for a, b in zip(took["gathered"], own, strict=True)),
            }
    for row in rows:
        row["memory_MiB"] = math.nan if args.no_memory else memory(row["way"], args)
        row["memory_share"] = row["memory_MiB"] / rows[0]["memory_MiB"]
    torch.set_num_threads(args.threads[0])
    bf16 = bf16_deviation(2 if args.quick else 30, 32 if args.quick else 128)
    setting = {name: getattr(args, name) for name in ("views", "width", "rounds", "processes", "threads")}
    report = {**machine(), **setting, "rows": rows, "bf16": bf16}
    print(f"{args.views} views x {args.width}, forward and backward; {report['device']}, load {report['load_average']}")
    for row in rows:
        times = "".join(
            f"   {k} threads: {t['seconds']:.4f} s ({t['processor_seconds']:.4f} s of the processor), "
            f"{t['times_faster']:.2f} times faster"
            for k, t in row["threads"].items()
        )
        print(f"{row['way']:<12}{row['memory_MiB']:6.1f} MiB ({row['memory_share']:.0%}){times}")
        print(f"{'':<12}deviation: loss {row['loss_deviation']:.1e}, gradient {row['gradient_deviation']:.1e}")
    print("bf16 autocast against float32: " + json.dumps(bf16["largest_relative_deviation"]))
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to {args.output}")
    return report


if __name__ == "__main__":
    main()
