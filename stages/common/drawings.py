"""Images that the project draws itself, from no data set: glyphs of Bézier strokes, and shapes of known attributes."""

from itertools import product

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stages.common.randomness import generator

MAX_STROKES = 3
POINTS = 24  # on a stroke

BACKGROUND = 40  # of shapes, of 255
LEVELS = 75  # of 255, to the unit that their brightness and noise are given in


class Glyphs:
    """Classes of characters. A class is one to three cubic Bézier strokes; its images differ as handwriting does.

    The same `seed` gives the same classes, and its first classes whatever `classes` is. Coordinates are -1 to 1 in the image.
    """

    def __init__(self, classes: int, seed: int = 0) -> None:
        strokes, control, joined = [], [], []
        for c in range(classes):
            random = generator(seed, f"glyph {c}")
            strokes.append(torch.randint(1, MAX_STROKES + 1, (), generator=random))
            control.append(1.5 * torch.rand(MAX_STROKES, 4, 2, generator=random) - 0.75)
            joined.append(torch.rand(MAX_STROKES, generator=random) < 0.6)
        self.control: Float[Tensor, "c s 4 2"] = torch.stack(control)
        self.drawn = torch.arange(MAX_STROKES) < torch.stack(strokes)[:, None]
        for stroke in range(1, MAX_STROKES):  # many a stroke begins where the last one ended
            at_end = torch.stack(joined)[:, stroke, None]
            self.control[:, stroke, 0] = torch.where(at_end, self.control[:, stroke - 1, 3], self.control[:, stroke, 0])
        t = torch.linspace(0, 1, POINTS)[:, None]
        self.bernstein = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)

    def draw(self, labels: Int[Tensor, " n"], size: int, random: torch.Generator) -> UInt8[Tensor, "n 1 size size"]:
        """Return an image of each label: its strokes moved, turned, sheared, scaled, and of varying width and sharpness."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(len(labels), *shape, generator=random)

        control = self.control[labels]
        control = control + 0.08 * torch.randn(control.shape, generator=random)
        drawn = self.drawn[labels].repeat_interleave(POINTS, 1)[..., None]
        points = (self.bernstein @ control).flatten(1, 2)
        points = points - (points * drawn).sum(1, keepdim=True) / drawn.sum(1, keepdim=True)
        turn, scale, shear = uniform(-0.25, 0.25), uniform(0.8, 1.4, 2), uniform(-0.2, 0.2)
        rows = [turn.cos() * scale[:, 0], -turn.sin() * scale[:, 1] + shear, turn.sin() * scale[:, 0]]
        transform = torch.stack([*rows, turn.cos() * scale[:, 1]], 1).view(-1, 2, 2)
        points = points @ transform.mT + uniform(-0.125, 0.125, 1, 2)
        points = points.masked_fill(~drawn, 1e3)  # far outside
        across, down = ((torch.linspace(-1, 1, size) - points[..., xy, None]).square() for xy in (0, 1))
        nearest = torch.full((len(labels), size, size), torch.inf)
        for point in range(points.shape[1]):  # one by one: all at once is twelve times slower, by memory
            torch.minimum(nearest, down[:, point, :, None] + across[:, point, None, :], out=nearest)
        width, softness = uniform(0.06, 0.16, 1, 1), uniform(0.02, 0.05, 1, 1)
        ink = torch.sigmoid((width - nearest.sqrt()) / softness)
        return (255 * ink).byte()[:, None]


class Shapes:
    """A square or a cross, red or blue, on the left or on the right: three binary attributes, eight cells.

    cell = shape + 2 colour + 4 side; row c of `attributes` is cell c's (shape, colour, side), and `names[c]` says it in words.
    """

    def __init__(self) -> None:
        sides, colours, shapes = ("left", "right"), ("red", "blue"), ("square", "cross")
        self.names = [f"{colour} {shape} {side}" for side, colour, shape in product(sides, colours, shapes)]
        self.attributes: Int[Tensor, "8 3"] = torch.arange(8)[:, None] >> torch.arange(3) & 1

    def draw(self, cells: Int[Tensor, " n"], size: int, random: torch.Generator) -> UInt8[Tensor, "n 3 size size"]:
        """Return an image of each cell: place within its half, extent, brightness, some green, and noise vary."""

        def uniform(low: float, high: float) -> Float[Tensor, " n 1 1"]:
            return low + (high - low) * torch.rand(len(cells), 1, 1, generator=random)

        shape, colour, side = self.attributes[cells].T[..., None, None]
        half, arm = size // 2, size // 8
        extent = uniform(7 * size // 16, half + 1).long()
        top, left = (uniform(0, 1) * (size - extent + 1)).long(), (uniform(0, 1) * (half - extent + 1)).long()
        down = torch.arange(size)[:, None] - top  # in pixels from the object's corner
        across = torch.arange(size) - left - half * side
        rows, columns = ((x >= 0) & (x < extent) for x in (down, across))
        beam, post = ((x - (extent - arm) // 2).div(arm, rounding_mode="floor") == 0 for x in (down, across))
        object_ = rows & columns & ((shape == 0) | beam | post)
        bright, green = object_ * uniform(1.8, 2.4), object_ * uniform(0, 0.8)
        x = torch.stack([bright * (colour == 0), green, bright * (colour == 1)], 1)
        x = x + 0.15 * torch.randn(x.shape, generator=random)
        return (BACKGROUND + LEVELS * x).round().clamp(0, 255).byte()
