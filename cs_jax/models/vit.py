"""Vision transformers: ViT-Ti."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jax.typing import DTypeLike

from cs_jax.core.arrays import logits_dtype
from cs_jax.layers.masked import MaskedDenseGeneral
from cs_jax.models.features import DEFAULT_FEATURES, Features, submodule_features
from cs_jax.models.wiring import Signal, Wiring

# DeiT truncates at 100 standard deviations, so in effect not at all.
narrow_normal = nn.initializers.normal(0.02)


class VisionTransformer(nn.Module):
    """Vision transformer: patch embedding, class token, learned positions, pre-LayerNorm blocks, a classifier.

    The classifier reads the class token. Maskable: the kernels of query, key, value, out and of the MLPs. Always dense:
    patch embedding, positions, class token, LayerNorms, biases, classifier. As in DeiT, initial weights are normal with
    standard deviation 0.02, and initial biases are 0. The initial patch embedding is LeCun normal. There is no dropout.

    Call: `model.apply(variables, images, train=...)` with float images (batch, height, width, channels) returns
    logits (batch, num_classes). `train` has no effect. Positions are learned for one image size.

    Attributes:
        num_classes: number of outputs of the classifier.
        depth: number of blocks.
        width: features of a token; the hidden layer of an MLP has 4 * `width`.
        num_heads: attention heads; divides `width`.
        patch_size: side of a patch in pixels; None means 16 for images of at least 64x64 pixels, else 4.
        dtype: dtype of the computation; by default the promoted dtype of images and weights.
        param_dtype: dtype of the weights.
        remat: store only the inputs of blocks for the backward pass, which recomputes the other activations.
        features: output features by layer name and heads by block name, where they differ from the defaults; set by
            `shrink`.
        dense: class of the masked layers; `flax.linen.DenseGeneral` makes the plain dense network.

    Raises:
        ValueError: the patch size does not divide height and width of the images, or `num_heads` does not divide the
            width.

    References:
        Dosovitskiy et al., 2020, arXiv:2010.11929; Touvron et al., 2020, arXiv:2012.12877, for ViT-Ti.
    """

    num_classes: int = 10
    depth: int = 12
    width: int = 192
    num_heads: int = 3
    patch_size: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    remat: bool = False
    features: Features = DEFAULT_FEATURES
    dense: type[nn.DenseGeneral] = MaskedDenseGeneral

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = self._tokens(x)
        make_block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for name in self._blocks():
            heads = self.features.get(name, self.num_heads)
            features = FrozenDict({**submodule_features(self.features, name), "heads": heads})
            x = make_block(self.num_heads, features, dense=self.dense, name=name, **dtypes)(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm", **dtypes)(x[:, 0])
        dtypes["dtype"] = logits_dtype(self.dtype)
        return nn.Dense(self.num_classes, kernel_init=narrow_normal, name="classifier", **dtypes)(x)

    def _blocks(self) -> list[str]:
        return [f"block{block}" for block in range(1, self.depth + 1)]

    def wire(self, net: Wiring, x: Signal) -> Signal:
        x = net.fixed(net.conv(x, "patch_embedding", zero_padded=False), "class_token", "position_embedding")
        for name in self._blocks():
            y = net.fixed(x, f"{name}/norm_attention")
            x = net.add(x, net.attention(y, name))
            y = net.dense(net.fixed(x, f"{name}/norm_mlp"), f"{name}/mlp_in")
            y = net.activation(y, partial(nn.gelu, approximate=False))
            x = net.add(x, net.dense(y, f"{name}/mlp_out"))
        return net.dense(net.fixed(x, "norm"), "classifier")

    def resize(self, features: Features) -> "VisionTransformer":
        return self.clone(features=FrozenDict({**self.features, **features}))

    def _tokens(self, images: jax.Array) -> jax.Array:
        """Class token and embedded patches plus positions: (batch, 1 + patches, width)."""
        size = _patch_size(images, self.patch_size)
        embed = nn.Conv(
            self.width,
            (size, size),
            strides=size,
            padding="VALID",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="patch_embedding",
        )
        patches = embed(images)
        patches = patches.reshape(patches.shape[0], -1, self.width)
        token = self.param("class_token", narrow_normal, (1, 1, self.width), self.param_dtype)
        positions = self.param(
            "position_embedding", narrow_normal, (1, 1 + patches.shape[1], self.width), self.param_dtype
        )
        token = jnp.broadcast_to(token.astype(patches.dtype), (patches.shape[0], 1, self.width))
        return jnp.concatenate([token, patches], axis=1) + positions.astype(patches.dtype)


class TransformerBlock(nn.Module):
    """LayerNorm and self-attention, then LayerNorm and MLP with GELU; each pair is added to its input.

    Maps (batch, tokens, width) to the same shape. A head has `width / num_heads` features, also where `features` has an
    entry "heads" with fewer heads.
    """

    num_heads: int
    features: Features = DEFAULT_FEATURES
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    dense: type[nn.DenseGeneral] = MaskedDenseGeneral

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads}: must divide the width {width}")
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(nn.LayerNorm, epsilon=1e-6, **dtypes)
        dense = partial(self.dense, kernel_init=narrow_normal, **dtypes)
        y = norm(name="norm_attention")(x)
        heads = (self.features.get("heads", self.num_heads), width // self.num_heads)
        query, key, value = (dense(heads, name=name)(y) for name in ("query", "key", "value"))
        # jax.nn's attention is faster on accelerators, but computes in float32 even for float64 inputs.
        attend = nn.dot_product_attention if query.dtype == jnp.float64 else jax.nn.dot_product_attention
        y = attend(query, key, value)
        x = x + dense(width, axis=(-2, -1), name="out")(y)
        y = dense(self.features.get("mlp_in", 4 * width), name="mlp_in")(norm(name="norm_mlp")(x))
        return x + dense(width, name="mlp_out")(nn.gelu(y, approximate=False))


ViTTiny = partial(VisionTransformer, depth=12, width=192, num_heads=3)
"""ViT-Ti/16: 5,717,416 weights for 224x224 images and 1000 classes, 5,308,416 of them maskable."""


def _patch_size(images: jax.Array, size: int | None) -> int:
    """Side of a patch for images (batch, height, width, channels); None selects it by the size of the images."""
    height, width = images.shape[1:3]
    if size is None:
        size = 16 if min(height, width) >= 64 else 4
    if size < 1 or height % size or width % size:
        raise ValueError(f"images {height}x{width}: patch size {size} must divide height and width")
    return size
