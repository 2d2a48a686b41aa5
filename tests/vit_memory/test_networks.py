"""Networks of timm as sources of features: what is read of them, and files that do not fit."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from stages.common.backbone import Backbone, BackboneConfig
from stages.common.stage import InputError
from stages.vit_memory import extract_features
from stages.vit_memory.extract_features import extract
from stages.vit_memory.networks import Network, build_network, check_layer, fit_size, load_published

CNN, VIT = "resnet10t", "test_vit"
CPU = torch.device("cpu")


def config(name: str, size: int) -> BackboneConfig:
    return BackboneConfig(name, False, size, None, (0.498,) * 3, (0.502,) * 3)


def images(n: int = 6, size: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_head_of_a_cnn_is_what_timm_calls_its_pre_logits():
    model = build_network(CNN)
    network = Network(model, config(CNN, 64), "", {}, "head")
    x = network.prepare(images())
    assert x.shape == (6, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        places = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    features = network.features(images(), batch_size=4)
    assert features.shape == (6, 1, model.num_features)
    torch.testing.assert_close(features[:, 0], expected, rtol=1e-4, atol=1e-5)
    stage = Network(model, config(CNN, 64), "", {}, 2).features(images())
    torch.testing.assert_close(stage[:, 0], places.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_the_last_block_of_a_vit_is_what_every_backbone_gives():
    model = build_network(VIT)
    fit_size(model, config(VIT, 32))
    last, backbone = Network(model, config(VIT, 32), "", {}, -1), Backbone(model, config(VIT, 32), "", {})
    torch.testing.assert_close(last.features(images()), backbone.features(images()))
    assert not torch.allclose(Network(model, config(VIT, 32), "", {}, 0).features(images()), last.features(images()))


@pytest.mark.parametrize("name", [CNN, VIT])
def test_weights_of_a_file_are_timms_own_and_its_classifier_is_left_out(name, tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model(name, num_classes=7).eval()
    save_file(
        {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in whole.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    network = build_network(name).eval()
    load_published(network, tmp_path / "w.safetensors", name)
    whole.load_state_dict(
        {k: t.half().to(t.dtype) if t.is_floating_point() else t for k, t in whole.state_dict().items()}
    )
    size = network.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(network(x), whole.forward_head(whole.forward_features(x), pre_logits=True))


def test_a_file_that_does_not_fit_is_refused_by_the_names_of_tensors(tmp_path):
    state = {k: t for k, t in build_network(CNN).state_dict().items() if t.is_floating_point()}
    path = tmp_path / "w.safetensors"
    for change, message in (
        ({"conv1.0.weight": torch.zeros(5, 3, 3, 3)}, r"conv1.0.weight: expected .*, got \(5, 3, 3, 3\)"),
        ({"layer9.weight": torch.zeros(2)}, r"1 tensors more than timm's 'resnet10t': layer9.weight"),
    ):
        save_file(state | change, path)
        with pytest.raises(InputError, match=message):
            load_published(build_network(CNN), path, CNN)
    save_file({k: t for k, t in state.items() if k != "bn1.weight"}, path)
    with pytest.raises(InputError, match=r"has no bn1.weight .* of timm's 'resnet10t'"):
        load_published(build_network(CNN), path, CNN)


def test_sizes_layers_and_names_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="reads no images of 33 pixels"):
        fit_size(build_network(VIT), config(VIT, 33))
    with pytest.raises(InputError, match="expected 'head' or -5 to 4, got 5"):
        check_layer(build_network(CNN), 5, CNN)
    check_layer(build_network(CNN), -5, CNN)
    with pytest.raises(InputError, match="timm has no model 'resnet11'"):
        build_network("resnet11")


def test_a_run_that_was_killed_goes_on_and_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """Pieces that are there are not computed again, and all bytes are those of an uninterrupted run."""
    monkeypatch.setattr(extract_features, "PIECE", 4)
    network, seen = Network(build_network(CNN), config(CNN, 32), "", {}, "head"), []

    class Watched:
        def __init__(self, last: int | None) -> None:
            self.last = last

        def features(self, part: torch.Tensor) -> torch.Tensor:
            if self.last is not None and len(seen) >= self.last:
                raise KeyboardInterrupt
            seen.append(len(part))
            return network.features(part)

    monkeypatch.setattr("os.cpu_count", lambda: 1)
    whole = extract({"a": (network, images(10)), "b": (network, images(3))}, tmp_path / "whole", CPU, "")
    with pytest.raises(KeyboardInterrupt):
        extract({"a": (Watched(2), images(10)), "b": (Watched(2), images(3))}, tmp_path / "cut", CPU, "")
    assert seen == [4, 4]
    resumed = extract({"a": (Watched(None), images(10)), "b": (Watched(None), images(3))}, tmp_path / "cut", CPU, "")
    assert seen == [4, 4, 2, 3]
    assert all(torch.equal(resumed[name], whole[name]) for name in ("a", "b"))
    assert torch.equal(whole["a"], torch.cat([network.features(part) for part in images(10).split(4)]))
