"""Associative memory: what it retrieves, what it never retrieves, and what forgetting leaves of a class."""

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import normalize

from stages.vit_memory.hopfield import ClassMemory, SlotMemory, associate, energy, hebbian_retrieve, retrieve, unit

DIM, CLASSES = 16, 4


def patterns(count, dim=64):
    return normalize(torch.randn(count, dim), dim=1)


def labelled(count=60):
    labels = torch.arange(count) % CLASSES
    return torch.randn(count, DIM) + 2 * torch.randn(CLASSES, DIM)[labels], labels


def memory(mode, beta=16.0):
    return SlotMemory(DIM, 100, beta) if mode == "associative" else ClassMemory(DIM, CLASSES, mode, beta)


MODES = ["associative", "class_prototype", "metric"]


def test_a_thousand_patterns_are_retrieved_and_the_output_follows_the_query():
    stored = patterns(1000)
    queries = normalize(stored + 0.25 * torch.randn(1000, 64) / 8, dim=1)
    back = retrieve(stored, queries, beta=16.0, steps=3)
    assert ((back @ stored.T).argmax(1) == torch.arange(1000)).double().mean() >= 0.99
    assert (retrieve(stored, stored, beta=16.0, steps=3) - stored).norm(dim=1).mean() <= 0.01
    assert (back[0] - back[1]).norm() > 0.5
    assert (retrieve(stored, queries, beta=0.125) - stored).norm(dim=1).mean() > 0.95  # retrieves the mean of all


@pytest.mark.parametrize("beta", [0.125, 4.0, 16.0, 64.0])
def test_no_update_raises_the_energy_which_is_never_negative(beta):
    stored = patterns(50).double() * 3 * torch.rand(50, 1)
    state = patterns(20).double()
    values = []
    for _ in range(8):
        values.append(energy(stored, state, beta))
        state = retrieve(stored, state, beta)
    values = torch.stack(values)
    assert (values[1:] <= values[:-1] + 1e-12).all()
    assert (values >= -1e-12).all()


def test_a_classical_network_holds_few_patterns_and_a_modern_one_many():
    def retrieved(count):
        stored = torch.where(torch.rand(count, 64) < 0.5, -1.0, 1.0)
        flipped = torch.where(torch.rand(count, 64) < 0.1, -stored, stored)
        both = hebbian_retrieve(stored, flipped, 20), retrieve(stored, flipped, 1.0, 3).sign()
        return [(back == stored).all(1).double().mean().item() for back in both]

    assert retrieved(3) == [1.0, 1.0]
    classical, modern = retrieved(64)
    assert classical < 0.1 < 0.99 < modern


def test_empty_slots_are_as_if_they_were_not_there():
    x = torch.randn(50, DIM)
    large, small = SlotMemory(DIM, 1000, novelty=1.1), SlotMemory(DIM, 50, novelty=1.1)
    for each in (large, small):
        each.write(x)
    queries = torch.randn(20, DIM)
    torch.testing.assert_close(large.read(queries), small.read(queries))
    assert large.attend(queries)[:, 50:].abs().max() == 0
    torch.testing.assert_close(large.attend(queries).sum(1), torch.ones(20))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_memory_answers_zero(mode):
    assert (memory(mode).read(torch.randn(5, DIM)) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_reading_changes_nothing_and_does_not_depend_on_the_batch(mode):
    store = memory(mode)
    store.write(*labelled())
    before = {name: buffer.clone() for name, buffer in store.state_dict().items()}
    queries = torch.randn(30, DIM)
    together, order = store.read(queries), torch.randperm(30)
    torch.testing.assert_close(store.read(queries[order]), together[order])
    torch.testing.assert_close(torch.cat([store.read(q[None]) for q in queries]), together)
    assert all(torch.equal(before[name], buffer) for name, buffer in store.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_a_forgotten_class_leaves_nothing(mode):
    x, labels = labelled()
    kept = labels != 2
    store, never = memory(mode), memory(mode)
    store.write(x, labels)
    store.forget(2)
    never.write(x[kept], labels[kept])
    queries = torch.randn(20, DIM)
    if mode == "associative":  # the slots are others, what they hold is the same
        torch.testing.assert_close(store.read(queries), never.read(queries))
        held, never_held = ([v[(s.writes > 0)] for v in (s.keys, s.values)] for s in (store, never))
        assert all(torch.equal(a, b) for a, b in zip(held, never_held, strict=True))
    else:
        assert torch.equal(store.read(queries), never.read(queries))
        assert all(torch.equal(a, b) for a, b in zip(store.buffers(), never.buffers(), strict=True))


@pytest.mark.parametrize("mode", ["class_prototype", "metric"])
def test_the_order_of_writes_does_not_matter(mode):
    x, labels = labelled()
    one, other, order = memory(mode), memory(mode), torch.randperm(len(x))
    one.write(x, labels)
    for part in order.split(7):
        other.write(x[part], labels[part])
    queries = torch.randn(20, DIM)
    torch.testing.assert_close(one.read(queries), other.read(queries))


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7])
def test_the_metric_memory_is_linear_discriminant_analysis(shrinkage):
    x, labels = labelled(200)
    store = ClassMemory(DIM, CLASSES, "metric", shrinkage=shrinkage)
    store.write(x, labels)

    class Shrunk:  # scikit-learn's own shrinkage is of standardised features; here it is of features as they are
        def fit(self, x):
            covariance = torch.from_numpy(x).mT.cov(correction=0)
            identity = torch.eye(DIM, dtype=torch.float64)
            self.covariance_ = ((1 - shrinkage) * covariance + shrinkage * covariance.trace() / DIM * identity).numpy()

    reference = LinearDiscriminantAnalysis("lsqr", covariance_estimator=Shrunk(), priors=[1 / CLASSES] * CLASSES)
    reference.fit(x.double().numpy(), labels.numpy())
    queries = torch.randn(50, DIM, dtype=torch.float64)
    posterior = torch.from_numpy(reference.predict_proba(queries.numpy()))
    torch.testing.assert_close(store.attend(queries), posterior, rtol=1e-6, atol=1e-9)


def test_a_familiar_pattern_moves_a_slot_and_a_novel_one_takes_the_least_written():
    store = SlotMemory(DIM, 2)
    a, b, c = torch.randn(3, DIM)
    store.write(torch.stack([a, a, b]))
    assert store.writes.tolist() == [2, 1]
    store.write(c[None])  # full: b goes
    torch.testing.assert_close(store.values, torch.stack([a, c]))
    store.write(a[None], torch.tensor([7]))  # the same vector under another label is novel
    assert store.labels.tolist() == [-1, 7]


def test_a_familiar_pattern_moves_its_slot_by_the_rate():
    store = SlotMemory(DIM, 3, rate=0.25)
    a = torch.randn(DIM)
    b = a + 0.05 * torch.randn(DIM)
    store.write(torch.stack([a, b]))
    torch.testing.assert_close(store.values[0], 0.75 * a + 0.25 * b)
    torch.testing.assert_close(store.keys[0], normalize(0.75 * unit(a) + 0.25 * unit(b), dim=0))


def test_association_is_attention():
    stored, queries = patterns(30), patterns(7)
    scaled = torch.nn.functional.scaled_dot_product_attention(queries[None], stored[None], stored[None], scale=5.0)[0]
    torch.testing.assert_close(associate(stored, queries, 5.0) @ stored, scaled)


@pytest.mark.parametrize("mode", ["class_prototype", "metric"])
def test_sums_stay_exact_in_a_model_of_half_precision(mode):
    x, labels = labelled(2000)
    store, exact = memory(mode).bfloat16(), memory(mode)
    for each in (store, exact):
        each.write(x, labels)
    assert store.counts.tolist() == [500] * CLASSES  # bfloat16 counts to 256
    assert torch.equal(store.read(x[:5]), exact.read(x[:5]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ClassMemory(DIM, 4, "associative"),
            "mode: expected one of class_prototype, metric, got 'associative'",
        ),
        (lambda: ClassMemory(DIM, 4, "metrics"), "mode: expected one of class_prototype, metric, got 'metrics'"),
        (lambda: ClassMemory(DIM, 4, "metric", shrinkage=1.5), "shrinkage: expected 0 to 1, got 1.5"),
        (lambda: ClassMemory(DIM, 0, "metric"), "num_classes: expected 1 or more, got 0"),
        (lambda: SlotMemory(DIM, 0), "size: expected 1 or more, got 0"),
        (lambda: SlotMemory(DIM, 4, beta=0.0), "beta: expected a number above 0, got 0.0"),
        (lambda: SlotMemory(DIM, 4, rate=-0.1), "rate: expected 0 to 1, got -0.1"),
        (lambda: SlotMemory(DIM, 4).write(torch.randn(2, DIM), torch.tensor([0.0, 1.0])), "expected 2 integers"),
        (lambda: SlotMemory(DIM, 4).write(torch.randn(2, DIM), torch.tensor([0])), "expected 2 integers, got 1"),
        (lambda: memory("metric").write(torch.randn(1, DIM), torch.tensor([-1])), "expected 0 to 3, got -1 to -1"),
        (lambda: memory("metric").write(torch.randn(1, DIM), torch.tensor([4])), "expected 0 to 3, got 4 to 4"),
        (lambda: memory("metric").write(torch.randn(2, DIM), torch.tensor([0])), r"integers of shape \[2\]"),
        (lambda: memory("metric").forget(-1), "label: expected 0 to 3, got -1"),  # it would be the last class
    ],
)
def test_what_would_be_stored_wrongly_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
