"""Continuous Sparsification as an optax transformation, for any model and any training loop, without masked layers.

Weights stay in the model. Scores, temperature, round and step are in the optimizer's state. The loss is evaluated at
`masked_params(params, opt_state)`. From the gradient at this point, `update` computes the gradients of weights and
scores by the chain rule. `update` requires the masked weights as an argument and compares them with the product of
weights and masks. A loop that forgets the masks therefore fails, instead of training the dense network. One training
step, with any `loss_fn` of weights::

    masked = cs_jax.masked_params(params, opt_state)
    gradient = jax.grad(loss_fn)(masked)
    updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
    params = optax.apply_updates(params, updates)

Transformations chained before this one receive the gradient at the masked weights. Transformations chained after it
receive the updates of the weights. Weight decay belongs in `weight_tx`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from cs_jax.core import rules, schedules, trees
from cs_jax.core.rules import Where
from cs_jax.core.selection import Selection
from cs_jax.core.target_density import track_density
from cs_jax.optim.state import SparsificationState, find_state, is_ticket, soft_masks


def continuous_sparsification(
    weight_tx: optax.GradientTransformation,
    score_tx: optax.GradientTransformation,
    *,
    epochs: int,
    steps_per_epoch: int,
    rounds: int = 1,
    final_temp: float = 200.0,
    init_value: float = 0.0,
    penalty: float = 0.0,
    target_density: float | None = None,
    where: Where = None,
    allow_empty_layers: bool = False,
    score_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Transformation that trains a mask for every selected weight together with the weights (arXiv:1912.04427).

    The temperature rises with every epoch of a round and then stays at `final_temp`. At the end of a round, call
    `next_round`, `ticket_masks`, `rewind` or `freeze_ticket`.

    Args:
        weight_tx: optimizer of the weights; receives `gradient * mask` for masked weights, and the gradient for others.
        score_tx: optimizer of the scores, without weight decay. Its updates should move a score by about 1 in a search.
            Learning rate for Adam: about 1 / number of updates, mostly 0.003 to 0.03; for SGD: 0.1 to 10.
        epochs: epochs in a round, at least 1; the temperature rises during them.
        steps_per_epoch: updates in an epoch, at least 1; with `optax.MultiSteps`, several batches make one update.
        rounds: planned rounds, at least 1; with a target, the density falls to the target over these rounds.
        final_temp: temperature of a round's last epoch, finite, at least 1.
        init_value: initial score (s0 in the paper), at least -80; controls the density if there is no target.
        penalty: weight of the sum of all masks (lambda in the paper), at least 0. Leave this penalty out of the loss.
        target_density: share of the masked weights that the ticket keeps, in (0, 1]; None sets no target.
        where: rules that select the masked weights, as for `select`.
        allow_empty_layers: whether a ticket may prune all weights of a masked array.
        score_dtype: float dtype of the scores; None: each weight array's dtype, at least float32.

    Returns:
        Transformation whose `update` requires `params` and `masked_params`. Updates are NaN if
        `masked_params` does not fit weights and state; only the smallest masked array is checked.

    Raises:
        ValueError: an argument, where concrete, is out of range. In `init`: as for `select`. In `update`: a tree does
            not fit the state, or `masked_params` is `params`.
        TypeError: an argument has a wrong type. In `init`: a leaf is not an array. In `update`: an argument is missing.

    >>> from cs_jax import current_masks
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> tx = continuous_sparsification(optax.sgd(0.1), optax.sgd(1.0), epochs=10, steps_per_epoch=1)
    >>> opt_state = tx.init(params)
    >>> masked = masked_params(params, opt_state)
    >>> gradient = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2))(masked)
    >>> updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
    >>> updates["kernel"][0], current_masks(opt_state)["kernel"][0].round(2)
    (Array([-0.2, -0.2, -0.2], dtype=float32), Array([0.28, 0.28, 0.28], dtype=float32))
    """
    select = functools.partial(
        rules.select, where=where, target_density=target_density, allow_empty_layers=allow_empty_layers
    )
    schedule = _Schedule(epochs, steps_per_epoch, rounds, final_temp)
    search = _Search(weight_tx, score_tx, _Scores(init_value, penalty, score_dtype), schedule, select)
    return optax.GradientTransformationExtraArgs(search.init, search.update)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Schedule:
    """Length of a search and its temperatures; arguments of `continuous_sparsification`, may be traced."""

    epochs: Any
    steps_per_epoch: Any
    rounds: Any
    final_temp: Any

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "rounds"):
            value = getattr(self, name)
            if not isinstance(value, Tracer) and not (_is_scalar(value, np.integer) and np.asarray(value) >= 1):
                raise ValueError(f"{name} {value!r}: must be a whole number of at least 1")
        _check_finite("final_temp", self.final_temp, least=1)

    def temperature(self, step: ArrayLike) -> jax.Array:
        epoch = jnp.asarray(jnp.minimum(step // jnp.asarray(self.steps_per_epoch), self.epochs - 1), float)
        return jnp.asarray(schedules.temperature(epoch, self.epochs, self.final_temp), float)


@dataclass(frozen=True)
class _Scores:
    """Initial value, penalty and dtype of the scores; arguments of `continuous_sparsification`."""

    init_value: Any
    penalty: Any
    dtype: DTypeLike | None

    def __post_init__(self) -> None:
        _check_finite("penalty", self.penalty, least=0)


@dataclass(frozen=True, eq=False)
class _Search:
    """The functions `init` and `update` of the transformation."""

    weight_tx: optax.GradientTransformation
    score_tx: optax.GradientTransformation
    scores: _Scores
    schedule: _Schedule
    select: Callable[[PyTree], Selection]

    def __post_init__(self) -> None:
        for name in ("weight_tx", "score_tx"):
            tx = getattr(self, name)
            if not (hasattr(tx, "init") and hasattr(tx, "update")):
                raise TypeError(f"{name} {tx!r}: must be an optax transformation, such as optax.sgd(0.1)")
            object.__setattr__(self, name, optax.with_extra_args_support(tx))

    def init(self, params: optax.Params) -> SparsificationState:
        _check_arrays(params)
        selection = self.select(params)
        scores = _init_scores(selection, params, self.scores.init_value, self.scores.dtype)
        return SparsificationState(
            step=jnp.zeros((), jnp.int32),
            round=jnp.zeros((), jnp.int32),
            temperature=self.schedule.temperature(0),
            first_temperature=self.schedule.temperature(0),
            final_temperature=jnp.asarray(self.schedule.final_temp, float),
            init_value=jnp.asarray(self.scores.init_value, float),
            scores=scores,
            masks={},
            weight_state=self.weight_tx.init(params),
            score_state=self.score_tx.init(scores),
            selection=selection,
        )

    def update(
        self,
        updates: optax.Updates,
        state: SparsificationState,
        params: optax.Params | None = None,
        *,
        masked_params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, SparsificationState]:
        _check_update(state, updates, params, masked_params)
        assert params is not None
        if is_ticket(state):
            step_masks, pull_back = state.masks, None
        else:
            step_masks, pull_back = jax.vjp(functools.partial(soft_masks, state), state.scores)
        gradient = _nan_unless_masked(updates, step_masks, params, masked_params)
        weight_gradient = trees.apply_masks(gradient, step_masks)
        updates, weight_state = self.weight_tx.update(weight_gradient, state.weight_state, params, **extra)
        state = state._replace(step=state.step + 1, weight_state=weight_state)
        if pull_back is None:
            return updates, state
        (score_gradient,) = pull_back(_mask_gradient(gradient, step_masks, params, self.scores.penalty))
        return updates, self._update_scores(state, score_gradient, extra)

    def _update_scores(
        self, state: SparsificationState, gradient: PyTree, extra: dict[str, Any]
    ) -> SparsificationState:
        score_updates, score_state = self.score_tx.update(gradient, state.score_state, state.scores, **extra)
        scores = optax.apply_updates(state.scores, score_updates)
        if state.selection.budgets:
            scores = jax.lax.cond(
                state.step % self.schedule.steps_per_epoch == 0,
                lambda scores: track_density(state.selection, scores, state.round, self.schedule.rounds),
                lambda scores: scores,
                scores,
            )
        return state._replace(
            temperature=self.schedule.temperature(state.step),
            init_value=jnp.asarray(self.scores.init_value, float),
            scores=scores,
            score_state=score_state,
        )


def _init_scores(selection: Selection, params: PyTree, value: ArrayLike, dtype: DTypeLike | None) -> PyTree:
    """Initial scores; a score array with the shape of its weight array also has the sharding of the weights."""
    weights = trees.leaves_by_path(params)
    scores = trees.leaves_by_path(selection.init_scores(value, dtype=dtype))
    alike = {
        path: jnp.full_like(weights[path], value, dtype=score.dtype)
        for path, score in scores.items()
        if score.shape == weights[path].shape
    }
    return trees.nest(scores | alike)


def masked_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """Weights multiplied by the current masks: the point at which to evaluate the loss and its gradient.

    The masks are soft while scores are trained, and the ticket's fixed masks afterwards. Call this function outside of
    `jax.grad`: `update` multiplies the gradient at the result by the masks.

    Args:
        params: weights, any pytree; leaves without a mask, such as functions in an Equinox module, are unchanged.
        opt_state: state of `continuous_sparsification`, or of a chain or another wrapper around it.

    Returns:
        Tree like `params` (structure, shapes, dtypes).

    Raises:
        ValueError: `opt_state` does not contain exactly one state of `continuous_sparsification`, or the state belongs
            to other weights.
        TypeError: the result is differentiated with respect to `params`.
    """
    state = find_state(opt_state)
    masked = trees.apply_masks(params, state.masks if is_ticket(state) else soft_masks(state, state.scores))
    leaves = trees.leaves_by_path(masked)
    paths = [leaf.path for leaf in state.selection.masked]
    guarded = _not_differentiable([leaves[path] for path in paths])
    return trees.replace_leaves(masked, dict(zip(paths, guarded, strict=True)))


@jax.custom_jvp
def _not_differentiable(arrays: list[Any]) -> list[Any]:
    return arrays


@_not_differentiable.defjvp
def _refuse_to_differentiate(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "masked_params: must not be differentiated, because update would apply the masks a second time; take the "
        "gradient at its result: masked = masked_params(params, opt_state); jax.grad(loss_fn)(masked)"
    )


def _mask_gradient(gradient: PyTree, step_masks: PyTree, params: optax.Params, penalty: ArrayLike) -> PyTree:
    """Gradient of loss and penalty for the masks, by the chain rule from the gradient at `weights * mask`."""
    weights, gradients = trees.leaves_by_path(params), trees.leaves_by_path(gradient)
    found = {
        path: weights[path].astype(mask.dtype) * gradients[path].astype(mask.dtype) + jnp.asarray(penalty, mask.dtype)
        for path, mask in trees.leaves_by_path(step_masks).items()
    }
    return trees.nest(found)


def _nan_unless_masked(gradient: PyTree, step_masks: PyTree, params: PyTree, masked: PyTree) -> PyTree:
    """The gradient, or NaN if `masked` differs from `params` times the masks, so that the next step shows the error.

    Inside jit, only the values show a wrong argument. Only the smallest masked array is compared, to 1%, which
    is more than the rounding of any weight dtype.
    """
    path, mask = min(trees.leaves_by_path(step_masks).items(), key=lambda item: item[1].size)
    weights, seen = (trees.leaves_by_path(tree)[path] for tree in (params, masked))
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    product = weights.astype(wide) * mask.astype(wide)
    wrong = jnp.abs(seen.astype(wide) - product) > 0.01 * jnp.abs(product) + 1e-3 * jnp.max(jnp.abs(product))
    factor = jnp.where(jnp.any(wrong), jnp.nan, 1.0)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)


def _check_update(
    state: SparsificationState, gradient: optax.Updates, params: optax.Params | None, masked: optax.Params | None
) -> None:
    if not isinstance(state, SparsificationState):
        raise ValueError(f"state {type(state).__name__}: must be a state that init or update returned")
    if masked is None:
        raise TypeError(
            "masked_params None: update requires the masked weights; compute masked = cs_jax.masked_params(params, "
            "opt_state), take the gradient at masked, and call update(gradient, opt_state, params, "
            "masked_params=masked)"
        )
    if params is None:
        raise TypeError("params None: update requires the weights, for the gradient of the scores")
    weights, seen, gradients = map(trees.leaves_by_path, (params, masked, gradient))
    for leaf in state.selection.masked:
        for what, leaves in (("params", weights), ("masked_params", seen), ("gradient", gradients)):
            if leaf.path not in leaves:
                raise ValueError(f"{what} with leaves {trees.names(leaves)}: must contain masked leaf {leaf.name!r}")
            shape = jnp.shape(leaves[leaf.path])
            if shape != leaf.shape:
                raise ValueError(f"{what} {leaf.name!r} of shape {shape}: must have shape {leaf.shape}")
        if seen[leaf.path] is weights[leaf.path]:
            raise ValueError(
                f"masked_params {leaf.name!r}: must not be the weight itself; pass cs_jax.masked_params(params, "
                "opt_state), and the gradient there"
            )


def _check_finite(name: str, value: Any, least: float) -> None:
    if not isinstance(value, Tracer) and not (_is_scalar(value, np.number) and least <= np.asarray(value) < np.inf):
        raise ValueError(f"{name} {value!r}: must be a finite number of at least {least}")


def _check_arrays(params: PyTree) -> None:
    for path, leaf in trees.leaves_by_path(params).items():
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params {trees.name(path)!r} of type {type(leaf).__name__}: must be an array; remove other leaves, as "
                "with eqx.filter(model, eqx.is_inexact_array)"
            )


def _is_scalar(value: Any, kind: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 0 and np.issubdtype(array.dtype, kind)
