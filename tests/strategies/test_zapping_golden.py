"""ASB, Meta-ASB, the episode sampler and both transfers against stored numbers (tests/golden/zapping)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

from avalanche_firn.models.least_squares import least_squares_head
from avalanche_firn.plugins.episodes import EpisodeSampler, draw_episode
from avalanche_firn.strategies.transfer import continual_transfer, iid_transfer
from avalanche_firn.strategies.transfer_start import TransferTask, prepare_head
from avalanche_firn.strategies.zapping import ASB

sys.path.append(str(Path(__file__).parent))
from zapping_cases import close, network, pixels, tensors


class AfterInner(SupervisedPlugin):
    """Weights as the outer step finds them."""

    def before_forward(self, strategy, **kwargs):
        self.weights = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}


def episodes(data, meta):
    """Yields the strategy after every episode, its losses, and the weights after the sequence."""
    after = AfterInner()
    strategy = ASB(
        model=network(data), inner_lr=float(data["inner_lr"]), outer_lr=float(data["outer_lr"]), meta=meta,
        zap=bool(data["zap"]), cycles=int(data["cycles"]), inner_batch_size=int(data["inner_batch_size"]),
        remember_only=bool(data["remember_only"]), max_grad_norm=float(data["max_grad_norm"]) or None,
        plugins=[after], evaluator=None, seed=0,
    )  # fmt: skip
    strategy.sequential_phase.zap_generator.manual_seed(int(data["zap_seed"]))
    for e, class_id in enumerate(data["classes"]):
        inner = pixels(data["inner_images_u8"][e])
        labels = torch.full((len(inner),), int(class_id))
        remember = torch.from_numpy(data["remember_labels"][e])
        losses = strategy.episode(inner, labels, pixels(data["remember_images_u8"][e]), remember)
        yield e, strategy.model, losses, after.weights


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_golden_asb(golden):
    data = golden("zapping", "asb_run")
    for e, model, losses, inner in episodes(data, meta=False):
        np.testing.assert_allclose(losses.inner, data["inner_losses"][e], rtol=0, atol=1e-9)
        assert abs(float(losses.batch) - data["batch_loss"][e]) <= 1e-9
        close(inner, tensors(data, f"e{e}_after_inner"))
        close(gradients(model), tensors(data, f"e{e}_batch_gradient"))
        close(dict(model.named_parameters()), tensors(data, f"e{e}_after_outer"))


def test_golden_meta_asb(golden):
    data = golden("zapping", "meta_asb_run")
    for e, model, losses, _ in episodes(data, meta=True):
        np.testing.assert_allclose(losses.inner, data["inner_losses"][e], rtol=0, atol=1e-9)
        assert abs(float(losses.batch) - data["batch_loss"][e]) <= 1e-9
        close(gradients(model), tensors(data, f"e{e}_meta_gradient"))
        close(dict(model.named_parameters()), tensors(data, f"e{e}_after_outer"))


def test_a_first_order_gradient_is_another_one(golden):
    data = golden("zapping", "meta_asb_run")
    _, model, _, _ = next(episodes(data, meta=False))
    expected = tensors(data, "e0_meta_gradient")
    assert max((gradients(model)[n] - g).abs().max() for n, g in expected.items()) > 0.1


def test_golden_sampler(golden):
    data = golden("zapping", "sampler_episodes")
    ends = np.cumsum(data["train_pool_sizes"])
    pools = np.split(data["train_pool"], ends[:-1])
    rng = np.random.default_rng(int(data["seed"]))
    for e in range(int(data["n_episodes"])):
        n, m = len(data[f"ep{e}_inner_ids"]), len(data[f"ep{e}_remember_ids"])
        chosen, inner, remember = draw_episode(pools, n, m, rng)
        assert chosen == data[f"ep{e}_class"]
        np.testing.assert_array_equal(inner, data[f"ep{e}_inner_ids"])
        np.testing.assert_array_equal(remember, data[f"ep{e}_remember_ids"])
        whole = np.concatenate([inner, remember])
        batch = whole[n:] if data[f"ep{e}_remember_only"] else whole
        np.testing.assert_array_equal(batch, data[f"ep{e}_batch_ids"])


def test_sampler_over_labels_draws_the_same_episodes(golden):
    """Pools of consecutive places, the first episodes of a run with one length."""
    data = golden("zapping", "sampler_episodes")
    labels = np.repeat(np.arange(len(data["train_pool_sizes"])), data["train_pool_sizes"])
    n, m = len(data["ep0_inner_ids"]), len(data["ep0_remember_ids"])
    sampler = EpisodeSampler(labels, episodes=4, inner_steps=n, remember_size=m, seed=int(data["seed"]))
    for e, batch in enumerate(sampler):
        np.testing.assert_array_equal(data["train_pool"][batch][:n], data[f"ep{e}_inner_ids"])
        np.testing.assert_array_equal(data["train_pool"][batch][n:], data[f"ep{e}_remember_ids"])


# ------------------------------------------------------------------- transfer
def tasks_of(data):
    """Tasks in stored order."""
    train = pixels(data["train_images_u8"]).split(data["train_counts"].tolist())
    test = pixels(data["test_images_u8"]).split(data["test_counts"].tolist())
    labels = data["task_labels"].tolist()
    return [
        TransferTask(x, torch.full((len(x),), c), z, torch.full((len(z),), c))
        for x, z, c in zip(train, test, labels, strict=True)
    ]


def with_golden_head(data):
    model = network(data)
    with torch.no_grad():
        model.fc.weight.copy_(torch.from_numpy(data["head_w_after_reinit"]))
        model.fc.bias.copy_(torch.from_numpy(data["head_b_after_reinit"]))
    return model


def logits(model, data):
    model.eval()
    with torch.no_grad():
        return model(pixels(data["test_images_u8"])).numpy()


@pytest.mark.parametrize("name", ["continual_transfer", "continual_transfer_head_only"])
def test_golden_continual_transfer(golden, name):
    data = golden("zapping", name)
    result = continual_transfer(
        with_golden_head(data), tasks_of(data), lr=float(data["lr"]), head="given", log_every=1, log_train=True,
        trainable="head" if data["head_only"] else "all",
    )  # fmt: skip
    assert list(result.logged_after) == data["logged_after_n_classes"].tolist()
    np.testing.assert_array_equal(result.test_accuracy, data["test_accuracy"])
    np.testing.assert_array_equal(result.train_accuracy, data["train_accuracy"])
    np.testing.assert_allclose(logits(result.model, data), data["final_test_logits"], rtol=0, atol=1e-8)
    close(dict(result.model.named_parameters()), tensors(data, "final"))
    assert not result.diverged


@pytest.mark.parametrize("name", ["continual_transfer", "continual_transfer_head_only"])
def test_golden_continual_transfer_through_naive(golden, name):
    """A fixed Linear, batches of 1, no shuffling, evaluation mode: the same numbers by Avalanche's loop."""
    data = golden("zapping", name)
    model = with_golden_head(data)
    if data["head_only"]:
        for parameter in [p for n, p in model.named_parameters() if not n.startswith("fc")]:
            parameter.requires_grad_(False)

    class EvaluationMode(SupervisedPlugin):
        def before_training_iteration(self, strategy, **kwargs):
            strategy.model.eval()

    labels = np.repeat(data["task_labels"], data["train_counts"])
    order = data["task_labels"].tolist()
    dataset = TensorDataset(pixels(data["train_images_u8"]), torch.from_numpy(labels))
    dataset.targets = labels.tolist()
    remapped = {c: i for i, c in enumerate(order)}
    dataset.targets = [remapped[c] for c in dataset.targets]  # Avalanche wants labels from 0
    avalanche = as_classification_dataset(dataset)
    data_of = {"train": avalanche, "test": avalanche}
    tasks = list(range(len(order)))
    benchmark = class_incremental_benchmark(data_of, class_order=tasks, num_classes_per_exp=[1] * len(order))
    strategy = Naive(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=float(data["lr"])),
        criterion=nn.CrossEntropyLoss(), train_mb_size=1, train_epochs=1, evaluator=None, plugins=[EvaluationMode()],
    )  # fmt: skip
    for experience in benchmark.train_stream:
        strategy.train(experience, shuffle=False)
    np.testing.assert_allclose(logits(model, data), data["final_test_logits"], rtol=0, atol=1e-8)
    close(dict(model.named_parameters()), tensors(data, "final"))


def test_golden_iid_transfer(golden):
    data = golden("zapping", "iid_transfer")
    result = iid_transfer(
        with_golden_head(data), tasks_of(data), lr=float(data["lr"]), head="given", epochs=int(data["epochs"]),
        batch_size=int(data["batch_size"]), orders=data["order"].tolist(), log_train=True,
    )  # fmt: skip
    counts = result.test_counts.double()
    top5 = float((result.test_top5[-1] * counts).sum() / counts.sum())
    assert result.accuracy == pytest.approx(data["test_top1_top5"][0], abs=1e-12)
    assert top5 == pytest.approx(data["test_top1_top5"][1], abs=1e-12)
    assert float(result.train_accuracy[-1].mean()) == pytest.approx(data["train_top1_top5"][0], abs=1e-12)
    np.testing.assert_allclose(logits(result.model, data), data["final_test_logits"], rtol=0, atol=1e-8)
    close(dict(result.model.named_parameters()), tensors(data, "final"))


def test_golden_head_start(golden):
    data = golden("zapping", "head_reinit")
    for i in range(int(data["n_cases"])):
        old, weight = int(data[f"c{i}_old_outputs"]), data[f"c{i}_weight"]
        model = nn.Sequential()
        model.add_module("backbone", nn.Identity())
        model.add_module("head", nn.Linear(weight.shape[1], old).double())
        before = model.head
        generator = torch.Generator().manual_seed(int(data[f"c{i}_seed"]))
        prepare_head(model, int(data[f"c{i}_needed"]), generator=generator)
        assert (model.head is not before) == bool(data[f"c{i}_replaced"])
        np.testing.assert_allclose(model.head.weight.detach(), weight, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(model.head.bias.detach(), data[f"c{i}_bias"])


def test_golden_least_squares_head(golden):
    data = golden("zapping", "lstsq_head")
    for i in range(int(data["n_cases"])):
        features, labels = torch.from_numpy(data[f"c{i}_features"]), torch.from_numpy(data[f"c{i}_labels"])
        weight, bias = least_squares_head(features, labels, int(data[f"c{i}_outputs"]))
        np.testing.assert_allclose(weight, data[f"c{i}_weight"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(bias, data[f"c{i}_bias"], rtol=0, atol=1e-9)
