"""Masked forms of Flax Linen's layers, all made by one mixin.

A masked layer knows nothing of scores, temperature or rounds: it multiplies its kernel by what it finds under the
same path in the "masks" collection. `init` makes masks of ones, so a fresh masked network is the dense network.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from cs_jax.layers import convolution

# The mixin is no module itself, so that one on the wrong side of a module can be told; type checkers see one.
_Mixin = nn.Module if TYPE_CHECKING else object


class Masked(_Mixin):
    """Mixin for a Linen module: multiplies the named parameters by their leaf of the "masks" collection.

    It comes before the module that it masks. Masks are made by `init`, as ones of the parameter's shape and dtype
    (and sharding names, where it has some), and are needed by every `apply`; there a mask of another dtype is cast
    to the parameter's.

    Lifted transforms carry "masks" as they carry "params": name it in `variable_axes` of `nn.scan` and `nn.vmap`.
    Around a masked layer use `cs_jax.WeightNorm` and `cs_jax.SpectralNorm`: Flax's own transform every collection,
    masks too, and stop at `init` with a NameInUseError.

    Attributes:
        masked_params: names of the parameters to mask; ("kernel",) unless the class says otherwise.

    Raises:
        TypeError: when the class is made, if the mixin comes after the module or `masked_params` is no tuple.
        ValueError: when it is initialised or applied, if a named parameter does not exist, or a mask is missing or
            has another shape than its parameter.

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
            raise TypeError(f"masked_params of {cls.__name__} is {cls.masked_params!r}, wanted a tuple of names")
        if not issubclass(cls, nn.Module):
            return
        order = cls.__mro__
        if order.index(Masked) > order.index(nn.Module):
            raise TypeError(f"{cls.__name__} masks nothing: put Masked first, as in class {cls.__name__}(Masked, ...)")
        # Linen makes parameters in one compact method, or in setup.
        declares = next((name for name in dir(cls) if hasattr(getattr(cls, name), "compact")), "setup")
        setattr(cls, declares, _checks_masked_params(getattr(cls, declares)))

    def param(self, name: str, init_fn: Callable, *init_args: Any, unbox: bool = True, **init_kwargs: Any) -> Any:
        """`nn.Module.param`, multiplied by its mask where `name` is in `masked_params`."""
        if name not in self.masked_params:
            return super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
        boxed = super().param(name, init_fn, *init_args, unbox=False, **init_kwargs)
        self._check_masks_are_there(name)
        boxed_mask = self.variable("masks", name, lambda: jax.tree.map(jnp.ones_like, boxed), unbox=False).value
        weight, mask = nn.unbox(boxed), nn.unbox(boxed_mask)
        if not (hasattr(weight, "dtype") and jnp.issubdtype(weight.dtype, jnp.floating)):
            found = getattr(weight, "dtype", type(weight).__name__)
            raise ValueError(f"{self._describe(name)} is masked and has dtype {found}, wanted a float array")
        if jnp.shape(mask) != weight.shape:
            raise ValueError(f"mask of {self._describe(name)} has shape {jnp.shape(mask)}, its weights {weight.shape}")
        masked = weight * mask.astype(weight.dtype)
        return masked if unbox else jax.tree.map(lambda _: masked, boxed)

    def _check_masks_are_there(self, name: str) -> None:
        if self.has_variable("masks", name) or (self.is_initializing() and self.is_mutable_collection("masks")):
            return
        if self.is_initializing():
            raise ValueError(
                f"{self._describe(name)} cannot make its mask: a lifted transform around it does not carry the "
                "collection 'masks'; name it beside 'params', as in variable_axes={'params': 0, 'masks': 0} (or in "
                "mutable=, where that was given)"
            )
        raise ValueError(
            f"{self._describe(name)} has no mask: the collection 'masks' is missing or does not hold it; apply the "
            "model to {'params': ..., 'masks': ...}"
        )

    def _describe(self, name: str) -> str:
        return "/".join((*self.path, name))


def _checks_masked_params(declare: Callable) -> Callable:
    """Wraps the method that makes a module's parameters, to see afterwards that the masked ones were among them."""
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
                    f"{type(self).__name__} at {'/'.join(self.path) or 'the top'} masks {name!r}, which is no "
                    "parameter of it: masked_params names what self.param makes"
                )
        return result

    declare_and_check.checks_masked_params = True  # pyright: ignore
    return declare_and_check


class MaskedDense(Masked, nn.Dense):
    """`flax.linen.Dense` with its kernel, (in, out), masked: same fields, parameters and results at masks of one."""


class MaskedDenseGeneral(Masked, nn.DenseGeneral):
    """`flax.linen.DenseGeneral` with its kernel masked: same fields, parameters and results at masks of one."""


class MaskedEinsum(Masked, nn.Einsum):
    """`flax.linen.Einsum` with its kernel masked: same fields, parameters and results at masks of one."""


class MaskedConv(Masked, nn.Conv):
    """`flax.linen.Conv` with its kernel, `(*window, in / groups, out)`, masked; the rest is as there.

    Its own `mask` field stays too: a constant mask that is multiplied on top of the learned one.
    """

    conv_general_dilated_cls: Any = convolution.chosen


class MaskedConvLocal(Masked, nn.ConvLocal):
    """`flax.linen.ConvLocal` with its kernel, `(*positions, window * in, out)`, masked; the rest is as there."""


class MaskedConvTranspose(Masked, nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with its kernel masked: same fields, parameters and results at masks of one."""


class MaskedEmbed(Masked, nn.Embed):
    """`flax.linen.Embed` with its embedding, (entries, features), masked, in look-ups and in `attend` alike."""

    masked_params = ("embedding",)


class WeightNorm(nn.WeightNorm):
    """`flax.linen.WeightNorm` for use around a masked layer: normalises the kernel, which is masked afterwards."""

    def _l2_normalize(self, path: tuple, vs: Any) -> Any:
        return vs if path[0].key == "masks" else super()._l2_normalize(path, vs)


class SpectralNorm(nn.SpectralNorm):
    """`flax.linen.SpectralNorm` for use around a masked layer: normalises the kernel, which is masked afterwards."""

    def _spectral_normalize(self, path: tuple, vs: Any, update_stats: bool) -> Any:
        return vs if path[0].key == "masks" else super()._spectral_normalize(path, vs, update_stats)
