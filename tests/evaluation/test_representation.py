"""Accuracies after adaptation against golden numbers and against recomputation from copies of the model."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from avalanche_firn.evaluation import matrix as matrices
from avalanche_firn.evaluation.probes import few_shot_indices, holdout_split
from avalanche_firn.evaluation.representation import RepresentationProbe

sys.path.append(str(Path(__file__).parent))
from representation_cases import ALL, KINDS, Copies, Tiny, learner, plain, rows_of, train


# ------------------------------------------------------------------------ golden
def test_golden_matrices_end_to_end(golden, stream_of):
    arrays = golden("lp_ft", "knn_matrix")
    tasks = range(len(arrays["backbone_weights"]))
    x, y, x_test, y_test = (
        np.concatenate([arrays[f"{kind}_{part}_{i}"] for i in tasks])
        for part, kind in itertools.product(("train", "test"), "xy")
    )
    stream = stream_of(x, y, [int(arrays["n_classes_per_task"])] * len(tasks), x_test, y_test)
    size = arrays["backbone_weights"].shape[1]
    model = nn.Sequential(nn.Linear(x.shape[1], size, bias=False), nn.ReLU(), nn.Linear(size, 3)).double()
    l2 = float(arrays["linear_l2"])
    for field, options in {
        "acc_k200": {"adapt": "knn"},
        "acc_masked_k200": {"adapt": "knn"},
        "acc_k_tasks_seen": {"adapt": "knn", "k": lambda t, n: t + 1},
        "acc_linear_lbfgs": {"adapt": "linear", "l2": l2},
        "acc_linear_ridge": {"adapt": "linear", "l2": l2, "solver": "ridge"},
    }.items():
        probe = RepresentationProbe(stream.train_stream, stream.test_stream, head="2", **options)
        for t in tasks:
            with torch.no_grad():
                model[0].weight.copy_(torch.from_numpy(arrays["backbone_weights"][t]))
            counts = probe.measure(model, t, tasks=tasks)[options["adapt"]]
            found = [100 * correct / total for correct, total in (counts[i] for i in tasks)]
            np.testing.assert_allclose(found, arrays[field][t], rtol=0, atol=1e-9, err_msg=field)
        assert probe.matrices[options["adapt"]].shape == (0, 0)  # measuring records nothing


# ----------------------------------------------------- recomputation, plain loops
@torch.no_grad()
def features_by_hand(model, x):
    return torch.relu(x @ model.backbone[0].weight.T + model.backbone[0].bias)


def knn_by_hand(bank, labels, queries, k, temperature):
    found = []
    for q in queries.tolist():
        near = []
        for row, label in zip(bank.tolist(), labels.tolist(), strict=True):
            lengths = math.sqrt(sum(v * v for v in q) * sum(v * v for v in row))
            near.append((sum(a * b for a, b in zip(q, row, strict=True)) / lengths if lengths else 0.0, label))
        near = sorted(near, reverse=True)[:k]
        scores = {}
        for similarity, label in near:
            scores[label] = scores.get(label, 0.0) + math.exp(similarity / temperature)
        found.append(max(sorted(scores), key=scores.get))
    return torch.tensor(found)


def logistic_by_hand(features, labels, l2):
    fit = LogisticRegression(C=(2 if len(labels.unique()) == 2 else 1) / (len(labels) * l2), tol=1e-12, max_iter=5000)
    fit.fit(features.numpy(), labels.numpy())
    w, b = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    return (torch.cat([-w, w]) / 2, torch.cat([-b, b]) / 2) if len(w) == 1 else (w, b)


def random_head_by_hand(classes, size, seed):
    draws, bound = torch.Generator().manual_seed(seed), size**-0.5
    weight = (torch.rand(classes, size, generator=draws) * 2 - 1) * bound
    return weight.double(), ((torch.rand(classes, generator=draws) * 2 - 1) * bound).double()


def tuned_by_hand(model, head, x, y, *, lr, epochs, batch_size, momentum, weight_decay, seed):
    """Parameters ``[B, b, W, c]`` after SGD with momentum and a cosine, written out."""
    first = model.backbone[0]
    p = [t.detach().clone().requires_grad_() for t in (first.weight, first.bias, *head)]
    speed, draws = [torch.zeros_like(t) for t in p], torch.Generator().manual_seed(seed)
    total, step = epochs * math.ceil(len(x) / batch_size), 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=draws)
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            logits = torch.relu(x[rows] @ p[0].T + p[1]) @ p[2].T + p[3]
            loss = (logits.logsumexp(1) - logits[range(len(rows)), y[rows]]).mean()
            grads = torch.autograd.grad(loss, p)
            rate = lr * (1 + math.cos(math.pi * step / total)) / 2
            for i, grad in enumerate(grads):
                speed[i] = momentum * speed[i] + grad + weight_decay * p[i].detach()
                p[i] = (p[i].detach() - rate * speed[i]).requires_grad_()
            step += 1
    return [t.detach() for t in p]


def predicted_by_hand(p, x):
    return (torch.relu(x @ p[0].T + p[1]) @ p[2].T + p[3]).argmax(1)


SGD = {"epochs": 3, "batch_size": 4, "momentum": 0.8, "weight_decay": 0.01}


def row_by_hand(model, stream, chosen, seed):
    """Accuracy by adaptation and task: 6 shots, k = 3, l2 = 0.1, two rates."""
    found = {name: [] for name in ALL}
    for i, experience in enumerate(stream.train_stream):
        x, y = (part[chosen[i]] for part in rows_of(experience))
        test, wanted = rows_of(stream.test_stream[i])
        classes = sorted(set(y.tolist()))
        local = torch.tensor([classes.index(c) for c in y.tolist()])
        target = torch.tensor([classes.index(c) for c in wanted.tolist()])
        h, queries = features_by_hand(model, x), features_by_hand(model, test)
        hits = {"knn": knn_by_hand(h, y, queries, 3, 0.2) == wanted}
        weight, bias = logistic_by_hand(h, local, 0.1)
        hits["linear"] = (queries @ weight.T + bias).argmax(1) == target
        kept, held = (torch.from_numpy(rows) for rows in holdout_split(y.numpy(), 0.3, seed))
        random = random_head_by_hand(len(classes), h.shape[1], seed)
        starts = {
            "fine_tune": (random, random),
            "lp_ft": ((weight, bias), logistic_by_hand(h[kept], local[kept], 0.1)),
        }
        for name, (whole, part) in starts.items():
            right = []
            for lr in (0.01, 0.3):
                p = tuned_by_hand(model, part, x[kept], local[kept], lr=lr, seed=seed, **SGD)
                right.append(int((predicted_by_hand(p, x[held]) == local[held]).sum()))
            rate = 0.3 if right[1] > right[0] else 0.01
            p = tuned_by_hand(model, whole, x, local, lr=rate, seed=seed, **SGD)
            hits[name] = predicted_by_hand(p, test) == target
        for name, values in hits.items():
            found[name].append(float(values.double().mean()))
    return found


@pytest.mark.parametrize("generation", ["modern", "classic"])
def test_everything_equals_recomputation_from_copies_of_the_model(stream, tools, generation):
    bench, log, saved, seed = stream((2, 3, 2), generation), tools.Collect(), Copies(), 5
    options = {"shots": 6, "seed": seed, "k": 3, "temperature": 0.2, "l2": 0.1, "val_fraction": 0.3}
    probe = RepresentationProbe(
        bench.train_stream, bench.test_stream, ALL, lr=[0.3, 0.01], eval_batch_size=5, **options, **SGD
    )
    strategy = learner(lambda: Tiny(7, norm=False, drop=0.0).double(), [probe], plugins=[saved], log=log)
    train(strategy, bench.train_stream)
    chosen = [few_shot_indices(rows_of(e)[1], 6, seed) for e in bench.train_stream]
    rows = [row_by_hand(model.eval(), bench, chosen, seed) for model in saved.models]
    expected_tags = set()
    for name in ALL:
        base, a = np.asarray(rows[0][name]), np.asarray([row[name] for row in rows[1:]])
        found = probe.matrices[name]
        np.testing.assert_array_equal(found.baseline, base)
        np.testing.assert_array_equal(found.accuracy, a)
        start = f"probe/{name.replace('_', '-')}"
        approx = lambda values: [(t, pytest.approx(v, abs=1e-12)) for t, v in values]  # noqa: E731
        assert log.curve(start) == approx((t, a[t, : t + 1].mean()) for t in range(3))
        for i in range(3):
            assert log.curve(f"{start}/task-{i}") == approx((t, a[t, i]) for t in range(3))
        backward = [(t, np.mean([a[t, i] - a[i, i] for i in range(t)])) for t in (1, 2)]
        assert log.curve(f"{start}/backward") == approx(backward)
        forward = [(t, np.mean([a[i - 1, i] - base[i] for i in range(1, t + 1)])) for t in (1, 2)]
        assert log.curve(f"{start}/forward") == approx(forward)
        for kind in KINDS:
            tag = f"{start}/forgetting-{kind.replace('_', '-')}"
            assert log.curve(tag) == approx((t, matrices.forgetting(a[: t + 1], kind)) for t in (1, 2))
            assert probe.figures(name)[tag.removeprefix(start)] == log.curve(tag)[-1][1]
            assert probe.curves()[tag] == [None, *(v for _, v in log.curve(tag))]
            expected_tags.add(tag)
        assert [x for x, _ in log.curve(f"{start}/matrix")] == [2]
        expected_tags |= {f"{start}{end}" for end in ("", "/task-0", "/task-1", "/task-2", "/matrix")}
        expected_tags |= {f"{start}/backward", f"{start}/forward"}
    assert log.tags == expected_tags
    accuracies = np.concatenate([probe.matrices[name].accuracy.ravel() for name in ALL])
    assert len(set(accuracies)) > 5 and 0.3 < accuracies.mean() < 1


@pytest.mark.usefixtures("cheap_picture")
def test_one_bank_of_the_seen_tasks(stream):
    bench, saved = stream(), Copies()
    options = {"task_aware": False, "tasks": "seen", "k": 5, "l2": 0.1, "adapt": ["knn", "linear"]}
    probe = RepresentationProbe(bench.train_stream, bench.test_stream, **options)
    diagonal = RepresentationProbe(bench.train_stream, bench.test_stream, when="diagonal", **options)
    train(learner(plain, [probe, diagonal], plugins=[saved]), bench.train_stream)
    for t, model in enumerate(saved.models[1:]):
        pairs = [rows_of(e) for e in bench.train_stream[: t + 1]]
        x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
        h = features_by_hand(model, x)
        weight, bias = logistic_by_hand(h, y, 0.1)
        for i in range(t + 1):
            test, wanted = rows_of(bench.test_stream[i])
            queries = features_by_hand(model, test)
            knn = float((knn_by_hand(h, y, queries, 5, 0.1) == wanted).double().mean())
            linear = float(((queries @ weight.T + bias).argmax(1) == wanted).double().mean())
            assert (probe.matrices["knn"].accuracy[t, i], probe.matrices["linear"].accuracy[t, i]) == (knn, linear)
            if i == t or t == 2:  # the bank of the diagonal is no smaller
                assert diagonal.matrices["knn"].accuracy[t, i] == knn
    aware = RepresentationProbe(bench.train_stream, bench.test_stream, k=5).measure(model, 2, tasks=range(3))["knn"]
    hits = sum(hit for hit, _ in aware.values())
    assert hits > probe.matrices["knn"].correct[2].sum()  # fewer classes compete within a task
