"""A transformer of five tokens with composed layers, streams of small images, and Naive on them: LoRAC-IPC's tests."""

import torch
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from avalanche.training.supervised import Naive
from timm.models.vision_transformer import VisionTransformer

from avalanche_firn.models.lora import LoRAComposition, add_composed_lora
from avalanche_firn.plugins.losses import LocalCrossEntropy

CLASSES = 6


def tiny_vit(num_classes=0, width=8, depth=2, dtype=torch.float32):
    torch.manual_seed(3)
    shape = dict(img_size=16, patch_size=8, embed_dim=width, depth=depth, num_heads=2)
    return VisionTransformer(**shape, num_classes=num_classes).to(dtype)


def adapted_vit(rank=2, alpha=2.0, **kwargs):
    """12 matrices in two blocks, and a plain classifier of six classes."""
    model = tiny_vit(CLASSES, **kwargs)
    add_composed_lora(model, rank=rank, alpha=alpha)
    return model


def images(stream_of, sizes=(2, 2, 2), per_class=8, dtype=torch.float32, **kwargs):
    """Each class has a pattern of its own under noise."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(sum(sizes)).repeat_interleave(per_class)
    pattern = torch.randn(sum(sizes), 3, 16, 16, generator=generator)
    x = torch.randn(len(y), 3, 16, 16, generator=generator) + pattern[y]
    return stream_of(x.to(dtype), y, list(sizes), **kwargs)


def naive(plugins, model=None, **kwargs):
    model = adapted_vit() if model is None else model
    settings = dict(
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01), criterion=LocalCrossEntropy(), train_mb_size=8,
        train_epochs=2, eval_mb_size=16, evaluator=quiet(),
    ) | kwargs  # fmt: skip
    return Naive(model=model, plugins=list(plugins), **settings)


def quiet(*metrics):
    return EvaluationPlugin(*metrics, loggers=[])


def logged(strategy, name):
    """Steps and values that were published under a name."""
    return strategy.evaluator.get_all_metrics()[name]


def train(strategy, benchmark, first=0, last=None):
    for experience in benchmark.train_stream[first:last]:
        torch.manual_seed(experience.current_experience)
        strategy.train(experience, eval_streams=[])
    return strategy


def layers(strategy):
    return LoRAComposition(strategy.model)


def state(strategy):
    return {k: v.clone() for k, v in strategy.model.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [k for k, v in first.items() if not torch.equal(v, second[k])] == []


class StopAt(SupervisedPlugin):
    """Ends an experience after so many steps."""

    stateless = True

    def __init__(self, step):
        super().__init__()
        self.step = step

    def after_training_iteration(self, strategy, **kwargs):
        if strategy.clock.train_exp_iterations + 1 == self.step:  # the clock counts after all plugins
            strategy.stop_training()
