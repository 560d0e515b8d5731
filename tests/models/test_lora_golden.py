"""Composed LoRA against the numbers of LoRAC-IPC's released code (tests/golden/lorac_ipc/README.md)."""

import pytest
import timm
import torch
from torch import nn

from avalanche_firn.models.lora import LoRAComposition, add_composed_lora, compose_delta, orthogonality_penalty

PARTS = {"qkv": ("q", "k", "v"), "out": ("out",), "fc1": ("fc1",), "fc2": ("fc2",)}
VIT = {"qkv": "attn.qkv", "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
F64, F32 = torch.float64, torch.float32


def close(actual, expected, tolerance):
    """Relative to the largest entry of the expected array."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def pool(g, tasks, *, dtype=F64, model=None, names=None, positions=tuple(PARTS), live=None, mask=None, gates=None):
    """Layers filled by a state dict. ``live``: scalars of an open task; ``mask``: 1 where a matrix is free."""
    blocks = g[f"A_{PARTS[positions[0]][0]}"].shape[1]
    if model is None:
        sides = {p: (g[f"A_{PARTS[p][0]}"].shape[2], sum(g[f"B_{n}"].shape[3] for n in PARTS[p])) for p in positions}
        model = nn.ModuleList(
            nn.ModuleDict({p: nn.Linear(*sides[p], bias=False) for p in positions}) for _ in range(blocks)
        )
        for parameter in model.parameters():
            nn.init.zeros_(parameter).requires_grad_(False)
        names = {p: p for p in positions}
    layers = add_composed_lora(
        model.to(dtype), list(names.values()), int(g["rank"]), float(g.get("alpha", g["rank"])), gates=gates
    )
    state = model.state_dict()
    for name, layer in layers.items():
        block = int(next(piece for piece in name.split(".") if piece.isdigit()))
        numbers = PARTS[next(p for p in positions if name.endswith(names[p]))]
        closed = tasks if live is None else tasks - 1
        snapshots, frozen = torch.ones(closed, len(numbers), closed), torch.zeros(len(numbers), dtype=torch.bool)
        snapshots = snapshots.double()
        for index, (part, n) in enumerate(zip(layer.parts, numbers, strict=True)):
            for task in range(tasks):
                state[f"{name}.A.{part}.{task}"] = torch.from_numpy(g[f"A_{n}"][task, block])
                state[f"{name}.B.{part}.{task}"] = torch.from_numpy(g[f"B_{n}"][task, block])
            if f"OB_{n}" in g:
                snapshots[:, index] = torch.from_numpy(g[f"OB_{n}"][:closed, :closed, block])
            if tasks > 1:
                omega = torch.ones(tasks - 1) if live is None else g[f"{live}_{n}"][: tasks - 1, block]
                state[f"{name}.omega.{part}"] = torch.as_tensor(omega)
            if mask is not None:
                frozen[index] = not g[f"M_{n}"][mask, block]
        state |= {f"{name}.snapshots": snapshots, f"{name}.frozen": frozen}
    model.load_state_dict(state)
    return model, LoRAComposition(model)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 2e-6)])
def test_golden_compose_eval(golden, dtype, tolerance):
    g = golden("lorac_ipc", "compose_eval")
    assert (g["OB_q"][0, 1:] == -999).all()  # junk, loaded into the layers as it is
    tasks, blocks = g["A_q"].shape[:2]
    model, composition = pool(g, tasks, dtype=dtype)
    for position, names in PARTS.items():
        for k in range(tasks):
            for block in range(blocks):
                expected = g[f"delta_{position}"][k, block]
                factors = [
                    [torch.as_tensor(g[f"{f}_{n}"][: k + 1, block], dtype=dtype) for f in "AB"]
                    + [torch.as_tensor(g[f"OB_{n}"][k, : k + 1, block], dtype=dtype)]
                    for n in names
                ]
                close(torch.cat([compose_delta(*f, float(g["scale"])) for f in factors], 1), expected, tolerance)
                layer = model[block][position]
                identity = torch.eye(layer.in_features, dtype=dtype)
                with torch.no_grad(), composition.as_task(k):
                    stacked = torch.cat([layer(row) for row in identity.split(1)])
                    assert ("merged", k) not in layer._kept  # the stacked path was taken
                    merged = layer(identity)
                close(stacked, expected, tolerance)
                close(merged, expected, tolerance)
                close(layer.merged_weight(k).T, expected, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 2e-6)])
def test_golden_compose_eval_of_different_tasks_in_one_pass(golden, dtype, tolerance):
    g = golden("lorac_ipc", "compose_eval")
    tasks = torch.arange(len(g["A_q"]))
    model, composition = pool(g, len(tasks), dtype=dtype)
    without_later_scalars(composition)
    for position in PARTS:
        for block, layers in enumerate(model):
            x = torch.eye(layers[position].in_features, dtype=dtype).expand(len(tasks), -1, -1)
            with torch.no_grad(), composition.as_tasks(tasks):
                close(layers[position](x), g[f"delta_{position}"][:, block], tolerance)


def without_later_scalars(composition):
    """Zeros for the scalars of later tasks, which is what closing a task writes there."""
    for layer in composition.layers.values():
        layer.snapshots.copy_(layer.snapshots.transpose(0, 1).tril().transpose(0, 1))


def check_gradients(g, layer, names, block, task, prefix, tolerance):
    for part, n in zip(layer.parts, names, strict=True):
        A, B = layer.A[part], layer.B[part]
        assert all(A[i].grad is None and B[i].grad is None for i in range(task))
        omega = layer.omega[part] if task else None
        expected = {f: g[f"{prefix}grad{f}_{n}"][block] for f in "AB"}
        expected["Omega"] = g[f"{prefix}gradOmega_{n}"][:task, block]
        actual = {"A": A[task].grad, "B": B[task].grad, "Omega": None if omega is None else omega.grad}
        for factor, numbers in expected.items():
            if actual[factor] is None:
                assert (numbers == 0).all()
            else:
                close(actual[factor], numbers, tolerance)
        if not layer.is_free(part):
            assert actual["Omega"] is None


def check_training(g, task, dtype, tolerance, prefix, **settings):
    """Deltas and gradients, by the layers and by their ``weight``; returns the loss by both."""
    losses = []
    for by_layer in (True, False):
        model, _ = pool(g, task + 1, dtype=dtype, live="O", mask=task - 1 if task else None, **settings)
        loss = 0.0
        for block, layers in enumerate(model):
            for position, layer in layers.items():
                delta = layer(torch.eye(layer.in_features, dtype=dtype)) if by_layer else layer.weight.T
                if f"{prefix}delta_{position}" in g:  # not stored for task 2
                    close(delta.detach(), g[f"{prefix}delta_{position}"][block], tolerance)
                loss = loss + (delta * torch.as_tensor(g[f"C_{position}"][block], dtype=dtype)).sum()
                loss = loss + 0.5 * delta.square().sum()
        loss.backward()
        for block, layers in enumerate(model):
            for position, layer in layers.items():
                check_gradients(g, layer, PARTS[position], block, task, prefix, tolerance)
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 5e-6)])
@pytest.mark.parametrize("task", range(4))
def test_golden_compose_train(golden, task, dtype, tolerance):
    g = golden("lorac_ipc", "compose_train")
    assert g[f"t{task}_other_slots_grad_absmax"] == 0
    for loss in check_training(g, task, dtype, tolerance, f"t{task}_"):
        close(loss, g[f"t{task}_loss"], tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 2e-6)])
@pytest.mark.parametrize("prefix, gates", [("correct_", None), ("official_", {"k": "q"})])
def test_golden_k_gate(golden, prefix, gates, dtype, tolerance):
    g = golden("lorac_ipc", "k_gate")
    check_training(g, int(g["task"]), dtype, tolerance, prefix, positions=("qkv",), gates=gates)
    assert (g["official_delta_qkv"] != g["correct_delta_qkv"]).any()


ORTHO = [(F64, 1e-12, 1e-11), (F32, 2e-6, 2e-3)]


@pytest.mark.parametrize("dtype, tolerance, near", ORTHO)
def test_golden_orthogonality_one_matrix_at_a_time(golden, dtype, tolerance, near):
    g = golden("lorac_ipc", "ortho")
    weight, blocks = float(g["lambda_ortho"]), g["A_q"].shape[1]
    for task in range(len(g["A_q"])):
        losses = torch.zeros(blocks, len(PARTS), dtype=dtype)
        for column, names in enumerate(PARTS.values()):
            for n in names:
                for block in range(blocks):
                    expected = g[f"t{task}_gradA_{n}"][block]
                    if task and not g[f"M_{n}"][task - 1, block]:
                        assert (expected == 0).all()
                        continue
                    A = torch.as_tensor(g[f"A_{n}"][: task + 1, block], dtype=dtype)
                    current = A[task].clone().requires_grad_()
                    loss = orthogonality_penalty(A[:task].transpose(0, 1).flatten(1), current)
                    (weight * loss).backward()
                    losses[block, column] += loss.detach()
                    assert torch.isfinite(current.grad).all()
                    if (n, block) == ("q", 0):  # orthonormal to the last bit
                        assert loss == 0 and (current.grad == 0).all() and (expected == 0).all()
                    elif (n, block) == ("v", 0):
                        close(current.grad, expected, near)
                        if task == 0:  # all but orthonormal, and yet: the point of the norm that is not squared
                            assert 0.5 * weight < current.grad.norm() <= 2 * weight * 1.001
                    else:
                        close(current.grad, expected, tolerance)
        close(losses, g[f"t{task}_loss"], tolerance)
        close(weight * losses.sum()[None], g[f"t{task}_total"], tolerance)


@pytest.mark.parametrize("dtype, tolerance, near", ORTHO)
def test_golden_orthogonality_of_a_model(golden, dtype, tolerance, near):
    g = golden("lorac_ipc", "ortho")
    for task in range(len(g["A_q"])):
        g |= {f"O_{n}": g["M_q"] for names in PARTS.values() for n in names}  # the scalars don't matter
        g |= {f"B_{n}": g[f"A_{n}"].transpose(0, 1, 3, 2)[..., :8] for names in PARTS.values() for n in names}
        model, composition = pool(g, task + 1, dtype=dtype, live="O", mask=task - 1 if task else None)
        total = float(g["lambda_ortho"]) * composition.orthogonality()
        total.backward()
        close(total.detach()[None], g[f"t{task}_total"], tolerance)
        for block, layers in enumerate(model):
            for position, layer in layers.items():
                for part, n in zip(layer.parts, PARTS[position], strict=True):
                    expected, (*closed, current) = g[f"t{task}_gradA_{n}"][block], layer.A[part]
                    assert all(A.grad is None for A in closed)
                    if current.grad is None:
                        assert not layer.is_free(part) and (expected == 0).all()
                    else:
                        close(current.grad, expected, near if (n, block) == ("v", 0) else tolerance)


def test_orthogonality_of_a_batch_is_that_of_its_members(golden):
    g = golden("lorac_ipc", "ortho")
    A = torch.stack([torch.from_numpy(g[f"A_{n}"]) for n in ("q", "k", "v", "out")], 1)  # (task, type, block, in, r)
    for task in range(len(A)):
        history = A[:task].movedim(0, -2).flatten(-2) if task else A[0][..., :0]
        together = A[task].clone().requires_grad_()
        penalty = orthogonality_penalty(history, together)
        penalty.sum().backward()
        assert penalty.shape == A.shape[1:3]
        for index in ((i, j) for i in range(4) for j in range(3)):
            alone = A[task][index].clone().requires_grad_()
            value = orthogonality_penalty(history[index], alone)
            value.backward()
            torch.testing.assert_close(penalty[index], value, rtol=1e-13, atol=0)
            torch.testing.assert_close(together.grad[index], alone.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("freeze", [False, True])
def test_golden_after_task(golden, freeze):
    g = golden("lorac_ipc", "after_task")
    blocks, numbers = range(g["A_q"].shape[1]), [n for names in PARTS.values() for n in names]
    model = nn.ModuleList(
        nn.ModuleDict(
            {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8), "fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)}
        )
        for _ in blocks
    ).double()
    for block in model:
        for linear in block.values():
            nn.init.zeros_(linear.weight)
    add_composed_lora(model, list(PARTS), int(g["rank"]), float(g["alpha"]))
    composition = LoRAComposition(model)
    places = [(layer, i, n, b) for b in blocks for p, layer in model[b].items() for i, n in enumerate(PARTS[p])]
    first = None
    for task in range(4):
        was_frozen = {(n, b): not layer.is_free(layer.parts[i]) for layer, i, n, b in places}
        composition.open_task()
        with torch.no_grad():
            for layer, i, n, block in places:
                part = layer.parts[i]
                layer.A[part][task].copy_(torch.from_numpy(g[f"A_{n}"][task, block]))
                layer.B[part][task].copy_(torch.from_numpy(g[f"B_{n}"][task, block]))
                if task:
                    layer.omega[part].copy_(torch.from_numpy(g[f"t{task}_omega_{n}"][:task, block]))
        composition.close_task()
        frozen = {n: torch.from_numpy(g[f"t{task}_frozen_after_{n}"]) & freeze for n in numbers}
        composition.freeze(torch.cat([frozen[n] for n in numbers]))  # positions: in the order of the layers' kinds
        assert composition.num_closed == composition.num_tasks == g[f"t{task}_current_task"] == task + 1
        for layer, i, n, block in places:
            assert layer.frozen[i] == frozen[n][block] == (not layer.is_free(layer.parts[i]))
            if was_frozen[n, block]:  # whatever the script wrote, a frozen matrix keeps its scalars
                assert torch.equal(layer.snapshots[task, i, :task], layer.snapshots[task - 1, i, :task])
                assert layer.snapshots[task, i, task] == 1
            else:
                expected = torch.from_numpy(g[f"t{task}_snapshot_{n}"][: task + 1, block])
                assert torch.equal(layer.snapshots[task, i, : task + 1], expected)
        delta = {position: model[0][position].merged_weight(0).T for position in PARTS}
        for position in PARTS:
            close(delta[position], g[f"t{task}_delta0_{position}"], 1e-12)
        first = first or {position: value.clone() for position, value in delta.items()}
        assert all(torch.equal(first[position], delta[position]) for position in PARTS)
    assert composition.frozen.any() == freeze


@pytest.fixture(scope="module")
def vit(golden):
    g = golden("lorac_ipc", "vit_forward")

    def build(dtype, tasks, **settings):
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=int(g["img"]), patch_size=int(g["patch"]), embed_dim=8, depth=2, num_heads=int(g["num_heads"]),
            num_classes=6,
        )  # fmt: skip
        model.double().load_state_dict({key[4:]: torch.from_numpy(g[key]) for key in g if key.startswith("vit.")})
        model, composition = pool(g, tasks, dtype=dtype, model=model.eval(), names=VIT, **settings)
        return model, composition, torch.as_tensor(g["x"], dtype=dtype)

    return build


def both(model, x):
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    return features, model.head(features)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 2e-6)])
def test_golden_vit_forward_as_each_task(golden, vit, dtype, tolerance):
    g = golden("lorac_ipc", "vit_forward")
    model, composition, x = vit(dtype, 3)
    for k in range(3):
        with torch.no_grad(), composition.as_task(k):
            many = both(model, x.repeat(8, 1, 1, 1))  # merged weights
            few = [torch.cat(found) for found in zip(*(both(model, image) for image in x.split(1)), strict=True)]
        for name, merged, stacked in zip(("features", "logits"), many, few, strict=True):
            close(merged, torch.from_numpy(g[f"eval{k}_{name}"]).repeat(8, 1), tolerance)
            close(stacked, g[f"eval{k}_{name}"], tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 2e-6)])
def test_golden_vit_forward_of_different_tasks_in_one_pass(golden, vit, dtype, tolerance):
    g = golden("lorac_ipc", "vit_forward")
    model, composition, x = vit(dtype, 3)
    without_later_scalars(composition)
    with torch.no_grad(), composition.as_tasks(torch.from_numpy(g["mixed_task"])):
        close(model(x), g["mixed_logits"], tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 2e-6)])
@pytest.mark.parametrize("k", [1, 2])
def test_golden_vit_forward_in_training(golden, vit, k, dtype, tolerance):
    g = golden("lorac_ipc", "vit_forward")
    model, composition, x = vit(dtype, k + 1, live="O", mask=k - 1)
    assert composition.frozen.any() == (k == 1) and not composition.frozen.all()
    for context in (torch.enable_grad(), torch.no_grad()):  # the function that trains, merged weights
        with context:
            features, logits = both(model, x)
        close(features.detach(), g[f"train{k}_features"], tolerance)
        close(logits.detach(), g[f"train{k}_logits"], tolerance)
