"""No step of our methods waits for the GPU: every synchronising call in a training iteration is reported by CUDA.

The first iterations of an experience may wait (a criterion looks once whether the targets belong to it, caches are
filled). Avalanche's own EWC and supervised contrastive loss copy constants to the device in every step, which is
theirs, and DER looks up the stored logits of a batch in main memory: these only have to train.
"""

import traceback
import warnings

import pytest
import torch
from avalanche.logging import BaseLogger
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin

from avalanche_firn.benchmarks import hold_in_memory
from avalanche_firn.evaluation import continual_metrics
from avalanche_firn.experiments.config import validate
from avalanche_firn.experiments.environment import seed_everything
from avalanche_firn.experiments.methods import METHODS, Ingredients, build_strategy
from avalanche_firn.experiments.resources import build_backbone, build_stream, stream_normalization
from avalanche_firn.models.feature_cache import FeatureCache
from avalanche_firn.plugins import FastPathPlugin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SETTINGS = {
    "scr": {"rehearsal": {"mem_size": 40}},
    "co2l": {"classifier": {"epochs": 2}},
    "cila": {"classifier": {"epochs": 2}},
}
WAITING = ("ewc", "scr", "der")


class Listen(SupervisedPlugin):
    def before_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations > 1:
            torch.cuda.set_sync_debug_mode("warn")


class Leave(SupervisedPlugin):
    def after_training_iteration(self, strategy, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_no_step_waits(name, precision):
    config = validate(
        {
            "name": "gpu", "seeds": [0], "precision": precision, "stream": {"name": "digits", "tasks": 5},
            "training": {"epochs": 2, "batch_size": 32, "optimizer": {"lr": 0.003}},
            "methods": [{"strategy": name, **SETTINGS.get(name, {})}],
        }
    )  # fmt: skip
    seed_everything(0)
    backbone, device = build_backbone(config), torch.device("cuda")
    stream, _ = hold_in_memory(build_stream(config, backbone.data_config, 0), device=device)
    metrics = EvaluationPlugin(*continual_metrics(image=False), loggers=[BaseLogger()], collect_all=False)
    normalization = stream_normalization(config, backbone.data_config)
    parts = Ingredients(config, backbone, device, [FastPathPlugin()], metrics, FeatureCache(), normalization)
    strategy = build_strategy(parts)
    strategy.plugins.insert(0, Listen())
    strategy.plugins.append(Leave())
    found = []

    def show(message, *_):
        if "called a synchronizing" in str(message):
            found.append("".join(traceback.format_stack()[-6:-1]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        try:
            for experience in (stream.joint() if METHODS[name].joint else stream).train[:2]:
                strategy.train(experience, eval_streams=[])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert name in WAITING or not found, f"{len(found)} waits, the first in\n{found[0]}"
