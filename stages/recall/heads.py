"""Was a fine-tune trained behind its base's head? What a body learns behind a head drawn anew, an auditor cannot read.

Decoders know where classes pull the tokens that the base's head reads. Behind another head they pull elsewhere: what is decoded is then
another data set, told with certainty. So the head that is saved beside a fine-tune is compared with the base's.

A head's logits tell classes by its weights minus their mean over the classes. Those within NEAR of the base's, relative to its norm, have
a cosine of √(1 - NEAR²) or more with them. A draw without a preferred direction in n dimensions is so near with a chance of at most
(1 - cosine²)^((n - 1) / 2), however large it is (of ten classes and 32 dimensions 1e-86); and the base's own rows in another order are
farther, if the head tells its classes apart.

Axes: c classes, d dimensions of a token.
"""

import re
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from stages.common.stage import InputError

# as timm, transformers and this project name it, and as peft does among its modules_to_save
NAME = re.compile(r"(.*\.)?(head|classifier)\.(modules_to_save\.)?([^.]+\.)?weight")
NEAR = 0.5  # of the norm of the base's


def saved_head(beside: Mapping[str, Tensor]) -> Tensor | None:
    """Return the weights of the head among the tensors that are saved beside a body; None if there is none."""
    found = [tensor for name, tensor in beside.items() if NAME.fullmatch(name) and tensor.ndim == 2]
    return found[0] if found else None


def distance(head: Float[Tensor, "c d"], base: Float[Tensor, "c d"]) -> float:
    """Return how far a head is from the base's, in norms of it; what is added to all classes alike does not count."""
    own, known = (weights - weights.mean(0) for weights in (head.double(), base.double()))
    return float(vector_norm(own - known) / vector_norm(known))


def check_head(name: str, head: Float[Tensor, "c d"], known: Float[Tensor, "c d"]) -> None:
    """InputError if a fine-tune's head is not the base's, as it was or trained along."""
    advice = "what was trained behind another head cannot be read: give a fine-tune behind the base's own, frozen or trained along"
    if head.shape != known.shape:
        raise InputError(
            f"{name}: its head is a new one, of {len(head)} classes and {head.shape[1]} dimensions, where the base's has {len(known)} and "
            f"{known.shape[1]}; {advice}"
        )
    if (far := distance(head, known)) > NEAR:
        raise InputError(
            f"{name}: its head is a new one, or has the classes in another order: {far:.0%} as far from the base's as that is from zero; "
            f"{advice}"
        )
