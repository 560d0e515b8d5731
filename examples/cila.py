"""CILA and Co2L in an ordinary Avalanche script: contrastive learning of a representation, kept by distillation.

    python examples/cila.py                 # CILA: the weight of the distillation follows the losses of earlier tasks
    python examples/cila.py --constant      # Co2L: the weight is 1 in every task
    tensorboard --logdir runs/example-cila

Five tasks of two handwritten digits each and 50 stored images, on the embedded backbone (pre-trained on Omniglot
characters). After every task a linear classifier is fitted on the frozen backbone. Takes a minute on a CPU core; a GPU
is used if there is one. At the end stands what CILA's theory says about the test images; nothing is chosen by it.
"""

from __future__ import annotations

import argparse

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin

from avalanche_firn.benchmarks import ContrastiveAugmentation, digits_stream
from avalanche_firn.evaluation import ContrastiveBound, ResultMatrixMetric, TaskIncrementalMatrixMetric
from avalanche_firn.models import load_backbone, with_projection_head
from avalanche_firn.plugins import ClassifierStagePlugin, ContrastiveDistillationPlugin, WarmupCosinePlugin
from avalanche_firn.strategies import CILA, Co2L


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constant", action="store_true", help="Co2L: a constant weight of the distillation")
    # open in the paper; at 1 the weight stays at its floor here, so that CILA equals Co2L
    parser.add_argument("--balance", type=float, default=2.0, help="factor of CILA's ratio (default 2)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs per task (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of class order, new layers, batches, views (default 0)")
    parser.add_argument("--logdir", default="runs/example-cila", help="TensorBoard folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    backbone = load_backbone("vit_firn_32.omniglot")  # or any timm name; img_size=... and weights=... go here too
    data = backbone.data_config
    stream = digits_stream(image_size=data["input_size"][-1], mean=data["mean"], std=data["std"], seed=args.seed)
    crops = ContrastiveAugmentation(
        crop_scale=(0.7, 1.0), flip=0.0, jitter=None, grey=0.0, mean=data["mean"], std=data["std"]
    )  # two views of a batch on the device; a mirror image of a digit is another sign

    matrix, given_task = ResultMatrixMetric(), TaskIncrementalMatrixMetric()
    bound = ContrastiveBound(stream.test)
    losses = ContrastiveDistillationPlugin(mode="constant" if args.constant else "max", balance=args.balance)
    model = with_projection_head(backbone.module)
    strategy = (Co2L if args.constant else CILA)(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4),  # SGD from 0.003 on makes its features collapse
        contrastive=losses,
        classifier=ClassifierStagePlugin(epochs=50, lr=0.1, views="evaluation", seed=args.seed),
        augmentation=crops,
        mem_size=50,
        rates=WarmupCosinePlugin(),
        seed=args.seed,
        train_mb_size=32,
        train_epochs=args.epochs,
        eval_mb_size=256,
        device="cuda" if torch.cuda.is_available() else "cpu",
        evaluator=EvaluationPlugin(
            matrix, given_task, bound, loggers=[TensorboardLogger(args.logdir)], collect_all=False
        ),
    )

    for experience in stream.train:
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test[: experience.current_experience + 1])
        accuracy, easier = (metric.matrix.summary()["accuracy/last"] for metric in (matrix, given_task))
        figures = f"accuracy {100 * accuracy:.2f} %, {100 * easier:.2f} % if the task is told"
        figures += f"; contrastive loss {losses.contrastive_losses[-1]:.3f}"
        if losses.coefficients[-1] is not None:  # the first task has nothing to distil
            figures += f", distillation {losses.distillation_losses[-1]:.3f}, coefficient {losses.coefficients[-1]:.3f}"
        print(f"after task {experience.current_experience}: {figures}")
    print("\n".join(bound.summary_lines()))


if __name__ == "__main__":
    main()
