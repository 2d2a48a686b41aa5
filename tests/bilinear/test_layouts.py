"""Classifiers of others compute here what they computed there, and what is no product of linear maps is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages.bilinear.decompose import decompose
from stages.bilinear.layouts import load_classifier
from stages.common.stage import InputError

D, H, C = 16, 6, 3


class Stacked(nn.Module):
    """The layout of the paper's code: L above R in one map."""

    def __init__(self, layers: int, bias: bool, residual: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(D, H, bias=False), nn.Linear(H, C, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(H, 2 * H, bias=bias) for _ in range(layers))
        self.residual = residual

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            left, right = block(h).chunk(2, dim=-1)
            h = h + left * right if self.residual else left * right
        return self.head(h)


class Apart(nn.Module):
    """Its first layout: two maps, other names, a bias of the head."""

    def __init__(self, layers: int, bias: bool, residual: bool) -> None:
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(D, H, bias=False), nn.Linear(H, C)
        pairs = [{"linear1": nn.Linear(H, H, bias=bias), "linear2": nn.Linear(H, H, bias=bias)} for _ in range(layers)]
        self.layers = nn.ModuleList(map(nn.ModuleDict, pairs))
        self.residual = residual

    def forward(self, x):
        h = self.linear_in(x)
        for layer in self.layers:
            z = layer["linear1"](h) * layer["linear2"](h)
            h = h + z if self.residual else z
        return self.linear_out(h)


@pytest.mark.parametrize("kind", [Stacked, Apart])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_network_of_others_has_the_same_logits_here(tmp_path, kind, layers, bias, residual):
    theirs, x = kind(layers, bias, residual), torch.rand(5, D)
    torch.save(
        {"model": {f"_orig_mod.{name}": tensor for name, tensor in theirs.state_dict().items()}}, tmp_path / "w.pt"
    )
    ours, notes = load_classifier(tmp_path / "w.pt", residual)
    torch.testing.assert_close(ours(x), theirs(x))
    assert any("norms" in note for note in notes)


def test_w_l_and_w_r_may_be_tensors_by_themselves_and_a_config_beside_says_whether_blocks_are_residual(tmp_path):
    theirs, x = Stacked(1, False, True), torch.rand(5, D)
    left, right = (half.clone() for half in theirs.blocks[0].weight.detach().chunk(2))
    state = {"embed.weight": theirs.embed.weight.detach(), "head.weight": theirs.head.weight.detach()}
    save_file(state | {"blocks.0.w_l": left, "blocks.0.w_r": right}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"residual": True, "n_layer": 1}))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        ours, notes = load_classifier(source)
        torch.testing.assert_close(ours(x), theirs(x))
        assert notes == []


@pytest.mark.parametrize(("bias", "residual"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", [Stacked, Apart])
def test_the_table_rebuilds_the_logits_with_their_constants(tmp_path, kind, bias, residual):
    theirs, x = kind(1, bias, residual).double(), torch.rand(5, D, dtype=torch.float64)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    table = decompose(tmp_path / "w.pt", residual)
    for label, rows in table.groupby("label"):
        read = torch.tensor(np.stack(rows["eigenvector"])) @ x.T + torch.tensor(rows["constant"].tolist())[:, None]
        logit = (torch.tensor(rows["eigenvalue"].tolist())[:, None] * read**2).sum(0)
        torch.testing.assert_close(logit, theirs(x)[:, label].detach(), rtol=1e-6, atol=1e-8)


def without(name: str):
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"norm.weight": torch.ones(H)}, "more than products of linear maps .norm.weight"),
        (lambda state: state | {"embed.bias": torch.ones(H)}, "a bias of the embedding"),
        (lambda state: state | {"blocks.0.p.weight": torch.ones(H, H)}, "more than products of linear maps"),
        (without("head.weight"), "is no bilinear classifier: expected embed.weight"),
        (without("embed.weight"), "is no bilinear classifier: expected embed.weight"),
        (without("blocks.0.weight"), "is no bilinear classifier"),
        (lambda state: state | {"blocks.2.weight": torch.ones(2 * H, H)}, "has no weight of block 1"),
        (lambda state: state | {"blocks.0.weight": torch.ones(H, H)}, r"block 0: expected \(12, 6\).*got \(6, 6\)"),
        (lambda state: without("blocks.0.weight")(state) | {"blocks.0.w_l": torch.ones(H, H)}, "two maps of which"),
        (lambda state: state | {"head.weight": torch.ones(C, H + 1)}, r"the head: expected \(3, 6\)"),
    ],
)
def test_what_is_no_bilinear_classifier_is_refused_in_a_line(tmp_path, change, said):
    torch.save(change(Stacked(1, False, False).state_dict()), tmp_path / "w.pt")
    with pytest.raises(InputError, match=said) as error:
        load_classifier(tmp_path / "w.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("config", "said"), [({"rms_norm": True}, "rms_norm=True"), ({"gate": "relu"}, "gate=relu")])
def test_norms_and_gates_that_a_config_names_are_refused(tmp_path, config, said):
    state = Stacked(1, False, False).state_dict()
    torch.save({"state_dict": state, "config": config}, tmp_path / "in.pt")
    torch.save(state, tmp_path / "beside.pt")
    with pytest.raises(InputError, match=said):
        load_classifier(tmp_path / "in.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        load_classifier(tmp_path / "beside.pt")
