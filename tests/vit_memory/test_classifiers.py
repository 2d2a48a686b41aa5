"""Classifiers on frozen features: closed forms, what no order of tasks changes, and chance where labels mean nothing."""

import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import one_hot

from stages.common.metrics import accuracy
from stages.vit_memory.classifiers import (
    RanPAC,
    Whitening,
    centred_cosines,
    class_means,
    linear_probe,
    memory_log_probabilities,
)
from stages.vit_memory.hopfield import ClassMemory


def features_by_task(classes=6, dim=12):
    labels = torch.arange(180) % classes
    centres = 2 * torch.randn(classes, dim)
    return centres[labels] + torch.randn(180, dim), labels


def test_ranpac_is_ridge_regression():
    x, labels = features_by_task()
    ranpac = RanPAC(12, 40, 6, torch.Generator().manual_seed(0))
    for part in torch.arange(len(x)).split(50):
        ranpac.write(x[part], labels[part])
    h, y = ranpac.expand(x), one_hot(labels, 6).float()
    stacked = torch.cat([h, 3.0 * torch.eye(40)]), torch.cat([y, torch.zeros(40, 6)])
    weights = torch.linalg.lstsq(*stacked).solution
    torch.testing.assert_close(ranpac.scores(x, 9.0), h @ weights, rtol=1e-3, atol=1e-4)


def test_ranpac_and_class_memories_end_alike_for_any_order_of_tasks():
    x, labels = features_by_task()
    queries = torch.randn(50, 12)
    answers = {"ranpac": [], "metric": [], "class_prototype": []}
    for order in ([0, 1, 2], [2, 0, 1]):
        memories = {mode: ClassMemory(12, 6, mode) for mode in ("metric", "class_prototype")}
        ranpac = RanPAC(12, 100, 6, torch.Generator().manual_seed(0))
        for task in order:
            own = labels // 2 == task
            ranpac.write(x[own], labels[own])
            for memory in memories.values():
                memory.write(x[own], labels[own])
        answers["ranpac"].append(ranpac.scores(queries, 1.0))
        for mode, memory in memories.items():
            answers[mode].append(memory.logits(queries))
    for one, other in answers.values():
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_whitened_classes_have_unit_covariance():
    labels = torch.arange(4000) % 4
    mixed = torch.randn(4000, 6) @ torch.randn(6, 6) + 5 * torch.randn(4, 6)[labels]
    x = Whitening(mixed, labels, shrinkage=0.0)(mixed)
    within = x - class_means(x, labels, 4)[labels]
    torch.testing.assert_close(within.T @ within / 4000, torch.eye(6), atol=1e-3, rtol=0)


def test_the_linear_probe_does_not_depend_on_the_scale_of_features():
    labels = torch.arange(60) % 3
    x = torch.randn(60, 5) + 3 * torch.randn(3, 5)[labels]
    queries = torch.randn(20, 5)
    scale = torch.tensor([0.1, 1.0, 10.0, 100.0, 1e3])
    one, other = (
        linear_probe(x, labels, queries, 3, 0.01),
        linear_probe(x * scale + 7, labels, queries * scale + 7, 3, 0.01),
    )
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert (linear_probe(x, labels, x, 3, 0.01).argmax(1) == labels).double().mean() > 0.9


def test_permuted_labels_give_chance():
    torch.manual_seed(0)
    centres = 3 * torch.randn(4, 8)
    labels = torch.arange(80) % 4
    x, queries = (centres[labels] + torch.randn(80, 8) for _ in range(2))

    def score(y):
        heads = linear_probe(x, y, queries, 4, 0.01), memory_log_probabilities(x, y, queries, 4, 16.0)
        return torch.stack([accuracy(head, labels) for head in heads])

    assert (score(labels) > 0.9).all()
    permuted = torch.stack([score(labels[torch.randperm(80)]) for _ in range(20)]).mean(0)
    assert (permuted - 0.25).abs().max() < 0.06


def test_class_means_are_those_of_each_class_and_zero_of_an_empty_one():
    x, labels = torch.randn(9, 5), torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2])
    means = class_means(x, labels, 3)
    torch.testing.assert_close(means[0], x[:3].mean(0))
    torch.testing.assert_close(means[2], x[3:].mean(0))
    assert (means[1] == 0).all()


def test_centred_cosines_have_the_mean_of_the_means_as_origin():
    means, queries = torch.randn(3, 5), torch.randn(7, 5)
    far = 100 * torch.randn(5)
    torch.testing.assert_close(
        centred_cosines(means + far, queries + far), centred_cosines(means, queries), rtol=1e-3, atol=1e-3
    )
    apart = centred_cosines(means, means)
    torch.testing.assert_close(apart.diagonal(), torch.ones(3))
    assert (apart.argmax(1) == torch.arange(3)).all()


def test_the_memorys_log_probabilities_are_those_of_its_attention():
    keys, labels, queries = torch.randn(8, 5), torch.tensor([0, 1, 1, 0, 2, 2, 2, 0]), torch.randn(6, 5)
    logs = memory_log_probabilities(keys, labels, queries, 4, 8.0)
    centre = keys.mean(0)
    cosines = torch.nn.functional.cosine_similarity((queries - centre)[:, None], (keys - centre)[None], dim=2)
    attention = (8.0 * cosines).exp() / (8.0 * cosines).exp().sum(1, keepdim=True)
    expected = torch.stack([attention[:, labels == c].sum(1) for c in range(3)], 1)
    torch.testing.assert_close(logs[:, :3].exp(), expected)
    assert torch.isfinite(logs).all()  # of a class without patterns as well


def test_shrinkage_mixes_the_covariance_with_its_mean_variance():
    labels = torch.arange(3000) % 3
    x = torch.randn(3000, 4) * torch.tensor([0.1, 1.0, 2.0, 5.0])
    half, whole = (Whitening(x, labels, shrinkage) for shrinkage in (0.5, 1.0))
    assert torch.linalg.cond(whole.map) < 1.001  # all directions alike
    within = x - class_means(x, labels, 3)[labels]
    covariance = within.T @ within / 3000
    mixed = 0.5 * covariance + 0.5 * covariance.trace() / 4 * torch.eye(4)
    torch.testing.assert_close(half.map @ mixed @ half.map, torch.eye(4), atol=1e-4, rtol=0)


def test_the_linear_probe_is_penalised_softmax_regression_fitted_to_the_end():
    labels = torch.arange(90) % 3
    x = torch.randn(90, 5) + torch.randn(3, 5)[labels]
    for decay in (0.01, 0.3):
        standard = (x - x.mean(0)) / x.std(0)
        reference = LogisticRegression(C=1 / (2 * len(x) * decay), tol=1e-8, max_iter=1000).fit(standard, labels)
        expected = torch.from_numpy(reference.predict_proba(standard)).float()
        torch.testing.assert_close(linear_probe(x, labels, x, 3, decay).softmax(1), expected, rtol=0.02, atol=0.005)


def test_a_feature_that_never_changes_counts_for_nothing():
    labels = torch.arange(30) % 3
    x = torch.randn(30, 5) + torch.randn(3, 5)[labels]
    constant = torch.cat([x, torch.full((30, 1), 0.5)], 1)
    with_it, without = linear_probe(constant, labels, constant, 3, 0.01), linear_probe(x, labels, x, 3, 0.01)
    torch.testing.assert_close(with_it, without, rtol=1e-2, atol=1e-2)
