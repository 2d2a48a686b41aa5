"""Ways to learn tasks one after the other: none looks ahead, and each is fine-tuning but for what it says."""

from dataclasses import replace

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy, mse_loss

from stages.common.backbone import Backbone, BackboneConfig
from stages.common.randomness import generator
from stages.vit_memory import ways
from stages.vit_memory.classifiers import RanPAC
from stages.vit_memory.continual import herd
from stages.vit_memory.hopfield import ClassMemory, unit
from stages.vit_memory.models import HeadedViT
from stages.vit_memory.streams import Stream, accuracy_matrices
from stages.vit_memory.ways import (
    FROZEN,
    NETWORKS,
    Budget,
    Exemplars,
    Finetune,
    Joint,
    Replay,
    Space,
    learn_first,
    learn_frozen,
    learn_network,
)

CPU = torch.device("cpu")
BUDGET = Budget(steps=2, batch_size=4, learning_rate=1e-3, buffer=24, fisher_images=4)
SPACE = Space(dim=12, classes=6, buffer=24, random_features=50, shrinkage=0.1)
LABELS = torch.arange(36) % 6


def stream(labels, test_labels):
    return Stream(torch.arange(len(labels)), labels, torch.arange(len(test_labels)), test_labels, 3, 2, seed=0)


def features_by_task(classes=6, dim=12):
    labels = torch.arange(180) % classes
    centres = 2 * torch.randn(classes, dim)
    return centres[labels] + torch.randn(180, dim), labels


def pictures(count=36):
    return torch.randint(256, (count, 1, 16, 16), dtype=torch.uint8)


def make(way, strength=10.0, budget=BUDGET, seed=0):
    """A way around a small ViT, always the same at first."""
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **shape)
    backbone = Backbone(vit, BackboneConfig("small", False, 16, None), "", {})
    return way(HeadedViT(vit, 6, freeze_backbone=False), backbone.prepare, budget, strength, seed)


def tasks_of(images, labels=LABELS):
    return stream(labels, labels).over(images)


@pytest.mark.parametrize("method", FROZEN)
def test_what_was_learnt_by_task_t_does_not_depend_on_later_data(method):
    x, labels = features_by_task()
    tests, test_labels = features_by_task()
    spoilt = x.clone()
    spoilt[labels >= 4] = 100 * torch.randn(int((labels >= 4).sum()), 12)
    clean, other = (
        learn_frozen(FROZEN[method](SPACE, 16.0, 0, CPU), stream(labels, test_labels).over(data), tests)
        for data in (x, spoilt)
    )
    assert torch.equal(clean[:2], other[:2])
    assert not torch.equal(clean[2], other[2])


@pytest.mark.parametrize("method", NETWORKS)
def test_a_network_does_not_look_ahead(method):
    images = pictures()
    spoilt = torch.where((LABELS >= 4)[:, None, None, None], 255 - images, images)
    clean, other = (learn_network(make(NETWORKS[method]), tasks_of(data), images) for data in (images, spoilt))
    assert torch.equal(clean[:2], other[:2])
    assert not torch.equal(clean[2], other[2])


@pytest.mark.parametrize("method", NETWORKS)
def test_a_first_task_that_is_taken_over_changes_nothing(method):
    images = pictures()
    first = learn_first(make(Finetune), tasks_of(images), images)
    taken, learned = (learn_network(make(NETWORKS[method]), tasks_of(images), images, known) for known in (first, None))
    assert torch.equal(taken, learned)


@pytest.mark.parametrize("method", FROZEN)
def test_permuted_labels_give_chance(method):
    torch.manual_seed(1)
    x, labels = features_by_task()
    many = x.repeat(5, 1) + 0.5 * torch.randn(900, 12)
    truth = labels.repeat(5)

    def final(y):
        scores = learn_frozen(FROZEN[method](SPACE, 16.0, 0, CPU), stream(y, truth).over(x), many)
        return accuracy_matrices(scores, stream(y, truth))["class"][-1].mean()

    assert final(labels) > 0.8
    permuted = [final(labels[torch.randperm(180)]) for _ in range(6)]
    assert abs(torch.stack(permuted).mean() - 1 / 6) < 0.1


@pytest.mark.parametrize("method", ["ewc", "lwf"])
def test_a_penalty_of_no_strength_is_fine_tuning(method):
    images = pictures()
    weak, strong = (
        learn_network(make(NETWORKS[method], strength), tasks_of(images), images) for strength in (0.0, 1e4)
    )
    plain = learn_network(make(Finetune), tasks_of(images), images)
    assert torch.equal(weak, plain)
    assert torch.equal(strong[0], plain[0])  # there is nothing to forget yet
    assert not torch.allclose(strong[1:], plain[1:])


@pytest.mark.parametrize("method", ["replay", "icarl"])
def test_half_of_a_batch_is_old_once_there_is_something_old(method):
    way, images = make(NETWORKS[method]), pictures()
    for task in tasks_of(images):
        way.begin(task)
        drawn = [way.batch() for _ in range(20)]
        assert all(len(x) == len(y) == BUDGET.batch_size for x, y in drawn)
        new = torch.stack([torch.isin(y, torch.tensor(list(task.classes))) for _, y in drawn])
        assert new[:, :2].all()
        assert new[:, 2:].all() == (task.number == 0)
        if task.number:
            assert not new[:, 2:].any()
            assert torch.cat([y[2:] for _, y in drawn]).unique().tolist() == list(range(task.classes.start))
        way.end(task)


def test_batches_are_images_of_the_task_with_their_labels():
    images = pictures()
    tasks = list(tasks_of(images))
    for way, known in ((make(Finetune), [0, 1, 2]), (make(Joint), [0, 1, 2])):
        seen = []
        for task in tasks:
            way.begin(task)
            seen = [*seen, task] if isinstance(way, Joint) else [task]
            x, y = (torch.cat(parts) for parts in zip(*(way.batch() for _ in range(60)), strict=True))
            candidates = way.prepare(torch.cat([each.x for each in seen]))
            labels = torch.cat([each.labels for each in seen])
            match = (x[:, None] == candidates[None]).flatten(2).all(2)
            assert match.any(1).all()
            assert torch.equal(labels[match.int().argmax(1)], y)
            assert match.any(0).all()  # all of them come
            way.end(task)
        assert known == [task.number for task in tasks]


def test_the_loss_is_of_the_classes_seen_so_far():
    way, images = make(Finetune), pictures()
    first, second, _ = tasks_of(images)
    logits, y = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])
    way.begin(first)
    torch.testing.assert_close(way.loss(images, y, logits), cross_entropy(logits[:, :2], y))
    way.begin(second)
    torch.testing.assert_close(way.loss(images, y, logits), cross_entropy(logits[:, :4], y))


def test_what_is_kept_is_within_the_buffer_and_of_all_tasks():
    images = pictures()
    budget = replace(BUDGET, buffer=12)
    replay, exemplars = make(Replay, budget=budget), make(Exemplars, budget=budget)
    for way in (replay, exemplars):
        learn_network(way, tasks_of(images), images)
    assert replay.buffer.seen == 36
    assert len(replay.buffer.images) == 12
    assert len(set(torch.stack(replay.buffer.labels).tolist())) >= 4
    assert [len(x) for x in exemplars.icarl.exemplars.values()] == [2] * 6


def test_ewc_reads_so_many_images_of_each_task(monkeypatch):
    made, sizes, original = [], [], ways.EWC

    def spy(model, batches, *rest):
        batches = list(batches)
        strength, previous, classes, seed = rest
        made.append(original(model, batches, *rest))
        sizes.append((sum(len(x) for x, _ in batches), strength, classes, seed))
        assert previous is (made[-2] if made[1:] else None)  # what was known is taken over
        return made[-1]

    monkeypatch.setattr(ways, "EWC", spy)
    learn_network(make(NETWORKS["ewc"], seed=7), tasks_of(pictures()), pictures(4))
    assert sizes == [
        (4, 10.0, 2, 7),
        (4, 10.0, 4, 8),
    ]  # images, lambda, classes that compete, seed; nothing follows the third


def test_lwf_keeps_the_outputs_of_the_classes_that_have_come_from_a_copy():
    way, images = make(NETWORKS["lwf"], strength=3.0), pictures()
    for task in tasks_of(images):
        way.begin(task)
        way.end(task)
        assert (way.lwf.num_classes, way.lwf.alpha) == (task.seen, 3.0)
        assert way.lwf.old_model is not way.model


def test_a_network_is_measured_and_left_in_evaluation_mode_and_trains_in_training_mode():
    modes = []

    class Watched(Finetune):
        def batch(self):
            modes.append(("batch", self.model.training))
            return super().batch()

        def end(self, task):
            modes.append(("end", self.model.training))
            super().end(task)

        def scores(self, x):
            modes.append(("scores", self.model.training))
            return super().scores(x)

    learn_network(make(Watched), tasks_of(pictures()), pictures(4))
    assert set(modes) == {("batch", True), ("end", False), ("scores", False)}


def test_no_gradient_is_longer_than_it_may_be(monkeypatch):
    images, longest = pictures(), []

    def watch(parameters, largest):
        parameters = list(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        longest.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr(ways, "clip_grad_norm_", watch)
    learn_network(make(NETWORKS["lwf"], strength=1e4), tasks_of(images), images)
    assert len(longest) == 3 * BUDGET.steps
    assert max(longest) <= ways.LARGEST_GRADIENT * 1.001
    assert max(longest) > 0.9 * ways.LARGEST_GRADIENT


def test_a_network_learns_what_it_is_shown():
    images = pictures(6)[LABELS]
    budget = replace(BUDGET, steps=40, batch_size=16)
    scores = learn_network(make(Joint, budget=budget), tasks_of(images), images)
    assert accuracy_matrices(scores, stream(LABELS, LABELS))["class"][-1].mean() > 0.9


class DarkExperience(Replay):
    """DER++ (Buzzega et al. 2020, arXiv:2004.07211) in the interface: a class and a line in a table is all that a way takes."""

    def end(self, task):
        super().end(task)
        with torch.no_grad():
            self.dark = self.model(self.prepare(torch.stack(self.buffer.images)))

    def loss(self, x, y, logits):
        loss = super().loss(x, y, logits)
        if self.buffer.seen == 0:
            return loss
        kept = self.prepare(torch.stack(self.buffer.images))
        return loss + self.strength * mse_loss(self.model(kept), self.dark)


def test_a_new_way_is_a_class(monkeypatch):
    monkeypatch.setitem(ways.NETWORKS, "der", DarkExperience)
    images = pictures()
    weak, strong = (learn_network(make(ways.NETWORKS["der"], s), tasks_of(images), images) for s in (0.0, 10.0))
    assert torch.equal(weak, learn_network(make(Replay), tasks_of(images), images))
    assert not torch.equal(weak, strong)


def test_a_memory_holds_herded_features_and_answers_by_what_it_retrieves_of_each_class():
    x, labels = features_by_task()
    learner = FROZEN["memory"](SPACE, 16.0, 0, CPU)
    scores = learn_frozen(learner, stream(labels, labels).over(x), x)
    slots = learner.slots
    for c in range(6):
        of_class = x[labels == c]
        herded = of_class[herd(unit(of_class), 4)]  # 24 of 6 classes
        held = slots.values[(slots.labels == c) & (slots.writes > 0)]
        assert len(held) <= 4
        assert (
            torch.cdist(herded[:1], held).min() < torch.cdist(herded[:1], herded[1:]).min()
        )  # the first is there, or near
        attention = slots.attend(x)[:, slots.labels == c]
        torch.testing.assert_close(scores[-1][:, c], attention.sum(1))
    torch.testing.assert_close(scores[-1].sum(1), torch.ones(180))
    assert scores[0, :, 2:].abs().max() == 0  # of classes that have not come


def test_patterns_are_chosen_by_herding():
    space = Space(dim=12, classes=1, buffer=3, random_features=1, shrinkage=0.1)
    x = 5 * torch.eye(12)[:9] + 0.1 * torch.randn(9, 12)  # so unlike that none shares a slot
    learner = FROZEN["memory"](space, 16.0, 0, CPU)
    learner.write(x, torch.zeros(9, dtype=torch.long))
    assert torch.equal(learner.slots.values, x[herd(unit(x), 3)])
    assert herd(unit(x), 3) != [0, 1, 2]


def test_learners_from_features_are_what_they_are_called():
    x, labels = features_by_task()
    space = Space(dim=12, classes=6, buffer=24, random_features=50, shrinkage=0.4)
    expected = {}
    for method, mode in (("nearest_mean", "class_prototype"), ("slda", "metric")):
        memory = ClassMemory(12, 6, mode, shrinkage=0.4)
        memory.write(x, labels)
        expected[method] = memory.logits(x)
    ranpac = RanPAC(12, 50, 6, generator(3, "RanPAC"))
    ranpac.write(x, labels)
    expected["ranpac"] = ranpac.scores(x, 100.0)
    for method, logits in expected.items():
        learner = FROZEN[method](space, 100.0, 3, CPU)
        learner.write(x, labels)
        assert torch.equal(learner.scores(x), logits)
