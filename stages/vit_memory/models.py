"""ViTs with a frozen backbone and something small to train: a linear head, prompts, or a gate to an associative memory.

`backbone_name` is a timm model, a Hugging Face repository of a ViT-MAE, a file of pretrain_backbone, or a ViT (taken over, not
copied). Inputs are float images [n, 3, h, w] as the backbone's `prepare` makes them; outputs are logits [n, num_classes].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stages.common.backbone import BackboneConfig, build_vit, load_backbone
from stages.vit_memory.hopfield import ClassMemory, Mode, SlotMemory

Position = Literal["after_attn", "after_ffn"]


def as_vit(backbone_name: str | VisionTransformer, pretrained: bool, image_size: int = 224) -> VisionTransformer:
    """Return the ViT that `backbone_name` means; `pretrained` and `image_size` count for timm's and Hugging Face's names alone."""
    if isinstance(backbone_name, VisionTransformer):
        return backbone_name
    if backbone_name.endswith(".safetensors"):
        return load_backbone(Path(backbone_name)).vit
    return build_vit(BackboneConfig(backbone_name, pretrained, image_size, None))


class HeadedViT(nn.Module):
    """A ViT and a linear head. With freeze_backbone the head alone trains, and the ViT stays in evaluation mode."""

    def __init__(self, vit: VisionTransformer, num_classes: int, freeze_backbone: bool = True) -> None:
        super().__init__()
        self.vit, self.frozen = vit.requires_grad_(not freeze_backbone), freeze_backbone
        self.head = nn.Linear(vit.embed_dim, num_classes)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As ever, but a frozen backbone stays in evaluation mode: no dropout."""
        super().train(mode)
        self.vit.train(mode and not self.frozen)
        return self

    def embed(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n t d"]:
        """Return the tokens that enter the first block, class token first."""
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(x)))

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return the class token that the head reads."""
        return self.vit.forward_features(x)[:, 0]

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        return self.head(self.features(x))


class LinearProbeViT(HeadedViT):
    """A linear head on the frozen class token. Trains head.weight and head.bias."""

    def __init__(self, backbone_name: str | VisionTransformer, pretrained: bool = True, num_classes: int = 10) -> None:
        super().__init__(as_vit(backbone_name, pretrained), num_classes)


class PromptedViT(HeadedViT):
    """A frozen ViT whose blocks see prompts beside the patches (Jia et al. 2022, arXiv:2203.12119). Trains prompts and head.

    Prompts are drawn as Jia et al. do: uniform, as Xavier would draw the patch embedding.
    """

    deep: bool  # new prompts before every block [blocks, n, d]; else before the first alone [n, d]

    def __init__(
        self,
        backbone_name: str | VisionTransformer,
        pretrained: bool = True,
        num_classes: int = 10,
        num_prompts: int = 10,
    ) -> None:
        super().__init__(as_vit(backbone_name, pretrained), num_classes)
        d = self.vit.embed_dim
        limit = (6 / (3 * self.vit.patch_embed.patch_size[0] ** 2 + d)) ** 0.5
        blocks = (len(self.vit.blocks),) if self.deep else ()
        self.prompts = nn.Parameter(torch.empty(*blocks, num_prompts, d).uniform_(-limit, limit))


class VPTShallow(PromptedViT):
    """Prompts before the first block, which go through all of them."""

    deep = False

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        tokens = self.embed(x)
        prompts = self.prompts.expand(len(x), -1, -1)
        return self.vit.norm(self.vit.blocks(torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)))[:, 0]


class VPTDeep(PromptedViT):
    """New prompts before every block, in place of what became of the last ones."""

    deep = True

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        tokens = self.embed(x)
        patches = tokens.shape[1] - 1
        for block, prompts in zip(self.vit.blocks, self.prompts, strict=True):
            kept = tokens[:, :1], prompts.expand(len(x), -1, -1), tokens[:, -patches:]
            tokens = block(torch.cat(kept, 1))
        return self.vit.norm(tokens)[:, 0]


class MemoryBlock(nn.Module):
    """A block of a ViT whose tokens read from a memory after attention or after the FFN: x + gate * out(read(x)).

    The gate starts at zero, so that the block starts as it was, to the bit; its gradient does not vanish, since `out` is the
    identity at first.
    """

    def __init__(self, block: Block, memory: SlotMemory | ClassMemory, dim: int, position: Position) -> None:
        super().__init__()
        self.block, self.memory, self.position = block, memory, position
        self.gate = nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.out.weight)

    def site(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Return the tokens at the place where the memory is read, and is to be written."""
        x = x + self.block.drop_path1(self.block.ls1(self.block.attn(self.block.norm1(x))))
        return x if self.position == "after_attn" else self._ffn(x)

    def _ffn(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        return x + self.block.drop_path2(self.block.ls2(self.block.mlp(self.block.norm2(x))))

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        x = self.site(x)
        x = x + self.gate * self.out(self.memory.read(x))
        return self._ffn(x) if self.position == "after_attn" else x


class MemoryAugmentedViT(HeadedViT):
    """A ViT with an associative memory in some blocks. Trains their gates and output maps, and the head; `memorise` writes.

    beta of 0.125, which is common, retrieves nothing from keys of length 1: all patterns at once (see diagnose_memory).
    """

    def __init__(
        self,
        backbone_name: str | VisionTransformer = "vit_base_patch16_224",
        pretrained: bool = True,
        num_classes: int = 10,
        mem_size: int = 1000,
        hopfield_position: Position = "after_attn",
        beta: float = 16.0,
        freeze_backbone: bool = True,
        memory_mode: Mode = "associative",
        memory_blocks: Sequence[int] = (-1,),
    ) -> None:
        super().__init__(as_vit(backbone_name, pretrained), num_classes, freeze_backbone)
        d = self.vit.embed_dim
        for i in memory_blocks:
            slots = memory_mode == "associative"
            memory = SlotMemory(d, mem_size, beta) if slots else ClassMemory(d, num_classes, memory_mode, beta)
            self.vit.blocks[i] = MemoryBlock(self.vit.blocks[i], memory, d, hopfield_position)
        self.train()

    @property
    def memory_blocks(self) -> list[MemoryBlock]:
        """The blocks that hold a memory, first to last."""
        return [block for block in self.vit.blocks if isinstance(block, MemoryBlock)]

    @torch.no_grad()
    def memorise(self, x: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"]) -> None:
        """Write the images' class tokens, as they are where each memory is read, under their labels."""
        tokens = self.embed(x)
        for block in self.vit.blocks:
            if isinstance(block, MemoryBlock):
                block.memory.write(block.site(tokens)[:, 0], labels)
            tokens = block(tokens)

    def forget(self, label: int) -> None:
        """Remove a class from every memory."""
        for block in self.memory_blocks:
            block.memory.forget(label)
