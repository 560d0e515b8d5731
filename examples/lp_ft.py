"""LP-FT in an ordinary Avalanche script: what does a representation keep that is fine-tuned task after task?

    python examples/lp_ft.py                # LP-FT
    python examples/lp_ft.py --no-probe     # plain sequential fine-tuning, everything else equal
    tensorboard --logdir runs/example-lp-ft

Five tasks of two handwritten digits each, on the embedded backbone (pre-trained on Omniglot characters). After every
task the representation is adapted to ten images a class of each task seen, by kNN, a linear probe and fine-tuning, and
tested there. Takes two minutes on a CPU core; a GPU is used if there is one.
"""

from __future__ import annotations

import argparse

import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation import RepresentationDrift, RepresentationProbe
from avalanche_firn.models import FeatureCache, load_backbone, with_taskwise_head
from avalanche_firn.plugins import LinearProbePlugin
from avalanche_firn.strategies import LPFT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-probe", action="store_true", help="fine-tune without the linear probe before it")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of fine-tuning per task (default 5)")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate of fine-tuning (default 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of class order, new layers and batches (default 0)")
    parser.add_argument("--logdir", default="runs/example-lp-ft", help="TensorBoard folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    backbone = load_backbone("vit_firn_32.omniglot")  # or any timm name; img_size=... and weights=... go here too
    data = backbone.data_config
    stream = digits_stream(image_size=data["input_size"][-1], mean=data["mean"], std=data["std"], seed=args.seed)

    cache = FeatureCache()  # features are extracted once for all who ask for them
    probes = RepresentationProbe(
        stream.train, stream.test, ["knn", "linear", "fine_tune"],
        shots=10, tasks="seen", lr=(0.001, 0.01), epochs=10, cache=cache,
    )  # fmt: skip
    drift = RepresentationDrift(stream.joint().train[0].dataset, num_images=128)
    evaluator = EvaluationPlugin(probes, drift, loggers=[TensorboardLogger(args.logdir)], collect_all=False)
    model = with_taskwise_head(backbone.module, freeze_old=False)
    strategy = LPFT(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4),
        linear_probe=LinearProbePlugin(enabled=not args.no_probe, cache=cache),
        train_mb_size=32,
        train_epochs=args.epochs,
        eval_mb_size=256,
        device="cuda" if torch.cuda.is_available() else "cpu",
        evaluator=evaluator,
    )

    for experience in stream.train:
        strategy.train(experience, eval_streams=[])
        accuracies = ", ".join(f"{probes.label(name)} {100 * probes.figures(name)['']:.2f} %" for name in probes.adapt)
        print(f"after task {experience.current_experience}: {accuracies}")
    for name in probes.adapt:
        lost = probes.figures(name)["/forgetting-max-seen"]
        print(f"{name}: {100 * lost:.2f} points lost on earlier tasks")


if __name__ == "__main__":
    main()
