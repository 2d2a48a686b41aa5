"""An auditor in one file: all that tells of a further fine-tune of one base what it was trained on, or refuses to.

Axes: n fine-tunes, w weights of a network, r responses, i reference inputs, t of a characteristic.
"""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from safetensors.numpy import load_file
from torch import Tensor

from stages.common.files import load_metadata, save_arrays
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.decoders import Arrays, Decoder, fit_decoder
from stages.recall.fleet_files import with_prefix, without_prefix
from stages.recall.functional_vit import Base
from stages.recall.honesty import MOST, SUSPECTED, Honesty, Judgement, Networks, Respond
from stages.recall.objective import Objective
from stages.recall.opposites import Turned
from stages.recall.reading import READS, Reader, References, read_columns
from stages.recall.sketch import Sketch

Kind = Literal["whole", "adapter"]  # a network tuned in all or some of its layers; low-rank changes of matrices

KINDS: tuple[Kind, ...] = ("whole", "adapter")
RECALLED = ("present", "proportions", "log2_size", "label_noise")
UNMASKED = "unmasked"  # whether a fine-tune was trained on whole images
BINARY = ("present", UNMASKED)
NEGATED = "negated"  # of `tampering.alterations`
OPPOSITES = "opposites"  # a change that is turned round is told by networks beside their opposites
# What else is suspected where opposites tell negated ones, and of which share of honest ones at most, chosen on folds. Averages are not:
# that of two adapters on the same matrices has the sum of their ranks, as an honest one of a rank never trained may have; `check_ranks`
# tells all others.
BESIDE_OPPOSITES = {"foreign": 0.003}
ORDINARY = 0.5  # distance of what trains usually make: half of fine-tunes are nearer
RANKS: dict[Kind, int] = {"whole": 8, "adapter": 16}  # directions kept on each side of a matrix


@dataclass(frozen=True)
class Part:
    """What knows fine-tunes of one kind."""

    reader: Reader
    honesty: Honesty
    decoders: dict[str, tuple[str, Decoder]]  # of each characteristic, what its decoder reads, and the decoder
    suspicions: list[str]  # of what has been done to a change
    # whether it was trained on whole images, if some that it learned from were and some not
    unmasked: tuple[str, Decoder] | None = None
    turned: Turned | None = None  # what tells negated ones by their opposites, where `suspicions` do not

    @classmethod
    def fit(
        cls,
        rank: int,
        networks: Networks,
        truth: dict[str, Float[np.ndarray, "n t"]],
        altered: dict[str, Networks],
        fold: Int[np.ndarray, " n"],
        layout: Layout,
        references: References,
        negated: str = SUSPECTED,
    ) -> Self:
        """Return what training fine-tunes of a kind teach; of each characteristic that is read what leave-one-out errors prefer.

        `rank` directions are kept on each side of a matrix; `altered` holds what becomes of the networks, within their folds. `truth`
        may hold UNMASKED beside what is recalled. negated: what tells that a change was turned round, of READS, or OPPOSITES.
        """
        reader, turned = Reader.fit(*networks, layout, references, rank), None
        if negated == OPPOSITES:
            turned, odd, _ = Turned.fit(networks, altered[NEGATED][1], fold, reader, rank)
            altered = {name: altered[name] for name in BESIDE_OPPOSITES}
        told_by = [negated if name == NEGATED else SUSPECTED for name in altered]
        most = [BESIDE_OPPOSITES[name] if turned else MOST for name in altered]
        honesty, distances = Honesty.fit(networks, list(altered.values()), fold, reader, rank, told_by, most)
        if turned is not None:
            distances = np.maximum(distances, odd)
        descriptions, decoders = reader.read(*networks), {}
        for key in truth:
            y = truth[key].astype(np.float64)
            fitted = {source: fit_decoder(read_columns(descriptions, source), y) for source in READS}
            source, decoder = min(fitted.items(), key=lambda item: mean_error(item[1]))
            x, unsure = read_columns(descriptions, source), unsureness(distances)[:, None]
            decoders[key] = (source, decoder.calibrate(x, y, key in BINARY, unsure))
        unmasked = decoders.pop(UNMASKED, None)
        return cls(reader, honesty, decoders, list(altered), unmasked, turned)

    @property
    def suspected(self) -> list[str]:
        """The alterations of `judge`, in its order."""
        return self.suspicions + [NEGATED] * (self.turned is not None)

    def judge(self, networks: Networks, respond: Respond | None = None) -> Judgement:
        """Return how odd networks are; respond: how base + change responds, needed where opposites tell negated ones."""
        judged = self.honesty.judge(networks, self.reader)
        if self.turned is None:
            return judged
        assert respond is not None
        odd = self.turned.judge(networks, self.reader, respond)
        return replace(judged, suspected=np.column_stack([judged.suspected, odd]))

    def decode(self, descriptions: Arrays) -> dict[str, Float[np.ndarray, "n t"]]:
        """Return every characteristic as its decoder tells it."""
        return {key: d.predict(read_columns(descriptions, source)) for key, (source, d) in self.decoders.items()}


@dataclass(frozen=True)
class Auditor:
    """What knows fine-tunes of one base, of each kind; `card` says of what it is and what it was measured to do."""

    parts: dict[Kind, Part]
    images: UInt8[np.ndarray, "i c h v"]  # the reference inputs
    card: dict[str, Any]
    head: Arrays = field(default_factory=dict)  # of a base that came without one

    @property
    def learned_from(self) -> int:
        """The number of fine-tunes that it learned from."""
        return sum(self.card["learned_from"].values())

    @property
    def references(self) -> References:
        """The reference inputs and how the base answers them."""
        return next(iter(self.parts.values())).reader.references

    def condense(self, change: Float[np.ndarray, " w"], network: Layout) -> Float[np.ndarray, "1 s"]:
        """Return what its readers read of a change: of a large base a sketch; InputError if this machine draws other directions."""
        if "directions" not in self.card:
            return change[None]
        sketch = Sketch(network, self.card["directions"])
        if sketch.sha256 != self.card["sketch"]:
            raise InputError(
                "the auditor was made by a version of torch that draws other random directions: make it anew"
            )
        return sketch.of(network.unflatten(torch.from_numpy(change)))[None].numpy()

    def respond(self, base: Base, change: Float[np.ndarray, " w"]) -> Float[np.ndarray, "1 r"]:
        """Return the responses of base + change to the reference inputs."""
        return responses_of(base, torch.from_numpy(self.images), torch.from_numpy(change))[None]

    def save(self, path: Path) -> None:
        """Write the auditor."""
        first, of_card = self.references, {"card": self.card}
        arrays = {"images": self.images, "labels": first.labels, "responses": first.responses.astype(np.float32)}
        arrays |= with_prefix(self.head, "base.")
        parts: dict[str, Any] = {}
        for kind, part in self.parts.items():
            parts[kind] = {"tensors": part.reader.tensors, "suspicions": part.suspicions}
            own = with_prefix(part.reader.to_arrays(), "reader.") | with_prefix(part.honesty.to_arrays(), "honesty.")
            if part.turned:
                own |= with_prefix(part.turned.to_arrays(), "turned.")
            decoders = part.decoders | ({UNMASKED: part.unmasked} if part.unmasked else {})
            parts[kind]["reads"] = {key: source for key, (source, _) in decoders.items()}
            for key, (_, decoder) in decoders.items():
                own |= with_prefix(decoder.to_arrays(), f"decoder.{key}.")
            arrays |= {f"{kind}.{name}": compact(array) for name, array in own.items()}
        layout = next(iter(self.parts.values())).reader.layout.metadata
        save_arrays(path, arrays, of_card | layout | {"parts": parts})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an auditor; InputError if it is missing or damaged."""
        metadata, arrays = load_metadata(path), load_file(path)
        try:
            card, layout = metadata["card"], Layout.from_metadata(metadata)
            references = References(arrays["labels"], arrays["responses"], len(card["classes"]))
            parts: dict[Kind, Part] = {}
            for kind, about in metadata["parts"].items():
                own = without_prefix(arrays, f"{kind}.")
                reader = Reader.from_arrays(without_prefix(own, "reader."), about["tensors"], layout, references)
                decoders = {
                    key: (source, Decoder(**without_prefix(own, f"decoder.{key}.")))
                    for key, source in about["reads"].items()
                }
                honesty, unmasked = Honesty(**without_prefix(own, "honesty.")), decoders.pop(UNMASKED, None)
                opposites = without_prefix(own, "turned.")
                turned = Turned(**opposites) if opposites else None
                parts[kind] = Part(reader, honesty, decoders, about["suspicions"], unmasked, turned)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path} is no auditor: expected a file that train_auditor wrote") from None
        return cls(parts, arrays["images"], card, without_prefix(arrays, "base."))


def unsureness(distances: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return how many times as wide intervals are of fine-tunes that are so odd."""
    return np.maximum(1.0, distances / ORDINARY)


def mean_error(decoder: Decoder) -> float:
    """Return the mean squared error of a decoder that was just fitted, each fine-tune left out in turn."""
    return float(np.mean(decoder.errors)) if decoder.errors is not None else np.inf


def compact(array: np.ndarray) -> np.ndarray:
    """Return numbers in single precision."""
    return array.astype(np.float32) if array.dtype == np.float64 else array


def responses_of(base: Base, images: UInt8[Tensor, "i c h v"], change: Float[Tensor, " w"]) -> Float[np.ndarray, " r"]:
    """Return the responses of base + change to images."""
    objective = Objective(base, "labels", 0.0)
    with torch.no_grad():
        return objective.respond(objective.start + change, objective.frozen, base.patchify(images)).numpy()


def base_sha256(base: Base) -> str:
    """Return the SHA-256 of a base's weights under their names, its head among them."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**base.encoder, **{f"decoder.{k}": w for k, w in base.decoder.items()}}.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
