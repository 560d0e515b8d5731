"""Cost of what belongs to zapping: the look at single tasks, episodes, the transfer, and the zap itself.

    python speed/zapping.py --omniglot ROOT    # the small Omniglot sets; without: random images of the same shape
    python speed/zapping.py --quick            # one short round, nothing recorded

* ``dynamics``: continual transfer to 67 classes of 15 images, one image at a time, by Adam; with ``TaskDynamics`` at
  its defaults (``default``), at class ends (``experience``), or as the options say (``options``), against ``none``.
* ``asb``, ``meta``: training by ``ASB`` and ``MetaASB`` as Avalanche runs them, data loading included, against a
  hand-written loop over tensors in memory (``loop``) that zaps, draws, learns and updates alike.
* ``transfer``: the same transfer without it by ``continual_transfer`` (``ours``) and by Avalanche's Naive with batches
  of one image (``naive``), against a hand-written ``loop``; all with accuracies after the first and the last class.
* ``zap``: Avalanche's Naive on a classifier of 1,000 outputs: ``ZappingPlugin`` in each iteration, on one row or on all
  of them, against no zaps; also milliseconds of a single zap.

One thread; seconds are medians of interleaved rounds after a warm-up, ratios medians within a round. That the ways
compared end in the same weights is measured first (largest difference of a weight, ``deviation``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a waiting thread leaves its core to others; before torch starts

import numpy as np
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from avalanche_firn.benchmarks import (
    OMNIGLOT_SMALL_PRETRAIN,
    OMNIGLOT_SMALL_TRANSFER,
    ClassImages,
    Stream,
    build_stream,
    omniglot_classes,
    one_class_stream,
)
from avalanche_firn.evaluation import TaskDynamics
from avalanche_firn.models import InstanceNormConvNet
from avalanche_firn.plugins import ZappingPlugin
from avalanche_firn.plugins.random_state import derived_seed
from avalanche_firn.strategies.transfer import continual_transfer, prepare_head, transfer_tasks
from avalanche_firn.strategies.zapping import ASB, MetaASB

RESULTS = Path(__file__).parent / "results" / "zapping.json"
PARTS = ("dynamics", "asb", "meta", "transfer", "zap")
RATE, INNER_RATE, SEED = 1e-3, 1e-3, 0
INNER, REMEMBER, OUTPUTS = 20, 64, 1000  # the papers' Omniglot
Ways = dict[str, Callable[[], Any]]


def random_classes(count: int, per_class: int) -> ClassImages:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count * per_class, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return ClassImages(images, torch.arange(count).repeat_interleave(per_class), tuple(map(str, range(count))))


def class_sets(root: str | None) -> tuple[ClassImages, ClassImages]:
    """Classes of pre-training (175) and of transfer (67), 20 images each."""
    if root is None:
        return random_classes(175, 20), random_classes(67, 20)
    alphabets_inside = (Path(root) / OMNIGLOT_SMALL_TRANSFER[0]).is_dir()
    part = None if alphabets_inside else "small"
    before = omniglot_classes(root, part, alphabets=OMNIGLOT_SMALL_PRETRAIN)
    return before, omniglot_classes(root, part, alphabets=OMNIGLOT_SMALL_TRANSFER)


def one_experience(images: ClassImages) -> Any:
    """All classes as a single training experience."""
    count, data = images.num_classes, images.dataset()
    return build_stream(
        "all", train=data, test=data, class_order=tuple(range(count)), task_sizes=(count,),
        class_names=images.class_names, fingerprint=images.fingerprint(),
    ).train[0]  # fmt: skip


def transfer_stream(images: ClassImages) -> Stream:
    """One class per experience, 5 images to test and 15 to learn."""
    test, train = images.split(5, 15, seed=SEED)
    return one_class_stream(train, test, allow_shared_images=True)


def network(width: int, outputs: int) -> InstanceNormConvNet:
    torch.manual_seed(SEED)
    return InstanceNormConvNet(28, width=width, num_classes=outputs, dead_biases=False)


def deviation(first: nn.Module, second: nn.Module) -> float:
    """Largest difference between two weights."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return float(torch.stack([(a - b).detach().abs().max() for a, b in pairs]).max())  # NaN if there is any


def dynamics_ways(width: int, stream: Stream, args: argparse.Namespace) -> Ways:
    model, tasks = network(width, 175), transfer_tasks(stream.train, stream.test)
    probed = [(task.test_images, task.test_labels) for task in tasks]
    names = ("every", "max_tasks", "images_per_task", "batch_size")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings: dict[str, dict[str, Any] | None] = {"none": None, "default": {}, "experience": {"every": "experience"}}
    settings |= {"options": chosen} if chosen else {}

    def way(setting: dict[str, Any] | None) -> Callable[[], nn.Module]:
        def transfer() -> nn.Module:
            dynamics = None if setting is None else TaskDynamics(probed, **setting)
            return continual_transfer(model, tasks, lr=RATE, seed=SEED, dynamics=dynamics).model

        return transfer

    return {name: way(setting) for name, setting in settings.items()}


def episode_loop(model: nn.Module, images: Tensor, labels: Tensor, *, meta: bool) -> Callable[[int, int], None]:
    """The hand-written way: ``episodes, seed ->`` training of ``model``."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    inner = torch.optim.SGD(model.parameters(), lr=INNER_RATE)
    classes = int(labels.max()) + 1
    pools = [np.flatnonzero(labels.numpy() == c) for c in range(classes)]
    everything, fan_in = np.concatenate(pools), model.fc.in_features
    zaps = torch.Generator().manual_seed(derived_seed(SEED, 1))

    def learn(rows: np.ndarray) -> None:
        for row in rows.tolist():
            inner.zero_grad()
            F.cross_entropy(model(images[row : row + 1]), labels[row : row + 1]).backward()
            inner.step()

    def unroll(rows: np.ndarray) -> dict[str, Tensor]:
        fast: dict[str, Tensor] = dict(model.named_parameters())
        for row in rows.tolist():
            loss = F.cross_entropy(functional_call(model, fast, (images[row : row + 1],)), labels[row : row + 1])
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: w - INNER_RATE * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
        return fast

    def train(episodes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(episodes):
            chosen = int(rng.choice(classes))
            sequence = rng.choice(pools[chosen], INNER, replace=len(pools[chosen]) < INNER)
            batch = torch.from_numpy(np.concatenate([sequence, rng.choice(everything, REMEMBER, replace=False)]))
            with torch.no_grad():
                model.fc.weight[chosen] = torch.randn(fan_in, generator=zaps) * (2 / fan_in) ** 0.5
            if meta:
                logits = functional_call(model, unroll(sequence), (images[batch],))
            else:
                learn(sequence)
                logits = model(images[batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()

    return train


def episode_ways(width: int, images: ClassImages, args: argparse.Namespace, *, meta: bool) -> tuple[Ways, float, int]:
    """The ways, the deviation after three episodes, and the episodes in a round."""
    experience, count = one_experience(images), images.num_classes
    pixels, labels = images.pixels(), images.labels
    kind, episodes = (MetaASB, max(2, args.episodes // 3)) if meta else (ASB, args.episodes)

    def ours(number: int) -> Any:
        return kind(
            model=network(width, count), inner_lr=INNER_RATE, outer_lr=RATE, episodes=number, zap=True,
            inner_steps=INNER, remember_size=REMEMBER, seed=SEED, evaluator=EvaluationPlugin(),
        )  # fmt: skip

    short, model = ours(3), network(width, count)
    short.train(experience, eval_streams=[])
    episode_loop(model, pixels, labels, meta=meta)(3, SEED)
    strategy, loop = ours(episodes), episode_loop(network(width, count), pixels, labels, meta=meta)
    ways = {"loop": lambda: loop(episodes, SEED), "ours": lambda: strategy.train(experience, eval_streams=[])}
    return ways, deviation(short.model, model), episodes


def transfer_ways(width: int, stream: Stream) -> Ways:
    model, tasks = network(width, 175), transfer_tasks(stream.train, stream.test)
    prepare_head(model, 67, generator=torch.Generator().manual_seed(SEED))
    test, targets = torch.cat([t.test_images for t in tasks]), torch.cat([t.test_labels for t in tasks])

    @torch.no_grad()
    def figures(net: nn.Module) -> Tensor:
        hits = [net(x).argmax(1) == y for x, y in zip(test.split(256), targets.split(256), strict=True)]
        return torch.cat(hits).double().mean()

    def loop() -> nn.Module:
        net = copy.deepcopy(model)
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        for index, task in enumerate(tasks):
            for image, label in zip(task.images.split(1), task.labels.split(1), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(net(image), label).backward()
                optimizer.step()
            if index in (0, len(tasks) - 1):
                figures(net)
        return net

    def naive() -> nn.Module:
        net = copy.deepcopy(model)
        strategy = Naive(
            model=net, optimizer=torch.optim.Adam(net.parameters(), lr=RATE), criterion=nn.CrossEntropyLoss(),
            train_mb_size=1, train_epochs=1, evaluator=EvaluationPlugin(),
        )  # fmt: skip
        for index, experience in enumerate(stream.train):
            strategy.train(experience, eval_streams=[], shuffle=False)
            if index in (0, len(tasks) - 1):
                figures(net)
        return net

    return {
        "loop": loop,
        "ours": lambda: continual_transfer(model, tasks, lr=RATE, head="given", seed=SEED).model,
        "naive": naive,
    }


def zap_images(args: argparse.Namespace) -> int:
    """Images of an epoch: at least one of each class."""
    return OUTPUTS * max(1, round(args.zap_batch * args.zap_steps / OUTPUTS))


def zap_ways(width: int, args: argparse.Namespace) -> Ways:
    experience = one_experience(random_classes(OUTPUTS, zap_images(args) // OUTPUTS))

    def way(scope: Any) -> Callable[[], Any]:
        zaps = [] if scope is None else [ZappingPlugin(scope=scope, schedule="iteration", skip_first=False, seed=SEED)]
        model = network(width, OUTPUTS)
        strategy = Naive(
            model=model, optimizer=torch.optim.Adam(model.parameters(), lr=RATE), criterion=nn.CrossEntropyLoss(),
            train_mb_size=args.zap_batch, train_epochs=1, plugins=zaps, evaluator=EvaluationPlugin(),
        )  # fmt: skip
        return lambda: strategy.train(experience, eval_streams=[], shuffle=False)

    return {"no zap": way(None), "one row": way([0]), "all rows": way("all")}


def timed(ways: Ways, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in interleaved rounds, after one round for warming up; each round starts with another."""
    took: dict[str, list[float]] = {way: [] for way in ways}
    names = list(ways)
    for turn in range(rounds + 1):
        for way in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            ways[way]()
            if turn:
                took[way].append(time.perf_counter() - start)
    return took


def machine() -> dict[str, Any]:
    cpu, name = Path("/proc/cpuinfo"), platform.processor()
    if cpu.exists():
        name = next((row.split(":")[1].strip() for row in cpu.read_text().splitlines() if "model name" in row), name)
    return {
        "device": f"CPU, {name}",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }


def measure(part: str, width: int, sets: tuple[ClassImages, ClassImages], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the ways of a part, their ratios to the first, and how far their weights are apart."""
    found: dict[str, Any] = {}
    if part in ("dynamics", "transfer"):
        stream = transfer_stream(sets[1])
        ways = dynamics_ways(width, stream, args) if part == "dynamics" else transfer_ways(width, stream)
        first, *others = [way() for way in ways.values()]
        found["deviation"] = max(deviation(first, other) for other in others)
    elif part == "zap":
        ways = zap_ways(width, args)
    else:
        train, _ = sets[0].split(15, 5, seed=SEED)
        ways, found["deviation"], found["episodes"] = episode_ways(width, train, args, meta=part == "meta")
    took = timed(ways, args.rounds)
    base = next(iter(ways))
    rows: dict[str, dict[str, float]] = {}
    for way, seconds in took.items():
        ratios = [a / b for a, b in zip(seconds, took[base], strict=True)]
        rows[way] = {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios)}
        if part == "zap" and way != base:
            extra = [a - b for a, b in zip(seconds, took[base], strict=True)]
            iterations = math.ceil(zap_images(args) / args.zap_batch)
            rows[way]["milliseconds_a_zap"] = 1000 * statistics.median(extra) / iterations
    if part == "transfer":
        rows["naive"]["times_ours"] = rows["naive"]["ratio"] / rows["ours"]["ratio"]
    return {**found, "ways": rows}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and record; returns what is recorded, under its key."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round with few episodes, recorded nowhere")
    parser.add_argument("--omniglot", metavar="ROOT", help="folder of the small Omniglot sets (default: random images)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 32], help="of the network (default 16 32)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default 7)")
    parser.add_argument("--episodes", type=int, default=60, help="of ASB in a round; a third for Meta-ASB (default 60)")
    parser.add_argument("--zap-batch", type=int, default=50, help="images in a training step of zap (default 50)")
    parser.add_argument("--zap-steps", type=int, default=20, help="training steps of zap in a round (default 20)")
    parser.add_argument("--every", type=int, help="of TaskDynamics, as the next three: adds the way 'options'")
    parser.add_argument("--max-tasks", type=int)
    parser.add_argument("--images-per-task", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--name", default="cpu", help="key of the record (default cpu)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # of Avalanche: no evaluator's metrics
    if args.quick:
        args.rounds, args.episodes = 1, 6
    data = "random images" if args.omniglot is None else "small Omniglot"
    print(f"data: {data}")
    sets = class_sets(args.omniglot)
    names = ("rounds", "zap_batch", "zap_steps", "every", "max_tasks", "images_per_task", "batch_size")
    report: dict[str, Any] = {**machine(), "data": data, **{name: getattr(args, name) for name in names}}
    for part in args.parts:
        for width in args.widths:
            found = report.setdefault(part, {})[f"width {width}"] = measure(part, width, sets, args)
            apart = f"   deviation {found['deviation']:.1e}" if "deviation" in found else ""
            print(f"{part}, width {width}{apart}")
            for way, row in found["ways"].items():
                more = "".join(
                    f"   {n.replace('_', ' ')} {v:.2f}" for n, v in row.items() if n not in ("seconds", "ratio")
                )
                print(f"    {way:<12}{row['seconds']:8.3f} s{row['ratio']:8.3f}{more}")
    if not args.quick:
        known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**known, args.name: report}, indent=2) + "\n", encoding="utf-8")
        print(f"written to {args.output}")
    return {args.name: report}


if __name__ == "__main__":
    main()
