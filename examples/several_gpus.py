"""One Avalanche script on one GPU or on several: SLCA, shared among the processes of torchrun.

    python examples/several_gpus.py                                   # one process
    torchrun --nproc-per-node=2 examples/several_gpus.py              # two, each with a GPU of its own, or on the CPU
    tensorboard --logdir runs/example-several-gpus

Five tasks of two handwritten digits each, on the embedded backbone (pre-trained on Omniglot characters). The batch size
is that of the batch as a whole, and the figures are those of one process but for rounding. Every process does the same
and passes its own part of each batch through the model; the first one prints and writes. See docs/distributed.md.
"""

from __future__ import annotations

import argparse

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation import ResultMatrixMetric
from avalanche_firn.models import load_backbone, with_taskwise_head
from avalanche_firn.models.processes import process_count, process_rank
from avalanche_firn.plugins import DistributedPlugin, end_processes, start_processes
from avalanche_firn.strategies import SLCA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="epochs per task (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="the same in every process (default 0)")
    parser.add_argument("--logdir", default="runs/example-several-gpus", help="TensorBoard folder")
    args = parser.parse_args()

    device = start_processes()  # does nothing without torchrun
    torch.manual_seed(args.seed)  # alike in every process, before the model is built
    backbone = load_backbone("vit_firn_32.omniglot")
    data = backbone.data_config
    stream = digits_stream(image_size=data["input_size"][-1], mean=data["mean"], std=data["std"], seed=args.seed)

    first = process_rank() == 0
    matrix = ResultMatrixMetric()
    model = with_taskwise_head(backbone.module)
    strategy = SLCA(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        backbone_scale=0.1,
        fresh_final_norm=False,
        train_mb_size=32,
        train_epochs=args.epochs,
        eval_mb_size=256,
        device=device,
        plugins=[DistributedPlugin()],
        evaluator=EvaluationPlugin(matrix, loggers=[TensorboardLogger(args.logdir)] if first else []),
    )
    for index, experience in enumerate(stream.train):
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test[: index + 1])
        if first:
            print(f"after task {index}: {matrix.matrix.last:.4f} of all seen digits, {process_count()} processes")
    end_processes()


if __name__ == "__main__":
    main()
