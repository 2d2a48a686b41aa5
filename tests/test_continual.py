"""Continual learning: the penalties' closed forms, uniform buffers, and classifiers that no order of tasks changes."""

import copy

import pytest
import timm
import torch
from scipy.stats import chisquare
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, normalize, one_hot

from stages.common.backbone import Backbone, BackboneConfig
from stages.vit_memory.classifiers import RanPAC
from stages.vit_memory.continual import EWC, LwF, ReplayBuffer, fisher_diagonal, herd, iCaRL
from stages.vit_memory.hopfield import ClassMemory
from stages.vit_memory.models import HeadedViT
from stages.vit_memory.train_continual import (
    FROZEN,
    NETWORKS,
    Stream,
    accuracy_matrices,
    learn_frozen,
    learn_network,
    measures,
)


def small_vit(classes=4):
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **shape)
    return HeadedViT(vit, classes, freeze_backbone=False)


def test_fisher_is_the_closed_form_of_softmax_regression():
    model = nn.Linear(5, 3).double()
    x = torch.randn(6000, 5).double()
    p = model(x).softmax(1)
    exact = torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / len(x)
    fisher = fisher_diagonal(model, [(part, None) for part in x.split(1000)])
    torch.testing.assert_close(fisher["weight"], exact.detach(), rtol=0.15, atol=0)  # labels are drawn
    torch.testing.assert_close(fisher["bias"], (p * (1 - p)).mean(0).detach(), rtol=0.1, atol=0)


def test_fisher_does_not_depend_on_the_batches():
    model, x = small_vit(), torch.randn(24, 3, 16, 16)
    one, other = (fisher_diagonal(model, [(part, None) for part in x.split(size)]) for size in (24, 5))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-9)


def test_fisher_is_that_of_single_inputs_and_leaves_the_model_as_it_was():
    model, x = small_vit().train(), torch.randn(1, 3, 16, 16)
    fisher = fisher_diagonal(model, [(x, None)], seed=3)
    weights = dict(model.named_parameters())
    candidates = [
        grad(lambda w, c=c: cross_entropy(functional_call(model, w, (x,)), torch.tensor([c])))(weights)
        for c in range(4)
    ]
    assert any(
        all(torch.allclose(fisher[name], g.square(), rtol=1e-3, atol=1e-9) for name, g in gradients.items())
        for gradients in candidates
    )
    assert model.training
    assert all(block.attn.fused_attn == small_vit().vit.blocks[0].attn.fused_attn for block in model.vit.blocks)


def test_ewc_is_zero_at_its_anchor_and_a_weighted_square_away_from_it():
    model = nn.Linear(3, 2)
    ewc = EWC(model, [(torch.randn(50, 3), None)], ewc_lambda=10.0)
    assert ewc.penalty() == 0
    ewc.penalty().backward()
    assert model.weight.grad.abs().max() == 0
    with torch.no_grad():
        model.weight += 0.5
    torch.testing.assert_close(ewc.penalty(), 5.0 * 0.25 * ewc.fisher["weight"].sum())
    again = EWC(model, [(torch.randn(50, 3), None)], ewc_lambda=10.0, previous=ewc)
    assert again.penalty() == 0
    assert (again.fisher["weight"] >= ewc.fisher["weight"]).all()


def test_lwf_pulls_nowhere_when_student_equals_teacher_and_back_when_not():
    model = nn.Linear(3, 4)
    x = torch.randn(20, 3)
    lwf = LwF(model, copy.deepcopy(model), alpha=2.0, num_classes=2)
    loss = lwf.penalty(x)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert model.weight.grad.abs().max() < 1e-6
    with torch.no_grad():
        model.weight[2:] += 1.0  # of classes that the teacher did not know
    assert abs(lwf.penalty(x).item()) < 1e-6
    with torch.no_grad():
        model.weight[:1] += 1.0
    assert lwf.penalty(x) > 0
    torch.testing.assert_close(lwf.penalty(x, model(x)), lwf.penalty(x))


def test_lwf_gradient_keeps_its_size_when_the_temperature_rises():
    teacher, x = nn.Linear(3, 4), torch.randn(200, 3)
    sizes = []
    for temperature in (20.0, 40.0):
        torch.manual_seed(1)
        student = nn.Linear(3, 4)
        LwF(student, teacher, temperature=temperature).penalty(x).backward()
        sizes.append(student.weight.grad.norm())
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)


def test_the_replay_buffer_is_a_uniform_sample():
    counts = torch.zeros(30)
    for seed in range(150):
        buffer = ReplayBuffer(10, seed)
        for part in torch.arange(30).split(7):
            buffer.add(part[:, None].float(), part)
        held = torch.stack(buffer.labels)
        assert len(held.unique()) == 10
        counts[held] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-3
    images, labels = buffer.sample(30)
    assert torch.equal(images[:, 0].long(), labels)
    assert set(labels.tolist()) <= set(held.tolist())


def test_herding_follows_the_mean_better_than_chance():
    x = normalize(torch.randn(200, 8) + 1, dim=1)
    chosen = herd(x, 10)
    assert len(set(chosen)) == 10
    assert chosen[:4] == herd(x, 4)  # a shorter list is the beginning of a longer one
    random = [(x[torch.randperm(200)[:10]].mean(0) - x.mean(0)).norm() for _ in range(50)]
    assert (x[chosen].mean(0) - x.mean(0)).norm() < min(random)


def test_icarl_keeps_equal_shares_and_classifies_its_own_exemplars_means():
    model = small_vit()
    icarl = iCaRL(model, num_classes=4, memory_size=12)
    images = {c: torch.randn(10, 3, 16, 16) for c in range(4)}
    icarl.keep({c: images[c] for c in (0, 1)})
    first = {c: x.clone() for c, x in icarl.exemplars.items()}
    assert [len(x) for x in icarl.exemplars.values()] == [6, 6]
    icarl.keep({c: images[c] for c in (2, 3)})
    assert [len(x) for x in icarl.exemplars.values()] == [3, 3, 3, 3]
    assert all(torch.equal(icarl.exemplars[c], first[c][:3]) for c in first)
    scores = icarl.classify(images[0])
    assert torch.isfinite(scores).all()
    assert (scores.abs() <= 1 + 1e-5).all()


def test_icarl_distils_old_classes_and_ignores_unseen_ones():
    model, x = small_vit(), torch.randn(6, 3, 16, 16)
    icarl = iCaRL(model, num_classes=4, memory_size=8)
    icarl.keep({0: x[:3], 1: x[3:]})
    icarl.begin()
    labels = torch.tensor([2, 2, 2, 0, 0, 0])
    logits = model(x).detach().requires_grad_()
    icarl.loss(x, labels, logits).backward()
    assert logits.grad[:, :2].abs().max() < 1e-6  # student equals teacher
    assert logits.grad[:, 2].abs().min() > 0
    assert logits.grad[:, 3].abs().max() == 0


def features_by_task(classes=6, dim=12):
    labels = torch.arange(180) % classes
    centres = 2 * torch.randn(classes, dim)
    return centres[labels] + torch.randn(180, dim), labels


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


def test_ranpac_is_ridge_regression():
    x, labels = features_by_task()
    ranpac = RanPAC(12, 40, 6, torch.Generator().manual_seed(0))
    for part in torch.arange(len(x)).split(50):
        ranpac.write(x[part], labels[part])
    h, y = ranpac.expand(x), one_hot(labels, 6).float()
    stacked = torch.cat([h, 3.0 * torch.eye(40)]), torch.cat([y, torch.zeros(40, 6)])
    weights = torch.linalg.lstsq(*stacked).solution
    torch.testing.assert_close(ranpac.scores(x, 9.0), h @ weights, rtol=1e-3, atol=1e-4)


class Settings:
    buffer, shrinkage, random_features = 24, 0.1, 50
    steps, batch_size, learning_rate, fisher_images = 2, 4, 1e-3, 4


def stream(labels, test_labels):
    return Stream(torch.arange(len(labels)), labels, torch.arange(len(test_labels)), test_labels, 3, 2, seed=0)


@pytest.mark.parametrize("method", FROZEN)
def test_what_was_learnt_by_task_t_does_not_depend_on_later_data(method):
    x, labels = features_by_task()
    tests, test_labels = features_by_task()
    spoilt = x.clone()
    spoilt[labels >= 4] = 100 * torch.randn(int((labels >= 4).sum()), 12)
    clean, other = (
        learn_frozen(method, 16.0, data, tests, stream(labels, test_labels), Settings) for data in (x, spoilt)
    )
    assert torch.equal(clean[:2], other[:2])
    assert not torch.equal(clean[2], other[2])


@pytest.mark.parametrize("method", NETWORKS)
def test_a_network_does_not_look_ahead(method):
    labels = torch.arange(36) % 6
    images = torch.randint(256, (36, 1, 16, 16), dtype=torch.uint8)
    spoilt = torch.where((labels >= 4)[:, None, None, None], 255 - images, images)
    backbone = Backbone(small_vit().vit, BackboneConfig("small", False, 16, None), "", {})
    clean, other = (
        learn_network(method, 10.0, backbone, data, images, stream(labels, labels), Settings)
        for data in (images, spoilt)
    )
    assert torch.equal(clean[:2], other[:2])
    assert not torch.equal(clean[2], other[2])


@pytest.mark.parametrize("method", FROZEN)
def test_permuted_labels_give_chance(method):
    torch.manual_seed(1)
    x, labels = features_by_task()
    many = x.repeat(5, 1) + 0.5 * torch.randn(900, 12)
    truth = labels.repeat(5)
    finals = [
        accuracy_matrices(learn_frozen(method, 16.0, x, many, stream(y, truth), Settings), stream(y, truth))["class"][
            -1
        ].mean()
        for y in (labels, *(labels[torch.randperm(180)] for _ in range(6)))
    ]
    assert finals[0] > 0.8
    assert abs(torch.stack(finals[1:]).mean() - 1 / 6) < 0.1


def test_measures_of_matrices_that_are_known():
    r = torch.tensor([[1.0, 0.5, 0.5], [0.6, 0.9, 0.4], [0.2, 0.7, 0.8]])
    got = measures(r, chance=0.5)
    expected = {"final": 1.7 / 3, "average": (1.0 + 0.75 + 1.7 / 3) / 3, "forgetting": 0.5}
    expected |= {"backward_transfer": -0.5, "forward_transfer": -0.05}
    assert got == pytest.approx(expected)
    assert measures(torch.eye(3) + (1 - torch.eye(3)) * 0.5, 0.5)["forward_transfer"] == 0
    assert measures(torch.ones(3, 3), 0.5)["forgetting"] == 0


def test_a_perfect_classifier_of_its_task_alone_forgets_class_incrementally():
    labels = torch.arange(60) % 6
    scores = torch.full((3, 60, 6), -1.0)
    for t in range(3):
        scores[t, :, 2 * t : 2 * t + 2] = one_hot(labels % 2, 2).float()  # it answers the newest task's class
    by_kind = accuracy_matrices(scores, stream(labels, labels))
    assert torch.equal(by_kind["class"], torch.eye(3))
    assert by_kind["task"].diagonal().eq(1).all()
