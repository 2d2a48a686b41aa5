"""Features: which images they are of."""

import torch

from stages.common.images import ImageSet
from stages.vit_memory.extract_features import with_random_weights
from stages.vit_memory.features import FeatureSets, Labelled, first


def test_the_first_images_are_taken_or_all():
    images = ImageSet(torch.arange(6, dtype=torch.uint8)[:, None, None, None], torch.arange(6), ["a"] * 6)
    assert first(images, 4).labels.tolist() == first(images, 4).images.flatten().tolist() == [0, 1, 2, 3]
    assert first(images, 9).labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_labels_of_the_classes_to_be_learnt_never_enter_the_coordinates():
    """Base images of new classes give their covariance within classes; those of the data set's own no more than centre and scale."""
    x, labels = torch.randn(300, 5) * torch.tensor([9.0, 1, 1, 1, 1]), torch.arange(300) % 3
    one = Labelled(x[:, None], labels)

    def sets(labels: torch.Tensor, new: bool) -> FeatureSets:
        base = Labelled(x[:, None], labels)
        return FeatureSets(one, one, one, one, base, torch.zeros(300, 1, 2, 2), new, ["a", "b", "c"], True)

    shuffled = labels[torch.randperm(300)]
    own, other = sets(labels, False).whitening(x)(x), sets(shuffled, False).whitening(x)(x)
    ratio = own[:, 0].std() / own[:, 1].std()
    torch.testing.assert_close(ratio, x[:, 0].std() / x[:, 1].std(), rtol=1e-4, atol=0)  # no direction is favoured
    assert torch.equal(own, other)
    within = sets(labels, True).whitening(x, 0.0)(x)
    torch.testing.assert_close(within[:, 0].std(), within[:, 1].std(), rtol=0.1, atol=0)


def test_random_weights_are_of_the_same_shape_and_know_nothing_of_the_backbone():
    import timm

    from stages.common.backbone import Backbone, BackboneConfig

    shape = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **shape)
    config = BackboneConfig("small", False, 16, None)
    with torch.no_grad():
        for p in vit.parameters():
            p += 1
    kept = {name: p.clone() for name, p in vit.named_parameters()}
    one, same, other = (with_random_weights(Backbone(vit, config, "", {}), seed) for seed in (0, 0, 1))
    assert all(torch.equal(p, kept[name]) for name, p in vit.named_parameters())
    for name, p in one.vit.named_parameters():
        assert torch.equal(p, same.vit.get_parameter(name))
        assert not torch.allclose(p, kept[name])
        if p.ndim == 2:
            assert not torch.equal(p, other.vit.get_parameter(name))
    assert one.config == config
