"""What all formats export: a plain network in float32, with the normalisation of its images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import PyTree

from cs_jax.core.errors import ConfigError
from cs_jax.data.images import normalize
from cs_jax.models.multiply_adds import evaluation_mode
from cs_jax.tickets import equivalence
from cs_jax.tickets.fold import fold
from cs_jax.tickets.shrink import shrink
from cs_jax.tickets.ticket import LoadedTicket


@dataclass(frozen=True, eq=False)
class Served:
    """A network without masks, and what is known of it."""

    model: nn.Module
    variables: dict[str, PyTree]  # "params" and, where norms are left, "batch_stats"; float32
    image_shape: tuple[int, ...]  # of one image
    normalization: Mapping[str, Any] | None  # "mean" and "std", in units of a pixel; None where nobody knows

    @property
    def about(self) -> dict[str, Any]:
        """What files say of it, JSON values."""
        return {"image_shape": list(self.image_shape), "normalization": self.normalization}

    def input_of(self, images: ArrayLike) -> jax.Array:
        """What the network takes for images (n, height, width, channels) of 0 to 255: as they are if nobody knows."""
        images = jnp.asarray(images)
        if self.normalization is None:
            return images
        return normalize(images, *(jnp.asarray(self.normalization[name], jnp.float32) for name in ("mean", "std")))

    def logits(self, images: ArrayLike) -> jax.Array:
        """Logits (n, num_classes) of images (n, height, width, channels) of 0 to 255."""
        return self.model.apply(self.variables, self.input_of(images), **evaluation_mode(self.model))  # pyright: ignore[reportReturnType]


def serve(ticket: LoadedTicket, *, keep_shapes: bool = False, fold_batch_norm: bool = False) -> Served:
    """What is exported of a ticket: shrunk, masks multiplied in, in float32 whatever it was trained in.

    Args:
        ticket: with a model.
        keep_shapes: do not shrink it.
        fold_batch_norm: fold its norms into the convolutions before them.

    Raises:
        ConfigError: it has no model, no image shape, or weights that are not finite; a mask keeps nothing of its layer;
            or its module does not say how it is wired.
    """
    model, variables, image_shape = _network(ticket)
    try:
        if not keep_shapes:
            model, variables = shrink(model, variables, image_shape)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error}; with --keep-shapes nothing is taken out") from error
    try:
        model, variables = fold(model, variables, image_shape, batch_norm=fold_batch_norm)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return Served(model, variables, image_shape, ticket.metadata.get("normalization"))


def masked_logits(ticket: LoadedTicket, images: np.ndarray) -> np.ndarray:
    """Logits of the ticket as it is, with its masks, in float32: what an export is compared with."""
    model, variables, image_shape = _network(ticket)
    masked = Served(model, variables, image_shape, ticket.metadata.get("normalization"))
    return np.asarray(jax.jit(masked.logits)(images))


def _network(ticket: LoadedTicket) -> tuple[nn.Module, dict[str, PyTree], tuple[int, ...]]:
    """Module and variables, both for float32, and the shape of an image."""
    image_shape = tuple((ticket.metadata.get("model") or {}).get("image_shape") or ())
    if ticket.model is None:
        raise ConfigError("is of a model of its maker's own, wanted one of cs_jax.models: export that in Python")
    if len(image_shape) != 3:
        raise ConfigError(f"image_shape: got {list(image_shape)}, wanted height, width and channels")
    equivalence.check_finite(ticket.variables)
    model = ticket.model.clone(dtype=None) if hasattr(ticket.model, "dtype") else ticket.model  # pyright: ignore[reportCallIssue]
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), ticket.variables), image_shape
