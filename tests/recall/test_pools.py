"""Pools of images share none."""

from dataclasses import replace

import torch
from tiny_vit import TRAIN

from stages.recall.pools import POOLS, pool


def test_pools_are_disjoint_and_together_all_images():
    numbered = replace(TRAIN, images=torch.arange(len(TRAIN)))
    parts = {name: pool(numbered, name) for name in POOLS}
    assert torch.equal(torch.cat([part.images for part in parts.values()]).sort().values, numbered.images)
    assert all(len(part) in (100, 101) for part in parts.values())
    assert all(torch.equal(part.labels, TRAIN.labels[part.images]) for part in parts.values())
