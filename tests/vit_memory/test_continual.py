"""Continual learning: the penalties' closed forms, uniform buffers, exemplars that stand for their classes."""

import copy

import pytest
import timm
import torch
from scipy.stats import chisquare
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

from stages.vit_memory.continual import EWC, LwF, ReplayBuffer, fisher_diagonal, herd, iCaRL
from stages.vit_memory.models import HeadedViT


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
    assert small_vit().vit.blocks[0].attn.fused_attn
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


def test_herding_takes_no_feature_twice():
    x = torch.tensor(
        [[0.0, 0.0], [1.0, 0.0], [-1.0, 0.1]]
    )  # the first is nearly the mean: with itself it still would be
    assert sorted(herd(x, 3)) == [0, 1, 2]


class Signed(nn.Linear):
    """A linear layer for inputs that sum to something positive, and its negative for others: written as a branch on data, or not."""

    branch = True

    def forward(self, x):
        if not self.branch:
            return super().forward(x) * torch.where(x.sum(1, keepdim=True) > 0, 1, -1)
        return torch.stack([nn.Linear.forward(self, row) * (1 if row.sum() > 0 else -1) for row in x])


def test_fisher_of_a_forward_that_branches_on_its_inputs_is_that_of_one_that_does_not():
    model, x = Signed(5, 3), torch.randn(12, 5)
    branching = fisher_diagonal(model, [(x, None)])
    model.branch = False
    at_once = fisher_diagonal(model, [(x, None)])
    for name in at_once:
        torch.testing.assert_close(branching[name], at_once[name])


def test_fisher_is_of_the_model_as_it_predicts():
    x = [(torch.randn(20, 6), None)]
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    trained, evaluated = (fisher_diagonal(model.train(mode), x) for mode in (True, False))
    assert all(torch.equal(trained[name], evaluated[name]) for name in trained)


def test_icarl_keeps_as_many_exemplars_of_each_class():
    model = small_vit()
    icarl = iCaRL(model, num_classes=4, memory_size=12)
    images = {c: torch.randn(10, 3, 16, 16) for c in range(4)}
    icarl.keep({c: images[c] for c in (0, 1)})
    first = {c: x.clone() for c, x in icarl.exemplars.items()}
    assert [len(x) for x in icarl.exemplars.values()] == [6, 6]
    icarl.keep({c: images[c] for c in (2, 3)})
    assert [len(x) for x in icarl.exemplars.values()] == [3, 3, 3, 3]
    assert all(torch.equal(icarl.exemplars[c], first[c][:3]) for c in first)


class Flat(nn.Module):
    """A model whose features are its inputs."""

    def features(self, x):
        return x


def test_icarl_classifies_by_the_nearest_mean_of_normalised_exemplars():
    directions = normalize(torch.randn(4, 12), dim=1)
    images = {c: 50 * directions[c] * torch.rand(30, 1) + torch.randn(30, 12) for c in (0, 1, 3)}
    icarl = iCaRL(Flat(), num_classes=4, memory_size=12)
    icarl.keep(images)
    x = torch.cat(list(images.values()))
    scores = icarl.classify(x)
    for c in images:
        exemplars = icarl.exemplars[c]
        assert len(exemplars) == 4
        assert all((exemplar == images[c]).all(1).any() for exemplar in exemplars)
        mean = (exemplars / exemplars.norm(dim=1, keepdim=True)).mean(0)
        expected = torch.nn.functional.cosine_similarity(x, mean[None])
        torch.testing.assert_close(scores[:, c], expected, rtol=1e-4, atol=1e-5)
    assert (scores[:, 2] == -torch.inf).all()
    labels = torch.tensor([0, 1, 3]).repeat_interleave(30)
    assert (scores.argmax(1) == labels).double().mean() > 0.9


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


def test_icarls_loss_is_summed_over_the_classes_seen_and_averaged_over_images():
    icarl, x = iCaRL(Flat(), num_classes=4), torch.randn(3, 12)
    icarl.begin()
    logits, labels = torch.randn(3, 4), torch.tensor([2, 0, 2])
    targets = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # of classes 0 and 2
    expected = binary_cross_entropy_with_logits(logits[:, [0, 2]], targets, reduction="none").sum(1).mean()
    torch.testing.assert_close(icarl.loss(x, labels, logits), expected)


def test_icarl_leaves_its_model_in_the_mode_it_was_in():
    model, x = small_vit().train(), torch.randn(4, 3, 16, 16)
    icarl = iCaRL(model, num_classes=4)
    icarl.keep({0: x})
    icarl.classify(x)
    assert model.training
    model.eval()
    icarl.classify(x)
    assert not model.training


def test_icarl_remembers_the_model_of_before_the_task():
    model, x = small_vit(), torch.randn(4, 3, 16, 16)
    icarl = iCaRL(model, num_classes=4)
    icarl.begin()
    assert icarl.old_model is None  # it knew nothing
    icarl.keep({0: x, 1: x})
    icarl.begin()
    before = model(x).detach()
    with torch.no_grad():
        model.head.bias += 1
    assert torch.equal(icarl.old_model(x), before)
    images, labels = icarl.replayed()
    assert images.shape == (8, 3, 16, 16)
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batches(n=8):
    return [(torch.randn(n, 6), None)]


def test_ewc_holds_the_old_rows_of_a_head_that_gets_new_classes():
    model = mlp()
    ewc = EWC(model, batches(), ewc_lambda=2.0)
    grown = nn.Linear(5, 6)
    with torch.no_grad():
        grown.weight[:3], grown.bias[:3] = model[2].weight, model[2].bias
    model[2] = grown
    assert ewc.penalty() == 0  # of the new rows nothing is known
    with torch.no_grad():
        grown.weight[3:] += 1.0
        assert ewc.penalty() == 0
        grown.weight[:3] += 0.5
    torch.testing.assert_close(ewc.penalty(), 0.25 * ewc.fisher["2.weight"].sum())
    again = EWC(model, batches(), previous=ewc)
    assert again.fisher["2.weight"].shape == (6, 5)
    assert (again.fisher["2.weight"][:3] >= ewc.fisher["2.weight"]).all()


def test_ewc_takes_over_what_it_knows_when_layers_are_added():
    model = mlp()
    ewc = EWC(model, batches(), seed=1)
    data = batches()
    alone = EWC(model, data, seed=2)
    both = EWC(model, data, previous=ewc, seed=2)
    torch.testing.assert_close(both.fisher["0.weight"], alone.fisher["0.weight"] + ewc.fisher["0.weight"])
    model.add_module("3", nn.Linear(3, 3))
    assert EWC(model, data, previous=ewc).penalty() == 0


def test_ewc_of_weights_that_changed_in_another_way_is_an_error():
    model = mlp()
    ewc = EWC(model, batches())
    model[2] = nn.Linear(7, 3)
    with pytest.raises(ValueError, match=r"2.weight: expected the shape \[3, 5\].* got \[3, 7\]"):
        ewc.penalty()
    model[2] = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=r"2.weight: expected the shape \[3, 5\].* got \[2, 5\]"):
        ewc.penalty()
    model[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"without \['2.bias', '2.weight'\]"):
        ewc.penalty()
    with pytest.raises(ValueError, match="without"):
        EWC(model, batches(), previous=ewc)


@pytest.mark.parametrize(
    ("dataloader", "got"),
    [
        ([], "got none: it is empty, or a generator that is used up"),
        (iter([]), "got none"),
        ([torch.randn(2, 6)], "got Tensor"),  # two images would be unpacked as one and its label
        ([{"x": torch.randn(2, 6)}], "got dict"),
    ],
)
def test_ewc_without_inputs_is_an_error_and_leaves_the_model_as_it_was(dataloader, got):
    model = mlp().train()
    with pytest.raises(ValueError, match=f"dataloader: expected .*{got}"):
        EWC(model, dataloader)
    assert model.training


def test_ewc_reads_inputs_alone_whatever_else_a_batch_has():
    model, x = mlp(), torch.randn(4, 6)
    pair, triple = (EWC(model, [batch]).fisher for batch in ((x, None), [x, torch.zeros(4), "more"]))
    assert all(torch.equal(pair[name], triple[name]) for name in pair)


class Two(nn.Module):
    """A model that returns two things."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x), None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC(mlp().requires_grad_(False), batches()), "weights that train, got none"),
        (lambda: EWC(Two(), batches()), "logits .*got tuple"),
        (lambda: EWC(mlp(), batches(), num_classes=4), "num_classes: expected 1 to the model's 3 logits, got 4"),
        (lambda: EWC(mlp(), batches(), num_classes=0), "got 0"),
        (lambda: EWC(mlp(), batches(), ewc_lambda=-1.0), "ewc_lambda: expected at least 0, got -1.0"),
        (lambda: LwF(mlp(), mlp(), temperature=0.0), "temperature: expected a number above 0, got 0.0"),
        (lambda: LwF(mlp(), mlp(), alpha=-1.0), "alpha: expected at least 0"),
        (lambda: LwF(mlp(), mlp(), num_classes=4).penalty(torch.randn(2, 6)), "got 4"),
        (lambda: ReplayBuffer(0), "capacity: expected at least 1, got 0"),
        (lambda: ReplayBuffer(4).sample(2), "expected 1 or more of 1 or more examples, got 2 of 0"),
        (lambda: ReplayBuffer(4).add(torch.randn(3, 2), torch.tensor([0, 1])), "one for each of 3 images, got 2"),
        (lambda: iCaRL(Flat(), 4, memory_size=2), "expected an exemplar or more for each .* got 2 for 4"),
        (lambda: iCaRL(mlp(), 4), r"expected one with a method features\(x\), got Sequential"),
        (lambda: iCaRL(Flat(), 4).classify(torch.randn(2, 3)), "got none: call keep"),
        (lambda: iCaRL(Flat(), 4).replayed(), "got none: call keep"),
        (lambda: iCaRL(Flat(), 4).keep({4: torch.randn(2, 3)}), "labels of 0 to 3.* got 2 of label 4"),
        (lambda: iCaRL(Flat(), 4).keep({1: torch.randn(0, 3)}), "an image or more, got 0 of label 1"),
        (lambda: iCaRL(Flat(), 4).loss(torch.randn(1, 3), torch.tensor([4]), torch.randn(1, 4)), "0 to 3, got 4 to 4"),
    ],
)
def test_what_would_mean_nothing_is_an_error_that_says_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lwf_of_the_model_itself_is_an_error_and_leaves_its_mode():
    model = mlp().train()
    with pytest.raises(ValueError, match="expected a copy from before the task"):
        LwF(model, model)
    assert model.training


def test_lwf_compares_the_classes_that_the_old_model_has():
    old, x = mlp(), torch.randn(4, 6)
    model = copy.deepcopy(old)
    model[2] = nn.Linear(5, 6)
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old[2].weight, old[2].bias
    assert abs(LwF(model, old).penalty(x).item()) < 1e-6


def test_what_the_caller_does_to_its_batch_later_does_not_change_the_buffer():
    images, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    buffer = ReplayBuffer(3)
    buffer.add(images, labels)
    images += 1
    labels += 1
    held, held_labels = buffer.sample(5)
    assert held.abs().max() == 0
    assert held_labels.max() == 0
