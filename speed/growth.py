"""The curves of ``curves``: how cost grows with classes, samples, past tasks, past samples and pixels.

Each function gives rows of one or more curves: a contestant per point, its ratio to the first point of the curve. The
last point carries the bound, as a ratio to the first: 1.05 or 1.1 where the cost must not grow, ``1.1 x`` where it may
grow in proportion (our choice, where the issue of the speed programme names no figure).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins import ZappingPlugin
from avalanche_firn.plugins.alignment_math import align_classifier, gaussian_batches
from avalanche_firn.plugins.class_statistics import ClassGaussians
from speed import alignment, lora, zapping
from speed.measure import Lap, Row, Settings, Timings, interleaved, make_row, rows_from
from speed.throughput import Case, strategy_for
from speed.workload import EpochClock, OnDevice, experience_of, held, on, recorded

__all__ = ["CURVES", "exponent", "point_rows"]

BENCHMARK = "curves"
FLAT, SLACK = 1.05, 1.1


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of ``log y`` against ``log x`` by least squares; NaN for fewer than two different ``x``."""
    logs = [math.log(v) for v in x]
    centre, middle = statistics.fmean(logs), statistics.fmean(math.log(v) for v in y)
    spread = sum((a - centre) ** 2 for a in logs)
    if not spread:
        return math.nan
    return sum((a - centre) * (math.log(b) - middle) for a, b in zip(logs, y, strict=True)) / spread


def point_rows(
    timings: Timings,
    case: str,
    points: Mapping[str, float],
    settings: Settings,
    *,
    axis: str,
    bound: float | None = None,
    **figures: Any,
) -> list[Row]:
    """Rows of one curve.

    Args:
        points: value on the axis by contestant, in rising order. axis: what it counts.
        bound: of the last point's ratio to the first.
        figures: further fields of the rows.
    """
    first, *_, last = points
    slope = exponent(list(points.values()), [timings.median(name) for name in points])
    details = {name: {"axis": axis, "x": x, "exponent": slope} for name, x in points.items()}
    bounds = {} if bound is None else {last: bound}
    chosen = Timings({name: timings.seconds[name] for name in points})
    return rows_from(chosen, BENCHMARK, case, settings, to_what=first, bounds=bounds, details=details, **figures)


def _proportional(x: Sequence[float]) -> float:
    return SLACK * x[-1] / x[0]


# ------------------------------------------------------------------------------------- statistics and alignment
def aligned(settings: Settings) -> list[Row]:
    """Drawing an epoch of rows, and one epoch of alignment on them, against the number of classes.

    Drawing grows in proportion. The alignment has products of all rows with all classes' weights, so a part of its
    arithmetic grows with the square; its bound is proportional to the arithmetic.
    """
    counts, size, samples = ((4, 8, 16), 32, 6) if settings.quick else ((10, 32, 100, 320, 1000), 768, 30)
    draws: dict[str, Callable[[], Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for classes in counts:
        problem = alignment.problem(classes, samples, size, 2)
        gaussians = ClassGaussians()
        for class_id, rows in enumerate(problem.features):
            gaussians.add(class_id, rows)
        gaussians.to(settings.device)
        problem = problem._replace(features=torch.empty(0))  # its memory
        name = f"{classes} classes"
        out = torch.empty(classes, alignment.ROWS, size, device=settings.device)
        draws[name] = partial(_draw, gaussians, out, settings.device)
        runs[name] = partial(_align, problem, gaussians, settings.device)
    points = {f"{classes} classes": float(classes) for classes in counts}
    drawn = interleaved(draws, settings.rounds_or(3), device=settings.device)
    draws.clear()
    timings = interleaved(runs, settings.rounds_or(3), device=settings.device)
    shape = f"{alignment.ROWS} rows a class, {size} features"
    operations = [classes * (2 * samples + 4 * classes) for classes in counts]  # per row and feature
    return [
        *point_rows(drawn, f"drawing {shape}", points, settings, axis="classes", bound=_proportional(counts)),
        *point_rows(
            timings,
            f"alignment, an epoch of {shape}",
            points,
            settings,
            axis="classes",
            bound=_proportional(operations),
        ),
    ]


def _draw(gaussians: ClassGaussians, out: Tensor, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    gaussians.sample(gaussians.class_ids, alignment.ROWS, generator, out=out)


def _align(problem: alignment.Problem, gaussians: ClassGaussians, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(1)
    weight, bias, task = (t.to(device) for t in (problem.weight, problem.bias, problem.class_task))
    batches = gaussian_batches(gaussians, gaussians.class_ids, generator=generator, mean_scale=problem.scale.to(device))
    align_classifier(weight, bias, batches, task, lr=0.01, momentum=0.9, weight_decay=5e-4, epochs=1, temperature=0.1)


def class_statistics(settings: Settings) -> list[Row]:
    """Time and bytes of a class's Gaussian against its number of samples."""
    counts, size = ((4, 8, 16, 64), 32) if settings.quick else ((10, 30, 100, 300, 1000, 3000), 768)
    found: list[Row] = []
    for form in ("low_rank", "cholesky"):
        data = {f"{n} samples": torch.randn(n, size, generator=torch.Generator().manual_seed(n)) for n in counts}
        runs = {name: partial(_add, form, features.to(settings.device)) for name, features in data.items()}
        timings = interleaved(runs, settings.rounds_or(7), device=settings.device)
        case = f"statistics of a class, {size} features, {form}"
        points = dict(zip(runs, map(float, counts), strict=True))
        found += point_rows(timings, case, points, settings, axis="samples per class", bound=_proportional(counts))
        for n, (name, run) in zip(counts, runs.items(), strict=True):
            documented = 4 * size * (min(n, size + 1) if form == "low_rank" else size + 1)
            stored = run().nbytes
            found.append(
                make_row(
                    BENCHMARK,
                    f"bytes of a class, {size} features, {form}",
                    name,
                    settings,
                    ratio=stored / documented,
                    to_what="documented",
                    quantity="bytes",
                    bound=1.0,
                    details={"axis": "samples per class", "x": float(n), "bytes": stored},
                )
            )
    return found


def _add(form: str, features: Tensor) -> ClassGaussians:
    gaussians = ClassGaussians(form)
    gaussians.add(0, features)
    return gaussians


# ------------------------------------------------------------------------------------------------- LoRA, zapping
def _lora_options(settings: Settings) -> argparse.Namespace:
    small = {"width": 64, "depth": 1, "size": 32, "patch": 16, "batch": 4}
    full = {"width": 384, "depth": 2, "size": 224, "patch": 16, "batch": 64}
    return argparse.Namespace(**(small if settings.quick else full), device=str(settings.device))


def lora_steps(settings: Settings) -> list[Row]:
    """A training step of LoRAC at its first to tenth task, and a pass with the weights of so many tasks merged."""
    args = _lora_options(settings)
    tasks = (1, 2) if settings.quick else (1, 2, 5, 10)
    size = f"width {args.width}, {args.size} px, {args.depth} blocks, batch {args.batch}"
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(settings.device)
    targets = torch.randint(90, 100, (args.batch,), generator=generator).to(settings.device)
    found: list[Row] = []
    for merged in (False, True):
        runs: dict[str, Callable[[], Any]] = {}
        for count in tasks:
            model = lora.composed(args, count, closed=merged)
            runs[f"task {count}"] = partial(_pass, model.eval(), images) if merged else _step(model, images, targets)
        timings = interleaved(runs, settings.rounds_or(7), warmup=2, device=settings.device)
        case = f"LoRAC-IPC, {'an evaluation pass, merged' if merged else 'a training step'}, {size}"
        points = dict(zip(runs, map(float, tasks), strict=True))
        found += point_rows(timings, case, points, settings, axis="tasks", bound=FLAT)
    return found


@torch.no_grad()
def _pass(model: Any, images: Tensor) -> None:
    model(images)


def _step(model: Any, images: Tensor, targets: Tensor) -> Callable[[], None]:
    layers = lora.LoRAComposition(model.train())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), targets) + lora.LAMBDA * layers.orthogonality()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def zaps(settings: Settings) -> list[Row]:
    """Naive with a zap in every iteration against none, by the number of classes."""
    counts, images, batch = ((10, 20), 20, 10) if settings.quick else ((10, 100, 1000), 1000, 50)
    found: list[Row] = []
    for classes in counts:
        experience = zapping.one_experience(zapping.random_classes(classes, images // classes))
        scopes: dict[str, Any] = {"no zap": None, "one row": [0], "all rows": "all"}
        runs = {name: partial(_zapping_epoch, experience, classes, batch, scope) for name, scope in scopes.items()}
        timings = interleaved(runs, settings.rounds_or(5))
        base = timings.median("no zap")
        details = {
            name: {
                "axis": "classes",
                "x": float(classes),
                "milliseconds_per_zap": 1000 * (timings.median(name) - base) / (images // batch),
            }
            for name in runs
        }
        case = f"zap in every iteration, {classes} classes, batch {batch}"
        cpu = _on_cpu(settings)
        found += rows_from(timings, BENCHMARK, case, cpu, to_what="no zap", images=images, details=details)
    return found


def _zapping_epoch(experience: Any, classes: int, batch: int, scope: Any) -> Lap:
    plugins = [] if scope is None else [ZappingPlugin(scope=scope, schedule="iteration", skip_first=False, seed=0)]
    model = zapping.network(16, classes)
    strategy = zapping.Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=batch,
        train_epochs=1,
        plugins=plugins,
        evaluator=zapping.EvaluationPlugin(),
    )
    clock = EpochClock(torch.device("cpu"))
    clock.install(strategy)
    strategy.train(experience, eval_streams=[])
    return Lap(clock.epochs[-1])


def dynamics(settings: Settings) -> list[Row]:
    """A transfer of one image at a time with the look at single tasks against one without, by the number of classes."""
    options = argparse.Namespace(every=None, max_tasks=None, images_per_task=None, batch_size=None)
    found: list[Row] = []
    for classes in (2, 3) if settings.quick else (5, 20, 67):
        stream = zapping.transfer_stream(zapping.random_classes(classes, 20))
        ways = zapping.dynamics_ways(16, stream, options)
        runs = {name: ways[name] for name in ("none", "default")}
        details = {name: {"axis": "classes", "x": float(classes)} for name in runs}
        timings = interleaved(runs, settings.rounds_or(3), warmup=0 if settings.quick else 1)
        case = f"transfer with the look at single tasks, {classes} classes of 15 images"
        cpu = _on_cpu(settings)
        found += rows_from(timings, BENCHMARK, case, cpu, to_what="none", images=15 * classes, details=details)
    return found


def _on_cpu(settings: Settings) -> Settings:
    """These curves are of small networks, which run on the CPU."""
    return replace(settings, device=torch.device("cpu"))


# -------------------------------------------------------------------------------------------------------- pixels
def pixels(settings: Settings) -> list[Row]:
    """An epoch of SLCA's first stage, fast path, against the edge of the images."""
    edges, batch, depth = ((32, 48), 4, 1) if settings.quick else ((32, 64, 128, 224), 16, 2)

    def epoch(edge: int, data: Any) -> Lap:
        torch.manual_seed(0)
        backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=edge, depth=depth)
        model: Any = with_taskwise_head(OnDevice(backbone), feature_size=backbone.num_features).to(settings.device)
        clock = EpochClock(settings.device)
        case = Case("vit_tiny_patch16_224", edge, batch, 4 * batch, bound=1.0)
        with recorded() as log:
            strategy = strategy_for("SLCA, fast path", model, case, 1, settings.device, log)
            clock.install(strategy)
            strategy.train(data, eval_streams=[])
        return Lap(clock.epochs[-1])

    runs = {
        f"{edge} px": partial(epoch, edge, experience_of(on(held("vit", edge, 4 * batch), settings.device)))
        for edge in edges
    }
    timings = interleaved(runs, settings.rounds_or(5), device=settings.device)
    case = f"SLCA, fast path, ViT-Ti/16 of {depth} blocks, batch {batch}"
    points = {f"{edge} px": float(edge) for edge in edges}
    return point_rows(timings, case, points, settings, axis="pixels of the edge", images=4 * batch)


CURVES: dict[str, Callable[[Settings], list[Row]]] = {
    "alignment": aligned,
    "statistics": class_statistics,
    "lora": lora_steps,
    "zaps": zaps,
    "dynamics": dynamics,
    "pixels": pixels,
}
