"""LoRAC-IPC in an ordinary Avalanche script: a low-rank pair per task on a frozen transformer, exported as a plain one.

    python examples/lorac_ipc.py                # the task of a test image is inferred, its weights are used
    python examples/lorac_ipc.py --newest       # without: the newest weights for all images
    tensorboard --logdir runs/example-lorac-ipc

Five tasks of two handwritten digits each, on the embedded backbone (pre-trained on Omniglot characters). Takes half a
minute on a CPU core; a GPU is used if there is one. At the end the composed weights are written as a file that any
timm transformer of this shape loads, without this package's layers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from avalanche.logging import TensorboardLogger
from avalanche.training.plugins import EvaluationPlugin
from safetensors.torch import load_file

from avalanche_firn.benchmarks import digits_stream
from avalanche_firn.evaluation import ResultMatrixMetric
from avalanche_firn.models import load_backbone, with_taskwise_head
from avalanche_firn.models.lora_export import save_merged
from avalanche_firn.plugins import ClassifierAlignmentPlugin, ImportantParameterPlugin, TaskInferencePlugin
from avalanche_firn.strategies import LoRACIPC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest", action="store_true", help="no task inference: the newest weights for all images")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of class order, new layers, batches, clusters (default 0)")
    parser.add_argument("--logdir", default="runs/example-lorac-ipc", help="folder of events and of the exported file")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    backbone = load_backbone("vit_firn_32.omniglot")  # or any timm transformer; weights=... go here too
    data = backbone.data_config
    stream = digits_stream(image_size=data["input_size"][-1], mean=data["mean"], std=data["std"], seed=args.seed)

    matrix = ResultMatrixMetric()
    freezing = ImportantParameterPlugin(0.05)  # 1 of this model's 36 matrices after each task; 0: LoRAC
    alignment = ClassifierAlignmentPlugin.tap(epochs=20, clusters=5, seed=args.seed)  # of the classifier, after a task
    inference = TaskInferencePlugin(clusters=4, seed=args.seed)
    model = with_taskwise_head(backbone.module)
    strategy = LoRACIPC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.0015),
        rank=16,
        orthogonality=0.5,  # pairs of different tasks stay orthogonal
        importance=freezing,
        alignment=alignment,
        task_inference=False if args.newest else inference,
        seed=args.seed,
        train_mb_size=32,
        train_epochs=args.epochs,
        eval_mb_size=256,
        device="cuda" if torch.cuda.is_available() else "cpu",
        evaluator=EvaluationPlugin(matrix, loggers=[TensorboardLogger(args.logdir)], collect_all=False),
    )

    for experience in stream.train:
        task = experience.current_experience
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test[: task + 1])
        figures = f"{matrix.matrix.last:.4f} of all seen digits"
        if not args.newest:
            figures += f", {inference.accuracies[task + 1]:.4f} sent to their own task"
        new = sorted(set(freezing.frozen_after[task]) - set(freezing.frozen_after[task - 1] if task else []))
        print(f"after task {task}: {figures}; frozen from now on: {', '.join(new)}")

    # The backbone as it was after a task (default: the last one), as a file; loaded by timm alone, on the CPU.
    path = Path(args.logdir) / "composed.safetensors"
    save_merged(strategy.model, path, submodule="backbone")
    plain = timm.create_model("vit_firn_32", num_classes=0).eval()
    plain.load_state_dict(load_file(path))
    images = torch.stack([stream.test[0].dataset[i][0] for i in range(16)])
    with torch.no_grad():
        difference = (plain(images) - strategy.model.eval().cpu().backbone(images)).abs().max()
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, features differ by {difference:.1e}")


if __name__ == "__main__":
    main()
