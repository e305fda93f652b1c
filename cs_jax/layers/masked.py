"""Masked forms of Flax Linen's layers, all made by one mixin.

A masked layer multiplies its kernel by the array under the same path in the "masks" collection. Masked layers do not
use scores, temperature or rounds. `init` makes masks of ones, so a new masked network computes the same as the dense
network.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from cs_jax.layers import convolution

# At run time the mixin is not a module, so that `__init_subclass__` can detect a mixin after the module in the list of
# base classes. Type checkers see a module.
_Mixin = nn.Module if TYPE_CHECKING else object


class Masked(_Mixin):
    """Mixin for a Linen module: multiplies each named parameter by its leaf of the "masks" collection.

    In the list of base classes, the mixin comes before the module that it masks. `init` makes masks: ones with the
    shape and dtype of the parameter, and with its sharding names, if any. Every `apply` needs masks, and casts a
    mask of another dtype to the dtype of the parameter.

    Lifted transforms must carry "masks" in the same way as "params": name both in `variable_axes` of `nn.scan` and
    `nn.vmap`. Around a masked layer use `cs_jax.WeightNorm` and `cs_jax.SpectralNorm`: the Flax classes of these names
    transform every collection, including masks, and raise a NameInUseError in `init`.

    Attributes:
        masked_params: names of the parameters to mask; ("kernel",) unless the class overrides it.

    Raises:
        TypeError: when the class is defined, if the mixin comes after the module or `masked_params` is not a tuple.
        ValueError: in `init` or `apply`, if a named parameter does not exist or is not a float array, or if a mask is
            missing, cannot be made, or has another shape than its parameter.

    >>> class Scale(Masked, nn.Module):
    ...     masked_params = ("scale",)
    ...
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return x * self.param("scale", nn.initializers.ones, x.shape[-1:])
    >>> variables = {"params": {"scale": jnp.array([3.0, 4.0])}, "masks": {"scale": jnp.array([0.0, 1.0])}}
    >>> Scale().apply(variables, jnp.array([1.0, 1.0]))
    Array([0., 4.], dtype=float32)
    """

    masked_params: ClassVar[tuple[str, ...]] = ("kernel",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if isinstance(cls.masked_params, str):
            raise TypeError(f"masked_params {cls.masked_params!r} of {cls.__name__}: must be a tuple of names")
        if not issubclass(cls, nn.Module):
            return
        order = cls.__mro__
        if order.index(Masked) > order.index(nn.Module):
            raise TypeError(
                f"{cls.__name__}: Masked must be the first base class, because a mixin after the module masks "
                f"nothing; write class {cls.__name__}(Masked, ...)"
            )
        # Linen makes parameters in one compact method, or in setup.
        declares = next((name for name in dir(cls) if hasattr(getattr(cls, name), "compact")), "setup")
        setattr(cls, declares, _checking_masked_params(getattr(cls, declares)))

    def param(self, name: str, init_fn: Callable, *init_args: Any, unbox: bool = True, **init_kwargs: Any) -> Any:
        """`nn.Module.param`, multiplied by its mask if `name` is in `masked_params`."""
        if name not in self.masked_params:
            return super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        boxed = super().param(name, init_fn, *init_args, unbox=False, **init_kwargs)
        self._check_mask_exists(name)
        boxed_mask = self.variable("masks", name, lambda: jax.tree.map(jnp.ones_like, boxed), unbox=False).value
        weight, mask = nn.unbox(boxed), nn.unbox(boxed_mask)
        if not (hasattr(weight, "dtype") and jnp.issubdtype(weight.dtype, jnp.floating)):
            found = getattr(weight, "dtype", type(weight).__name__)
            raise ValueError(f"{self._describe(name)} of dtype {found}: must be a float array, because it is masked")
        if jnp.shape(mask) != weight.shape:
            raise ValueError(
                f"mask of {self._describe(name)} with shape {jnp.shape(mask)}: must have the shape of the weights, "
                f"{weight.shape}"
            )
        masked = weight * mask.astype(weight.dtype)
        return masked if unbox else jax.tree.map(lambda _: masked, boxed)

    def _check_mask_exists(self, name: str) -> None:
        if self.has_variable("masks", name) or (self.is_initializing() and self.is_mutable_collection("masks")):
            return
        if self.is_initializing():
            raise ValueError(
                f"{self._describe(name)}: cannot make its mask, because a lifted transform around the layer does not "
                "carry the collection 'masks'; name 'masks' with 'params', as in variable_axes={'params': 0, 'masks': "
                "0}, and in mutable= if you set mutable="
            )
        raise ValueError(
            f"{self._describe(name)}: needs a mask in the collection 'masks'; apply the model to "
            "{'params': ..., 'masks': ...}"
        )

    def _describe(self, name: str) -> str:
        return "/".join((*self.path, name))


def _checking_masked_params(declare: Callable) -> Callable:
    """The method that makes a module's parameters, followed by a check that the masked parameters exist."""
    if hasattr(declare, "checks_masked_params"):
        return declare

    @functools.wraps(declare)
    def declare_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "_declares_params" in vars(self):  # called through super(): the outermost call checks
            return declare(self, *args, **kwargs)
        object.__setattr__(self, "_declares_params", True)
        try:
            result = declare(self, *args, **kwargs)
        finally:
            object.__delattr__(self, "_declares_params")
        for name in self.masked_params:
            found = self.get_variable("params", name)
            if found is None or isinstance(found, Mapping):
                raise ValueError(
                    f"masked_params {name!r} of {type(self).__name__} at {'/'.join(self.path) or 'the top'}: must be a "
                    "parameter that self.param makes"
                )
        return result

    declare_and_check.checks_masked_params = True  # pyright: ignore
    return declare_and_check


class MaskedDense(Masked, nn.Dense):
    """`flax.linen.Dense` with a masked kernel, (in, out): same fields, parameters, and results for masks of ones."""


class MaskedDenseGeneral(Masked, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with a masked kernel: same fields, parameters, and results for masks of ones."""


class MaskedEinsum(Masked, nn.Einsum):
    """`flax.linen.Einsum` with a masked kernel: same fields, parameters, and results for masks of ones."""


class MaskedConv(Masked, nn.Conv):
    """`flax.linen.Conv` with a masked kernel, `(*window, in / groups, out)`: same results for masks of ones.

    Flax's field `mask` still works: it is a constant mask, which multiplies the kernel in addition to the learned mask.
    """

    conv_general_dilated_cls: Any = convolution.get_convolve


class MaskedConvLocal(Masked, nn.ConvLocal):
    """`flax.linen.ConvLocal` with a masked kernel, `(*positions, window * in, out)`: same results for masks of ones."""


class MaskedConvTranspose(Masked, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with a masked kernel: same fields, parameters, and results for masks of ones."""


class MaskedEmbed(Masked, nn.Embed):
    """`flax.linen.Embed` with a masked embedding, (entries, features), in look-ups and in `attend`."""

    masked_params = ("embedding",)


class WeightNorm(nn.WeightNorm):
    """`flax.linen.WeightNorm` for masked layers: normalises the kernel, which is masked afterwards."""

    def _l2_normalize(self, path: tuple, vs: Any) -> Any:
        return vs if path[0].key == "masks" else super()._l2_normalize(path, vs)


class SpectralNorm(nn.SpectralNorm):
    """`flax.linen.SpectralNorm` for masked layers: normalises the kernel, which is masked afterwards."""

    def _spectral_normalize(self, path: tuple, vs: Any, update_stats: bool) -> Any:
        return vs if path[0].key == "masks" else super()._spectral_normalize(path, vs, update_stats)
