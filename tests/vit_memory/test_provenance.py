"""Where answers come from, and what is forgotten exactly."""

import pytest
import torch

from stages.vit_memory.classifiers import memory_log_probabilities
from stages.vit_memory.provenance import ImageMemory


def examples(seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 4
    x = torch.randn(4, 12, generator=random)[labels] + torch.randn(40, 12, generator=random)
    return x, labels, [f"image {i}" for i in range(40)], torch.randn(25, 12, generator=random)


def memory_of(x, labels, names, parts: int = 1) -> ImageMemory:
    memory = ImageMemory(x.shape[1], 4, beta=8.0)
    for place in torch.arange(len(x)).chunk(parts):
        memory.write(x[place], labels[place], [names[i] for i in place.tolist()])
    return memory


def test_an_answer_is_the_sum_of_its_sources():
    x, labels, names, queries = examples()
    memory = memory_of(x, labels, names)
    answers, sources = memory.answer(queries), memory.sources(queries, count=40)
    for answer, row in zip(answers, sources, strict=True):
        assert [s.weight for s in row] == sorted((s.weight for s in row), reverse=True)
        assert sum(s.weight for s in row) == pytest.approx(1, abs=1e-5)
        for c in range(4):
            assert sum(s.weight for s in row if s.label == c) == pytest.approx(answer[c].item(), abs=1e-5)
        assert all(labels[names.index(s.name)] == s.label for s in row)
    expected = memory_log_probabilities(x, labels, queries, 4, beta=8.0).exp()
    torch.testing.assert_close(answers, expected)  # the memory head's own memory


def test_a_stored_image_is_its_own_first_source():
    x, labels, names, _ = examples()
    assert [row[0].name for row in memory_of(x, labels, names).sources(x)] == names


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("gone", [0, 17, 39])
def test_a_memory_that_forgot_an_image_never_saw_it(gone, parts):
    x, labels, names, queries = examples()
    memory = memory_of(x, labels, names, parts)
    before = memory.answer(queries)
    memory.forget_image(names[gone])
    kept = torch.arange(40) != gone
    never = memory_of(x[kept], labels[kept], [name for i, name in enumerate(names) if i != gone])
    assert torch.equal(memory.x, never.x)
    assert torch.equal(memory.labels, never.labels)
    assert memory.names == never.names
    assert torch.equal(memory.answer(queries), never.answer(queries))
    assert not torch.equal(memory.answer(queries), before)  # it did have a part


def test_a_memory_that_forgot_a_class_never_saw_it():
    x, labels, names, queries = examples()
    memory = memory_of(x, labels, names)
    memory.forget(2)
    kept = labels != 2
    never = memory_of(x[kept], labels[kept], [name for name, keep in zip(names, kept.tolist(), strict=True) if keep])
    assert torch.equal(memory.x, never.x)
    assert torch.equal(memory.answer(queries), never.answer(queries))
    assert not memory.answer(queries)[:, 2].any()


def test_what_is_forgotten_can_be_written_again():
    x, labels, names, queries = examples()
    memory = memory_of(x, labels, names)
    memory.forget_image(names[39])
    memory.write(x[39:], labels[39:], names[39:])
    assert torch.equal(memory.answer(queries), memory_of(x, labels, names).answer(queries))


def test_mistakes_are_told():
    x, labels, names, queries = examples()
    memory = memory_of(x, labels, names)
    for wrong, call in {
        "expected one of the 40 stored images, got 'image 99'": lambda: memory.forget_image("image 99"),
        "expected 0 to 3, got 4": lambda: memory.forget(4),
        "expected each image once": lambda: memory.write(x[:1], labels[:1], names[:1]),
        r"expected \[n, 12\] and a name for each, got \[2, 12\] and 1 names": lambda: memory.write(
            x[:2], labels[:2], ["a"]
        ),
        "call write\\(\\) first": lambda: ImageMemory(12, 4).answer(queries),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            call()
