"""Zapping in an ordinary Avalanche script: rows of the classifier are redrawn while a pre-trained network is tuned.

    python examples/zapping.py              # SLCA, rows of a task partly redrawn at each of its epochs but the first
    python examples/zapping.py --no-zap     # without: nothing else differs, not even the order of the images
    python examples/zapping.py --iid        # as in pre-training: all digits at once, the whole classifier redrawn
    tensorboard --logdir runs/example-zapping

Five tasks of two handwritten digits each, on the embedded backbone (pre-trained on Omniglot characters). Takes half a
minute on a CPU core; a GPU is used if there is one. An epoch has seven steps here, too few to relearn rows that are
redrawn whole (``--blend 1``), so a row takes a tenth of its fresh values by default: chosen among 1, 0.5, 0.2 and 0.1
on the validation images, with seeds 1 and 2. What zapping was made for, pre-training, is in zapping_dynamics.py.
"""

from __future__ import annotations

import argparse

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation import ResultMatrixMetric
from avalanche_firn.models import load_backbone, with_taskwise_head
from avalanche_firn.plugins import ZappingPlugin
from avalanche_firn.strategies import SLCA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-zap", action="store_true", help="the same training without zaps")
    parser.add_argument("--iid", action="store_true", help="one task of all digits, as in pre-training, with Naive")
    parser.add_argument("--blend", type=float, default=0.1, help="share of fresh values in a zapped row (default 0.1)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of class order, new layers, batches, zaps (default 0)")
    parser.add_argument("--logdir", default="runs/example-zapping", help="TensorBoard folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    backbone = load_backbone("vit_firn_32.omniglot")  # or any timm name; img_size=... and weights=... go here too
    data = backbone.data_config
    stream = digits_stream(image_size=data["input_size"][-1], mean=data["mean"], std=data["std"], seed=args.seed)

    every = 0 if args.no_zap else 1  # epochs between zaps; 0: never
    if args.iid:
        zapping = ZappingPlugin.pretraining(every=every, seed=args.seed, log=True)
    else:  # rows of earlier tasks are left alone: "experience" names the classes of the current one
        zapping = ZappingPlugin(
            scope="experience", schedule="epoch", every=every, blend=args.blend, seed=args.seed, log=True
        )
    matrix = ResultMatrixMetric()
    model = with_taskwise_head(backbone.module)
    common = dict(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        plugins=[zapping],
        train_mb_size=32,
        train_epochs=args.epochs,
        eval_mb_size=256,
        device="cuda" if torch.cuda.is_available() else "cpu",
        evaluator=EvaluationPlugin(matrix, loggers=[TensorboardLogger(args.logdir)], collect_all=False),
    )
    strategy = Naive(**common) if args.iid else SLCA(backbone_scale=0.1, fresh_final_norm=False, **common)

    for experience in (stream.joint() if args.iid else stream).train:
        task = experience.current_experience
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test if args.iid else stream.test[: task + 1])
        seen = matrix.matrix.accuracy[-1, : len(stream.test) if args.iid else task + 1]
        per_task = ", ".join(f"{100 * value:.1f}" for value in seen)
        rows = sum(len(zap.rows) for zap in zapping.history if zap.experience == task)
        accuracy = f"{100 * matrix.matrix.last:.2f} % of all seen digits ({per_task})"
        print(f"after task {task}: {accuracy}; {rows} rows zapped")
    print(f"{sum(len(zap.rows) for zap in zapping.history)} rows zapped in all, in {len(zapping.history)} zaps")


if __name__ == "__main__":
    main()
