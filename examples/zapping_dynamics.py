"""What zapping in pre-training and the optimizer of the transfer do to the dynamics of single classes.

    python examples/zapping_dynamics.py                   # zapped i.i.d. pre-training against none, a minute
    python examples/zapping_dynamics.py --regime asb      # alternating sequential and batch learning; or meta
    python examples/zapping_dynamics.py --omniglot ROOT   # characters of the small Omniglot sets; some minutes
    tensorboard --logdir runs/example-zapping-dynamics

A small convnet is pre-trained on some classes, with zaps and without, and then learns others: class after class, one
image at a time, by SGD and by Adam (arXiv 2310.07996, 2507.01559). The default data are the handwritten digits 0 to 4
and 5 to 9. Interference and synergy are the rises and falls of the losses of earlier classes, summed over all blocks;
shock is how much higher the loss of a class is, when its turn comes, than that of the class before it at the end of its
own; recovery is the number of images until half of that is gone. Pictures go into the folder and to TensorBoard.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from avalanche_firn.benchmarks import (
    OMNIGLOT_SMALL_PRETRAIN,
    OMNIGLOT_SMALL_TRANSFER,
    Stream,
    digit_classes,
    omniglot_stream,
    split_stream,
)
from avalanche_firn.evaluation import (
    Dynamics,
    TaskDynamics,
    Trajectory,
    save_figure,
    trajectory_landscape,
)
from avalanche_firn.models import InstanceNormConvNet
from avalanche_firn.plugins import ZappingPlugin
from avalanche_firn.strategies import ASB, MetaASB, continual_transfer, transfer_tasks

# SGD, Adam; the same with zaps and without. Digits: chosen on the validation images, which are not used here. Omniglot:
# chosen on characters that the recipe zapping_omniglot_small leaves out for that. See strategies/transfer_sweep.py.
DIGIT_RATES, OMNIGLOT_RATES = (0.001, 0.0003), (0.003, 0.001)


def streams(root: str | None, seed: int) -> tuple[Stream, Stream]:
    """Classes to pre-train on and, in an order of the seed, classes to learn afterwards, one per experience."""
    sizes = dict(train_per_class=15, test_per_class=5)
    if root is not None:
        part = None if (Path(root) / OMNIGLOT_SMALL_TRANSFER[0]).is_dir() else "small"  # alphabets, or the two sets
        before = omniglot_stream(root, part, alphabets=OMNIGLOT_SMALL_PRETRAIN, **sizes)
        return before, omniglot_stream(root, part, alphabets=OMNIGLOT_SMALL_TRANSFER, seed=seed, **sizes)
    digits = digit_classes()
    before = split_stream(digits.take(range(5)), name="digits 0 to 4", train_per_class=120, test_per_class=50)
    sizes = dict(train_per_class=50, test_per_class=50, valid_per_class=50)
    return before, split_stream(digits.take(range(5, 10)), name="digits 5 to 9", seed=seed, **sizes)


def pretrain(stream: Stream, args: argparse.Namespace, *, zap: bool) -> nn.Module:
    """A network trained on all classes at once; with and without zaps from the same weights on the same batches."""
    torch.manual_seed(args.seed)
    model = InstanceNormConvNet(28, width=args.width, num_classes=stream.num_classes, dead_biases=False)
    common = dict(model=model, device=args.device, evaluator=EvaluationPlugin())
    if args.regime == "iid":
        zapping = ZappingPlugin.pretraining(every=int(zap), seed=args.seed)  # the whole classifier, before each epoch
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        strategy = Naive(
            **common, optimizer=optimizer, train_mb_size=32, train_epochs=args.epochs, plugins=[zapping]
        )  # fmt: skip
    else:
        kind = MetaASB if args.regime == "meta" else ASB
        strategy = kind(**common, inner_lr=0.01, outer_lr=1e-3, episodes=args.episodes, zap=zap, seed=args.seed)
    strategy.train(stream.joint().train[0], eval_streams=[])
    return strategy.model


def shocks(found: Dynamics) -> tuple[float, float, int]:
    """Mean shock in nats, mean recovery in images of the classes that recovered, and how many did not."""
    columns = [task for (task,) in found.block_tasks]
    turns = zip(found.blocks[1:], columns[1:], found.blocks[:-1], columns[:-1], strict=True)
    places = {task: column for column, task in enumerate(found.task_ids)}
    jumps = [
        found.shock(found.loss[before[1], places[last]], task, row=int(block[0]))
        for block, task, before, last in turns
        if task in places and last in places
    ]
    times = [jump.iterations for jump in jumps if jump.iterations is not None]
    sizes = [jump.size for jump in jumps]
    return float(np.mean(sizes)), float(np.mean(times)) if times else math.nan, len(jumps) - len(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=("iid", "asb", "meta"), default="iid", help="pre-training (default iid)")
    parser.add_argument(
        "--omniglot", metavar="ROOT", help="folder of the small Omniglot sets, or of their alphabets (default: digits)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="of i.i.d. pre-training (default 20)")
    parser.add_argument("--episodes", type=int, default=300, help="of ASB and Meta-ASB (default 300)")
    parser.add_argument("--width", type=int, default=16, help="channels of the network (default 16)")
    parser.add_argument("--sgd-lr", type=float, help="rate of SGD in the transfer (default 0.001; Omniglot 0.003)")
    parser.add_argument("--adam-lr", type=float, help="rate of Adam in the transfer (default 0.0003; Omniglot 0.001)")
    parser.add_argument("--every", type=int, default=1, help="images between two looks at all losses (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of class order, weights, batches, zaps (default 0)")
    parser.add_argument("--logdir", default="runs/example-zapping-dynamics", help="folder of events and pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)  # batches of one image gain nothing from a second core
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    before, after = streams(args.omniglot, args.seed)
    tasks = transfer_tasks(after.train, after.test)
    if args.every > (least := min(len(task.labels) for task in tasks)):
        parser.error(f"--every is {args.every}; 1 to {least} is accepted, so that every class has a block of its own")
    names = [after.class_names[int(task.labels[0])].replace("/character", " ") for task in tasks]
    images, labels = (torch.cat(parts) for parts in zip(*((t.test_images, t.test_labels) for t in tasks), strict=True))
    rates = DIGIT_RATES if args.omniglot is None else OMNIGLOT_RATES
    sgd, adam = (given or usual for given, usual in zip((args.sgd_lr, args.adam_lr), rates, strict=True))
    folder, table = Path(args.logdir), []
    writer = SummaryWriter(args.logdir)
    for start in ("no zap", "zap"):
        model = pretrain(before, args, zap=start == "zap")
        for optimizer, rate in ((torch.optim.SGD, sgd), (torch.optim.Adam, adam)):
            name = f"{start}, {optimizer.__name__}"
            dynamics = TaskDynamics(
                [(task.test_images, task.test_labels) for task in tasks],
                every=args.every, images_per_task=20, task_names=names,
            )  # fmt: skip
            path = Trajectory(part="encoder")
            result = continual_transfer(
                model, tasks, lr=rate, optimizer=optimizer, log_every=1, dynamics=dynamics, seed=args.seed,
                after_task=lambda net, done, path=path: path.record(net, label=f"task {done - 1}" if done else "start"),
            )  # fmt: skip
            for done, accuracy in zip(result.logged_after, result.curve.tolist(), strict=True):
                writer.add_scalar(f"accuracy/{name}", accuracy, done)
            shown = [f"{100 * accuracy:.0f}" for accuracy in result.curve.tolist()]
            some = ", ".join(shown[:: max(1, len(shown) // 10)])
            print(f"{name}: {some}; after task {len(tasks) - 1}: {shown[-1]} % of the classes learnt so far")
            found = dynamics.result()
            landscape = trajectory_landscape(result.model, images, labels, path, points=15).figure()
            figures = {**found.figures(), "landscape": landscape}
            for kind, figure in figures.items():
                figure.axes[0].set_title(f"{name}: {kind}", fontsize=11, loc="left")
                save_figure(figure, folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}-{kind}.png")
                writer.add_figure(f"{kind}/{name}", figure, close=False)
            table.append((name, result.accuracy, found.totals(), shocks(found)))
    writer.close()

    print(f"{'pre-training, optimizer':<25}accuracy  interference  synergy   shock  recovery  not recovered")
    for name, accuracy, totals, (shock, time, never) in table:
        print(
            f"{name:<25}{100 * accuracy:6.1f} %{totals.interference:14.2f}{totals.synergy:9.2f}"
            f"{shock:8.2f}{time:10.1f}{never:15d}"
        )
    print(f"pictures in {folder}")


if __name__ == "__main__":
    main()
