"""What gpu.sh measures beside the benchmarks: the pipeline's numbers on this device, and a ViT-S/14.

python tests/tools/on_card.py smoke [stage ...]     # the smoke scale against tests/expected/smoke.json, by default all of it
python tests/tools/on_card.py vit [pixels]          # features and one episode of VPT-deep, random weights, by default 224 pixels
Each prints one line for the table. The device is WEIGHTLENS_DEVICE's, by default a GPU if there is one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import timm
import torch
from reproduction import EXPECTED, FIXED, differences, metrics, smoke_clone

from stages.common.backbone import Backbone, BackboneConfig
from stages.common.runtime import pick_device
from stages.vit_memory.few_shot import Examples, Training, predict, train_through
from stages.vit_memory.models import VPTDeep

SHOWN = 10  # differences
WAY, SHOT, QUERIES, STEPS, PROMPTS = 10, 5, 200, 20, 10


def smoke(stages: list[str]) -> str:
    """Run the smoke scale on this device; return how many of its metrics are within the tolerance of the committed ones."""
    expected = json.loads(EXPECTED.read_text())["metrics"]
    with tempfile.TemporaryDirectory() as folder:
        project = smoke_clone(Path(folder, "clone"))
        environment = os.environ | FIXED | {"WEIGHTLENS_DEVICE": str(pick_device())}
        done = subprocess.run(
            ["dvc", "repro", "--no-run-cache", *stages], cwd=project, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"dvc repro failed: {done.stderr[-2000:]}")
        got = metrics(project)
    if stages:  # what was not asked for is not missed
        expected = {key: known for key, known in expected.items() if key in got}
    lines = differences(got, expected)
    if lines:
        print("\n".join(lines[:SHOWN]), file=sys.stderr)
    return f"{len(expected) - len(lines)} of {len(expected)} numbers within tolerance of the processor's"


def waited(device: torch.device) -> float:
    """Return the time once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def vit(pixels: int) -> str:
    """Return how fast features of a ViT-S/14 and one episode of VPT-deep are; weights are random, which takes as long."""
    device = pick_device()
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=pixels).to(device)
    backbone = Backbone(model, BackboneConfig("vit_small_patch14_dinov2", False, pixels, None), "", {})
    random = torch.Generator().manual_seed(0)
    n = QUERIES if pixels >= 224 else 10
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=random, dtype=torch.uint8).to(device)
    backbone.features(images[:10])
    start = waited(device)
    backbone.features(images)
    extracted = waited(device) - start
    labels = (torch.arange(WAY * SHOT) % WAY).to(device)
    support = Examples(images[torch.arange(WAY * SHOT) % n], torch.zeros(WAY * SHOT, 1), None, labels, WAY, 0)
    training = Training(backbone, PROMPTS, 16.0, STEPS if n == QUERIES else 1, 20, 0.03)
    start = waited(device)
    trained = train_through(lambda vit: VPTDeep(vit, num_classes=WAY, num_prompts=PROMPTS), support, training)
    predict(trained, backbone, images)
    episode = waited(device) - start
    return f"{n / extracted:.0f} images a second; an episode of VPT-deep {episode:.1f} s"


if __name__ == "__main__":
    if sys.argv[1:2] not in (["smoke"], ["vit"]):
        sys.exit(__doc__)
    words = sys.argv[2:]
    print(smoke(words) if sys.argv[1] == "smoke" else vit(int(words[0]) if words else 224))
