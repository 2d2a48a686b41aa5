"""The command that compares two classifiers finds one shared with itself, and refuses what cannot be compared."""

import pandas as pd
import pytest
import torch

from stages.bilinear import compare as command
from stages.bilinear.compare import compare_eigenvectors, compare_functions, load_pair
from stages.bilinear.decomposition import decompose_bilinear_model, input_basis
from stages.bilinear.model import BilinearImageClassifier
from stages.bilinear.similarity import Gaussian
from stages.common.stage import InputError


@pytest.fixture
def files(tmp_path):
    def write(seed: int = 0, d_input: int = 16, classes: int = 3, n_layer: int = 1) -> str:
        path = tmp_path / f"{seed}-{d_input}-{classes}-{n_layer}.pt"
        torch.save(BilinearImageClassifier(d_input, 8, classes, n_layer, False, False, seed).state_dict(), path)
        return path

    return write


def test_a_network_is_itself_in_every_row(files):
    a, b = load_pair((files(), files()))
    functions = compare_functions(a, b, Gaussian(torch.zeros(16, dtype=torch.float64)))
    assert functions["label"].tolist() == ["0", "1", "2", "all"]
    assert functions["cosine"].tolist() == pytest.approx([1] * 4)
    artifacts = [decompose_bilinear_model(model, input_basis(model)) for model in (a, b)]
    table = compare_eigenvectors(*artifacts, rank=4)
    assert table["cosine"].tolist() == pytest.approx([1] * 12)
    assert (table["index_a"] == table["partner"]).all()
    assert table["shared"].all()


def test_of_networks_of_other_seeds_about_as_many_are_shared_as_of_other_classes(files):
    artifacts = [decompose_bilinear_model(m, input_basis(m)) for m in load_pair((files(0), files(1)))]
    assert compare_eigenvectors(*artifacts, rank=4)["shared"].mean() < 0.4


def test_the_command_prints_and_writes_table_and_picture(files, tmp_path, monkeypatch, capsys):
    arguments = ["--rank", "3", "--output", str(tmp_path / "t.csv"), "--picture", str(tmp_path / "p.png")]
    monkeypatch.setattr("sys.argv", ["compare", str(files(0)), str(files(1)), *arguments])
    command.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1
    assert len(pd.read_csv(tmp_path / "t.csv")) == 9
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_compared_is_refused(files):
    for other, said in (
        (files(0, d_input=25), "16 pixels.* 25"),
        (files(0, classes=4), "3 classes.* 4"),
        (files(0, n_layer=2), "1 bilinear layer, got 2"),
    ):
        with pytest.raises(InputError, match=said):
            load_pair((files(), other))
