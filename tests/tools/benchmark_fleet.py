"""Seconds for fine-tunes that train together, against timm and torch.optim one after the other: the same networks.

python tests/tools/benchmark_fleet.py [stack ...]     # fine-tunes that train together, by default 1 5 20
Processor seconds, or on a GPU (WEIGHTLENS_DEVICE=cuda) those that pass.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from timing import clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.common.backbone import BackboneConfig, build_vit, save_backbone
from stages.common.mae import MaskedAutoencoder
from stages.common.runtime import pick_device, pin_threads
from stages.recall.fleet import BETAS, train_stack
from stages.recall.functional_vit import load_base
from stages.recall.objective import Objective

STEPS, IMAGES, RATIO, RATE = 20, 64, 0.75, 1e-3
ROUNDS = 3  # of which the fastest counts


def train_alone(vit: nn.Module, head: nn.Linear, images: Tensor, labels: Tensor, noise: Tensor) -> nn.Module:
    """Fine-tune one network behind its frozen head as PyTorch's users do; images [t, b, 3, 16, 16], noise [t, b, p]."""
    optimizer = torch.optim.Adam([p for p in vit.parameters() if p.requires_grad], RATE, BETAS, fused=True)
    for x, y, masks in zip(images, labels, noise, strict=True):
        tokens = vit.patch_embed(x) + vit.pos_embed[:, 1:]
        seen = masks.argsort(1)[:, : round(tokens.shape[1] * (1 - RATIO)), None].expand(-1, -1, tokens.shape[2])
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        out = vit.norm(vit.blocks(torch.cat([cls, tokens.gather(1, seen)], 1)))
        loss = cross_entropy(head(out[:, 0]), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return vit


def main() -> None:
    pin_threads()
    device = pick_device()
    torch.manual_seed(0)
    path, shape = (
        Path(".work/benchmark_fleet.safetensors"),
        {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )
    config = BackboneConfig("vit_tiny_patch16_224", False, 16, shape | {"mlp_ratio": 2})
    vit, head = build_vit(config), nn.Linear(32, 10)
    decoder = {k: v for k, v in MaskedAutoencoder(vit).state_dict().items() if not k.startswith("vit.")}
    save_backbone(path, vit, config, decoder | {f"head.{k}": v for k, v in head.state_dict().items()})
    base = load_base(path, device)
    vit, head = vit.to(device), head.to(device)
    path.unlink()
    objective, m = Objective(base, "labels", RATIO), max(stacks := [int(word) for word in sys.argv[1:]] or [1, 5, 20])
    images = torch.randint(256, (m, STEPS, IMAGES, 3, 16, 16), dtype=torch.uint8).to(device)
    labels = torch.randint(10, (m, STEPS, IMAGES)).to(device)
    noise = torch.rand(m, STEPS, IMAGES, base.patches).to(device)
    patches = torch.stack([torch.stack([base.patchify(x) for x in own]) for own in images])
    x = (images.float() / 255 - 0.5) / 0.25
    head.load_state_dict({k.removeprefix("head."): v for k, v in objective.frozen.items() if k.startswith("head.")})
    head.requires_grad_(False)

    def alone(i: int) -> nn.Module:
        vit.load_state_dict(dict(base.encoder))
        vit.pos_embed.requires_grad_(False)
        return train_alone(vit, head, x[i], labels[i], noise[i])

    def together(stack: int) -> Tensor:
        frozen = {name: weight.expand(stack, *weight.shape) for name, weight in objective.frozen.items()}
        first, rates, steps = objective.start.expand(stack, -1), torch.full((stack,), RATE), torch.full((stack,), STEPS)
        return train_stack(
            objective.loss,
            first,
            frozen,
            lambda t: (patches[:stack, t], labels[:stack, t], noise[:stack, t]),
            rates,
            steps,
        )

    for stack in stacks:
        seconds = {"alone": float("inf"), "together": float("inf")}
        for _ in range(ROUNDS):  # in turn, so that a busy machine slows both
            start = clock(device)
            last = [{k: w.clone() for k, w in alone(i).state_dict().items()} for i in range(stack)]
            middle = clock(device)
            vectors = together(stack)
            seconds["alone"] = min(seconds["alone"], middle - start)
            seconds["together"] = min(seconds["together"], clock(device) - middle)
        worst = max(
            (weight - last[i][name]).abs().max().item()
            for i in range(stack)
            for name, weight in objective.layout.unflatten(vectors[i]).items()
        )
        ratio = seconds["alone"] / seconds["together"]
        each = ", ".join(f"{name} {1e3 * value / stack / STEPS:.2f} ms a step" for name, value in seconds.items())
        print(f"stack of {stack}: {each}; {ratio:.2f} times as fast; largest difference of weights {worst:.0e}")


if __name__ == "__main__":
    main()
