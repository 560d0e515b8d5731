"""Task inference on Naive: the released code's numbers, figures by hand, both ways of a pass, what is left behind."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from avalanche_firn.models.heads import UNSEEN_LOGIT
from avalanche_firn.models.lora import LoRAComposition, add_composed_lora
from avalanche_firn.models.parts import extract_features, with_taskwise_head
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.mahalanobis import MahalanobisTaskInference
from avalanche_firn.plugins.mixed_precision import MixedPrecisionPlugin
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.task_inference import TaskInferencePlugin

sys.path.append(str(Path(__file__).parent))
from lora_cases import (
    StopAt,
    adapted_vit,
    assert_equal,
    images,
    layers,
    logged,
    naive,
    quiet,
    state,
    tiny_vit,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


class Outputs(SupervisedPlugin):
    """Final outputs and targets of an evaluation, by batch."""

    def before_eval(self, strategy, **kwargs):
        self.logits, self.targets, self.experiences = [], [], []

    def after_eval_forward(self, strategy, **kwargs):
        self.logits.append(strategy.mb_output)
        self.targets.append(strategy.mb_y)
        self.experiences.append(strategy.experience.current_experience)


def strategy_with(inference, *more, model=None, **kwargs):
    return naive([LoRACompositionPlugin(0.1), inference, Outputs(), *more], model, **kwargs)


def outputs(strategy, stream):
    """Logits and targets of all samples."""
    strategy.eval(stream)
    seen = next(p for p in strategy.plugins if isinstance(p, Outputs))
    return torch.cat(seen.logits), torch.cat(seen.targets)


def inputs(stream):
    return torch.cat([torch.stack([row[0] for row in experience.dataset]) for experience in stream])


@pytest.fixture(scope="module")
def benchmark(stream_of):
    """Three tasks of 3, 1 and 2 classes."""
    return images(stream_of, (3, 1, 2))


@pytest.fixture(scope="module")
def trained(benchmark):
    """A strategy after all tasks, and one after two of them; tests must not train them."""
    strategies = [train(strategy_with(TaskInferencePlugin(2)), benchmark, last=tasks) for tasks in (2, 3)]
    return dict(zip((2, 3), strategies, strict=True))


def with_settings(strategy, **settings):
    """The trained strategy with other settings of its plugin, for one test."""
    changed = copy.deepcopy(strategy)
    for field, value in settings.items():
        setattr(changed.plugins[1], field, value)
    return changed


# ------------------------------------------------------------------ the released code's numbers
class Table(nn.Module):
    """The golden file's stub: features ``x P[k]`` and logits ``x H[k] + bias`` from one composed layer."""

    class Head(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.bias = nn.Parameter(bias)

        def forward(self, features, logits):
            return logits + self.bias

    def __init__(self, bias):
        super().__init__()
        self.both = nn.Linear(6, 12, bias=False, dtype=torch.float64)
        self.head = self.Head(bias)
        nn.init.zeros_(self.both.weight)
        add_composed_lora(self, ["both"], rank=6, alpha=6.0)

    def forward(self, x):
        both = self.both(x)
        return self.head(both[:, :6], both[:, 6:])

    @torch.no_grad()
    def learn(self, change):
        """Add a task whose weight differs by ``change (6, 12)``."""
        composition = LoRAComposition(self)
        composition.open_task()
        self.both.A["full"][-1].copy_(torch.eye(6))
        self.both.B["full"][-1].copy_(change)
        composition.close_task()


@pytest.mark.parametrize("mixed", ["one_pass", "grouped"])
@pytest.mark.parametrize("mode", ["instance", "batch"])
@pytest.mark.filterwarnings("ignore:. tasks of rank 6 exceed the input width")
def test_golden_evaluation(golden, stream_of, mode, mixed):
    file = golden("lorac_ipc", "tii_evaluate")
    mean, shrunk, P, H, bias = (torch.from_numpy(file[n]) for n in ("mean", "shrunk", "P", "H", "bias"))
    plugin = TaskInferencePlugin(mask_unseen=False, batchwise_vote=mode == "batch", mixed=mixed)
    model, routed = Table(bias), []
    plugin._count = lambda tasks, targets, count=plugin._count: (routed.append(tasks), count(tasks, targets))
    strategy = strategy_with(plugin, model=model, eval_mb_size=int(file["batch_size"]))
    stream = stream_of(file["inputs"], file["targets"], (2, 2, 2)).test_stream
    assert [len(e.dataset) for e in stream] == file["test_sizes"].tolist()
    both = torch.cat([P, H], 2)
    for t in range(3):
        model.learn(both[t] - (both[t - 1] if t else 0))
        for position in (file["class_task"] == t).nonzero()[0]:
            moments = (mean[position], shrunk[position], t)
            plugin.inference.add_moments(int(file["class_ids"][position]), *moments, shrunk=True)
        routed.clear()
        logits, targets = outputs(strategy, stream[: t + 1])
        right = (logits.argmax(1) == targets).split(file["test_sizes"].tolist()[: t + 1])
        assert torch.cat(routed).tolist() == file[f"{mode}_t{t}_routed_task"].tolist()
        for i, share in enumerate(right):
            assert 100 * float(share.double().mean()) == pytest.approx(file[f"{mode}_acc_matrix"][i, t], abs=1e-4)
        accuracy, *_, inferred = file[f"{mode}_t{t}_metrics"]
        assert sum(100 * float(share.double().mean()) for share in right) / (t + 1) == pytest.approx(accuracy, abs=1e-4)
        if mode == "instance":  # the released code measures before the vote, we measure what is used
            assert 100 * plugin.accuracies[t + 1] == pytest.approx(inferred, abs=1e-4)
        else:
            assert 100 * plugin.accuracies[t + 1] >= inferred - 1e-4


# ------------------------------------------------------------------ the figure, by hand
def tasks_by_hand(strategy, benchmark, experience, clusters=2):
    """Tasks of the samples, from statistics of the first task's features taken here, one sample at a time."""
    store, composition = MahalanobisTaskInference(clusters), layers(strategy)
    with composition.as_task(0):
        for task, trained_on in enumerate(benchmark.train_stream[: composition.num_closed]):
            features, targets = extract_features(strategy.model, trained_on.dataset.eval())
            for class_id in sorted(set(targets.tolist())):
                store.add(class_id, features[targets == class_id], task)
        features, _ = extract_features(strategy.model, experience.dataset.eval(), batch_size=1)
    return torch.cat([store.infer(row) for row in features.split(1)])


@pytest.mark.parametrize("learnt", [2, 3])
def test_outputs_and_figure_equal_those_by_hand(benchmark, trained, learnt):
    """Every sample goes through the model as it was after its task; experiences to come count in no figure."""
    strategy = copy.deepcopy(trained[learnt])
    logits, _ = outputs(strategy, benchmark.test_stream)
    assert logits.shape == (48, 6)
    shares, expected = [], []
    with torch.no_grad():
        for task, experience in enumerate(benchmark.test_stream):
            tasks = tasks_by_hand(strategy, benchmark, experience)
            if task < learnt:
                shares.append(float((tasks == task).double().mean()))
            for (x, *_), k in zip(experience.dataset, tasks.tolist(), strict=True):
                with layers(strategy).as_task(k):
                    expected.append(strategy.model.eval()(x[None]))
    expected, seen = torch.cat(expected), [0, 1, 2, 3, 4, 5][: {2: 4, 3: 6}[learnt]]
    torch.testing.assert_close(logits[:, seen], expected[:, seen], rtol=1e-5, atol=1e-5)
    assert (logits[:, len(seen) :] == UNSEEN_LOGIT).all()
    assert strategy.plugins[1].accuracies == {learnt: pytest.approx(sum(shares) / learnt, abs=1e-12)}
    steps, values = logged(strategy, "lorac/task-inference")
    assert steps == [learnt] and values == list(strategy.plugins[1].accuracies.values())
    assert 1 / learnt < values[0] <= 1


def test_periodic_evaluations_count_the_tasks_that_were_learnt(stream_of):
    """The last one of a task comes before the clock has counted it; those in the middle of a task measure nothing."""
    benchmark, kept = images(stream_of), {}
    for eval_every in (-1, 0, 1):
        plugin = TaskInferencePlugin(2)
        strategy = strategy_with(plugin, eval_every=eval_every, train_epochs=3)
        for experience in benchmark.train_stream:
            torch.manual_seed(0)
            strategy.train(experience, eval_streams=[benchmark.test_stream])
            if eval_every == -1:
                strategy.eval(benchmark.test_stream)
        kept[eval_every] = plugin.accuracies
        assert set(logged(strategy, "lorac/task-inference")[0]) == {1, 2, 3}
    assert kept[-1].keys() == {1, 2, 3} and kept[0].keys() == kept[1].keys() == {1, 2, 3}
    assert kept[0][1] == kept[1][1] == 1.0


def test_an_evaluation_inside_a_task_uses_the_weights_as_they_are(stream_of):
    class Live(SupervisedPlugin):
        def after_eval_forward(self, strategy, **kwargs):
            tasks = layers(strategy)
            closed.append(tasks.num_closed == tasks.num_tasks)
            if not closed[-1]:
                weights = {n: layer.merged_weight().clone() for n, layer in tasks.layers.items()}
                seen.append(weights)
                assert torch.equal(strategy.mb_output, strategy.model(strategy.mb_x))

    closed, seen, plugin, benchmark = [], [], TaskInferencePlugin(2), images(stream_of, (2, 2))
    strategy = strategy_with(plugin, Live(), eval_every=1, train_epochs=3, eval_mb_size=64)
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[benchmark.test_stream[:1]])
    assert closed == 2 * [True, False, False, True]  # before the task, after each of three epochs
    assert not torch.equal(*(seen[i]["blocks.0.attn.proj"] for i in (2, 3)))


# ------------------------------------------------------------------ options
def test_a_vote_over_batches_of_one_task_leaks_the_task(benchmark):
    """One cluster per class, so that samples go astray; whole test sets as batches, or batches of one."""
    assert TaskInferencePlugin().batchwise_vote is False
    trained, figures, right = train(strategy_with(TaskInferencePlugin(1)), benchmark), {}, {}
    for vote in (False, True):
        for size in (1, 64):
            strategy = with_settings(trained, batchwise_vote=vote)
            strategy.eval_mb_size = size
            logits, targets = outputs(strategy, benchmark.test_stream)
            assert strategy.plugins[1].batchwise_vote is vote
            figures[vote, size] = strategy.plugins[1].accuracies[3]
            right[vote, size] = float((logits.argmax(1) == targets).float().mean())
    for found in (figures, right):
        assert found[False, 1] == found[False, 64] == found[True, 1]
    assert figures[True, 64] == 1 > figures[False, 64] + 0.1
    assert right[True, 64] > right[False, 64]


@pytest.mark.parametrize("learnt", [2, 3])
def test_grouped_equals_one_pass(benchmark, trained, learnt):
    found = {}
    for mixed in ("one_pass", "grouped", "auto"):
        strategy, passes = with_settings(trained[learnt], mixed=mixed), []
        strategy.eval_mb_size = 11
        strategy.model.register_forward_hook(lambda _, args, output, passes=passes: passes.append(len(output)))
        found[mixed] = (outputs(strategy, benchmark.test_stream)[0], passes)
    (one, whole), (grouped, parts) = found["one_pass"], found["grouped"]
    torch.testing.assert_close(one, grouped, rtol=1e-5, atol=1e-5)
    assert sum(whole) == sum(parts) == 2 * 48 and len(parts) > len(whole)
    assert torch.equal(found["auto"][0], grouped) and found["auto"][1] == parts  # the cheaper way on a CPU


@pytest.mark.parametrize("mask_unseen", [True, False])
def test_classes_that_were_not_seen_on_a_plain_classifier(benchmark, trained, mask_unseen):
    strategy = with_settings(trained[2], mask_unseen=mask_unseen)
    with torch.no_grad():
        strategy.model.head.bias[4:] += 50.0  # what was never trained would win
    logits, _ = outputs(strategy, benchmark.test_stream)
    assert logits.shape == (48, 6)
    if mask_unseen:
        assert (logits[:, 4:] == UNSEEN_LOGIT).all() and (logits.argmax(1) < 4).all()
        assert (logits[:, :4] > UNSEEN_LOGIT).all()
    else:
        assert (logits.argmax(1) >= 4).all()
    loss = F.cross_entropy(logits, torch.full((48,), 5))
    assert loss.isfinite()


def test_masking_changes_nothing_on_a_taskwise_head(benchmark):
    found = []
    for mask_unseen in (True, False):
        model = with_taskwise_head(tiny_vit())
        add_composed_lora(model, rank=2, alpha=2.0)
        strategy = train(strategy_with(TaskInferencePlugin(mask_unseen=mask_unseen), model=model), benchmark, last=2)
        strategy.eval(benchmark.test_stream)
        found.append(strategy.plugins[2].logits)
    assert (found[0][-1][:, 4:] == UNSEEN_LOGIT).all()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("mixed", ["one_pass", "grouped"])
def test_predict_gives_what_an_evaluation_gives(benchmark, trained, mixed, vote):
    strategy = with_settings(trained[2], mixed=mixed, batchwise_vote=vote)
    strategy.eval(benchmark.test_stream[1:])
    seen, plugin, model = strategy.plugins[2], strategy.plugins[1], strategy.model
    model.train()
    rows = iter(inputs(benchmark.test_stream[1:]).split([8, 16]))
    for logits, x in zip(seen.logits, rows, strict=True):
        assert torch.equal(plugin.predict(model, x), logits)
    assert all(module.training for module in model.modules())  # as it was before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert plugin.predict(model, x).requires_grad is False


def test_predict_needs_a_task():
    with pytest.raises(RuntimeError, match=r"predict\(\) needs the statistics of at least one task; train first"):
        TaskInferencePlugin().predict(adapted_vit(), torch.zeros(2, 3, 16, 16))


class ReadsWeights(nn.Module):
    """Multiplies by a weight itself, as BEiT does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.proj, self.head = nn.Flatten(), nn.Linear(768, 16), nn.Linear(16, 6)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(self.stem(x), self.proj.weight, self.proj.bias)))


def test_models_that_read_weights_are_evaluated_task_by_task(benchmark):
    def learn(mixed):
        model = ReadsWeights()
        add_composed_lora(model, ["proj"], rank=2)
        return train(strategy_with(TaskInferencePlugin(2, mixed=mixed), model=model), benchmark, last=2)

    with pytest.raises(RuntimeError, match=r"evaluate them task by task \(mixed='grouped' of TaskInferencePlugin\)"):
        learn("one_pass").eval(benchmark.test_stream)
    strategy = learn("grouped")
    logits, _ = outputs(strategy, benchmark.test_stream)
    with torch.no_grad():
        for experience, own in zip(benchmark.test_stream, logits.split([24, 8, 16]), strict=True):
            for (x, *_), k, row in zip(
                experience.dataset, tasks_by_hand(strategy, benchmark, experience), own, strict=True
            ):
                with layers(strategy).as_task(int(k)):
                    torch.testing.assert_close(row[:4], strategy.model(x[None])[0, :4], rtol=1e-5, atol=1e-5)


def test_statistics_of_the_users_own(benchmark):
    store = MahalanobisTaskInference(1, correlation=False, normalize=False, seed=5)
    plugin = TaskInferencePlugin(inference=store)
    assert plugin.inference is store and TaskInferencePlugin(3, seed=7).inference.seed == 7
    strategy = train(strategy_with(plugin), benchmark, last=2)
    assert (store.class_ids, store.tasks) == ((0, 1, 2, 3), (0, 0, 0, 1))
    assert outputs(strategy, benchmark.test_stream)[0].isfinite().all()


def test_bf16(benchmark, trained):
    strategy = train(strategy_with(TaskInferencePlugin(2), MixedPrecisionPlugin("bf16")), benchmark)
    logits, targets = outputs(strategy, benchmark.test_stream)
    exact, _ = outputs(copy.deepcopy(trained[3]), benchmark.test_stream)
    assert logits.isfinite().all() and strategy.plugins[1].inference.state_dict()["means"].dtype == torch.float32
    assert ((logits.argmax(1) == targets).float().mean() - (exact.argmax(1) == targets).float().mean()).abs() < 0.15


# ------------------------------------------------------------------ errors, and what is left behind
def test_the_order_of_the_plugins(benchmark):
    for plugins in ([TaskInferencePlugin(), LoRACompositionPlugin()], [TaskInferencePlugin()]):
        strategy = naive(plugins)
        before = state(strategy)
        with pytest.raises(ValueError, match="TaskInferencePlugin needs the weights that LoRACompositionPlugin keeps"):
            train(strategy, benchmark)
        assert_equal(before, state(strategy))


def test_classes_that_come_back_are_refused(benchmark):
    strategy = train(strategy_with(TaskInferencePlugin()), benchmark, last=2)
    with pytest.raises(ValueError, match=r"classes \[0, 1, 2\] were learnt in an earlier experience"):
        train(strategy, benchmark, last=1)


def test_bad_settings():
    with pytest.raises(ValueError, match="mixed is 'both'; 'auto', 'one_pass' or 'grouped'"):
        TaskInferencePlugin(mixed="both")
    with pytest.raises(ValueError, match="clusters: must be at least 1, got 0"):
        TaskInferencePlugin(0)


def test_an_evaluation_before_any_training(benchmark):
    strategy = strategy_with(TaskInferencePlugin(), evaluator=quiet(accuracy_metrics(stream=True)))
    logits, _ = outputs(strategy, benchmark.test_stream)
    with torch.no_grad():
        expected = strategy.model.eval()(inputs(benchmark.test_stream))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert strategy.plugins[1].accuracies == {} and len(strategy.evaluator.get_last_metrics()) == 1


def break_pass(strategy, number, error):
    """An exception in the middle of a forward pass; returns a handle."""
    calls = []

    def bomb(module, args):
        calls.append(args)
        if len(calls) == number:
            raise error

    return strategy.model.blocks[1].register_forward_pre_hook(bomb)


@pytest.mark.parametrize("mixed", ["one_pass", "grouped"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("broken_pass", [1, 2])
def test_nothing_is_left_behind_by_an_exception_in_a_pass(benchmark, trained, mixed, error, broken_pass):
    strategy = with_settings(trained[2], mixed=mixed)
    expected, _ = outputs(strategy, benchmark.test_stream)
    handle = break_pass(strategy, broken_pass, error)
    with pytest.raises(error):
        strategy.eval(benchmark.test_stream)
    handle.remove()
    composition = layers(strategy)
    if error is ZeroDivisionError:  # at once, whoever uses the model next
        assert {layer._view for layer in composition.layers.values()} == {None}
        assert not strategy.model.head._forward_pre_hooks
    again, _ = outputs(strategy, benchmark.test_stream)
    assert torch.equal(again, expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in strategy.model.modules())
    assert {layer._view for layer in composition.layers.values()} == {None}


def test_training_after_a_broken_evaluation(benchmark, trained):
    """It would else go through the first task's weights, without a gradient for the pairs, and the criterion would
    believe that it evaluates."""
    states = []
    for broken in (False, True):
        strategy = with_settings(trained[2])
        if broken:
            handle = break_pass(strategy, 1, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                strategy.eval(benchmark.test_stream)
            handle.remove()
        train(strategy, benchmark, first=2)
        states.append(state(strategy))
    assert_equal(*states)


def test_statistics_of_a_task_that_stops_early(benchmark):
    plugin = TaskInferencePlugin(2)
    strategy = strategy_with(plugin, StopAt(1), train_epochs=3)
    train(strategy, benchmark)
    assert plugin.inference.class_ids == (0, 1, 2, 3, 4, 5) and plugin.inference.tasks == (0, 0, 0, 1, 2, 2)


# ------------------------------------------------------------------ state
def test_state_round_trip(benchmark, trained):
    strategy = copy.deepcopy(trained[2])
    expected, _ = outputs(strategy, benchmark.test_stream)
    saved = copy.deepcopy(to_plain(strategy.plugins[1].state_dict()))
    resumed = strategy_with(TaskInferencePlugin(2))
    resumed.model.load_state_dict(strategy.model.state_dict())
    resumed.plugins[1].load_state_dict(copy.deepcopy(strategy.plugins[1].state_dict()))
    resumed.clock.train_exp_counter = 2
    assert differing_state(saved, to_plain(resumed.plugins[1].state_dict())) is None
    assert resumed.plugins[1].accuracies == strategy.plugins[1].accuracies != {}
    assert torch.equal(outputs(resumed, benchmark.test_stream)[0], expected)
    for one in (strategy, resumed):
        train(one, benchmark, first=2)
    assert torch.equal(*(outputs(one, benchmark.test_stream)[0] for one in (strategy, resumed)))
    assert differing_state(*(to_plain(one.plugins[1].state_dict()) for one in (strategy, resumed))) is None
    with pytest.raises(ValueError, match="clusters: the state was made with 2, here it is 4"):
        TaskInferencePlugin().load_state_dict(strategy.plugins[1].state_dict())
