"""Continuous Sparsification as an optax transformation: any model and any training loop, without a masked layer.

Weights stay in the model; scores, temperature, round and step are in the optimizer's state. The loss is evaluated at
`masked_params(params, opt_state)`, and from the gradient there `update` derives those of weights and scores by the
chain rule. `update` asks for the masked weights by name, and compares them with its own, so that a loop that forgot
them fails instead of training the dense network.
"""

import functools
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
    """Trains a mask for every selected weight together with the weights.

    Each step, with `loss_fn` any loss of the model's weights::

        masked = cs_jax.masked_params(params, opt_state)
        gradient = jax.grad(loss_fn)(masked)
        updates, opt_state = tx.update(gradient, opt_state, params, masked_params=masked)
        params = optax.apply_updates(params, updates)

    Transformations chained before this one see the gradient at the masked weights, those after it the weights'
    updates; decay belongs into `weight_tx`. The temperature rises with every epoch of a round, and stays at
    `final_temp` when its steps are done; `next_round`, `ticket_masks`, `rewind` and `freeze_ticket` do what comes then.

    Args:
        weight_tx: optimizer of the weights; sees `gradient * mask` for masked weights, the gradient for others.
        score_tx: optimizer of the scores, without decay. It should move them by about 1 in a search: Adam with about 1
            over the number of updates, 0.003 to 0.03 in most, or SGD with 0.1 to 10.
        epochs: epochs in a round, at least 1: the steps in which the temperature rises.
        steps_per_epoch: updates in an epoch, at least 1; with `optax.MultiSteps` not every batch is one.
        rounds: rounds that are planned; under a target, the density falls to it over them.
        final_temp: temperature of a round's last epoch, at least 1.
        init_value: initial score (s0 in the paper), at least -80; without a target, the dial for density.
        penalty: weight of the penalty on the sum of all masks (lambda in the paper), at least 0. The loss need not
            contain it.
        target_density: share of the masked weights that the ticket keeps, in (0, 1].
        where: rules for what is masked, as `select` takes them.
        allow_empty_layers: whether a ticket may leave a masked array without any weight.
        score_dtype: of the scores; by default that of the weights, at least float32.

    Returns:
        A transformation whose `update` wants `params` and `masked_params`. Where these are not what `masked_params`
        gives for its state, its updates are not a number.

    Raises:
        ValueError: an argument is out of range; in `init`, whatever `select` finds wrong; in `update`, trees that do
            not fit or `masked_params` that are the weights themselves.
        TypeError: `update` is called without `masked_params` or `params`; an argument has another type.

    References:
        Savarese et al., 2020, arXiv:1912.04427.

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
    _check_arguments(weight_tx, score_tx, epochs, steps_per_epoch, rounds, final_temp, penalty)
    of_weights, of_scores = map(optax.with_extra_args_support, (weight_tx, score_tx))

    def temperature(step: ArrayLike) -> jax.Array:
        epoch = jnp.asarray(jnp.minimum(step // jnp.asarray(steps_per_epoch), epochs - 1), float)
        return jnp.asarray(schedules.temperature(epoch, epochs, final_temp), float)

    def init(params: optax.Params) -> SparsificationState:
        _check_arrays(params)
        selection = rules.select(params, where, target_density=target_density, allow_empty_layers=allow_empty_layers)
        scores = _init_scores(selection, params, init_value, score_dtype)
        return SparsificationState(
            step=jnp.zeros((), jnp.int32),
            round=jnp.zeros((), jnp.int32),
            temperature=temperature(0),
            first_temperature=temperature(0),
            final_temperature=jnp.asarray(final_temp, float),
            init_value=jnp.asarray(init_value, float),
            scores=scores,
            masks={},
            weight_state=of_weights.init(params),
            score_state=of_scores.init(scores),
            selection=selection,
        )

    def update(
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
        slopes = _spoiled_unless_masked(updates, step_masks, params, masked_params)
        gradient = trees.apply_masks(slopes, step_masks)
        updates, weight_state = of_weights.update(gradient, state.weight_state, params, **extra)
        if pull_back is None:
            return updates, state._replace(step=state.step + 1, weight_state=weight_state)
        (score_gradient,) = pull_back(_mask_slopes(slopes, step_masks, params, penalty))
        score_updates, score_state = of_scores.update(score_gradient, state.score_state, state.scores, **extra)
        step = state.step + 1
        scores = optax.apply_updates(state.scores, score_updates)
        if state.selection.budgets:
            scores = jax.lax.cond(
                step % steps_per_epoch == 0,
                lambda scores: track_density(state.selection, scores, state.round, rounds),
                lambda scores: scores,
                scores,
            )
        return updates, state._replace(
            step=step,
            temperature=temperature(step),
            init_value=jnp.asarray(init_value, float),
            scores=scores,
            weight_state=weight_state,
            score_state=score_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _init_scores(selection: Selection, params: PyTree, value: ArrayLike, dtype: DTypeLike | None) -> PyTree:
    """Scores that lie on the devices where their weights do, if they have the same shape."""
    weights = trees.leaves_by_path(params)
    scores = trees.leaves_by_path(selection.init_scores(value, dtype=dtype))
    alike = {
        path: jnp.full_like(weights[path], value, dtype=score.dtype)
        for path, score in scores.items()
        if score.shape == weights[path].shape
    }
    return trees.nest(scores | alike)


def masked_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """The weights under the masks of now, at which the loss and its gradient are to be evaluated.

    Soft masks while scores are trained, a ticket's fixed ones afterwards. The state may be that of a chain or another
    wrapper around `continuous_sparsification`. `update` derives the weights' gradient from the one here, so this
    function cannot be differentiated through: call it outside of `jax.grad`.

    Args:
        params: weights; other leaves, such as the functions in an Equinox module, are returned as they are.
        opt_state: the optimizer's state.

    Returns:
        Tree like `params`.

    Raises:
        ValueError: there is no state of `continuous_sparsification` in `opt_state`, or not just one, or it belongs to
            other weights.
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
        "masked_params is differentiated, and update would apply the masks a second time; wanted the gradient at its "
        "result: masked = masked_params(params, opt_state); jax.grad(loss_fn)(masked)"
    )


def _mask_slopes(slopes: PyTree, step_masks: PyTree, params: optax.Params, penalty: ArrayLike) -> PyTree:
    """Gradient of loss and penalty with respect to the masks, by the chain rule from that at `weights * mask`."""
    weights, slopes_by_path = trees.leaves_by_path(params), trees.leaves_by_path(slopes)
    found = {
        path: weights[path].astype(mask.dtype) * slopes_by_path[path].astype(mask.dtype)
        + jnp.asarray(penalty, mask.dtype)
        for path, mask in trees.leaves_by_path(step_masks).items()
    }
    return trees.nest(found)


def _spoiled_unless_masked(gradient: PyTree, step_masks: PyTree, params: PyTree, masked: PyTree) -> PyTree:
    """The gradient; not a number where `masked` is not what it should be, which shows at the next step.

    Compared on the smallest masked array, to a hundredth, which is more than any rounding of the weights' dtype.
    """
    path, mask = min(trees.leaves_by_path(step_masks).items(), key=lambda item: item[1].size)
    weights, seen = (trees.leaves_by_path(tree)[path] for tree in (params, masked))
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    product = weights.astype(wide) * mask.astype(wide)
    off = jnp.abs(seen.astype(wide) - product) > 0.01 * jnp.abs(product) + 1e-3 * jnp.max(jnp.abs(product))
    spoiled = jnp.where(jnp.any(off), jnp.nan, 1.0)
    return jax.tree.map(lambda slope: slope * spoiled.astype(slope.dtype), gradient)


def _check_update(
    state: SparsificationState, gradient: optax.Updates, params: optax.Params | None, masked: optax.Params | None
) -> None:
    if not isinstance(state, SparsificationState):
        raise ValueError(f"state: got {type(state).__name__}, wanted what init or update returned")
    if masked is None:
        raise TypeError(
            "update() lacks masked_params: without them the gradient is likely that of the dense network; wanted "
            "masked = cs_jax.masked_params(params, opt_state), the gradient taken at masked, and "
            "update(gradient, opt_state, params, masked_params=masked)"
        )
    if params is None:
        raise TypeError("update() lacks params: the scores' gradient is made with them")
    weights, seen, slopes = map(trees.leaves_by_path, (params, masked, gradient))
    for leaf in state.selection.masked:
        for what, leaves in (("params", weights), ("masked_params", seen), ("gradient", slopes)):
            if leaf.path not in leaves:
                raise ValueError(f"{what}: no leaf {leaf.name!r}, which is masked; got {trees.names(leaves)}")
            if jnp.shape(leaves[leaf.path]) != leaf.shape:
                raise ValueError(f"{what} {leaf.name!r}: got shape {jnp.shape(leaves[leaf.path])}, wanted {leaf.shape}")
        if seen[leaf.path] is weights[leaf.path]:
            raise ValueError(
                f"masked_params {leaf.name!r} is the weight itself: wanted cs_jax.masked_params(params, opt_state), "
                "and the gradient taken there"
            )


def _check_arguments(
    weight_tx: Any, score_tx: Any, epochs: Any, steps_per_epoch: Any, rounds: Any, final_temp: Any, penalty: Any
) -> None:
    for name, tx in (("weight_tx", weight_tx), ("score_tx", score_tx)):
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise TypeError(f"{name}: got {tx!r}, wanted an optax transformation, as optax.sgd(0.1) makes one")
    for name, value in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch), ("rounds", rounds)):
        if not isinstance(value, Tracer) and not (_is_scalar(value, np.integer) and np.asarray(value) >= 1):
            raise ValueError(f"{name}: got {value!r}, wanted a whole number of at least 1")
    for name, value, least in (("final_temp", final_temp, 1), ("penalty", penalty, 0)):
        if not isinstance(value, Tracer) and not (_is_scalar(value, np.number) and least <= np.asarray(value) < np.inf):
            raise ValueError(f"{name}: got {value!r}, wanted a finite number of at least {least}")


def _check_arrays(params: PyTree) -> None:
    for path, leaf in trees.leaves_by_path(params).items():
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params {trees.name(path)!r}: got {type(leaf).__name__}, wanted arrays alone, as "
                "eqx.filter(model, eqx.is_inexact_array) leaves them"
            )


def _is_scalar(value: Any, kind: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 0 and np.issubdtype(array.dtype, kind)
