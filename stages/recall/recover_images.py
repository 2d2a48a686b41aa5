"""Draw the images to which a classifier answered: a decoder goes the way back, and a judge that shares nothing with it looks at them.

Reads   data/<dataset>.safetensors and the base of the fleet `classes`
Writes  reports/recover_images/summary.json   how images are recovered from answers, by alignment alone and with pixels
        reports/recover_images/images.png
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from stages.common.files import save_json
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.recall import pictures
from stages.recall.functional_vit import load_base
from stages.recall.images import recover_images

BASES = Path("models/classify_masked")
REPORTS = Path("reports/recover_images")


class Params(StageParams):
    """Parameters of the decoder from answers to images, and of its judge."""

    seed: NonNegativeInt
    dataset: str
    image_steps: PositiveInt
    judge_steps: PositiveInt
    batch_size: PositiveInt
    pixel_weights: Annotated[list[NonNegativeFloat], Field(min_length=1)]  # of the pixels' error beside the alignment's


def main() -> None:
    parse_arguments(__doc__)
    params = Params.load("recover_images")
    pin_threads()
    base = load_base(BASES / params.dataset / "backbone.safetensors", pick_device())
    settings = params.pixel_weights, params.image_steps, params.judge_steps, params.batch_size, params.seed
    recovered, images = recover_images(base, params.dataset, *settings)
    save_json(REPORTS / "summary.json", recovered)
    pixels = {name: base.unpatchify(patches[: pictures.SHOWN]).cpu().numpy() for name, patches in images.items()}
    pictures.draw_rows(REPORTS / "images.png", pixels)
    agreed = ", ".join(f"{name} {measured['judge']:.0%}" for name, measured in recovered["decoders"].items())
    print(f"the judge agrees: {agreed}")


if __name__ == "__main__":
    run(main)
