"""Ordinary classifiers, as people write them who never heard of this project: for images of 3 x 16 x 16 and 10 classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNetView(nn.Module):
    """PyTorch's old tutorial: sizes are multiplied in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 2 * 2, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    def num_flat_features(self, x: Tensor) -> int:
        features = 1
        for size in x.size()[1:]:
            features *= size
        return features


class MnistExample(nn.Module):
    """PyTorch's example for MNIST: dropout of channels, log_softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 1), nn.Conv2d(8, 16, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(16 * 36, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = torch.flatten(self.dropout1(F.max_pool2d(x, 2)), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


class FunctionalDropout(nn.Module):
    """Functions instead of modules, in place, batch size by hand, softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 5, padding=2), nn.Linear(8 * 64, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        batch = x.shape[0]
        x = F.relu(self.conv(x), inplace=True)
        x = F.avg_pool2d(x, 2).reshape(batch, -1)
        features = F.dropout(torch.tanh(self.fc(x)), 0.3, self.training)
        if return_features:
            return features
        return torch.softmax(self.head(features), -1)


class Vgg(nn.Module):
    """A list of widths, batch norms, ReLUs in place."""

    def __init__(self, widths=(8, "M", 12, 12, "M", 16, "M")) -> None:
        super().__init__()
        layers, channels = [], 3
        for width in widths:
            if width == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers, nn.AvgPool2d(kernel_size=1, stride=1))
        self.classifier = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class LambdaLayer(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BasicBlock(nn.Module):
    def __init__(self, before: int, planes: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != planes:
            if option == "A":
                more = planes // 4
                self.shortcut = LambdaLayer(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more), "constant", 0))
            else:
                self.shortcut = nn.Sequential(nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNetCifar(nn.Module):
    """ResNet-20 for CIFAR as in pytorch_resnet_cifar10, with the paper's shortcuts without weights (A) or with (B)."""

    def __init__(self, option: str = "A", blocks: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.planes = 8
        self.layer1 = self.stage(8, blocks, 1, option)
        self.layer2 = self.stage(16, blocks, 2, option)
        self.layer3 = self.stage(32, blocks, 2, option)
        self.linear = nn.Linear(32, 10)

    def stage(self, planes: int, blocks: int, stride: int, option: str) -> nn.Sequential:
        layers = []
        for step in [stride] + [1] * (blocks - 1):
            layers.append(BasicBlock(self.planes, planes, step, option))
            self.planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Mlp(nn.Module):
    """BatchNorm1d, dropout, an input of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn1, self.drop = nn.Linear(3 * 256, 32), nn.BatchNorm1d(32), nn.Dropout(0.2)
        self.fc2, self.bn2, self.fc3 = nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], -1)
        x = self.drop(F.relu(self.bn1(self.fc1(x))))
        return self.fc3(self.drop(F.relu(self.bn2(self.fc2(x)))))


class PreluMlp(nn.Module):
    """A slope for each unit, a slope for all, a slope by hand, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.fc1, self.act1 = nn.Flatten(), nn.Linear(768, 24), nn.PReLU(24)
        self.fc2, self.act2, self.norm = nn.Linear(24, 24), nn.PReLU(), nn.LayerNorm(24)
        self.fc3, self.head = nn.Linear(24, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.fc1(self.flatten(x)))
        x = self.act2(self.norm(self.fc2(x)))
        return self.head(F.leaky_relu(self.fc3(x), 0.2))


class Normalised(nn.Module):
    """The input is normalised inside, by buffers; the mean over pixels is the head's; one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.49, 0.48, 0.44]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.2, 0.2]).view(1, 3, 1, 1), persistent=False)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 12, 4, padding="same")
        self.head, self.auxiliary = nn.Linear(12, 10), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        x = F.elu(self.conv1(x), alpha=0.5)
        x = F.gelu(self.conv2(2 * x - 1), approximate="tanh")
        return self.head(x.mean(dim=[2, 3], keepdim=True).squeeze(-1).squeeze(-1))


class MobileNet(nn.Module):
    """Depthwise separable convolutions, ReLU6, a pool to one pixel."""

    def __init__(self) -> None:
        super().__init__()

        def separable(before: int, after: int, stride: int) -> nn.Sequential:
            depthwise = [nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False), nn.BatchNorm2d(before)]
            pointwise = [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)]
            return nn.Sequential(*depthwise, nn.ReLU6(True), *pointwise, nn.ReLU6(True))

        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), separable(8, 12, 1), separable(12, 16, 2))
        self.pool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.body(x))
        return self.fc(x.squeeze())


class SqueezeExcite(nn.Module):
    """Channels are weighed by what a small network makes of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Sequential(nn.Linear(12, 4), nn.ReLU(inplace=True), nn.Linear(4, 12), nn.Sigmoid())
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        y = self.conv(x)
        b, c, _, _ = y.size()
        gate = self.excite(self.pool(y).view(b, c)).view(b, c, 1, 1)
        x = F.relu(x + y * gate.expand_as(y))
        return self.head(torch.mean(x, (2, 3)))


class Inception(nn.Module):
    """Branches are concatenated, one of them twice; channels are split again; a maximum over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.five = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(3, 8, 5, 1, 2)
        self.merge, self.norm, self.head = nn.Conv2d(22, 12, 1), nn.GroupNorm(3, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.one(x))
        x = torch.cat([one, F.relu(self.three(x)), F.relu(self.five(x)), one], dim=1)
        x = F.relu(self.norm(self.merge(x)))
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a * b, a - 0.5 * b], 1)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


class ConvNextLike(nn.Module):
    """Channels last, LayerNorm over channels, a learned scale of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma, self.last, self.head = nn.Parameter(0.1 * torch.ones(8)), nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.narrow(F.gelu(self.wide(self.norm(y))))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(self.last(x.mean([-2, -1])))


class Shared(nn.Module):
    """One block is used three times; a stem for grey images reads the mean colour; a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8 * 16, 10)
        self.offset = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.mean(1, keepdim=True)))
        for _ in range(3):
            x = x + torch.relu(self.block(x) + self.offset)
        return self.head(F.interpolate(x, scale_factor=0.5).flatten(start_dim=1))


class NormAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: asserts, and calls the function with its own tensors."""

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        assert x.shape[1] == self.num_features
        training = self.training or (self.running_mean is None)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return F.relu_(x)


class TimmLike(nn.Module):
    """Norms with activations, dilation, a fixed border, the pool that counts no border."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 2, dilation=2, bias=False), NormAct(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, bias=False), NormAct(12)
        self.pool, self.head = nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.pool(self.bn2(self.conv2(F.pad(x, (1, 1, 1, 1)))))
        return self.head(x.flatten(2).mean(-1))


def sequential() -> nn.Sequential:
    """Return nothing but a list of modules."""
    convolutions = [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    ]
    convolutions += [nn.Conv2d(8, 12, 3, dilation=2), nn.BatchNorm2d(12, affine=False), nn.Hardtanh(-0.5, 2.0)]
    hidden = [nn.Flatten(), nn.LazyLinear(20), nn.Softplus(2.0), nn.Linear(20, 10), nn.LogSoftmax(dim=1)]
    model = nn.Sequential(*convolutions, *hidden)
    model(torch.zeros(2, 3, 16, 16))
    return model


CLASSIFIERS = {
    "LeNet, view": LeNetView,
    "MNIST example": MnistExample,
    "functional": FunctionalDropout,
    "VGG": Vgg,
    "ResNet-20, option A": ResNetCifar,
    "ResNet-20, option B": lambda: ResNetCifar("B"),
    "MLP": Mlp,
    "MLP, PReLU": PreluMlp,
    "normalised input": Normalised,
    "MobileNet": MobileNet,
    "squeeze and excite": SqueezeExcite,
    "Inception": Inception,
    "ConvNeXt": ConvNextLike,
    "shared block": Shared,
    "timm": TimmLike,
    "Sequential": sequential,
}
