"""Classifiers with attention, windows, groups, shuffles, gates and tokens, as people write them: of 3 x 16 x 16 pixels, 10 classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SequentialSoftmax(nn.Sequential):
    """A tutorial's first network."""

    def __init__(self) -> None:
        super().__init__(
            *(
                nn.Conv2d(3, 8, 3),
                nn.LeakyReLU(0.1),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 12, 3),
                nn.ELU(),
                nn.AdaptiveAvgPool2d(2),
            ),
            *(nn.Flatten(), nn.Linear(48, 20), nn.BatchNorm1d(20), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(20, 10)),
            nn.Softmax(dim=1),
        )


class ModuleLists(nn.Module):
    """Lists of modules in loops, features concatenated, squeezed, weights of a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.mix, self.head = nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
            features.append(F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2))
        y = torch.cat(features, 1)
        for _ in range(2):
            y = y + torch.tanh(self.mix(y))
        return F.log_softmax(self.head(y), -1)


class SelfAttention(nn.Module):
    """Queries, keys and values by three layers, several heads, products written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * self.scale, dim=-1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, t, c))


class TinyVit(nn.Module):
    """Patches by a convolution, a class token, learned positions, blocks of attention and of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.zeros(1, 1, 12))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, 12))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = SelfAttention(12, 3)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.gamma, self.head = nn.Parameter(0.1 * torch.ones(12)), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + self.gamma * self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class TorchEncoder(nn.Module):
    """torch's own encoder on rows of pixels, averaged."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Linear(48, 12), batch_first
        layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=batch_first, dropout=0.1)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.permute(0, 2, 1, 3).flatten(2))
        x = x if self.batch_first else x.permute(1, 0, 2)
        x = self.encoder(x)
        return self.head(x.mean(1 if self.batch_first else 0))


class FusedAttention(nn.Module):
    """One layer for queries, keys and values, torch's fused function, positions relative by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.out = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, 36), nn.Linear(12, 12)
        self.table = nn.Parameter(0.1 * torch.randn(49, 3))
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patches(x).flatten(2).transpose(1, 2))
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 3, c // 3).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.head((x + self.out(y.transpose(1, 2).reshape(b, t, c))).mean(1))


class Windows(nn.Module):
    """Attention inside windows, which are shifted, with a mask as Swin has it; patches are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.attention = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12), SelfAttention(12, 2)
        self.merge, self.head = nn.Linear(48, 16, bias=False), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), shifts=(-2, -2), dims=(1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.attention(y).view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(x).mean((1, 2)))


class Shuffle(nn.Module):
    """Half of the channels goes through a branch, then the halves are shuffled (ShuffleNet v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 10)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for branch in self.branches:
            first, second = x.chunk(2, dim=1)
            x = torch.cat((first, branch(second)), dim=1)
            b, c, h, w = x.size()
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return self.head(x.mean([2, 3]))


class Grouped(nn.Module):
    """ResNeXt's convolutions in groups, a gate of channels, GroupNorm in as many groups, depth multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.groups, self.expand = (
            nn.Conv2d(3, 12, 1),
            nn.Conv2d(12, 12, 3, 1, 1, groups=4),
            nn.Conv2d(12, 16, 1),
        )
        self.norm, self.deep = nn.GroupNorm(4, 12), nn.Conv2d(16, 32, 3, 1, 1, groups=16)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), nn.Sigmoid()
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.groups(F.relu(self.reduce(x)))))
        x = self.expand(x)
        x = self.deep(x * self.gate(x))
        return self.head(F.relu(x).mean((2, 3)))


class Mixer(nn.Module):
    """Layers along patches, then along channels (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.channels, self.head = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        return self.head(x.mean(1))


class LinearAttention(nn.Module):
    """Keys times values first: an outer product, in which the keys' neurons stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.patches(x).flatten(2).transpose(1, 2)).chunk(3, -1)
        return self.head(torch.bmm(F.relu(q), torch.bmm(F.relu(k).transpose(1, 2), v)).mean(1))


class Standardised(nn.Conv2d):
    """A convolution whose kernels have mean zero and deviation one (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        spread = centred.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, centred / spread, self.bias, self.stride, self.padding)


class NormalisedKernel(nn.Conv2d):
    """The same by a batch norm of kernels, with a gain for each, as in networks without norms (Brock et al. 2021)."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * 0.1).view(-1)
        kernel = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(
            self.weight
        )
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding)


def of_kernels(convolution=nn.Conv2d, change=lambda layer: layer) -> nn.Module:
    """A network whose kernels are made of others."""
    first, second, hidden = convolution(3, 6, 3, 2), convolution(6, 8, 3, 2), nn.Linear(72, 12)
    layers = [
        change(first),
        nn.ReLU(),
        change(second),
        nn.Tanh(),
        nn.Flatten(),
        change(hidden),
        nn.ReLU(),
        nn.Linear(12, 10),
    ]
    return nn.Sequential(*layers)


class GroupedKernels(nn.Module):
    """Kernels with norms, in groups, and of each channel alone."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 12, 3, groups=4),
            nn.Conv2d(12, 12, 3, groups=12),
            nn.Conv2d(12, 6, 1),
        )
        self.layers = nn.ModuleList(nn.utils.parametrizations.weight_norm(layer) for layer in convolutions)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


class ResizedPlaces(nn.Module):
    """An embedding of places that is resized to the image, and one of windows that is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 10)
        self.places, self.windows = nn.Parameter(torch.randn(1, 8, 3, 3)), nn.Parameter(torch.randn(1, 8, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        places = F.interpolate(self.places, size=(8, 8), mode="bicubic")
        x = torch.relu(self.stem(x) + places + self.windows.tile(1, 1, 4, 4))
        return self.head(x.mean((2, 3)))


class Cosine(nn.Module):
    """Classes by their cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.directions = nn.Linear(768, 12), nn.Parameter(torch.randn(10, 12))

    def forward(self, x: Tensor) -> Tensor:
        return 8 * F.linear(F.normalize(torch.relu(self.body(x.flatten(1)))), F.normalize(self.directions))


class Patches(nn.Module):
    """Patches that overlap, by unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3 * 15, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, (5, 3), dilation=(1, 2), padding=(0, 1), stride=(3, 2)).transpose(1, 2)
        return self.head(torch.relu(self.embed(patches)).mean(1))


class Recurrent(nn.Module):
    """Rows of pixels one after the other."""

    def __init__(self, layer: type[nn.RNNBase], last: bool, **options: bool | int) -> None:
        super().__init__()
        self.layer, self.last = layer(48, 6, batch_first=True, **options), last
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.layer(x.transpose(1, 2).flatten(2))
        state = state[0] if isinstance(state, tuple) else state
        ends = state[-2:].transpose(0, 1).flatten(1) if self.layer.bidirectional else state[-1]
        return self.head(ends if self.last else outputs[:, -1])


class RowsFirst(Recurrent):
    """The same with the batch as the second axis, and a state that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(1, len(x), 6, dtype=x.dtype)
        outputs, _ = self.layer(x.transpose(1, 2).flatten(2).transpose(0, 1), zeros)
        return self.head(outputs[-1])


def rows_first() -> nn.Module:
    model = RowsFirst(nn.RNN, False)
    model.layer.batch_first = False
    return model


class Cells(nn.Module):
    """A recurrent cell that forward calls row by row, from a state of zeros."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(16, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(len(x), 6, dtype=x.dtype)
        state = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for row in x.mean(1).unbind(1):
            state = self.cell(row, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class TableOfPlaces(nn.Module):
    """Rows of an image as tokens, their places looked up in a table, for each image or once for all."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each, self.embed, self.places = each, nn.Linear(16, 12), nn.Embedding(17, 12)
        self.encoder, self.head = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(16)
        places = places.unsqueeze(0).expand(len(x), -1) if self.each else places
        return self.head(self.encoder(self.embed(x.mean(1)) + self.places(places)).mean(1))


MODERN = {
    "Sequential, softmax": SequentialSoftmax,
    "module lists": ModuleLists,
    "tiny ViT": TinyVit,
    "torch's encoder": TorchEncoder,
    "torch's encoder, batch second": lambda: TorchEncoder(batch_first=False),
    "fused attention": FusedAttention,
    "windows": Windows,
    "shuffle": Shuffle,
    "grouped": Grouped,
    "Mixer": Mixer,
    "linear attention": LinearAttention,
    "weight norm": lambda: of_kernels(change=nn.utils.parametrizations.weight_norm),
    "spectral norm": lambda: of_kernels(change=nn.utils.parametrizations.spectral_norm),
    "standardised": lambda: of_kernels(Standardised),
    "normalised kernels": lambda: of_kernels(NormalisedKernel),
    "kernels in groups": GroupedKernels,
    "resized places": ResizedPlaces,
    "cosines": Cosine,
    "patches": Patches,
    "LSTM": lambda: Recurrent(nn.LSTM, False, num_layers=2),
    "GRU, both ways": lambda: Recurrent(nn.GRU, True, bidirectional=True, num_layers=2),
    "GRU, no biases": lambda: Recurrent(nn.GRU, False, bias=False),
    "RNN, rows first": rows_first,
    "LSTM cell": lambda: Cells(type("OwnCell", (nn.LSTMCell,), {})),  # named by people, as their classes are
    "GRU cell": lambda: Cells(nn.GRUCell),
    "RNN cell": lambda: Cells(nn.RNNCell),
    "table of places": lambda: TableOfPlaces(each=False),
    "table of places, for each": lambda: TableOfPlaces(each=True),
}
