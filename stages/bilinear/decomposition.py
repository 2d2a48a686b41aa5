"""Read a bilinear classifier from its weights: every logit is a quadratic form, and its eigenvectors are the features.

    logit_c(x) = z^T Q_c z = sum_k lambda_ck (v_ck . z)^2,    z = E x, or [E x; 1] if there are biases or residuals

Pearce et al. 2024, arXiv:2410.08417, section 3, extended: the constant coordinate folds biases and residuals exactly, other
bases than the hidden one, and networks of two layers by decomposing the forms of the first along the eigenvectors of the second.

Axes: n images, c classes, h hidden units, z coordinates of the forms (h, or h + 1 with the constant), k eigenvectors, g coordinates
of a basis, r ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from stages.bilinear.model import BilinearImageClassifier

typed = jaxtyped(typechecker=beartype)

IMAGES_AT_ONCE = 4096  # more would only take memory


@dataclass(frozen=True)
class DecompositionArtifacts:
    """The forms of a single-layer classifier and their eigenvectors; z is d_hidden, or d_hidden + 1 with biases or residuals.

    Class, then eigenvectors: logit_c = sum_k eigenvalues[c, k] * (eigenvectors_hidden[c, :, k] . z)^2, and where z has no
    constant also sum_k eigenvalues[c, k] * (eigenvectors_input[c, k] . x)^2. Eigenvalues ascend.
    """

    bilinear_tensor: Float[Tensor, "c z z"]
    symmetrized_tensor: Float[Tensor, "c z z"]
    eigenvalues: Float[Tensor, "c k"]
    eigenvectors_hidden: Float[Tensor, "c z k"]
    eigenvectors_input: Float[Tensor, "c k d_input"]

    def to(self, target: torch.dtype | torch.device | str) -> "DecompositionArtifacts":
        """Return the same in another precision or on another device."""
        return DecompositionArtifacts(**{name: tensor.to(target) for name, tensor in vars(self).items()})


# --- the forms ---------------------------------------------------------------------------------------------------------


def with_layers(model: nn.Module, count: int | None = None) -> BilinearImageClassifier:
    """Return the network; ValueError unless it is a bilinear classifier of so many layers (None: one or more)."""
    wanted = {None: "1 or more bilinear layers", 1: "1 bilinear layer"}.get(count, f"{count} bilinear layers")
    if not isinstance(model, BilinearImageClassifier):
        raise ValueError(f"expected a BilinearImageClassifier with {wanted}, got an object of {type(model).__name__}")
    if not model.blocks or count not in (None, len(model.blocks)):
        raise ValueError(f"expected a network of {wanted}, got {len(model.blocks)}")
    return model


def check_ranks(ranks: list[int], what: str = "eigenvectors") -> None:
    """ValueError unless there are ranks, each 1 or more: 0 and less would count from the end."""
    if not ranks or min(ranks) < 1:
        raise ValueError(f"expected 1 or more {what}, got {ranks}")


def has_constant(model: BilinearImageClassifier) -> bool:
    """Whether the network's forms need the constant coordinate: z = [h; 1]. ValueError without a bilinear layer."""
    with_layers(model)
    return model.residual or model.blocks[0].bias is not None


@typed
def embed(model: BilinearImageClassifier, x: Float[Tensor, "n *chw"]) -> Float[Tensor, "n z"]:
    """Return z = E x, or [E x; 1], of images."""
    h = x.flatten(1) @ model.embedding_weight.T
    return pad(h, (0, 1), value=1.0) if has_constant(model) else h


@typed
def layer_forms(model: BilinearImageClassifier, layer: int, u: Float[Tensor, "k _"]) -> Float[Tensor, "k z z"]:
    """Return the matrices Q_k with u_k . block(h) = z^T Q_k z: sum_o u_ko (L_o . z)(R_o . z), and u_k . h in the border if residual.

    u: [k, d_hidden], or [k, d_hidden + 1] if it also weighs the constant.
    """
    left, right = model.bilinear_weights[layer]
    d_hidden = len(left)
    if has_constant(model):
        left, right = (
            torch.cat([w, b[:, None]], 1) for w, b in zip((left, right), model.bilinear_biases[layer], strict=True)
        )
    on_hidden, on_constant = u[:, :d_hidden], u[:, d_hidden:]
    forms = torch.einsum("ko,oi,oj->kij", on_hidden, left, right)
    if model.residual:
        forms[:, :d_hidden, -1] += on_hidden
    if on_constant.shape[1]:
        forms[:, -1, -1] += on_constant[:, 0]
    return forms


@typed
def build_bilinear_tensor(model: nn.Module) -> Float[Tensor, "c z z"]:
    """Return Q with logit_c = z^T Q_c z, not symmetrised.

    ValueError unless the network has exactly one bilinear layer: of none its logits are linear, and for two see `nested_logits`.
    """
    model = with_layers(model, 1)
    return layer_forms(model, 0, model.output_weight)


@typed
def symmetrize_bilinear_tensor(tensor: Float[Tensor, "*c z z"]) -> Float[Tensor, "*c z z"]:
    """Return (T + T^T) / 2: the symmetric forms of the same values."""
    return (tensor + tensor.mT) / 2


# --- eigenvectors, in three bases ---------------------------------------------------------------------------------------


@typed
def input_basis(model: nn.Module) -> Float[Tensor, "z g"]:
    """Return A with z = A g, where g are orthonormal coordinates of the pixels the embedding sees: E^T = O R, A = R^T.

    Its eigenvectors do not change when the hidden space is recombined (E -> M E, L -> L M^-1, R -> R M^-1), the hidden basis's do.
    """
    model = with_layers(model)
    basis = torch.linalg.qr(model.embedding_weight.T).R.T
    return torch.block_diag(basis, basis.new_ones(1, 1)) if has_constant(model) else basis


@typed
def data_basis(model: nn.Module, x: Float[Tensor, "n *chw"]) -> Float[Tensor, "z g"]:
    """Return A with z = A g, where g are uncorrelated coordinates of unit second moment on `x` (directions without data left out)."""
    model = with_layers(model)
    chunks = (embed(model, chunk.to(model.embed.weight.dtype)) for chunk in x.split(IMAGES_AT_ONCE))
    moments, directions = torch.linalg.eigh(sum(z.T @ z for z in chunks) / len(x))
    kept = moments > moments[-1] * len(moments) * torch.finfo(moments.dtype).eps
    return directions[:, kept] * moments[kept].sqrt()


@typed
def decompose_bilinear_model(model: nn.Module, basis: Float[Tensor, "z g"] | None = None) -> DecompositionArtifacts:
    """Return the forms of a single-layer classifier and their eigenvectors. ValueError if it is none.

    basis: A with z = A g, in whose coordinates the eigenvectors are orthonormal (`input_basis`, `data_basis`); None: the
    hidden space. The eigenvectors returned are the vectors that read z and x, whatever the basis.
    """
    model = with_layers(model, 1)
    tensor = build_bilinear_tensor(model)
    forms = symmetrize_bilinear_tensor(tensor)
    if basis is None:
        eigenvalues, eigenvectors = torch.linalg.eigh(forms)
    elif len(basis) != forms.shape[1]:
        raise ValueError(f"basis: expected {forms.shape[1]} rows, one for each number of z, got {len(basis)}")
    else:
        eigenvalues, eigenvectors = torch.linalg.eigh(symmetrize_bilinear_tensor(basis.T @ forms @ basis))
        eigenvectors = torch.linalg.pinv(basis).T @ eigenvectors
    return DecompositionArtifacts(
        tensor, forms, eigenvalues, eigenvectors, project_eigenvectors_to_input(eigenvectors, model.embedding_weight)
    )


@typed
def project_eigenvectors_to_input(
    eigvecs: Float[Tensor, "c z k"], embed_w: Float[Tensor, "h d_input"]
) -> Float[Tensor, "c k d_input"]:
    """Return E^T v for the columns v of `eigvecs`, as rows; a constant coordinate of v (z = h + 1) reads no pixel and is left out."""
    if eigvecs.shape[1] - len(embed_w) not in (0, 1):
        raise ValueError(f"expected vectors of {len(embed_w)} or one more numbers, got {eigvecs.shape[1]}")
    return eigvecs[:, : len(embed_w)].mT @ embed_w


# --- truncation ---------------------------------------------------------------------------------------------------------


@typed
def order_by_magnitude(eigenvalues: Float[Tensor, "c k"]) -> Int[Tensor, "c k"]:
    """Return the order of falling |lambda|."""
    return eigenvalues.abs().argsort(dim=1, descending=True, stable=True)


@typed
def order_by_sign(eigenvalues: Float[Tensor, "c k"]) -> Int[Tensor, "c k"]:
    """Return the order most positive, most negative, second most positive, ...: its first 2 m are m of either sign."""
    ascending = eigenvalues.argsort(dim=1, stable=True)
    return torch.stack([ascending.flip(1), ascending], dim=2).flatten(1)[:, : eigenvalues.shape[1]]


@typed
def eigen_terms(
    z: Float[Tensor, "n z"], eigenvalues: Float[Tensor, "c k"], eigenvectors: Float[Tensor, "c z k"]
) -> Float[Tensor, "n c k"]:
    """Return lambda_ck (v_ck . z)^2: what each eigenvector adds to its class's logit. They sum to the logits over k."""
    return (eigenvalues[:, None] * (z @ eigenvectors).square()).transpose(0, 1)


@typed
def truncated_logits(
    terms: Float[Tensor, "n c k"], order: Int[Tensor, "c k"], ranks: list[int]
) -> Float[Tensor, "r n c"]:
    """Return the logits from the first r eigenvectors of each class in `order`, for every r in `ranks` (1 to k)."""
    check_ranks(ranks)
    sums = terms.gather(2, order.expand_as(terms)).cumsum(2)
    return sums[:, :, torch.tensor(ranks) - 1].permute(2, 0, 1)


@dataclass(frozen=True)
class NestedDecomposition:
    """A two-layer classifier as a tree of eigenvectors.

    logit_c = sum_k outer_values[c, k] y_ck^2, and y_ck = sum_j inner_values[c, k, j] (inner_vectors[c, k, :, j] . z)^2:
    y_ck = v_ck . z_1 with the eigenvectors v of the second layer's forms, itself a quadratic form of the first layer's z.
    """

    outer_values: Float[Tensor, "c k"]
    inner_values: Float[Tensor, "c k j"]
    inner_vectors: Float[Tensor, "c k z j"]


Order = Callable[[Float[Tensor, "c k"]], Int[Tensor, "c k"]]


def decompose_two_layers(model: nn.Module, rank: int, order: Order = order_by_magnitude) -> NestedDecomposition:
    """Return the first `rank` outer eigenvectors of each class in `order`, with all of their inner ones in `order`.

    ValueError unless the network has two bilinear layers.
    """
    model = with_layers(model, 2)
    check_ranks([rank])

    def ordered(forms: Float[Tensor, "c z z"], rank: int) -> tuple[Float[Tensor, "c k"], Float[Tensor, "c z k"]]:
        values, vectors = torch.linalg.eigh(symmetrize_bilinear_tensor(forms))
        first = order(values)[:, :rank]
        return values.gather(1, first), vectors.gather(2, first[:, None].expand(-1, vectors.shape[1], -1))

    outer, v = ordered(layer_forms(model, 1, model.output_weight), rank)
    trees = [ordered(layer_forms(model, 0, vectors.T), len(vectors)) for vectors in v]
    inner, w = (torch.stack(parts) for parts in zip(*trees, strict=True))
    return NestedDecomposition(outer, inner, w)


@typed
def nested_logits(
    tree: NestedDecomposition, z: Float[Tensor, "n z"], outer_ranks: list[int], inner_ranks: list[int]
) -> Float[Tensor, "outer inner n c"]:
    """Return a two-layer classifier's logits from its first r outer and s inner eigenvectors, for all r and s."""
    check_ranks(outer_ranks, "outer eigenvectors")
    check_ranks(inner_ranks, "inner eigenvectors")
    logits = []
    for outer, inner, w in zip(tree.outer_values, tree.inner_values, tree.inner_vectors, strict=True):
        terms = eigen_terms(z, inner[:, : max(inner_ranks)], w[:, :, : max(inner_ranks)])
        y = terms.cumsum(2)[:, :, torch.tensor(inner_ranks) - 1]  # [n, k, inner]
        terms = outer[:, None] * y.square()
        logits.append(terms.cumsum(1)[:, torch.tensor(outer_ranks) - 1])  # [n, outer, inner]
    return torch.stack(logits).permute(2, 3, 1, 0)


# --- what the eigenvectors are good for ---------------------------------------------------------------------------------


@typed
def adversarial_masks(artifacts: DecompositionArtifacts, rank: int) -> Float[Tensor, "c r d_input"]:
    """Return unit images that each excite one of a class's `rank` most positive eigenvectors and none of its others.

    The pseudo-inverse of the eigenvectors: mask_i . v_j = 0 for i != j (arXiv:2410.08417, section 4.4).
    """
    check_ranks([rank])
    top = artifacts.eigenvectors_input[:, -rank:].flip(1)
    return normalize(torch.linalg.pinv(top.mT), dim=2)


@typed
def pixel_attributions(
    model: BilinearImageClassifier, x: Float[Tensor, "n *chw"], classes: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n d_input"], Float[Tensor, " n"]]:
    """Return x_i (Q_c x)_i for every pixel of every image and its class c, and the constant's part (0 without one).

    They sum to the logit exactly: each pixel gets its square and half of every product it is in.
    """
    forms = symmetrize_bilinear_tensor(build_bilinear_tensor(model))
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < len(forms):
        got = f"{int(classes.min())} to {int(classes.max())}"
        raise ValueError(f"classes: expected 0 to {len(forms) - 1}, got {got}")
    z = embed(model, x)
    gradient = torch.empty_like(z)  # half of it: Q_c z
    for c, form in enumerate(forms):
        gradient[classes == c] = z[classes == c] @ form
    d_hidden = len(model.embedding_weight)
    constant = (z * gradient)[:, d_hidden:].sum(1)
    return x.flatten(1) * (gradient[:, :d_hidden] @ model.embedding_weight), constant


@typed
def matched_similarity(a: DecompositionArtifacts, b: DecompositionArtifacts, rank: int) -> float:
    """Return the mean |cosine| in input space of the `rank` largest eigenvectors of two networks, matched one to one for each class.

    Order is free (Hungarian matching), sign is not defined; eigenvectors of opposite eigenvalue do not match. In 0 to 1.
    """

    check_ranks([rank])

    def top(artifacts: DecompositionArtifacts) -> tuple[Float[Tensor, "c r d"], Float[Tensor, "c r"]]:
        order = order_by_magnitude(artifacts.eigenvalues)[:, :rank]
        vectors = artifacts.eigenvectors_input.gather(
            1, order[..., None].expand(-1, -1, artifacts.eigenvectors_input.shape[2])
        )
        return normalize(vectors, dim=2), artifacts.eigenvalues.gather(1, order).sign()

    (vectors_a, signs_a), (vectors_b, signs_b) = top(a), top(b)
    cosines = (vectors_a @ vectors_b.mT).abs() * (signs_a[:, :, None] == signs_b[:, None])
    return sum(c[linear_sum_assignment(c, maximize=True)].mean().item() for c in cosines.cpu().numpy()) / len(cosines)


@typed
def subspace_similarity(a: DecompositionArtifacts, b: DecompositionArtifacts, rank: int) -> float:
    """Return the mean cosine of the principal angles between the spans of two networks' `rank` most positive eigenvectors. In 0 to 1."""
    check_ranks([rank])
    span_a, span_b = (torch.linalg.qr(artifacts.eigenvectors_input[:, -rank:].mT).Q for artifacts in (a, b))
    return torch.linalg.svdvals(span_a.mT @ span_b).mean().item()
