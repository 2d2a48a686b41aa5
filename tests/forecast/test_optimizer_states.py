"""Optimisers' states beside weights: which direction is which tensor's, in any usual form of checkpoint, or one line that says why not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cosine_similarity

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.forecast.optimizer_states import read_directions
from stages.forecast.regimes import direction


def network() -> nn.Sequential:
    """One with a norm and its running statistics, and two tensors of the same shape."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2)
    )


def groups(model: nn.Module) -> list[dict]:
    """Matrices, and the rest without decay, as transformers hands them over."""
    return [
        {"params": [p for p in model.parameters() if (p.dim() == 2) == matrices], "weight_decay": decay}
        for matrices, decay in ((True, 0.1), (False, 0.0))
    ]


OPTIMIZERS = {
    "Adam": lambda model: [torch.optim.Adam(model.parameters(), 1e-2)],
    "AdamW in groups": lambda model: [torch.optim.AdamW(groups(model), 1e-2)],
    "AdamW by name": lambda model: [torch.optim.AdamW(reversed(list(model.named_parameters())), 1e-2)],
    "SGD": lambda model: [torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)],
    "Muon and AdamW": lambda model: [
        torch.optim.Muon(groups(model)[0]["params"], 1e-2),
        torch.optim.AdamW(groups(model)[1]["params"], 1e-2),
    ],
}


def save_plainly(path: Path, model: nn.Module, optimizers: list) -> Path:
    torch.save(
        {"model": model.state_dict(), "optimizer": [o.state_dict() for o in optimizers], "epoch": 1}, path / "0.pt"
    )
    return path / "0.pt"


def save_as_lightning(path: Path, model: nn.Module, optimizers: list) -> Path:
    state = {f"net.{name}": x for name, x in model.state_dict().items()}
    torch.save(
        {"state_dict": state, "optimizer_states": [o.state_dict() for o in optimizers], "global_step": 3},
        path / "0.ckpt",
    )
    return path / "0.ckpt"


def save_as_transformers(path: Path, model: nn.Module, optimizers: list) -> Path:
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    states = [o.state_dict() for o in optimizers]
    torch.save(states[0] if len(states) == 1 else {"all": states}, path / "optimizer.pt")
    return path / "pytorch_model.bin"


def save_as_accelerate(path: Path, model: nn.Module, optimizers: list) -> Path:
    save_file(model.state_dict(), path / "model.safetensors")
    torch.save(optimizers[0].state_dict(), path / "optimizer.bin")
    return path / "model.safetensors"


def trained(optimizer: str, steps: int = 3) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = network()
    optimizers = OPTIMIZERS[optimizer](model)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        for o in optimizers:
            o.step()
    return model, optimizers


def layout_of(model: nn.Module) -> Layout:
    return Layout.of(dict(model.named_parameters()))


def check(rows, model: nn.Module, optimizers: list, layout: Layout) -> None:
    """Each tensor has the direction of its own optimiser's state, of size 1 whatever the size of gradients."""
    named = layout.unflatten(rows[0].float())
    for name, p in model.named_parameters():
        (held,) = (o for o in optimizers if p in o.state)
        (group,) = (g for g in held.param_groups if any(p is q for q in g["params"]))
        expected = direction(p, held.state[p], group)
        assert cosine_similarity(expected.flatten(), named[name].flatten(), dim=0) > 0.999, name
        assert named[name].square().mean().sqrt() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("save", [save_plainly, save_as_lightning, save_as_transformers])
def test_each_tensor_gets_its_own_direction(tmp_path, optimizer, save):
    model, optimizers = trained(optimizer)
    layout = layout_of(model)
    check(read_directions([save(tmp_path, model, optimizers)], layout), model, optimizers, layout)


def test_tensors_sorted_by_name_are_told_by_name_or_by_a_shape_of_their_own(tmp_path):
    def sorted_layout(model) -> Layout:
        return Layout.of(dict(sorted(model.named_parameters())))

    model, optimizers = trained("AdamW by name")
    layout = sorted_layout(model)
    check(read_directions([save_as_accelerate(tmp_path, model, optimizers)], layout), model, optimizers, layout)
    model, optimizers = trained("Adam")
    with pytest.raises(InputError, match=r"sorted by name: which is which only files of torch.save say"):
        read_directions([save_as_accelerate(tmp_path, model, optimizers)], layout)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    optimizers = [torch.optim.Adam(model.parameters())]
    model(torch.randn(8, 4)).square().sum().backward()
    optimizers[0].step()
    layout = sorted_layout(model)
    check(read_directions([save_as_accelerate(tmp_path, model, optimizers)], layout), model, optimizers, layout)


def test_what_is_not_trained_or_not_yet_stepped_has_none(tmp_path):
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    paths = [tmp_path / f"{t}.pt" for t in range(2)]
    for path in paths:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    rows = read_directions(paths, layout_of(model))
    named = layout_of(model).unflatten(rows[1])
    assert not rows[0].any()
    assert [name for name, x in named.items() if not x.any()] == ["0.weight", "0.bias"]


def test_without_an_optimiser_there_is_nothing_to_read(tmp_path):
    model = network()
    torch.save({"model": model.state_dict()}, tmp_path / "0.pt")
    assert read_directions([tmp_path / "0.pt"], layout_of(model)) is None


def spoilt(kind: str, model: nn.Module, adam: torch.optim.Optimizer) -> dict:
    """Return an optimiser's state that cannot be read."""
    state = adam.state_dict()
    match kind:
        case "no direction":
            return torch.optim.RMSprop(model.parameters()).state_dict() | {
                "state": {i: {"square_avg": p} for i, p in enumerate(model.parameters())}
            }
        case "plain SGD":
            return {
                "state": {i: {"momentum_buffer": None} for i in state["state"]},
                "param_groups": state["param_groups"],
            }
        case "another network":
            return {
                **state,
                "state": {i: {"exp_avg": torch.ones(7, 7), "exp_avg_sq": torch.ones(7, 7)} for i in state["state"]},
            }
        case "some of several":
            shorter = state["param_groups"][0] | {"params": state["param_groups"][0]["params"][:-4]}
            return {**state, "param_groups": [shorter]}
        case "no betas":
            return {**state, "param_groups": [{"params": state["param_groups"][0]["params"]}]}
        case "not finite":
            return {
                **state,
                "state": {i: {**s, "exp_avg": s["exp_avg"] * torch.nan} for i, s in state["state"].items()},
            }
        case _:
            return {"state": [], "param_groups": 3}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no direction", "expected the moments of Adam, or the momentum of SGD or Muon, got square_avg"),
        ("plain SGD", "got momentum_buffer"),
        ("another network", r"0.weight is \(5, 4\), but \(7, 7\) in the optimiser's state"),
        ("some of several", r"5 tensors are \(5,\), and 4 parameters in 1 groups: which is which is not said"),
        ("no betas", "its group lacks what Adam needs"),
        ("not finite", "values that are not finite"),
        ("no form", "expected state and param_groups"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(tmp_path, kind, message):
    model, (adam,) = trained("Adam")
    torch.save({"model": model.state_dict(), "optimizer": spoilt(kind, model, adam)}, tmp_path / "0.pt")
    with pytest.raises(InputError, match=message) as error:
        read_directions([tmp_path / "0.pt"], layout_of(model))
    assert "\n" not in str(error.value)


def test_of_snapshots_without_an_optimiser_the_first_is_named(tmp_path):
    model, (adam,) = trained("Adam")
    torch.save({"model": model.state_dict()}, tmp_path / "0.pt")
    torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "1.pt")
    with pytest.raises(InputError, match=r"0.pt: its optimiser's state cannot be read: there is none"):
        read_directions([tmp_path / "0.pt", tmp_path / "1.pt"], layout_of(model))
