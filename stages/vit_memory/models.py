"""ViTs with a frozen backbone and something small to train: a linear head, prompts, or a gate to an associative memory.

`backbone_name` is a timm model, a Hugging Face repository of a ViT-MAE, a file of pretrain_backbone, a BackboneConfig (random
weights), or a ViT of timm's class VisionTransformer (taken over, not copied). Inputs are float images [n, 3, h, w] as the backbone's
`prepare` makes them; outputs are logits [n, num_classes].

Axes: n images, h and w pixels, t tokens, p patches, d features, c classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from stages.common.backbone import BackboneConfig, build_vit, load_backbone
from stages.vit_memory.checks import check_choice, check_counts, check_label, check_labels
from stages.vit_memory.hopfield import ClassMemory, Mode, SlotMemory

Position = Literal["after_attn", "after_ffn"]

OTHER_FILES = {".pt", ".pth", ".bin", ".ckpt"}  # of weights, which do not say of what model


def as_vit(
    backbone_name: str | VisionTransformer | BackboneConfig, pretrained: bool, image_size: int = 224
) -> VisionTransformer:
    """Return the ViT that `backbone_name` means; `pretrained` and `image_size` count for timm's and Hugging Face's names alone.

    ValueError if it means none.
    """
    if isinstance(backbone_name, VisionTransformer):
        return backbone_name
    if isinstance(backbone_name, BackboneConfig):
        return build_vit(backbone_name)
    expected = "a model's name, a .safetensors file of pretrain_backbone, or a VisionTransformer of timm"
    if not isinstance(backbone_name, str | Path):
        raise ValueError(f"backbone_name: expected {expected}, got an object of {type(backbone_name).__name__}")
    path = Path(backbone_name)
    if path.suffix == ".safetensors":
        return load_backbone(path).vit
    if isinstance(backbone_name, Path) or path.suffix in OTHER_FILES or path.exists():
        raise ValueError(f"backbone_name: expected {expected}, got {str(path)!r}")
    return build_vit(BackboneConfig(backbone_name, pretrained, image_size, None))


def recipe(backbone_name: str | VisionTransformer | BackboneConfig, image_size: int = 224) -> BackboneConfig | None:
    """Return what rebuilds the ViT that `backbone_name` means, its weights apart; None of a ViT that came as an object."""
    if isinstance(backbone_name, BackboneConfig):
        return backbone_name
    if isinstance(backbone_name, VisionTransformer):
        return None
    if Path(backbone_name).suffix == ".safetensors":
        return replace(load_backbone(Path(backbone_name)).config, pretrained=False)
    return BackboneConfig(backbone_name, False, image_size, None)


class HeadedViT(nn.Module):
    """A ViT and a linear head. With freeze_backbone the head alone trains, and the ViT stays in evaluation mode.

    The head reads the class token, or what timm pools where the ViT is made for that (its `global_pool`: avg, map and others).
    """

    def __init__(self, vit: VisionTransformer, num_classes: int, freeze_backbone: bool = True) -> None:
        super().__init__()
        check_counts(num_classes=num_classes)
        if vit.cls_token is None and not vit.global_pool:
            raise ValueError("backbone: expected a class token, or global_pool='avg' or the like, got neither")
        self.vit, self.frozen = vit.requires_grad_(not freeze_backbone), freeze_backbone
        self.head = nn.Linear(vit.embed_dim, num_classes)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As ever, but a frozen backbone stays in evaluation mode: no dropout."""
        super().train(mode)
        self.vit.train(mode and not self.frozen)
        return self

    def check_images(self, x: Tensor) -> None:
        """ValueError unless these are images as the backbone reads them."""
        channels, size = self.vit.in_chans, self.vit.patch_embed.img_size
        fits = x.ndim == 4 and x.shape[1] == channels and x.is_floating_point()
        if not fits or (not self.vit.dynamic_img_size and tuple(x.shape[2:]) != tuple(size)):
            expected = f"float images [n, {channels}, {size[0]}, {size[1]}] as `prepare` of a backbone makes them"
            raise ValueError(f"x: expected {expected}, got {x.dtype} of shape {list(x.shape)}")

    def embed(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n t d"]:
        """Return the tokens that enter the first block: class token and registers, if there are any, then patches."""
        self.check_images(x)
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(x)))

    def pool(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
        """Return what the head reads of the last block's tokens."""
        if self.vit.global_pool in ("", "token"):
            return tokens[:, 0]
        return self.vit.forward_head(tokens, pre_logits=True)

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Return what the head reads of images."""
        self.check_images(x)
        return self.pool(self.vit.forward_features(x))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c"]:
        return self.head(self.features(x))


class LinearProbeViT(HeadedViT):
    """A linear head on frozen features. Trains head.weight and head.bias."""

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
        check_counts(at_least=0, num_prompts=num_prompts)
        d = self.vit.embed_dim
        limit = (6 / (3 * self.vit.patch_embed.patch_size[0] ** 2 + d)) ** 0.5
        blocks = (len(self.vit.blocks),) if self.deep else ()
        self.prompts = nn.Parameter(torch.empty(*blocks, num_prompts, d).uniform_(-limit, limit))

    def prompted(self, tokens: Float[Tensor, "n t d"], prompts: Float[Tensor, "k d"]) -> Float[Tensor, "n _ d"]:
        """Return the tokens with prompts between class token and registers on one side, patches on the other."""
        first = self.vit.num_prefix_tokens
        return torch.cat([tokens[:, :first], prompts.expand(len(tokens), -1, -1), tokens[:, first:]], 1)

    def unprompted(self, tokens: Float[Tensor, "n _ d"]) -> Float[Tensor, "n t d"]:
        """Return the tokens without what became of the prompts."""
        first, prompts = self.vit.num_prefix_tokens, self.prompts.shape[-2]
        return torch.cat([tokens[:, :first], tokens[:, first + prompts :]], 1)


class VPTShallow(PromptedViT):
    """Prompts before the first block, which go through all of them."""

    deep = False

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        tokens = self.vit.blocks(self.prompted(self.embed(x), self.prompts))
        return self.pool(self.vit.norm(self.unprompted(tokens)))


class VPTDeep(PromptedViT):
    """New prompts before every block, in place of what became of the last ones."""

    deep = True

    def features(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        tokens = self.embed(x)
        for block, prompts in zip(self.vit.blocks, self.prompts, strict=True):
            tokens = self.unprompted(block(self.prompted(tokens, prompts)))
        return self.pool(self.vit.norm(tokens))


class MemoryBlock(nn.Module):
    """A block of a ViT whose tokens read from a memory after attention or after the FFN: x + gate * out(read(x)).

    The gate starts at zero, so that the block starts as it was, to the bit; its gradient does not vanish, since `out` is the
    identity at first.
    """

    def __init__(self, block: Block, memory: SlotMemory | ClassMemory, dim: int, position: Position) -> None:
        super().__init__()
        check_choice("hopfield_position", position, Position)
        if not isinstance(block, Block):
            raise ValueError(
                f"block: expected timm's Block, which adds attention, then FFN, got {type(block).__name__}"
            )
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


class MemoryAugmentedViT(HeadedViT, PyTorchModelHubMixin, library_name="weightlens", license="apache-2.0"):
    """A ViT with an associative memory in some blocks. Trains their gates and output maps, and the head; `memorise` writes.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are Hugging Face's: what is saved holds the ViT and what was memorised,
    and is loaded without the file or the name that the backbone came from.

    beta of 0.125, which is common, retrieves nothing from keys of length 1: all patterns at once (see diagnose_memory).
    """

    def __init__(
        self,
        backbone_name: str | VisionTransformer | BackboneConfig = "vit_base_patch16_224",
        pretrained: bool = True,
        num_classes: int = 10,
        mem_size: int = 1000,
        hopfield_position: Position = "after_attn",
        beta: float = 16.0,
        freeze_backbone: bool = True,
        memory_mode: Mode = "associative",
        memory_blocks: Sequence[int] = (-1,),
    ) -> None:
        check_choice("memory_mode", memory_mode, Mode)
        check_choice("hopfield_position", hopfield_position, Position)
        super().__init__(as_vit(backbone_name, pretrained), num_classes, freeze_backbone)
        d, depth = self.vit.embed_dim, len(self.vit.blocks)
        places = {i % depth for i in memory_blocks if -depth <= i < depth}
        if not places or len(places) < len(memory_blocks):
            expected = f"one or more blocks of {-depth} to {depth - 1}, each once"
            raise ValueError(f"memory_blocks: expected {expected}, got {tuple(memory_blocks)}")
        for i in memory_blocks:
            if memory_mode == "associative":  # noqa: SIM108 (only so mypy knows the other modes below)
                memory = SlotMemory(d, mem_size, beta)
            else:
                memory = ClassMemory(d, num_classes, memory_mode, beta)
            self.vit.blocks[i] = MemoryBlock(self.vit.blocks[i], memory, d, hopfield_position)
        self.recipe = recipe(backbone_name)
        self.train()

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.recipe is None:
            raise ValueError(
                "backbone_name: expected a name or a file, which can be written down, got a ViT: pass a BackboneConfig"
            )
        config: Any = self._hub_mixin_config
        self._hub_mixin_config = config | {"backbone_name": asdict(self.recipe)}
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, **options: Any) -> Self:  # type: ignore[override]  # of what it is called with one is another here
        found = options.pop("backbone_name", None)
        if not isinstance(found, dict):
            raise ValueError(
                f"{options['model_id']}: expected what save_pretrained wrote, got a config.json without a backbone"
            )
        return super()._from_pretrained(backbone_name=BackboneConfig(**found), strict=True, **options)

    @property
    def memory_blocks(self) -> list[MemoryBlock]:
        """The blocks that hold a memory, first to last."""
        return [block for block in self.vit.blocks if isinstance(block, MemoryBlock)]

    @torch.no_grad()
    def memorise(self, x: Float[Tensor, "n 3 h w"], labels: Int[Tensor, " n"]) -> None:
        """Write the images' class tokens, as they are where each memory is read, under their labels; the mean of the patches'
        tokens if there is no class token.
        """
        check_labels(labels, len(x), self.head.out_features)
        tokens, first = self.embed(x), self.vit.num_prefix_tokens
        for block in self.vit.blocks:
            if isinstance(block, MemoryBlock):
                site = block.site(tokens)
                patterns = site[:, first:].mean(1) if self.vit.cls_token is None else site[:, 0]
                block.memory.write(patterns, labels)
            tokens = block(tokens)

    def forget(self, label: int) -> None:
        """Remove a class from every memory."""
        check_label(label, self.head.out_features)
        for block in self.memory_blocks:
            block.memory.forget(label)
