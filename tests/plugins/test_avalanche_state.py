"""EWC and LwF: equal to Avalanche's where nothing had to change, right where its own plugins are not."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EWCPlugin, LwFPlugin, SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_firn.plugins.avalanche_state import ResumableEWCPlugin, ResumableLwFPlugin, autocast_of
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin

sys.path.append(str(Path(__file__).parent))
from checkpoint_recipes import Noisy, dataset, domains, grown, mlp, noisy_view, sgd, stream

pytestmark = pytest.mark.filterwarnings("ignore")


class Watch(SupervisedPlugin):
    """Loss before and after what plugins before this one have added to it, outputs and inputs, of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[float, float]] = []
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        plain = F.cross_entropy(strategy.mb_output.float(), strategy.mb_y)
        self.steps.append((float(plain), float(strategy.loss)))
        self.batches.append((strategy.mb_x.clone(), strategy.mb_output.detach().clone()))


def trained(make: Any, *, kind: type = Noisy, train: Any = None, experiences: int = 3) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    strategy = make()
    for experience in (train or stream(kind).train_stream)[:experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def weights(strategy: Any) -> torch.Tensor:
    return torch.cat([v.double().flatten() for v in strategy.model.state_dict().values()])


# -------------------------------------------------------------------------- EWC
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: ResumableEWCPlugin(5.0), lambda: EWCPlugin(5.0)),
        (
            lambda: ResumableEWCPlugin(5.0, "online", 0.5),
            lambda: EWCPlugin(5.0, mode="online", decay_factor=0.5, keep_importance_data=False),
        ),
        (lambda: ResumableLwFPlugin(2.0, 3.0, teacher="training"), lambda: LwFPlugin(2.0, 3.0)),
    ],
    ids=["ewc", "ewc_online", "lwf"],
)
def test_equal_to_avalanche_s_plugin_where_nothing_grows(ours: Any, theirs: Any) -> None:
    """To the bit, with dropout and BatchNorm; and the penalty does something."""
    runs = [trained(lambda make=make: sgd(mlp(), [make()])) for make in (ours, theirs)]
    plain = trained(lambda: sgd(mlp(), []))
    assert torch.equal(*(weights(run) for run in runs))
    assert not torch.allclose(weights(runs[0]), weights(plain), atol=1e-3)


def test_avalanche_s_online_mode_does_not_survive_a_second_part_of_the_classifier() -> None:
    """The reason for pairing by name."""
    with pytest.raises(AssertionError, match="Error in importance computation"):
        trained(lambda: grown([EWCPlugin(1.0, mode="online", decay_factor=0.5)], []))


def test_online_importances_are_decayed_and_summed_by_name() -> None:
    """Against squares of batch gradients computed by hand, two experiences, a classifier in two parts."""
    plugin = ResumableEWCPlugin(1.0, "online", 0.5)
    seen: list[dict[str, torch.Tensor]] = []

    class ByHand(SupervisedPlugin):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            data, model = strategy.experience.dataset, strategy.model.eval()
            total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            starts = range(0, len(data), 10)
            for start in starts:
                rows = [data[i] for i in range(start, min(start + 10, len(data)))]
                model.zero_grad()
                loss = F.cross_entropy(
                    model(torch.stack([r[0] for r in rows])), torch.tensor([int(r[1]) for r in rows])
                )
                loss.backward()
                for name, parameter in model.named_parameters():
                    total[name] += parameter.grad**2 / len(starts)
            model.train()
            seen.append(total)

    strategy = trained(lambda: grown([ByHand(), plugin], []), kind=torch.utils.data.TensorDataset, experiences=2)
    found = plugin.importances[1]
    assert list(found) == [name for name, _ in strategy.model.named_parameters()] and list(plugin.importances) == [1]
    assert "head.weights.1" in found and "head.weights.1" not in seen[0]
    for name, importance in found.items():
        expected = seen[1][name] + 0.5 * seen[0].get(name, torch.zeros(()))
        torch.testing.assert_close(importance.data, expected)


def test_the_penalty_is_that_of_the_formula_and_leaves_new_rows_free() -> None:
    plugin, watch = ResumableEWCPlugin(3.0, "online", 0.5), Watch()
    expected: list[float] = []

    class ByHand(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_counter:
                before, importances = plugin.saved_params[0], plugin.importances[0]
                moved = dict(strategy.model.named_parameters())
                expected.append(
                    3 * sum(float((importances[n].data * (moved[n] - p.data) ** 2).sum()) for n, p in before.items())
                )

    trained(lambda: grown([ByHand(), plugin, watch], []), experiences=2)
    added = [after - before for before, after in watch.steps[-len(expected) :]]
    assert max(expected) > 0.001
    np.testing.assert_allclose(added, expected, rtol=1e-3, atol=1e-5)


def test_measuring_importances_leaves_the_running_statistics_alone() -> None:
    """BatchNorm's buffers have no importance, and the pass over the experience must not move them."""
    moved: list[bool] = []

    class Buffers(ResumableEWCPlugin):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            before = [b.clone() for b in strategy.model.buffers()]
            super().after_training_exp(strategy, **kwargs)
            moved.append(not all(torch.equal(a, b) for a, b in zip(before, strategy.model.buffers(), strict=True)))

    strategy = trained(lambda: grown([Buffers(1.0)], []), experiences=1)
    assert moved == [False] and strategy.model.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ewc_lambda": -1}, "ewc_lambda is -1; 0 and above"),
        ({"mode": "both"}, "mode is 'both'; 'separate' or 'online'"),
        ({"mode": "online"}, "decay_factor is None with mode 'online'"),
        ({"decay_factor": 0.5}, "decay_factor is 0.5 with mode 'separate'"),
        ({"mode": "online", "decay_factor": 1.5}, "decay_factor is 1.5; 0 to 1"),
    ],
)
def test_wrong_settings_of_ewc(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableEWCPlugin(**wrong)


# -------------------------------------------------------------------------- LwF
def test_the_teacher_is_the_model_before_the_experience_in_evaluation_mode() -> None:
    """Distillation from a frozen copy, on the classes seen before and at a temperature, against the formula."""
    plugin, watch = ResumableLwFPlugin(2.0, 3.0), Watch()
    before: list[nn.Module] = []

    class Keep(SupervisedPlugin):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            before.append(copy.deepcopy(strategy.model).eval())

    strategy = trained(lambda: grown([plugin, watch, Keep()], []), experiences=2)
    old = [3, 1, 7, 0]  # the first experience's
    assert plugin.state_dict()["classes"] == sorted([*old, 9, 2, 8]) and plugin.lwf.prev_model is None
    assert len(watch.steps) > 12 and all(before == pytest.approx(after) for before, after in watch.steps[:12])
    for (inputs, output), (plain, whole) in zip(watch.batches[12:], watch.steps[12:], strict=True):
        wanted = F.softmax(before[0](inputs)[:, old] / 3, dim=1)
        loss = F.kl_div(F.log_softmax(output[:, old] / 3, dim=1), wanted, reduction="batchmean")
        assert whole - plain == pytest.approx(2 * float(loss), rel=1e-3, abs=1e-5)
    assert all(p.requires_grad for p in strategy.model.parameters())


def test_the_mode_of_the_teacher_matters_and_its_parameters_never_learn() -> None:
    kept: dict[str, Any] = {}

    class Look(SupervisedPlugin):
        def __init__(self, name: str, plugin: ResumableLwFPlugin) -> None:
            super().__init__()
            self.name, self.plugin = name, plugin

        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            teacher = self.plugin.lwf.prev_model
            if teacher is not None:
                state = {n: v.clone() for n, v in teacher.state_dict().items()}
                kept.setdefault(self.name, []).append((teacher.training, state))
                assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())

    for mode in ("evaluation", "training"):
        plugin = ResumableLwFPlugin(teacher=mode)
        trained(lambda plugin=plugin, mode=mode: grown([plugin, Look(mode, plugin)], []), experiences=2)
    for mode in ("evaluation", "training"):
        (training, first), (_, second) = kept[mode]
        assert training is (mode == "training")
        same = {name: torch.equal(first[name], second[name]) for name in first}
        assert all(v for name, v in same.items() if "running" not in name and "num_batches" not in name)
        assert same["backbone.1.running_mean"] is (mode == "evaluation")


@pytest.mark.parametrize("kind", ["task labels that rise", "classes that come again"])
def test_all_classes_seen_are_distilled_whatever_the_task_labels(kind: str) -> None:
    if kind.startswith("task"):
        data = (dataset(slice(0, 128)), dataset(slice(400, 450)))
        train = nc_benchmark(*data, n_experiences=5, task_labels=True, shuffle=False).train_stream
    else:
        train = domains(noisy_view).train_stream
    plugin, watch = ResumableLwFPlugin(1.0), Watch()
    trained(lambda: sgd(mlp(), [plugin, watch]), train=train, experiences=2)
    classes = {int(c) for e in train[:2] for c in e.classes_in_this_experience}
    assert set(plugin.state_dict()["classes"]) == classes
    assert watch.steps[-1][1] - watch.steps[-1][0] > 1e-4


def test_lwf_refuses_several_heads_and_wrong_settings() -> None:
    class Heads(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = MultiHeadClassifier(64, masking=False)

        def forward(self, x: Any, task_labels: Any) -> Any:
            return self.head(x, task_labels)

    with pytest.raises(ValueError, match="Heads has a head per task label; one head is accepted"):
        trained(lambda: sgd(Heads(), [ResumableLwFPlugin()]))
    for wrong, message in (({"alpha": -1}, "alpha is -1"), ({"temperature": 0}, "temperature is 0")):
        with pytest.raises(ValueError, match=message):
            ResumableLwFPlugin(**wrong)
    with pytest.raises(ValueError, match="teacher is 'eval'; 'evaluation' or 'training'"):
        ResumableLwFPlugin(teacher="eval")  # type: ignore[arg-type]


# -------------------------------------------------------------------- precision
def test_teacher_and_importances_follow_the_precision_of_the_run() -> None:
    """bf16: the teacher's and the importances' forward passes are in it, the distillation in float32."""
    kinds: list[torch.dtype] = []

    class Layer(nn.Linear):
        def forward(self, x: Any) -> Any:
            output = super().forward(x)
            kinds.append(output.dtype)
            return output

    model = nn.Sequential(Layer(64, 16), nn.ReLU(), nn.Linear(16, 10))
    watch = Watch()
    own = [ResumableLwFPlugin(), ResumableEWCPlugin(1.0), MixedPrecisionPlugin("bf16"), watch]
    strategy = trained(lambda: sgd(model, own), experiences=2)
    assert set(kinds) == {torch.bfloat16} and strategy.loss.dtype == torch.float32
    assert all(np.isfinite(after) and after >= before - 1e-3 for before, after in watch.steps)


def test_autocast_of() -> None:
    cases = [("bf16", False, True), ("bf16", True, True), ("fp16", False, True), ("fp16", True, False)]
    for precision, gradients, expected in [*cases, ("fp32", False, False)]:
        strategy = sgd(mlp(), [MixedPrecisionPlugin(precision)])
        with autocast_of(strategy, gradients=gradients):
            assert torch.is_autocast_enabled("cpu") is expected
    with autocast_of(sgd(mlp(), [])):
        assert not torch.is_autocast_enabled("cpu")
