"""The convolutions of many networks at once, as one batch of matrix products.

Small images make small convolutions, for which libraries are slow. Two ways to a matrix product are fast: a convolution of very
few pixels is the dense matrix that it is (most of its entries are weights), and others multiply unfolded patches.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import conv2d

Pair = tuple[int, int]  # of rows and columns
Stack = Float[Tensor, "n b h w c"]  # images or channels of n networks, channels last
DENSE = 2  # pixels over taps, up to which the dense matrix is faster


def convolve(
    x: Stack,
    weight: Float[Tensor, "n d c k k"],
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int = 1,
    dilation: tuple[int, int] = (1, 1),
) -> Stack:
    """Return the convolutions of n networks with n kernels; x may have one network's images for all."""
    (h, w), (k, q) = x.shape[2:4], weight.shape[3:]
    if len(weight) == 1 or groups > 1 or dilation != (1, 1):  # one network: the library's convolution is made for it
        images = x.permute(0, 1, 4, 2, 3)
        parts = [
            conv2d(images[min(i, len(x) - 1)], one, None, stride, padding, dilation, groups)
            for i, one in enumerate(weight)
        ]
        return torch.stack(parts).permute(0, 1, 3, 4, 2)
    kernel = weight.permute(0, 3, 4, 2, 1)  # [n, k, q, c, d]
    if h * w <= DENSE * k * q:
        return _dense(x, kernel, stride, padding)
    return Unfolded.apply(x, kernel, stride, padding)


def _outputs(size: int, taps: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - taps) // stride + 1


def _dense(x: Stack, kernel: Float[Tensor, "n k q c d"], stride: tuple[int, int], padding: tuple[int, int]) -> Stack:
    """Return the product with the matrix from all inputs to all outputs."""
    _, b, h, w, c = x.shape
    n, *taps, _, d = kernel.shape
    o, p = _outputs(h, taps[0], stride[0], padding[0]), _outputs(w, taps[1], stride[1], padding[1])
    matrix = DenseMatrix.apply(kernel, (h, w), (o, p), stride, padding)
    y = torch.matmul(x.reshape(len(x), b, h * w * c), matrix.view(n, h * w * c, o * p * d))
    return y.view(n, b, o, p, d)


class DenseMatrix(torch.autograd.Function):
    """kernel [n, k, q, c, d] -> matrix [n, h, w, c, o, p, d] whose entries are its taps, or zero."""

    @staticmethod
    def places(ctx: FunctionCtx) -> Sequence[tuple[tuple[int | slice, ...], tuple[slice, ...]]]:
        """Return which part of the matrix holds which part of the kernel, for every output pixel."""
        (h, w), (o, p), stride, padding, (k, q) = ctx.geometry
        found = []
        for i in range(o):
            for j in range(p):
                top, left = i * stride[0] - padding[0], j * stride[1] - padding[1]
                rows, columns = slice(max(top, 0), min(top + k, h)), slice(max(left, 0), min(left + q, w))
                taps = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
                found.append(((slice(None), rows, columns, slice(None), i, j), (slice(None), *taps)))
        return found

    @staticmethod
    def forward(ctx: FunctionCtx, kernel: Tensor, size: Pair, outputs: Pair, stride: Pair, padding: Pair) -> Tensor:
        n, k, q, c, d = kernel.shape
        ctx.geometry = (size, outputs, stride, padding, (k, q))
        matrix = kernel.new_zeros(n, *size, c, *outputs, d)
        for place, taps in DenseMatrix.places(ctx):
            matrix[place] = kernel[taps]
        return matrix

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n, _, _, c, _, _, d = gradient.shape
        result = gradient.new_zeros(n, *ctx.geometry[-1], c, d)
        for place, taps in DenseMatrix.places(ctx):
            result[taps] += gradient[place]
        return result, None, None, None, None


class Unfolded(torch.autograd.Function):
    """Patches times kernels. Unlike autograd's, the backward pass adds the patches' gradients in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kernel: Tensor, stride: Pair, padding: Pair) -> Tensor:
        m, b, h, w, c = x.shape
        n, k, q, _, d = kernel.shape
        o, p = _outputs(h, k, stride[0], padding[0]), _outputs(w, q, stride[1], padding[1])
        top, left = padding
        padded = x.new_empty(m, b, h + 2 * top, w + 2 * left, c)
        padded[:, :, top : top + h, left : left + w] = x
        for border in (
            padded[:, :, :top],
            padded[:, :, top + h :],
            padded[:, :, :, :left],
            padded[:, :, :, left + w :],
        ):
            border.zero_()
        patches = _unfold(_windows(padded, (o, p), (k, q), stride))
        matrix = kernel.reshape(n, k * q * c, d)
        ctx.save_for_backward(patches if kernel.requires_grad else None, matrix)
        ctx.geometry = (x.shape, kernel.shape, stride, padding, (o, p))
        y = x.new_empty(n, b, o, p, d)
        torch.matmul(patches, matrix, out=y.view(n, b * o * p, d))
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        patches, matrix = ctx.saved_tensors
        (m, b, h, w, c), (n, k, q, _, d), stride, padding, (o, p) = ctx.geometry
        gradient = gradient.reshape(n, b * o * p, d)
        for_x = for_kernel = None
        if ctx.needs_input_grad[1]:
            for_kernel = torch.matmul(patches.mT, gradient).view(n, k, q, c, d)
        if ctx.needs_input_grad[0]:
            moved = torch.matmul(gradient, matrix.mT)
            moved = (moved if m == n else moved.sum(0, keepdim=True)).view(m, b, o, p, k, q, c)
            padded = gradient.new_empty(m, b, h + 2 * padding[0], w + 2 * padding[1], c)
            full = k >= stride[0] and q >= stride[1]  # then the first block leaves no gaps
            for rest in (padded[:, :, o * stride[0] :], padded[:, :, :, p * stride[1] :]) if full else (padded,):
                rest.zero_()
            for i in range(0, k, stride[0]):  # blocks of taps no larger than the stride do not overlap
                for j in range(0, q, stride[1]):
                    block = moved[:, :, :, :, i : i + stride[0], j : j + stride[1]]
                    pixels = _windows(padded[:, :, i:, j:], (o, p), block.shape[4:6], stride)
                    pixels.copy_(block) if full and i == j == 0 else pixels.add_(block)
            for_x = padded[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]
        return for_x, for_kernel, None, None


def _windows(
    x: Stack, outputs: tuple[int, int], taps: tuple[int, int], stride: tuple[int, int]
) -> Float[Tensor, "n b o p k q c"]:
    """Return a view of the pixels that each output sees."""
    s = x.stride()
    strides = (s[0], s[1], s[2] * stride[0], s[3] * stride[1], s[2], s[3], s[4])
    return x.as_strided((*x.shape[:2], *outputs, *taps, x.shape[4]), strides)


def _unfold(windows: Float[Tensor, "n b o p k q c"]) -> Float[Tensor, "n b*o*p k*q*c"]:
    """Return patches as rows, transposed in memory if that copies longer runs of numbers."""
    n, b, o, p, k, q, c = windows.shape
    if q * c < p:
        return windows.permute(0, 4, 5, 6, 1, 2, 3).reshape(n, k * q * c, b * o * p).mT
    return windows.reshape(n, b * o * p, k * q * c)
