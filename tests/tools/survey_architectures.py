"""Which architectures the tracer follows: torchvision's classifiers, the smallest of each of timm's families, beginners' networks.

python tests/tools/survey_architectures.py torchvision|timm|classifiers [name ...] [--results results.jsonl]

Each network gets random weights, of norms too, is traced (each step compared with the module's own), and the symmetry that is derived
is tried out by relabelling every group in float64; weights of a network that rounding alone moves are made smaller first. Prints
followed, refused with the reason, or wrong; then the reasons by how many networks each blocks. With --results, what is there already is
not run again, so a survey that was stopped goes on.
"""

import argparse
import contextlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from stages.common.runtime import pin_threads
from stages.common.stage import InputError
from stages.weightnet.tracing.program import ROUNDING, Program, Weights, float_state, randomise, run_stack, trace
from stages.weightnet.tracing.symmetry import derive_symmetry, symmetry_error

SIDES = (64, 96, 128, 224, 256, 384)  # of images: the first that a network runs on
# the smallest network of each module of timm 1.0.31, by its number of weights, and some of other kinds
SMALLEST = (
    *("beit_base_patch16_224", "halonet_h1", "test_byobnet", "cait_s24_224", "coat_tiny", "convit_tiny"),
    *("convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s"),
    *("cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla34"),
    *("dpn48b", "edgenext_x_small", "efficientformer_l1", "efficientformerv2_s0", "test_efficientnet"),
    *("efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0"),
    *("fastvit_t8", "focalnet_tiny_srf", "gcvit_xtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b"),
    *("hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18", "iformer_t", "inception_next_atto"),
    *("inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128", "lowformer_b0"),
    *("test_mambaout", "test_coatnet", "caformer_s18", "gmixer_12_224", "mobilenetv3_small_050"),
    *("mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_gap", "nasnetalarge"),
    *("nest_tiny", "nextvit_small", "test_nfnet", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m"),
    *("rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "test_resnet"),
    *("resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1"),
    *("skresnet18", "starnet_s1", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"),
    *("swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small"),
    *("vgg11", "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos"),
    *("samvit_base_patch16_224", "vitamin_small_224", "volo_d1_224", "vovnet39a", "legacy_xception"),
    *("xception41p", "xcit_nano_12_p8_224", "deit_tiny_distilled_patch16_224", "gmlp_s16_224", "resmlp_12_224"),
    *("mixer_s32_224", "poolformer_s12", "ecaresnet26t", "mobilenetv2_035", "mnasnet_small"),
)
LAST_BITS = 1e-15  # of numbers in float64
CALMER = 0.8  # what the kernels of a chaotic network are multiplied by, again and again
FIXED = {"inception_v3": 96, "maxvit_t": 224}


@dataclass(frozen=True)
class Finding:
    """What became of a network: followed, refused or wrong, and why; free: of its hidden neurons, how many may be relabelled."""

    name: str
    verdict: str
    reason: str = ""
    weights: int = 0
    groups: int = 0
    free: int = 0
    hidden: int = 0
    error: float = 0.0
    seconds: float = 0.0


def torchvision_network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return one of torchvision's classifiers, untrained, and the shape of small images for it."""
    from torchvision import models

    side = FIXED.get(name, 64)
    if name.startswith("vit"):
        side = 56 if name.endswith("14") else 64
        return models.get_model(name, weights=None, image_size=side), (3, side, side)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, **options), (3, side, side)


def timm_network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return one of timm's networks, untrained, and the shape of the smallest images of a few that it runs on."""
    import timm

    config = timm.get_pretrained_cfg(name)
    own = config.input_size if config else (3, 224, 224)
    for side in [side for side in SIDES if side < own[-1]]:
        with contextlib.suppress(Exception):  # others' code: whatever it raises, this size is not for it
            network = timm.create_model(name, img_size=side)
            network.eval()(torch.zeros(1, own[0], side, side))
            return network, (own[0], side, side)
        if config and not config.fixed_input_size:
            with contextlib.suppress(Exception):
                network = timm.create_model(name)
                network.eval()(torch.zeros(1, own[0], side, side))
                return network, (own[0], side, side)
    return timm.create_model(name), tuple(own)


def beginners_network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return one of the tests' classifiers."""
    from weightnet.classifiers import CLASSIFIERS
    from weightnet.modern import MODERN

    return (CLASSIFIERS | MODERN)[name](), (3, 16, 16)


def names_of(survey: str) -> list[str]:
    """Return the names of the networks of a survey."""
    if survey == "torchvision":
        from torchvision import models

        return models.list_models(models)
    if survey == "timm":
        return list(SMALLEST)
    from weightnet.classifiers import CLASSIFIERS
    from weightnet.modern import MODERN

    return [*CLASSIFIERS, *MODERN]


def examine(name: str, build: Callable[[str], tuple[nn.Module, tuple[int, ...]]]) -> Finding:
    """Return what becomes of a network of random weights."""
    start = time.process_time()

    def found(verdict: str, reason: str = "", **more: Any) -> Finding:
        return Finding(name, verdict, reason, size, seconds=round(time.process_time() - start, 2), **more)

    size = 0
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            model, shape = build(name)
            size = sum(tensor.numel() for tensor in model.parameters())
            program = trace(model, shape)
            symmetry = derive_symmetry(program)
            state = float_state(model.double())
            randomise(state, torch.Generator().manual_seed(1))
            weights = {name: state[name].detach()[None] for name in program.layout.shapes}
            error = symmetry_error(program, symmetry, weights, torch.Generator().manual_seed(2))
            while not error < ROUNDING and not sensitivity(program, weights) < ROUNDING:
                for kernel in (weight for weight in weights.values() if weight.dim() > 2):
                    kernel.mul_(CALMER)
                error = symmetry_error(program, symmetry, weights, torch.Generator().manual_seed(2))
    except InputError as refusal:
        return found("refused", str(refusal))
    free = sum(symmetry.sizes[group] for group in symmetry.free)
    hidden = sum(symmetry.sizes[group] for group in symmetry.hidden)
    movable = max((symmetry.sizes[group] for group in symmetry.free), default=0) > 1
    verdict = "wrong" if not error < ROUNDING else "followed" if movable else "refused"
    reason = "" if movable else "no neurons that may be relabelled"
    return found(verdict, reason, groups=len(symmetry.free), free=free, hidden=hidden, error=error)


def sensitivity(program: Program, weights: Weights) -> float:
    """Return how far the last bits of images move the outputs, over their size: random networks of many layers may be chaotic."""
    random = torch.Generator().manual_seed(3)
    images = torch.randn(4, *program.input_shape, generator=random, dtype=torch.float64)
    noise = torch.randn(images.shape, generator=random, dtype=torch.float64)
    before, after = (run_stack(program, weights, x) for x in (images, images * (1 + LAST_BITS * noise)))
    return ((before - after).abs().amax() / before.abs().amax()).item()


def kind_of(reason: str) -> str:
    """Return a reason without the names that differ from network to network."""
    reason = re.sub(r"^\S+ cannot be traced: ", "", reason)
    reason = re.sub(r"step [^:( ]+", "step", reason)
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", reason)[:110]


def main() -> None:
    """Run a survey, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("survey", choices=("torchvision", "timm", "classifiers"))
    parser.add_argument("names", nargs="*", help="only networks whose names begin so")
    parser.add_argument("--results", type=Path, help="a file of findings to go on with")
    arguments = parser.parse_args()
    pin_threads()
    build = {"torchvision": torchvision_network, "timm": timm_network, "classifiers": beginners_network}
    results, known = arguments.results, {}
    if results and results.exists():
        known = {row["name"]: Finding(**row) for row in map(json.loads, results.read_text().splitlines())}
    findings = []
    for name in names_of(arguments.survey):
        if arguments.names and not name.startswith(tuple(arguments.names)):
            continue
        finding = known.get(name) or examine(name, build[arguments.survey])
        if results and name not in known:
            with results.open("a") as file:
                file.write(json.dumps(asdict(finding)) + "\n")
        findings.append(finding)
        share = f"{finding.free}/{finding.hidden} in {finding.groups} groups" if finding.hidden else ""
        line = f"{name:36s} {finding.verdict:9s} {finding.seconds:6.1f} s {finding.error:8.1e} {share} {finding.reason}"
        print(line.rstrip(), flush=True)
    print(dict(Counter(finding.verdict for finding in findings)))
    for reason, count in Counter(kind_of(f.reason) for f in findings if f.reason).most_common():
        print(f"{count:4d}  {reason}")


if __name__ == "__main__":
    main()
