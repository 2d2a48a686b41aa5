"""Networks brought into one order of neurons."""

import json
from itertools import permutations, product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from weightnet.modern import MODERN
from weightnet.test_symmetry import followed, seeded

from stages.common.stage import InputError
from stages.weightnet import symmetry as command
from stages.weightnet.tracing.alignment import align, assign_blocks, distance, loss_barrier
from stages.weightnet.tracing.program import Weights
from stages.weightnet.tracing.symmetry import permute, random_permutations
from stages.weightnet.zoo.architectures import build_network, zoo_program


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None]
    return (images - images.mean()) / images.std(), torch.from_numpy(data.target)


def trained(seed: int, steps: int = 250) -> Weights:
    """A LeNet that was trained on half of the digits."""
    torch.manual_seed(seed)
    model = build_network("lenet", 1, 10, 8)
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        batch = torch.randint(0, 900, (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return {name: value.detach()[None] for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def pair() -> list[Weights]:
    return [trained(seed) for seed in (0, 1)]


def test_two_seeds_of_a_lenet_are_closer_in_one_order_and_the_barrier_between_them_falls(pair):
    program, symmetry = zoo_program("lenet", 1, 10, 8)
    orders = align(*pair, symmetry, seeded())
    moved = permute(pair[1], symmetry, orders)
    images, labels = (values[900:] for values in digits())
    before, after = (loss_barrier(program, pair[0], other, images, labels) for other in (pair[1], moved))
    assert loss_barrier(program, pair[1], moved, images, labels) > 0  # another place, and the same function
    assert distance(pair[0], moved) < distance(*pair)
    assert 0 <= after < 0.6 * before
    assert loss_barrier(program, pair[0], pair[0], images, labels) < 1e-6


@pytest.mark.parametrize("name", ["tiny ViT", "grouped", "lenet"])
def test_a_relabelled_network_is_brought_back(name, pair):
    if name == "lenet":
        (_, symmetry), weights = zoo_program("lenet", 1, 10, 8), pair[0]
    else:
        torch.manual_seed(0)
        _, symmetry, _ = followed(model := MODERN[name]())
        state = model.state_dict()
        weights = {n: state[n][None] + 0.1 * torch.randn(state[n][None].shape, generator=seeded()) for n in state}
        weights = {n: value for n, value in weights.items() if value.is_floating_point()}
    moved = permute(weights, symmetry, random_permutations(symmetry, seeded()))
    assert distance(weights, moved) > 0.1
    back = permute(moved, symmetry, align(weights, moved, symmetry, seeded()))
    assert distance(weights, back) < 1e-6


def test_blocks_are_assigned_as_trying_all_orders_assigns_them():
    random = np.random.default_rng(0)
    likeness = {"a": random.standard_normal((6, 6)), "b": random.standard_normal((9, 9))}

    def value(orders: dict[str, np.ndarray]) -> float:
        return sum(matrix[np.arange(len(matrix)), orders[group]].sum() for group, matrix in likeness.items())

    best = max(
        sum(
            max(sum(matrix[i * d + u, j * d + v] for u, v in enumerate(inner)) for inner in permutations(range(d)))
            for (i, j), (matrix, d) in product(enumerate(blocks), ((likeness["a"], 2), (likeness["b"], 3)))
        )
        for blocks in permutations(range(3))
    )
    found = {group: order.numpy() for group, order in assign_blocks(likeness, 3).items()}
    assert value(found) == pytest.approx(best)
    assert (found["a"].reshape(3, 2) // 2 == found["b"].reshape(3, 3)[:, :2] // 3).all()


def ask(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["symmetry", *words])
    command.main()
    return capsys.readouterr().out


def test_the_command_prints_what_is_permuted_as_a_table_and_as_json(monkeypatch, capsys):
    assert "7.weight   axis 0: 7, axis 1: 3 x 4" in ask(monkeypatch, capsys, "--arch", "lenet")
    groups = json.loads(ask(monkeypatch, capsys, "--arch", "lenet", "--json"))["groups"]
    assert {name: found["size"] for name, found in groups.items()} == {
        **{"input": 1, "0": 6, "3": 16, "7": 120, "9": 84, "output": 10}
    }
    assert {"tensor": "7.weight", "axis": 1, "start": 0, "step": 4, "block": 4} in groups["3"]["tensors"]
    assert not groups["output"]["permuted"]


def test_the_command_aligns_files_and_writes_the_second_in_the_first_s_order(project, monkeypatch, capsys, pair):
    files = []
    for name, weights in zip("ab", pair, strict=True):
        files.append(str(project / f"{name}.safetensors"))
        save_file({key: value[0].contiguous() for key, value in weights.items()}, files[-1])
    words = ["--arch", "lenet", "--align", *files, "--json", "--save", str(project / "c.safetensors")]
    found = json.loads(ask(monkeypatch, capsys, *words))
    saved = {key: value[None] for key, value in load_file(project / "c.safetensors").items()}
    assert found["before"] == pytest.approx(distance(*pair))
    assert found["after"] == pytest.approx(distance(pair[0], saved))
    assert found["after"] < found["before"]
    with pytest.raises(InputError, match="is missing"):
        ask(monkeypatch, capsys, "--arch", "lenet", "--align", files[0], "none.pt")
