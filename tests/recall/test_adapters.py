"""What is read of an adapter is its product alone, and a stack of adapters trains as each alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_vit import autoencoder, base_of

from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.adapter_files import load_adapter, save_adapter
from stages.recall.adapters import MATRICES, AdapterSpace, canonical, check_ranks, dense, forms_of, merged_adapter

BASE = base_of(autoencoder())
LAYOUT = Layout.of(BASE.trained)
QKV = "blocks.0.attn.qkv.weight"


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_canonical_form_depends_on_the_product_alone(rank):
    b, a, g = draw(48, rank), draw(rank, 16, seed=1), draw(rank, rank, seed=2)
    form, other = canonical(b, a, 0.5), canonical(b @ g, np.linalg.inv(g) @ a, 0.5)
    assert np.allclose(form.change, 0.5 * b @ a, atol=1e-12)
    for name in ("u", "s", "v"):
        assert np.allclose(getattr(form, name), getattr(other, name), atol=1e-9), name
    assert np.allclose(form.s, np.linalg.svd(0.5 * b @ a, compute_uv=False)[:rank])
    assert np.allclose(form.u.T @ form.u, np.eye(rank)) and np.allclose(form.v.T @ form.v, np.eye(rank))


def test_ranks_that_add_nothing_are_left_out():
    b, a = draw(48, 2), draw(2, 16, seed=1)
    wide = canonical(np.concatenate([b, b], 1), np.concatenate([a, a]), 0.5)
    assert len(wide.s) == 2 and np.allclose(wide.change, b @ a)
    assert len(canonical(np.zeros((48, 4)), draw(4, 16)).s) == 0


def test_an_adapter_starts_at_the_base_and_ranks_that_it_lacks_never_move():
    space = AdapterSpace(LAYOUT, 6)
    start = space.start(torch.Generator().manual_seed(0), 2, MATRICES[:1])
    assert not space.change(start, torch.tensor(2.0)).any()
    parts = space.layout.unflatten(start)
    assert {n for n, w in parts.items() if w.any()} == {f"A.blocks.{i}.attn.qkv.weight" for i in (0, 1)}
    assert not parts[f"A.{QKV}"][2:].any() and parts[f"A.{QKV}"][:2].all()
    target = torch.randn(LAYOUT.size)
    vector = start.clone().requires_grad_()
    for _ in range(3):
        ((space.change(vector, torch.tensor(2.0)) - target) ** 2).sum().backward()
        with torch.no_grad():
            vector -= 0.01 * vector.grad
        vector.grad = None
    moved = space.layout.unflatten(vector.detach())
    assert moved[f"B.{QKV}"][:, :2].all() and not moved[f"B.{QKV}"][:, 2:].any()
    assert not moved["B.blocks.0.mlp.fc1.weight"].any()
    change = LAYOUT.unflatten(space.change(vector.detach(), torch.tensor(2.0)))
    expected = 2.0 * moved[f"B.{QKV}"] @ moved[f"A.{QKV}"]
    torch.testing.assert_close(change[QKV], expected)
    assert torch.linalg.matrix_rank(change[QKV]) == 2
    alone = space.change(vector.detach(), torch.tensor(2.0)).numpy()  # merged into weights that are zeros
    assert merged_adapter(alone, alone, LAYOUT) is not None


def test_a_change_of_all_ranks_or_of_other_tensors_is_no_adapter():
    change = {name: np.zeros(shape) for name, shape in LAYOUT.shapes.items()}
    low, full = draw(48, 8) @ draw(8, 16, seed=1), draw(48, 16)

    def vector(**tensors: np.ndarray) -> np.ndarray:
        named = {name.replace("__", "."): value for name, value in tensors.items()}
        return LAYOUT.flatten({k: torch.from_numpy(v) for k, v in (change | named).items()}).numpy()

    def forms(vector: np.ndarray) -> dict | None:
        return merged_adapter(vector, vector, LAYOUT)

    assert forms(vector(blocks__0__attn__qkv__weight=low)) is not None
    assert forms(vector(blocks__0__attn__qkv__weight=full)) is None
    assert forms(vector(blocks__0__attn__qkv__weight=low, norm__bias=np.ones(16))) is None
    assert forms(vector()) is None


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_an_adapter_is_found_again_in_merged_weights_that_were_saved_in_half_precision(half):
    low = draw(48, 4) @ draw(4, 16, seed=1)
    base = {name: torch.from_numpy(draw(*shape, seed=2)) for name, shape in LAYOUT.shapes.items()}
    exact = LAYOUT.flatten({k: torch.from_numpy(low) if k == QKV else torch.zeros_like(w) for k, w in base.items()})
    start = LAYOUT.flatten(base)
    saved = torch.where(exact != 0, (start + exact).to(half).to(start), start)
    rough = (saved - start).numpy()
    assert np.linalg.matrix_rank(rough[LAYOUT.slices[QKV]].reshape(48, 16)) == 16
    (form,) = merged_adapter(rough, saved.numpy(), LAYOUT).values()
    assert len(form.s) == 4
    assert np.linalg.norm(form.change - low) < np.linalg.norm(rough - exact.numpy())
    full = draw(48, 16, seed=3)
    of_all_ranks = rough.copy()
    of_all_ranks[LAYOUT.slices[QKV]] = full.ravel()
    assert merged_adapter(of_all_ranks, (start.numpy() + of_all_ranks), LAYOUT) is None


def adapters(rank: int = 2) -> dict:
    return {
        QKV: canonical(draw(48, rank), draw(rank, 16, seed=1)),
        "blocks.1.mlp.fc2.weight": canonical(draw(16, 1), draw(1, 32)),
    }


def changed(rank: int, *kinds: str, seed: int = 0) -> np.ndarray:
    """Return the change by an adapter of this rank on matrices of these kinds."""
    forms = {
        name: canonical(draw(shape[0], rank, seed=seed + i), draw(rank, shape[1], seed=seed + i + 50))
        for i, (name, shape) in enumerate(LAYOUT.shapes.items())
        if name.endswith(tuple(f"{kind}.weight" for kind in kinds))
    }
    return dense(forms, LAYOUT)


@pytest.mark.parametrize("rank", [1, 3, 5, 40])
def test_ranks_of_one_adapter_agree_and_of_a_sum_of_two_on_other_matrices_do_not(rank):
    one, other = changed(rank, *MATRICES[:2]), changed(2, *MATRICES[1:], seed=100)
    check_ranks("one", forms_of(one, LAYOUT))  # of rank 40 all matrices have all the ranks that they can have
    with pytest.raises(InputError, match=r"two: its change of .* has rank .*: it is a mixture of adapters"):
        check_ranks("two", forms_of((one + other) / 2, LAYOUT))


def test_adapters_of_queries_and_values_apart_have_the_rank_of_each():
    proj = canonical(draw(16, 3), draw(3, 16, seed=1))
    apart = np.zeros((48, 6))
    apart[:16, :3], apart[32:, 3:] = draw(16, 3, seed=2), draw(16, 3, seed=3)
    forms = {QKV: canonical(apart, draw(6, 16, seed=4)), QKV.replace("qkv", "proj"): proj}
    check_ranks("one", forms)
    together = canonical(
        draw(48, 6, seed=5), draw(6, 16, seed=6)
    )  # its thirds share directions: one adapter of rank 6, or a sum
    with pytest.raises(InputError, match="it is a mixture of adapters"):
        check_ranks("two", forms | {QKV: together})


def test_a_saved_adapter_is_read_as_the_same_change_from_either_file(tmp_path):
    save_adapter(tmp_path / "a", adapters())
    read, notes = load_adapter(tmp_path / "a", LAYOUT)
    assert notes == [] and list(read) == list(adapters())
    assert np.allclose(dense(read, LAYOUT), dense(adapters(), LAYOUT), atol=1e-6)
    weights = load_file(tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in weights.items()}, tmp_path / "a/adapter_model.bin")
    again, _ = load_adapter(tmp_path / "a", LAYOUT)
    assert np.array_equal(dense(read, LAYOUT), dense(again, LAYOUT))


class Folder:
    """An adapter on disk that can be altered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        save_adapter(path, adapters())
        self.config = json.loads((path / "adapter_config.json").read_text())
        self.weights = load_file(path / "adapter_model.safetensors")

    def read(self) -> np.ndarray:
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.weights, self.path / "adapter_model.safetensors")
        return dense(load_adapter(self.path, LAYOUT)[0], LAYOUT)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "adapter")


def test_the_scale_is_alpha_over_rank_or_its_root_and_patterns_are_of_single_modules(folder):
    plain = folder.read()
    where, other = LAYOUT.slices[QKV], LAYOUT.slices["blocks.1.mlp.fc2.weight"]
    folder.config["lora_alpha"] = 6
    assert np.allclose(folder.read(), 3 * plain, atol=1e-5)
    folder.config["use_rslora"] = True
    assert np.allclose(folder.read(), 6 / 2**0.5 * plain, atol=1e-5)
    folder.config |= {"use_rslora": False, "alpha_pattern": {"blocks.1.mlp.fc2": 4}}
    read = folder.read()
    assert np.allclose(read[where], 3 * plain[where], atol=1e-5) and np.allclose(
        read[other], 2 * plain[other], atol=1e-5
    )
    folder.config |= {"alpha_pattern": {}, "rank_pattern": {r"blocks.\d.mlp.fc2": 1}}
    key = "base_model.model.blocks.1.mlp.fc2.lora_"
    folder.weights |= {
        f"{key}A.weight": folder.weights[f"{key}A.weight"][:1].copy(),
        f"{key}B.weight": folder.weights[f"{key}B.weight"][:, :1].copy(),
    }
    assert np.allclose(folder.read()[other], 6 * plain[other], atol=1e-5)


def test_refactored_factors_are_read_as_the_same_change(folder):
    plain, g = folder.read(), draw(2, 2, seed=5).astype(np.float32)
    for module in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
        a, b = (f"base_model.model.{module}.lora_{factor}.weight" for factor in "AB")
        folder.weights |= {a: np.linalg.inv(g) @ folder.weights[a], b: folder.weights[b] @ g}
    assert np.allclose(folder.read(), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda f: f.config.update(peft_type="LOHA"), "peft_type: expected LORA, got LOHA"),
        (lambda f: f.config.update(use_dora=True), "use_dora: expected False, got True"),
        (lambda f: f.config.update(bias="all"), "bias: expected none, got all"),
        (
            lambda f: f.config.update(init_lora_weights="pissa_niter_16"),
            "'?pissa_niter_16'? takes its first factors out of",
        ),
        (lambda f: f.config.pop("r"), "expected numbers r and lora_alpha"),
        (lambda f: f.config.update(r=3), r"expected lora_A \(3, 16\) and lora_B \(48, 3\), got \(2, 16\)"),
        (
            lambda f: f.weights.pop("base_model.model.blocks.0.attn.qkv.lora_B.weight"),
            "has no lora_B: save both factors",
        ),
        (lambda f: f.weights.update({"x.lora_A.weight": np.ones((2, 3), "f")}), "the base has no module x"),
        (lambda f: f.weights.update({"x.lora_magnitude_vector": np.ones(3, "f")}), "is no factor of plain LoRA"),
        (
            lambda f: [w.fill(0) for n, w in f.weights.items() if "lora_B" in n],
            "changes nothing: its factors B are zeros",
        ),
        (lambda f: [w.fill(np.nan) for w in f.weights.values()], "not finite"),
        (lambda f: f.weights.clear() or f.weights.update({"a.weight": np.ones(3, "f")}), "has no lora_A and lora_B"),
    ],
)
def test_what_is_no_plain_adapter_of_the_base_is_refused_on_one_line(folder, alter, message):
    alter(folder)
    with pytest.raises(InputError, match=message) as refusal:
        folder.read()
    assert "\n" not in str(refusal.value)


def test_a_folder_without_an_adapter_or_with_an_odd_config_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"is no adapter: expected a folder with adapter_config\.json"):
        load_adapter(tmp_path, LAYOUT)
    (folder.path / "adapter_config.json").write_text("[1")
    with pytest.raises(InputError, match="is no config of peft"):
        load_adapter(folder.path, LAYOUT)


def test_what_is_saved_beside_an_adapter_is_named(folder):
    folder.weights["base_model.model.head.weight"] = np.ones((8, 16), np.float32)
    folder.read()
    _, notes = load_adapter(folder.path, LAYOUT)
    assert notes == ["not read: base_model.model.head.weight, which is saved beside the adapter"]
