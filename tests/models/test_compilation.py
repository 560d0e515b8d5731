"""A compiled backbone: what is compiled, how often, what stays of the model, what can't be compiled."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from avalanche_firn.evaluation.block_outputs import recorded_blocks
from avalanche_firn.models import FeatureClassifier, TaskwiseLinearHead, add_composed_lora, with_projection_head
from avalanche_firn.models.compilation import compile_backbone, is_compiled
from avalanche_firn.models.parts import extract_features, find_parts
from avalanche_firn.plugins import FreshOptimizerPlugin, MixedPrecisionPlugin, SlowLearnerPlugin
from avalanche_firn.strategies import SLCA

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What one test compiled is no business of another."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backbone() -> nn.Module:
    """One block, 16 pixels."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    return timm.models.VisionTransformer(**options, num_classes=0)


def model(head: nn.Module | None = None) -> nn.Module:
    return FeatureClassifier(backbone(), nn.Linear(24, 5) if head is None else head)


def whole_timm_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


MODELS = [pytest.param(model, id="backbone-and-head"), pytest.param(whole_timm_model, id="timm")]


# ---------------------------------------------------------------- what it computes
@pytest.mark.parametrize("make", MODELS)
def test_equals_the_plain_model(make: Any) -> None:
    plain, compiled = make(), make()
    compile_backbone(compiled, backend="aot_eager")
    for network in (plain, compiled):
        network(images(4)).square().mean().backward()
    for (name, mine), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    for mine, theirs in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("make", MODELS)
def test_one_graph_for_training_and_one_for_evaluation(make: Any) -> None:
    counter, network = CompileCounterWithBackend("eager"), make()
    compile_backbone(network, backend=counter, fullgraph=True)
    for count in (24, 24, 18, 20, 24, 17):  # on a CPU torch has another convolution below 16 images
        network(images(count)).sum().backward()
    assert counter.frame_count == 1
    network.eval()
    with torch.no_grad():
        for count in (32, 19, 24, 18):
            network(images(count))
    assert counter.frame_count == 2
    network.train()
    network(images(22)).sum().backward()
    assert counter.frame_count == 2


def test_a_graph_for_each_size_on_request() -> None:
    counter, network = CompileCounterWithBackend("eager"), model()
    compile_backbone(network, backend=counter, dynamic=False)
    for count in (8, 3, 8, 3):
        network(images(count))
    assert counter.frame_count == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_growing_head_compiles_nothing(stream_of: Any, precision: Any) -> None:
    """Three experiences with evaluations, through a strategy of ours: two graphs, and the plain run's weights."""
    counter, runs = CompileCounterWithBackend("eager"), []
    torch.manual_seed(1)
    stream = stream_of(torch.randn(66, 3, 16, 16), torch.arange(66) % 6, (2, 2, 2))
    for compiled in (False, True):
        network = model(TaskwiseLinearHead(24, freeze_old=False))
        if compiled:
            compile_backbone(network, backend=counter)
        strategy = Naive(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=8,
            eval_mb_size=16,
            evaluator=EvaluationPlugin(loggers=[]),
            plugins=[FreshOptimizerPlugin(), MixedPrecisionPlugin(precision)],
        )
        torch.manual_seed(2)
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
            strategy.eval(stream.test_stream)
        runs.append(network)
    assert counter.frame_count == 2
    for (name, mine), theirs in zip(runs[1].named_parameters(), runs[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 if precision == "fp32" else 2e-2, msg=name)


def test_inside_slca_with_its_statistics(stream_of: Any) -> None:
    torch.manual_seed(1)
    stream = stream_of(torch.randn(44, 3, 16, 16), torch.arange(44) % 4, (2, 2))
    counter, network = CompileCounterWithBackend("eager"), model(TaskwiseLinearHead(24))
    compile_backbone(network, backend=counter)
    strategy = SLCA(model=network, train_mb_size=8, eval_mb_size=16, evaluator=EvaluationPlugin(loggers=[]))
    assert any(isinstance(plugin, SlowLearnerPlugin) for plugin in strategy.plugins)
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test_stream)
    assert counter.frame_count == 2  # features for the statistics are those of evaluation


# ---------------------------------------------------------------- what stays
@pytest.mark.parametrize("make", MODELS)
def test_names_state_copies_and_pickles_stay(make: Any) -> None:
    plain, network = make(), make()
    kind, names = type(network), list(network.state_dict())
    compile_backbone(network, backend="eager")
    assert is_compiled(network) and not is_compiled(plain)
    network.eval(), plain.eval()
    before = network(images(4))
    assert torch.equal(before, plain(images(4)))
    assert type(network) is kind and list(network.state_dict()) == names
    assert [n for n, _ in network.named_modules()] == [n for n, _ in plain.named_modules()]
    assert find_parts(network).head_name == find_parts(plain).head_name
    for made in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not is_compiled(made)
        assert torch.equal(made(images(4)), before)
        with torch.no_grad():  # a copy computes with its own weights, not with those of the original
            for parameter in made.parameters():
                parameter.zero_()
        assert not torch.equal(made(images(4)), before)
        assert torch.equal(network(images(4)), before)
    plain.load_state_dict(network.state_dict())
    compile_backbone(copy.deepcopy(network), backend="eager")  # and may be compiled itself


@pytest.mark.parametrize("make", MODELS)
def test_hooks_and_features(make: Any) -> None:
    """Hooks that come after compilation are called, and the compiled code is used again without them."""
    counter, network = CompileCounterWithBackend("eager"), make().eval()
    compile_backbone(network, backend=counter)
    name = "backbone.blocks.0" if make is model else "layer1"
    with torch.no_grad():
        before = network(images(4))
        with recorded_blocks(network, {"first": name}) as outputs:
            assert torch.equal(network(images(4)), before)
        assert len(outputs["first"]) == 1 and len(outputs["first"][0]) == 4
        assert counter.frame_count == 1
        network(images(5))
        assert counter.frame_count == 1
    data = [(image, 0) for image in images(6)]
    features, _ = extract_features(network, data, batch_size=4)
    assert features.shape == (6, find_parts(network).head.in_features)
    seen: list[int] = []
    inside = network.backbone if make is model else network
    handle = inside.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    network(images(3))
    handle.remove()
    network(images(3))
    assert seen == [3]


def test_transforms_of_torch_func() -> None:
    network, plain = model().eval(), model().eval()
    compile_backbone(network, backend="aot_eager")
    network(images(2))
    found = []
    for one in (network, plain):
        values = dict(one.named_parameters())

        def loss(weights: dict[str, Tensor], x: Tensor, one: nn.Module = one) -> Tensor:
            return torch.func.functional_call(one, weights, (x[None],)).square().sum()

        found.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(values, images(3)))
    for name in found[1]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_projections_go_through_the_compiled_backbone() -> None:
    counter = CompileCounterWithBackend("eager")
    network = with_projection_head(model(TaskwiseLinearHead(24, freeze_old=False)), projection_size=6)
    compile_backbone(network, backend=counter)
    network.project(images(4))
    assert counter.frame_count == 1


# ---------------------------------------------------------------- what can't be
def test_refusals() -> None:
    network = model()
    compile_backbone(network, backend="eager")
    with pytest.raises(ValueError, match="FeatureClassifier is compiled already"):
        compile_backbone(network)
    other = whole_timm_model()
    compile_backbone(other, backend="eager")
    with pytest.raises(ValueError, match="ResNet is compiled already"):
        compile_backbone(other)
    adapted = model()
    add_composed_lora(adapted, rank=2)
    with pytest.raises(ValueError, match="FeatureClassifier has composed LoRA layers"):
        compile_backbone(adapted)
    with pytest.raises(ValueError, match=r"Sequential has the parts \['0', '1'\]; attributes backbone and head"):
        compile_backbone(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert not is_compiled(adapted)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_inductor() -> None:
    plain, compiled = model(), model()
    compile_backbone(compiled)
    for count in (4, 3):
        found = []
        for network in (plain, compiled):
            network.zero_grad()
            network(images(count)).square().mean().backward()
            found.append([p.grad.clone() for p in network.parameters()])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
