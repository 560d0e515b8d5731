"""SLCA in an ordinary Avalanche script, and its two plugins on Avalanche's Naive.

    python examples/slca.py                 # the ready strategy
    python examples/slca.py --as-plugins    # the same from parts: identical numbers
    tensorboard --logdir runs/example-slca

Five tasks of two handwritten digits each, on the embedded backbone (pre-trained on Omniglot characters). Takes half a
minute on two CPU cores; a GPU is used if there is one.
"""

from __future__ import annotations

import argparse

import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation import ResultMatrixMetric
from avalanche_firn.models import load_backbone, with_taskwise_head
from avalanche_firn.plugins import ClassifierAlignmentPlugin, LocalCrossEntropy, SlowLearnerPlugin
from avalanche_firn.strategies import SLCA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as-plugins", action="store_true", help="Naive with plugins instead of the SLCA strategy")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of class order, new layers and batches (default 0)")
    parser.add_argument("--logdir", default="runs/example-slca", help="TensorBoard folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    backbone = load_backbone("vit_firn_32.omniglot")  # or any timm name; img_size=... and weights=... go here too
    data = backbone.data_config
    stream = digits_stream(image_size=data["input_size"][-1], mean=data["mean"], std=data["std"], seed=args.seed)

    matrix = ResultMatrixMetric()
    common = dict(
        train_mb_size=32,
        train_epochs=args.epochs,
        eval_mb_size=256,
        device=device,
        evaluator=EvaluationPlugin(
            accuracy_metrics(stream=True), matrix, loggers=[TensorboardLogger(args.logdir)], collect_all=False
        ),
    )
    model = with_taskwise_head(backbone.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if args.as_plugins:
        plugins = [SlowLearnerPlugin(backbone_scale=0.1), ClassifierAlignmentPlugin()]
        strategy = Naive(model=model, optimizer=optimizer, criterion=LocalCrossEntropy(), plugins=plugins, **common)
    else:
        strategy = SLCA(model=model, optimizer=optimizer, backbone_scale=0.1, fresh_final_norm=False, **common)

    for experience in stream.train:
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test[: experience.current_experience + 1])
        print(f"after task {experience.current_experience}: {matrix.matrix.last:.4f} of all seen digits")


if __name__ == "__main__":
    main()
