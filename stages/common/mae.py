"""Masked autoencoders: a ViT that fills in hidden patches, and the weights of Hugging Face's ViT-MAE under timm's names.

Axes: n images, p patches, q numbers of a patch.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

State = dict[str, Tensor]


class MaskedAutoencoder(nn.Module):
    """A ViT that sees some patches, and one transformer block that fills in the others (He et al. 2021, arXiv:2111.06377).

    `vit` is the encoder, taken over and not copied.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit, d, patches = vit, vit.embed_dim, vit.patch_embed.num_patches
        self.patch_size = vit.patch_embed.patch_size[0]
        self.embed = nn.Linear(d, d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.position = nn.Parameter(0.02 * torch.randn(1, patches + 1, d))
        self.block = Block(d, vit.blocks[0].attn.num_heads)
        self.norm = nn.LayerNorm(d)
        self.predict = nn.Linear(d, 3 * self.patch_size**2)

    def patchify(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n p q"]:
        """Return the pixels of each patch, patches row by row."""
        s = self.patch_size
        return x.unfold(2, s, s).unfold(3, s, s).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Float[Tensor, "n p q"]) -> Float[Tensor, "n 3 h w"]:
        """Return the images of which these are the patches."""
        s, side = self.patch_size, round(patches.shape[1] ** 0.5)
        return patches.view(-1, side, side, 3, s, s).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * s, side * s)

    def forward(
        self, x: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n p"], mask_ratio: float
    ) -> tuple[Float[Tensor, "n p q"], Bool[Tensor, "n p"]]:
        """Return the predicted pixels of all patches, and which of them were hidden: those of the largest `noise`."""
        vit, n = self.vit, len(x)
        tokens = vit.patch_embed(x) + vit.pos_embed[:, 1:]
        order = noise.argsort(1)
        back, seen = order.argsort(1), round(order.shape[1] * (1 - mask_ratio))
        visible = tokens.gather(1, order[:, :seen, None].expand(-1, -1, tokens.shape[2]))
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(n, -1, -1)
        code = self.embed(vit.norm(vit.blocks(torch.cat([cls, visible], 1))))
        filled = torch.cat([code[:, 1:], self.mask_token.expand(n, order.shape[1] - seen, -1)], 1)
        filled = filled.gather(1, back[..., None].expand(-1, -1, filled.shape[2]))
        decoded = self.block(torch.cat([code[:, :1], filled], 1) + self.position)
        return self.predict(self.norm(decoded[:, 1:])), back >= seen

    def loss(self, x: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n p"], mask_ratio: float) -> Float[Tensor, ""]:
        """Return the mean squared error of the hidden patches' pixels."""
        predicted, hidden = self(x, noise, mask_ratio)
        return (predicted - self.patchify(x)).square().mean(2)[hidden].mean()


def vit_of_mae(config: dict[str, float]) -> VisionTransformer:
    """Return the timm ViT that computes what a ViT-MAE encoder of this config.json does; its LayerNorm's epsilon matters."""
    return VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=config["intermediate_size"] / config["hidden_size"],
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        num_classes=0,
    )


def mae_to_timm(state: State) -> State:
    """Return the encoder weights of Hugging Face's ViTMAE under timm's names.

    Both of its spellings are known: of files (vit.encoder.layer.0.attention.attention.query) and of transformers 5 in memory
    (vit.layers.0.attention.q_proj). The encoder shuffles its patches even at mask ratio 0, unless it is given `noise` that ascends.
    """
    spellings = {
        r"^vit\.": "",
        r"^encoder\.layer\.": "layers.",
        r"^embeddings\.cls_token": "cls_token",
        r"^embeddings\.position_embeddings": "pos_embed",
        r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
        r"^layernorm\.": "norm.",
        r"^layers\.": "blocks.",
    }
    return respell({name: tensor for name, tensor in state.items() if not name.startswith("decoder")}, spellings)


def mae_to_decoder(state: State, patch_size: int) -> State:
    """Return the decoder weights of Hugging Face's ViTMAE, as transformers 5 names them in memory, for a `MaskedAutoencoder`.

    Names and the order of a patch's pixels change. They fit if the decoder has the encoder's width and heads, one block, and no
    biases of queries, keys and values.
    """
    spellings = {
        r"^decoder\.": "",
        r"^decoder_layers\.0\.": "block.",
        r"^decoder_pos_embed": "position",
        r"^decoder_pred\.": "predict.",
        r"^decoder_": "",
    }
    named = respell({name: tensor for name, tensor in state.items() if name.startswith("decoder")}, spellings)
    for name in ("predict.weight", "predict.bias"):  # of pixels, theirs of a patch are (row, column, channel)
        named[name] = named[name].unflatten(0, (patch_size, patch_size, -1)).movedim(2, 0).flatten(0, 2)
    return named


def respell(state: State, spellings: dict[str, str]) -> State:
    """Return weights of ViTMAE with patterns of their names replaced, and within blocks with timm's names and matrices."""
    within_blocks: dict[str, str | Callable[[re.Match[str]], str]] = {
        r"attention\.attention\.(query|key|value)": lambda match: f"attention.{match[1][0]}_proj",
        r"attention\.output\.dense": "attention.o_proj",
        r"intermediate\.dense": "mlp.fc1",
        r"(?<!attention\.)output\.dense": "mlp.fc2",
        r"layernorm_before": "norm1",
        r"layernorm_after": "norm2",
        r"attention\.o_proj": "attn.proj",
    }
    named = {}
    for name, tensor in state.items():
        for pattern, spelling in (spellings | within_blocks).items():
            name = re.sub(pattern, spelling, name)
        named[name] = tensor
    for query in [name for name in named if "q_proj" in name]:
        parts = [named.pop(query.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[query.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return named
