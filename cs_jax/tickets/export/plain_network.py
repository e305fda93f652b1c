"""Plain network that all export formats write: float32, without masks, with the normalisation constants of images."""

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
class PlainNetwork:
    """A float32 network without masks, and the normalisation constants of its images."""

    model: nn.Module
    variables: dict[str, PyTree]  # "params" and, unless all BatchNorm is folded, "batch_stats"; float32
    image_shape: tuple[int, ...]  # of one image: height, width, channels
    normalization: Mapping[str, Any] | None  # "mean" and "std" by channel, for pixels of 0 to 255; None if unknown

    @property
    def about(self) -> dict[str, Any]:
        """Image shape and normalisation constants as JSON values, for the metadata of files."""
        return {"image_shape": list(self.image_shape), "normalization": self.normalization}

    def input_of(self, images: ArrayLike) -> jax.Array:
        """Normalised images (n, height, width, channels) from pixels of 0 to 255; unchanged without constants."""
        images = jnp.asarray(images)
        if self.normalization is None:
            return images
        return normalize(images, *(jnp.asarray(self.normalization[name], jnp.float32) for name in ("mean", "std")))

    def logits(self, images: ArrayLike) -> jax.Array:
        """Logits (n, num_classes) of images (n, height, width, channels) with pixels of 0 to 255."""
        return self.model.apply(self.variables, self.input_of(images), **evaluation_mode(self.model))  # pyright: ignore[reportReturnType]


def make_plain_network(
    ticket: LoadedTicket, *, keep_shapes: bool = False, fold_batch_norm: bool = False
) -> PlainNetwork:
    """Plain network of a ticket: shrunk, masks multiplied into weights, float32 for every training dtype.

    Args:
        ticket: a ticket with a model.
        keep_shapes: do not shrink the network.
        fold_batch_norm: fold BatchNorm into the convolutions before it.

    Raises:
        ConfigError: the ticket has no model, no image shape, or weights that are not finite; a mask keeps no weight of
            its layer; or the module does not describe its wiring.
    """
    model, variables, image_shape = _network(ticket)
    try:
        if not keep_shapes:
            model, variables = shrink(model, variables, image_shape)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{error}; use --keep-shapes to export without shrinking") from error
    try:
        model, variables = fold(model, variables, image_shape, batch_norm=fold_batch_norm)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return PlainNetwork(model, variables, image_shape, ticket.metadata.get("normalization"))


def masked_logits(ticket: LoadedTicket, images: np.ndarray) -> np.ndarray:
    """Logits of the masked network in float32, the reference for exports."""
    model, variables, image_shape = _network(ticket)
    masked = PlainNetwork(model, variables, image_shape, ticket.metadata.get("normalization"))
    return np.asarray(jax.jit(masked.logits)(images))


def _network(ticket: LoadedTicket) -> tuple[nn.Module, dict[str, PyTree], tuple[int, ...]]:
    """Module and variables of a ticket in float32, and the shape of an image."""
    image_shape = tuple((ticket.metadata.get("model") or {}).get("image_shape") or ())
    if ticket.model is None:
        raise ConfigError("ticket has a custom model; this command supports cs_jax.models only")
    if len(image_shape) != 3:
        raise ConfigError(
            f"metadata: model.image_shape {list(image_shape)}: must be height, width and channels; save the ticket "
            "with them"
        )
    equivalence.check_finite(ticket.variables)
    model = ticket.model.clone(dtype=None) if hasattr(ticket.model, "dtype") else ticket.model  # pyright: ignore[reportCallIssue]
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), ticket.variables), image_shape
