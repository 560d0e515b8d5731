"""LoRAC-IPC inside Avalanche: the released code's run, equality with its plugins, streams, evaluation, a story."""

import copy
import math
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from avalanche_firn.benchmarks.digits import digits_stream
from avalanche_firn.models.heads import UNSEEN_LOGIT
from avalanche_firn.models.lora import LoRAComposition, add_composed_lora
from avalanche_firn.models.parts import with_taskwise_head
from avalanche_firn.plugins import checkpoint_files
from avalanche_firn.plugins.checkpoint import ExactCheckpointPlugin
from avalanche_firn.plugins.classifier_alignment import ClassifierAlignmentPlugin
from avalanche_firn.plugins.critical_parameters import ImportantParameterPlugin
from avalanche_firn.plugins.lora_composition import LoRACompositionPlugin
from avalanche_firn.plugins.losses import LocalCrossEntropy
from avalanche_firn.plugins.optimizers import FreshOptimizerPlugin
from avalanche_firn.plugins.plain_state import differing_state, to_plain
from avalanche_firn.plugins.schedules import lagged_cosine
from avalanche_firn.plugins.strategy_state import capture_strategy
from avalanche_firn.plugins.task_inference import TaskInferencePlugin
from avalanche_firn.strategies.lorac_ipc import LoRACIPC

sys.path.append(str(Path(__file__).parents[1] / "plugins"))
from lora_cases import StopAt, assert_equal, images, layers, logged, quiet, state, tiny_vit

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def lorac(model=None, **kwargs):
    settings = dict(
        rank=2, alpha=2.0, threshold=0.25, train_mb_size=8, train_epochs=2, eval_mb_size=16, evaluator=quiet(),
    ) | kwargs  # fmt: skip
    model = tiny_vit() if model is None else model
    settings.setdefault("optimizer", torch.optim.Adam(model.parameters(), lr=0.01))
    return LoRACIPC(model=model, **settings)


def short_tap(**kwargs):
    return ClassifierAlignmentPlugin.tap(**{"epochs": 3, "samples_per_class": 16, "clusters": 2, **kwargs})


def train(strategy, experiences, evaluated=None):
    for experience in experiences:
        torch.manual_seed(experience.current_experience)
        strategy.train(experience, eval_streams=[])
        if evaluated is not None:
            strategy.eval(evaluated)
    return strategy


def plain(strategy):
    """State of the method's plugins."""
    kinds = (LoRACompositionPlugin, ImportantParameterPlugin, ClassifierAlignmentPlugin, TaskInferencePlugin)
    return to_plain([p.state_dict() for p in strategy.plugins if isinstance(p, kinds)])


@pytest.fixture(scope="module")
def benchmark(stream_of):
    """Three tasks of 2, 1 and 3 classes."""
    return images(stream_of, (2, 1, 3))


# ------------------------------------------------------------------ the released code's run
F64, F32 = torch.float64, torch.float32


def close(actual, expected, tolerance):
    """Relative to the largest entry of the expected array."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    assert (actual.detach() - expected).abs().max() <= tolerance * expected.abs().max()


def golden_places(composition):
    """(golden name of the matrix, block, name of the position, layer, part)."""
    found = []
    for name, layer in composition.layers.items():
        block, kind = int(name.split("blocks.")[1][0]), name.rpartition(".")[2]
        for part in layer.parts:
            golden_name = {"qkv": part, "proj": "out"}.get(kind, kind)
            found.append((golden_name, block, name if part == "full" else f"{name}.{part}", layer, part))
    assert len(found) == 12
    return found


class RecordingLoss(LocalCrossEntropy, supports_distributed=True):
    """Keeps the training loss: Avalanche's own sum is float32."""

    def local_loss(self, *args):
        self.value = super().local_loss(*args)
        return self.value


class Recorder(SupervisedPlugin):
    """Puts the golden initial values in place, and keeps what the golden file has of every step."""

    def __init__(self, g):
        super().__init__()
        self.g, self.steps = g, []

    def before_training_exp(self, strategy, **kwargs):
        task, head, self.steps = strategy.clock.train_exp_counter, strategy.model.head, []
        with torch.no_grad():
            for n, block, _, layer, part in golden_places(layers(strategy)):
                assert len(layer.A[part]) == task + 1 and not layer.B[part][task].any()
                layer.A[part][task].copy_(torch.from_numpy(self.g[f"A_init_{n}"][task, block]))
            if not isinstance(head, nn.Linear):
                rows = slice(2 * task, 2 * task + 2)
                head.weights[task].copy_(torch.from_numpy(self.g["vit.head.weight"][rows]))
                head.biases[task].copy_(torch.from_numpy(self.g["vit.head.bias"][rows]))

    def before_backward(self, strategy, **kwargs):
        """After the penalty was added."""
        self.ortho = float(self.g["lambda_ortho"]) * layers(strategy).orthogonality().detach()
        self.ce = strategy._criterion.value.detach()
        torch.testing.assert_close(strategy.loss.squeeze(), (self.ce + self.ortho).float(), rtol=1e-5, atol=0)

    def after_backward(self, strategy, **kwargs):
        gradients = [p.grad.norm() for p in strategy.model.parameters() if p.requires_grad]
        self.steps.append(torch.stack([self.ce, self.ortho, torch.stack(gradients).norm()]))

    def after_update(self, strategy, **kwargs):
        tracker = next(p for p in strategy.plugins if isinstance(p, ImportantParameterPlugin)).tracker
        self.S, self.U = tracker.sensitivity(), tracker.uncertainty()


def golden_strategy(g, kind, gates, dtype, **overrides):
    sizes = {"img_size": int(g["img"]), "patch_size": int(g["patch"]), "num_heads": int(g["num_heads"])}
    vit = VisionTransformer(**sizes, embed_dim=8, depth=2, num_classes=6).to(dtype)
    vit.load_state_dict({k[4:]: torch.from_numpy(v) for k, v in g.items() if k.startswith("vit.")})
    common = dict(
        optimizer=torch.optim.Adam(vit.parameters(), lr=float(g["lr"])), train_mb_size=4,
        train_epochs=int(g["epochs"]), evaluator=quiet(), criterion=RecordingLoss(),
    )  # fmt: skip
    method = dict(omega_scale=float(g["omega_lr_scale"]), clip=float(g["clip"])) | overrides
    low_rank = dict(rank=int(g["rank"]), alpha=float(g["alpha"]))
    if kind == "LoRACIPC":
        return LoRACIPC(
            model=with_taskwise_head(vit).to(dtype), orthogonality=float(g["lambda_ortho"]), alignment=False,
            threshold=float(g["fraction"]), task_inference=False, official_k_gate=gates is not None,
            plugins=[Recorder(g)], **low_rank, **method, **common,
        )  # fmt: skip
    add_composed_lora(vit, **low_rank, gates=gates)
    plugins = [
        LoRACompositionPlugin(float(g["lambda_ortho"]), **method),
        ImportantParameterPlugin(float(g["fraction"]), window=None), Recorder(g),
    ]  # fmt: skip
    return Naive(model=vit, plugins=plugins, **common)


def golden_run(g, stream_of, kind="Naive", gates=None, dtype=F64, **overrides):
    strategy = golden_strategy(g, kind, gates, dtype, **overrides)
    x, y = (torch.cat([torch.from_numpy(g[f"t{t}_{part}"]).flatten(0, 1) for t in range(3)]) for part in "xy")
    for task, experience in enumerate(stream_of(x.to(dtype), y, (2, 2, 2)).train_stream):
        strategy.train(experience, eval_streams=[], shuffle=False)
        yield task, strategy


@pytest.mark.parametrize("kind", ["Naive", "LoRACIPC"])
@pytest.mark.parametrize(("prefix", "gates"), [("correct", None), ("official", {"k": "q"})])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 2e-5)])
def test_golden_train_run(golden, stream_of, kind, prefix, gates, dtype, tolerance):
    g = golden("lorac_ipc", "train_run")
    before, key_alone = set(), False
    for task, strategy in golden_run(g, stream_of, kind, gates, dtype):
        recorder = next(p for p in strategy.plugins if isinstance(p, Recorder))
        for column, name in enumerate(("ce", "ortho", "gradnorm")):
            close(torch.stack(recorder.steps)[:, column], g[f"{prefix}_t{task}_{name}"], tolerance)
        composition, frozen = layers(strategy), set()
        for n, block, position, layer, part in golden_places(composition):
            close(layer.A[part][task], g[f"{prefix}_t{task}_A_{n}"][block], tolerance)
            close(layer.B[part][task], g[f"{prefix}_t{task}_B_{n}"][block], tolerance)
            if task:
                close(layer.omega[part], g[f"{prefix}_t{task}_omega_{n}"][:, block], tolerance)
            assert (position in recorder.S) == (position not in before)  # frozen: not tracked
            if position not in before:
                for values, name in ((recorder.S, "S"), (recorder.U, "U")):
                    close(values[position], g[f"{prefix}_t{task}_{name}_{n}"][block], tolerance)
            if g[f"{prefix}_t{task}_frozen_{n}"][block]:
                frozen.add(position)
            assert layer.is_free(part) == (position not in frozen)
        head = strategy.model.head
        weight, bias = (head.weight, head.bias) if kind == "Naive" else head.weight_matrix()
        close(weight, g[f"{prefix}_t{task}_head_weight"][: len(weight)], tolerance)
        close(bias, g[f"{prefix}_t{task}_head_bias"][: len(bias)], tolerance)
        before = frozen
        key_alone = key_alone or any(p.endswith(".k") and f"{p[:-1]}q" not in frozen for p in frozen)
    assert key_alone  # else both gates would give the same
    with torch.no_grad():
        for task in range(3):
            with composition.as_task(task):
                logits = strategy.model.eval()(torch.from_numpy(g["probe_x"]).to(dtype))
            close(logits, g[f"{prefix}_probe_logits_task{task}"], tolerance)


@pytest.mark.parametrize("wrong", [{"omega_scale": 0.5}, {"clip": None}, {"first_lr": 0.001}, {"gates": {"k": "q"}}])
def test_the_golden_run_notices_wrong_settings(golden, stream_of, wrong):
    g = golden("lorac_ipc", "train_run")
    *_, (task, strategy) = golden_run(g, stream_of, **wrong)
    with torch.no_grad(), layers(strategy).as_task(task):
        logits = strategy.model.eval()(torch.from_numpy(g["probe_x"]))
    assert (logits - torch.from_numpy(g["correct_probe_logits_task2"])).abs().max() > 1e-7


# ------------------------------------------------------------------ composition
@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_equals_naive_with_plugins_to_the_bit(stream_of, generation):
    benchmark = images(stream_of, (2, 1, 3), generation=generation)
    metrics = (accuracy_metrics(stream=True), loss_metrics(stream=True))
    ours = LoRACIPC(
        model=tiny_vit(), rank=2, threshold=0.25, seed=4, train_mb_size=8, train_epochs=3, evaluator=quiet(*metrics)
    )
    model = with_taskwise_head(tiny_vit())
    add_composed_lora(model, rank=2, alpha=1)
    naive = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.0015), criterion=LocalCrossEntropy(),
        train_mb_size=8, train_epochs=3, eval_mb_size=8, evaluator=quiet(*metrics),
        plugins=[
            LoRACompositionPlugin(scheduler_factory=lagged_cosine(3), seed=4), ImportantParameterPlugin(0.25),
            ClassifierAlignmentPlugin.tap(seed=4), TaskInferencePlugin(seed=4),
        ],
    )  # fmt: skip
    for strategy in (ours, naive):
        train(strategy, benchmark.train_stream, benchmark.test_stream)
    assert_equal(state(ours), state(naive))
    assert len(plain(ours)) == 4 and differing_state(plain(ours), plain(naive)) is None
    mine, theirs = (s.evaluator.get_last_metrics() for s in (ours, naive))
    assert mine == theirs and any(k.startswith("Loss_Stream") for k in mine)


def test_a_threshold_of_0_is_lorac(benchmark):
    """Nothing is frozen, nothing tracked; the same without the plugin, to the bit."""
    strategy = train(lorac(threshold=0.0, alignment=False), benchmark.train_stream)
    importance = next(p for p in strategy.plugins if isinstance(p, ImportantParameterPlugin))
    assert importance.frozen_after == [[], [], []] and importance.tracker.score() == {}
    assert not layers(strategy).frozen.any()
    model = with_taskwise_head(tiny_vit())
    add_composed_lora(model, rank=2, alpha=2.0)
    without = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01), criterion=LocalCrossEntropy(),
        plugins=[LoRACompositionPlugin(scheduler_factory=lagged_cosine(2))], train_mb_size=8, train_epochs=2,
        evaluator=quiet(),
    )  # fmt: skip
    assert_equal(state(strategy), state(train(without, benchmark.train_stream)))


def test_defaults_are_those_of_the_released_script():
    strategy = LoRACIPC(model=tiny_vit(width=32), evaluator=quiet())
    composition, importance, alignment, inference = strategy.plugins[:4]
    assert (composition.orthogonality, composition.omega_scale, composition.clip) == (0.5, 1.0, 1.0)
    assert composition.first_lr is None and (importance.fraction, importance.window) == (0.05, 150)
    assert (alignment.epochs, alignment.gaussians.clusters, alignment.restore) == (50, 10, False)
    assert inference.inference.clusters == 4 and not inference.batchwise_vote and inference.mask_unseen
    assert type(strategy.optimizer) is torch.optim.Adam and strategy.optimizer.defaults["lr"] == 0.0015
    assert strategy.optimizer.defaults["weight_decay"] == 0 and isinstance(strategy._criterion, LocalCrossEntropy)
    assert (strategy.train_mb_size, strategy.train_epochs) == (128, 10)
    tasks = layers(strategy)
    assert len(tasks.positions) == 12 and {(layer.rank, layer.scale) for layer in tasks.layers.values()} == {
        (16, 1 / 16)
    }
    extra = SupervisedPlugin()
    strategy = lorac(plugins=[extra], alignment=False, task_inference=False, seed=3)
    kinds = [type(p) for p in strategy.plugins[:2]]
    assert kinds == [LoRACompositionPlugin, ImportantParameterPlugin] and strategy.plugins[2] is extra
    assert strategy.plugins[0].seed == 3


def test_parts_that_are_given_are_used(benchmark):
    importance, alignment, inference = ImportantParameterPlugin(0.5), short_tap(), TaskInferencePlugin(2)
    model = with_taskwise_head(tiny_vit())
    layer = add_composed_lora(model, ["mlp.fc1"], rank=3)["backbone.blocks.0.mlp.fc1"]
    strategy = lorac(model, importance=importance, alignment=alignment, task_inference=inference, rank=2)
    assert strategy.plugins[1:4] == [importance, alignment, inference] and strategy.model is model
    train(strategy, benchmark.train_stream[:1])
    assert layer.num_closed == 1 and layer.rank == 3 and len(importance.frozen_after[0]) == 1
    with pytest.raises(ValueError, match="official_k_gate is True, and the model has its LoRA layers already"):
        lorac(model, official_k_gate=True)
    gates = {layer.gates.get("k") for layer in layers(lorac(official_k_gate=True)).layers.values()}
    assert gates == {"q", None}
    (name,) = layers(lorac(targets=["blocks.1.attn.proj"], init="qr")).layers
    assert name == "backbone.blocks.1.attn.proj"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "fraction is 1.5"), ({"orthogonality": -1}, "orthogonality is -1"),
        ({"clip": 0}, "clip is 0"), ({"rank": 9}, "rank is 9; 1 to 8"), ({"init": "zeros"}, "init is 'zeros'"),
        ({"targets": ["q_proj"]}, r"targets \['q_proj'\] match nothing"), ({"train_epochs": 0}, "epochs is 0"),
        ({"model": nn.Sequential(nn.Linear(4, 4))}, "feature size of Sequential is not known"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        lorac(**settings)


# ------------------------------------------------------------------ what a new task leaves alone
def test_the_first_step_of_a_task_computes_what_the_last_task_left(benchmark):
    """Difference 0, frozen matrices and aligned heads included."""

    class FirstStep(SupervisedPlugin):
        def after_forward(self, strategy, **kwargs):
            if strategy.clock.train_exp_iterations == 0 and before is not None:
                with torch.no_grad():
                    known = len(before.head.known_classes)
                    expected = before.eval()(strategy.mb_x)
                compared.append((strategy.mb_output.detach()[:, :known], expected[:, :known]))

    compared, before = [], None
    strategy = lorac(alignment=short_tap(), plugins=[FirstStep()])
    train(strategy, benchmark.train_stream[:1])
    for experience in benchmark.train_stream[1:]:
        before = copy.deepcopy(strategy.model)
        train(strategy, [experience])
    assert len(compared) == 2 and layers(strategy).frozen.any()
    for now, then in compared:
        assert torch.equal(now, then) and now.abs().max() > 0


@pytest.mark.parametrize("official_k_gate", [False, True])
def test_frozen_matrices_and_closed_tasks_stay_bit_identical(benchmark, official_k_gate):
    """Also under weight decay, in the layers and in the weights they compose."""
    vit = tiny_vit()
    strategy = lorac(
        vit, optimizer=torch.optim.AdamW(vit.parameters(), lr=0.01, weight_decay=0.5), official_k_gate=official_k_gate
    )
    for task, experience in enumerate(benchmark.train_stream):
        tasks = layers(strategy)
        closed = [{n: layer.merged_weight(k).clone() for n, layer in tasks.layers.items()} for k in range(task)]
        newest = {n: layer.merged_weight().clone() for n, layer in tasks.layers.items()}
        free = [(n, part) for n, layer in tasks.layers.items() for part in layer.parts if layer.is_free(part)]
        train(strategy, [experience])
        for k, weights in enumerate(closed):
            assert all(torch.equal(layer.merged_weight(k), weights[n]) for n, layer in tasks.layers.items())
        for n, layer in tasks.layers.items():
            for i, part in enumerate(layer.parts):
                rows = layer._rows(i)
                moved = not torch.equal(layer.merged_weight()[rows], newest[n][rows])
                if not (official_k_gate and part == "k"):  # the slip: new keys are gated by the queries
                    assert moved == ((n, part) in free)
    assert len(free) == 6


def test_old_heads_change_by_alignment_only(benchmark):
    class Heads(SupervisedPlugin):
        """Weights and biases of all classes, when an experience opens and at the end of its last epoch."""

        def before_training_epoch(self, strategy, **kwargs):
            if strategy.clock.train_exp_epochs == 0:
                starts.append(strategy.model.head.weight_matrix())

        def after_training_iteration(self, strategy, **kwargs):
            ends[strategy.clock.train_exp_counter] = strategy.model.head.weight_matrix()

    for alignment in (False, short_tap()):
        starts, ends, finals = [], {}, []
        vit = tiny_vit()
        strategy = lorac(
            vit, alignment=alignment, plugins=[Heads()],
            optimizer=torch.optim.AdamW(vit.parameters(), lr=0.01, weight_decay=0.5),
        )  # fmt: skip
        for experience in benchmark.train_stream:
            train(strategy, [experience])
            finals.append(strategy.model.head.weight_matrix())
        for task, old in ((1, 2), (2, 3)):
            for kind in (0, 1):
                assert torch.equal(starts[task][kind][:old], finals[task - 1][kind])
                assert torch.equal(ends[task][kind][:old], starts[task][kind][:old])  # training
                same = torch.equal(finals[task][kind], ends[task][kind])
                assert same == (alignment is False)
        assert torch.equal(finals[0][0], ends[0][0])  # the first task is not aligned


def test_the_penalty_keeps_pairs_apart(benchmark):
    """Largest product of columns of two tasks over seeds 0, 1, 2: 1.07, 1.17, 1.72 without, .67, .69, .86 with it."""
    found = {}
    for weight in (0.0, 0.5):
        strategy = lorac(orthogonality=weight, alignment=False, task_inference=False, train_epochs=15, threshold=0)
        train(strategy, benchmark.train_stream[:2])
        found[weight] = strategy.plugins[0].overlaps[-1]
    for name in ("largest", "mean-cosine"):
        assert found[0.5][name] < 0.8 * found[0.0][name], found


# ------------------------------------------------------------------ streams
def digit_tasks(sizes, order=None):
    """Digits of 16 pixels; the 359 of the validation part are trained on."""
    return digits_stream(image_size=16, tasks=sizes, class_order=order)


@pytest.mark.parametrize("eval_every", [0, 1])
def test_permuted_unequal_tasks_with_periodic_evaluations_of_the_whole_stream(eval_every):
    """Tasks of 3, 1 and 2 digits in no order; experiences to come have a finite loss; what is logged last is what an
    evaluation of its own says; and evaluations change nothing."""

    class Seed(SupervisedPlugin):
        def before_train_dataset_adaptation(self, strategy, **kwargs):
            torch.manual_seed(strategy.experience.current_experience)

        def before_training_epoch(self, strategy, **kwargs):
            torch.manual_seed(10 * strategy.clock.train_exp_counter + strategy.clock.train_exp_epochs)

    stream = digit_tasks([3, 1, 2, 4], [7, 3, 0, 9, 4, 1, 8, 2, 6, 5])
    states, routed = [], []
    for every in (eval_every, -1):
        evaluator = quiet(accuracy_metrics(stream=True, experience=True), loss_metrics(stream=True, experience=True))
        strategy = lorac(
            eval_every=every, evaluator=evaluator, plugins=[Seed()], train_mb_size=32, alignment=short_tap(),
            eval_mb_size=128,
        )  # fmt: skip
        for task, experience in enumerate(stream.benchmark.valid_stream[:3]):
            strategy.train(experience, eval_streams=[stream.test])
            found = strategy.eval(stream.test) if every == -1 else evaluator.get_last_metrics()
            losses = {k: v for k, v in found.items() if "Loss_" in k}
            assert len(losses) == 5 and all(map(math.isfinite, losses.values()))
            accuracies = [v for k, v in sorted(found.items()) if k.startswith("Top1_Acc_Exp")]
            assert len(accuracies) == 4 and accuracies[task + 1 :] == [0.0] * (3 - task)
            assert every == -1 or strategy.eval(stream.test) == found
        assert strategy.model.head.known_classes == (0, 3, 7, 9, 1, 4)
        inference = next(p for p in strategy.plugins if isinstance(p, TaskInferencePlugin))
        assert dict(zip(inference.inference.class_ids, inference.inference.tasks, strict=True)) == {
            0: 0, 3: 0, 7: 0, 9: 1, 1: 2, 4: 2
        }  # fmt: skip
        states.append(state(strategy))
        routed.append(inference.accuracies)
    assert_equal(*states)
    assert routed[0] == routed[1] and routed[0].keys() == {1, 2, 3}


def test_a_first_experience_of_one_class(stream_of):
    """Its loss is 0 and so are all scores; the penalty still shapes the pairs."""
    benchmark = images(stream_of, (1, 2))
    strategy = lorac(evaluator=quiet(accuracy_metrics(stream=True), loss_metrics(stream=True)))
    train(strategy, benchmark.train_stream, benchmark.test_stream)
    assert [len(p) for p in strategy.plugins[1].frozen_after] == [3, 6]
    assert all(map(math.isfinite, strategy.evaluator.get_last_metrics().values()))
    assert logged(strategy, "loss/task")[1][0] == 0 < logged(strategy, "loss/orthogonality")[1][0]


def test_an_experience_that_stops_early(benchmark):
    strategy = lorac(plugins=[StopAt(1)], train_epochs=4, alignment=short_tap())
    train(strategy, benchmark.train_stream, benchmark.test_stream)
    assert layers(strategy).num_closed == 3 and strategy.plugins[3].inference.tasks == (0, 0, 1, 2, 2, 2)
    assert [len(p) for p in strategy.plugins[1].frozen_after] == [3, 6, 9]


# ------------------------------------------------------------------ evaluation
class Logits(SupervisedPlugin):
    def before_eval(self, strategy, **kwargs):
        self.logits = []

    def after_eval_forward(self, strategy, **kwargs):
        self.logits.append(strategy.mb_output)


@pytest.mark.parametrize("mixed", ["one_pass", "grouped"])
def test_the_order_and_size_of_batches_do_not_matter(stream_of, mixed):
    """All test images as one experience, so that batches hold all tasks."""
    seen, inference = Logits(), TaskInferencePlugin(2, mixed=mixed)
    strategy = lorac(task_inference=inference, plugins=[seen], alignment=short_tap())
    train(strategy, images(stream_of, (2, 1, 3)).train_stream)
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(90, 3, 16, 16, generator=generator), torch.arange(90) % 6
    shuffled = torch.randperm(90, generator=generator)
    found = {}
    for name, rows, size in (("one", torch.arange(90), 1), ("many", torch.arange(90), 64), ("mixed", shuffled, 64)):
        strategy.eval_mb_size = size
        strategy.eval(stream_of(x[rows], y[rows], (6,)).test_stream)
        found[name] = torch.cat(seen.logits)
    torch.testing.assert_close(found["many"], found["one"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["mixed"], found["one"][shuffled], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["one"].argmax(1), found["many"].argmax(1))
    assert torch.equal(found["one"].argmax(1)[shuffled], found["mixed"].argmax(1))
    captured = []
    handle = strategy.model.head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad(), layers(strategy).as_task(0):
        strategy.model.eval()(x)
    handle.remove()
    tasks = inference.inference.infer(captured[0])
    assert set(tasks.tolist()) == {0, 1, 2}
    for row, task, logits in zip(x, tasks.tolist(), found["many"], strict=True):
        with torch.no_grad(), layers(strategy).as_task(task):
            torch.testing.assert_close(strategy.model(row[None])[0], logits, rtol=1e-5, atol=1e-5)


def test_without_task_inference_the_newest_weights_are_used(benchmark):
    seen = Logits()
    strategy = train(lorac(task_inference=False, plugins=[seen]), benchmark.train_stream[:2])
    strategy.eval(benchmark.test_stream)
    x = torch.stack([row[0] for experience in benchmark.test_stream for row in experience.dataset])
    with torch.no_grad(), layers(strategy).as_task(1):
        expected = strategy.model.eval()(x)
    logits = torch.cat([nn.functional.pad(part, (0, 6 - part.shape[1]), value=UNSEEN_LOGIT) for part in seen.logits])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected[:, 3:] == UNSEEN_LOGIT).all()


# ------------------------------------------------------------------ resume
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_stops_anywhere_resumes_to_the_bit(stream_of, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "sync", lambda path: None)

    class Stop(SupervisedPlugin):
        stateless = True
        at = None

        def after_training_iteration(self, strategy, **kwargs):
            if strategy.clock.train_iterations == self.at:
                raise KeyboardInterrupt

    benchmark = images(stream_of, (2, 3))

    def run(folder, seed, at=None):
        torch.manual_seed(seed)
        stop, checkpoint = Stop(), ExactCheckpointPlugin(folder, every=2)
        stop.at = at
        strategy = lorac(
            plugins=[stop, checkpoint], alignment=short_tap(), importance=ImportantParameterPlugin(0.25, window=3)
        )
        for experience in benchmark.train_stream[checkpoint.resume(strategy) :]:
            if not checkpoint.is_trained(experience):
                strategy.train(experience, eval_streams=[])
            strategy.eval(benchmark.test_stream)
        captured = capture_strategy(strategy)
        captured["plugins"] = [p for p in captured["plugins"] if "checkpoint" not in p["class"]]
        checkpoint.close()
        return captured

    expected = run(tmp_path / "whole", 0)
    # 4 iterations in the first task, 6 in the second, of which the last 3 are in the window
    for seed, at in ((0, 3), (1, 5), (2, 9)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", seed, at)
    assert differing_state(expected, run(tmp_path / "parts", 3)) is None


# ------------------------------------------------------------------ story
def test_three_tasks_of_digits_are_remembered_unlike_by_one_pair_for_all():
    """The embedded transformer on 359 digits in three tasks. Last accuracy over seeds 0, 1, 2: one pair for the whole
    stream .398, .387, .401; LoRAC-IPC .981, .986, .975 (tasks inferred .990, .992, .985); without alignment .967, .981,
    .961; without task inference, too, .944, .947, .908."""
    stream = digits_stream(tasks=[3, 3, 4])

    def last_accuracy(sequential, seed=0):
        torch.manual_seed(seed)
        model = timm.create_model("vit_firn_32.omniglot", pretrained=True)
        common = dict(
            optimizer=torch.optim.Adam(model.parameters(), lr=0.005), train_mb_size=16, train_epochs=2,
            eval_mb_size=256, evaluator=quiet(accuracy_metrics(stream=True)),
        )  # fmt: skip
        if sequential:
            model = with_taskwise_head(model, freeze_old=False)
            for parameter in model.backbone.parameters():
                parameter.requires_grad_(False)
            add_composed_lora(model, rank=4)
            LoRAComposition(model).open_task(torch.Generator().manual_seed(seed))
            strategy = Naive(model=model, criterion=nn.CrossEntropyLoss(), plugins=[FreshOptimizerPlugin()], **common)
        else:
            strategy = LoRACIPC(model=model, rank=4, seed=seed, **common)
        train(strategy, stream.benchmark.valid_stream)
        (accuracy,) = (v for k, v in strategy.eval(stream.test).items() if k.startswith("Top1_Acc_Stream"))
        return accuracy, strategy

    sequential, _ = last_accuracy(True)
    start = time.process_time()
    accuracy, strategy = last_accuracy(False)
    assert time.process_time() - start < 30  # three tasks, measured: 4 s
    composition, importance, _, inference = strategy.plugins[:4]
    assert accuracy > 0.9 and accuracy > sequential + 0.4
    assert inference.accuracies[3] > 0.9  # chance: 1/3
    assert [len(names) for names in importance.frozen_after] == [1, 2, 3]  # 5 % of 36 matrices
    assert composition.overlaps[-1]["mean-cosine"] < 0.07
