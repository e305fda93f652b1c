"""The optax transformation: gradients, composition with other transformations, rounds, tickets, and errors."""

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from jax import lax

import cs_jax
from cs_jax.optim.state import find_state
from cs_jax.optim.transformation import continuous_sparsification

# Most searches here are cut short.
pytestmark = pytest.mark.filterwarnings("ignore::cs_jax.UnfinishedSearchWarning")

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
PARAMS = {
    "hidden": {"kernel": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), "bias": jnp.zeros(8)},
    "out": {"kernel": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "bias": jnp.zeros(3)},
}


def loss_fn(params: Any, x: jax.Array = X, y: jax.Array = Y) -> jax.Array:
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return ((hidden @ params["out"]["kernel"] + params["out"]["bias"][None] - y) ** 2).mean()


def make(weight_tx: Any = None, score_tx: Any = None, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    defaults: dict[str, Any] = dict(epochs=5, steps_per_epoch=2, final_temp=50.0)
    weight_tx = weight_tx or optax.sgd(0.05, momentum=0.9)
    return continuous_sparsification(weight_tx, score_tx or optax.sgd(1.0), **(defaults | arguments))


def step(tx: Any, params: Any, state: Any, loss: Any = loss_fn) -> tuple[Any, Any]:
    masked = cs_jax.masked_params(params, state)
    gradient = jax.grad(loss)(masked)
    updates, state = tx.update(gradient, state, params, masked_params=masked)
    return optax.apply_updates(params, updates), state


def train(tx: Any, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    compiled = jax.jit(functools.partial(step, tx))
    for _ in range(steps):
        params, state = compiled(params, state)
    return params, state


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_equal(a: Any, b: Any) -> None:
    assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("where", [None, cs_jax.Rule(group="output_channel"), cs_jax.Rule(group=cs_jax.NM(1, 2))])
def test_gradients_are_those_of_differentiating_through_the_masks(where: Any) -> None:
    """With plain SGD at rate 1, updates are minus the gradients of loss plus penalty."""
    tx = make(optax.sgd(1.0), optax.sgd(1.0), where=where, penalty=0.01, init_value=0.1)
    state = tx.init(PARAMS)
    noise = np.random.default_rng(1)
    scores = jax.tree.map(lambda s: s + jnp.asarray(noise.normal(size=s.shape), s.dtype), state.scores)
    state = state._replace(scores=scores, temperature=jnp.float32(3.0))

    def through(params: Any, scores: Any) -> jax.Array:
        soft = state.selection.soft_mask(scores, 3.0, init_value=0.1)
        return loss_fn(cs_jax.apply_masks(params, soft)) + 0.01 * cs_jax.mask_penalty(soft)

    weight_gradient, score_gradient = jax.grad(through, argnums=(0, 1))(PARAMS, scores)
    params, after = step(tx, PARAMS, state)
    expected = jax.tree.map(jnp.subtract, (PARAMS, scores), (weight_gradient, score_gradient))
    assert_close((params, after.scores), expected, rtol=1e-6, atol=1e-6)


def test_a_fresh_state_is_the_dense_network() -> None:
    masked = cs_jax.masked_params(PARAMS, make(init_value=-0.3).init(PARAMS))
    assert_close(masked, PARAMS, rtol=1e-6)
    assert masked["hidden"]["bias"] is PARAMS["hidden"]["bias"]


def test_temperature_rises_with_the_epochs_and_starts_again_with_the_round() -> None:
    tx = make()
    state, seen = tx.init(PARAMS), []
    for _ in range(12):
        seen.append(float(state.temperature))
        _, state = step(tx, PARAMS, state)
    rising = [cs_jax.temperature(epoch, 5, 50.0) for epoch in range(5) for _ in range(2)]
    np.testing.assert_allclose(seen, [*rising, 50.0, 50.0], rtol=1e-6)
    state = cs_jax.next_round(state)
    assert (int(state.step), int(state.round), float(state.temperature)) == (0, 1, 1.0)


def test_a_round_of_one_epoch_has_the_final_temperature_and_keeps_it() -> None:
    tx = make(epochs=1)
    state = tx.init(PARAMS)
    assert float(state.temperature) == 50.0
    assert float(cs_jax.next_round(step(tx, PARAMS, state)[1]).temperature) == 50.0


@pytest.mark.parametrize("reset, temperature", [("paper", 50.0), ("released", 1.0)])
def test_next_round_resets_scores_alone(reset: str, temperature: float) -> None:
    tx = make(init_value=0.05)
    _, state = train(tx, PARAMS, tx.init(PARAMS), 10)
    after = cs_jax.next_round(state, reset=reset)
    assert_equal(after.scores, cs_jax.prune_scores(state.scores, temperature, init_value=0.05))
    assert_equal((after.weight_state, after.score_state), (state.weight_state, state.score_state))


def test_a_ticket_has_the_target_density_and_rewinding_brings_back_the_snapshot() -> None:
    tx = make(target_density=0.25, rounds=2)
    params, state = train(tx, PARAMS, tx.init(PARAMS), 10)
    assert cs_jax.density(cs_jax.ticket_masks(state)) == 18 / 72
    params, state = train(tx, params, cs_jax.next_round(state), 10)
    ticket = cs_jax.ticket_masks(state)
    rewound, frozen = cs_jax.rewind(tx, state, PARAMS)
    assert_equal(rewound, PARAMS)
    assert_equal(cs_jax.current_masks(frozen), ticket)
    assert cs_jax.density(ticket) == 18 / 72
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(frozen.weight_state))
    retrained, after = train(tx, rewound, frozen, 5)
    assert_equal(cs_jax.current_masks(after), ticket)
    for layer, mask in ((name, ticket[name]["kernel"]) for name in ticket):
        moved = np.asarray(retrained[layer]["kernel"] != PARAMS[layer]["kernel"])
        assert moved.any() and not moved[np.asarray(mask) == 0].any()
    assert float(loss_fn(cs_jax.masked_params(retrained, after))) < float(
        loss_fn(cs_jax.masked_params(rewound, frozen))
    )


def test_in_training_the_density_is_held_over_the_rounds() -> None:
    tx = make(target_density=0.25, rounds=2)
    params, state = train(tx, PARAMS, tx.init(PARAMS), 2)
    count = sum(int((leaf > 0).sum()) for leaf in jax.tree.leaves(state.scores))
    assert count == 36  # half of 72: the square root of a quarter
    _, state = train(tx, params, cs_jax.next_round(state), 2)
    assert sum(int((leaf > 0).sum()) for leaf in jax.tree.leaves(state.scores)) == 18


def test_freezing_keeps_weights_and_their_optimizer() -> None:
    tx = make(target_density=0.5)
    params, state = train(tx, PARAMS, tx.init(PARAMS), 6)
    frozen = cs_jax.freeze_ticket(state)
    assert_equal(frozen.weight_state, state.weight_state)
    assert (frozen.scores, frozen.score_state) == ({}, ())
    assert_equal(frozen.masks, cs_jax.ticket_masks(state))
    retrained, after = train(tx, params, frozen, 5)
    before, now = (float(loss_fn(cs_jax.masked_params(*pair))) for pair in ((params, frozen), (retrained, after)))
    assert now < before


def test_a_search_that_is_ended_early_is_told() -> None:
    """As with MultiSteps, where updates are counted in minibatches: 4 of 10 updates were made."""
    tx = make()
    _, state = train(tx, PARAMS, tx.init(PARAMS), 4)
    ending = "temperature 7.07 after 4 updates: below the final 50, so masks are still soft"
    for end in (cs_jax.ticket_masks, cs_jax.freeze_ticket, cs_jax.next_round, lambda s: cs_jax.rewind(tx, s, PARAMS)):
        with pytest.warns(cs_jax.UnfinishedSearchWarning, match=ending):
            end(state)
    tx = make(score_tx=optax.sgd(50.0))
    _, state = train(tx, PARAMS, tx.init(PARAMS), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cs_jax.next_round(state)


def test_scores_that_hardly_move_are_told() -> None:
    tx = make(score_tx=optax.sgd(1e-6))
    _, state = train(tx, PARAMS, tx.init(PARAMS), 10)
    with pytest.warns(cs_jax.UnfinishedSearchWarning, match="100% of the masks are still soft at the end"):
        cs_jax.next_round(state)


def test_a_transformation_can_be_made_inside_jit() -> None:
    tx = optax.inject_hyperparams(lambda rate: make(optax.sgd(rate)))(rate=0.05)
    params, _ = train(tx, PARAMS, tx.init(PARAMS), 2)
    assert_close(params, train(make(optax.sgd(0.05)), PARAMS, make(optax.sgd(0.05)).init(PARAMS), 2)[0], rtol=1e-6)


WRAPPERS = {
    "chain before": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "chain after": lambda tx: optax.chain(tx, optax.scale(0.5)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("sparse", tx)),
    "adam": lambda tx: make(optax.adamw(0.01), optax.adam(0.05), target_density=0.25),
    "injected weights": lambda tx: make(optax.inject_hyperparams(optax.adam)(learning_rate=0.01), target_density=0.25),
    "injected": lambda tx: optax.inject_hyperparams(continuous_sparsification, static_args=("target_density",))(
        optax.sgd(0.05), optax.sgd(1.0), epochs=5, steps_per_epoch=2, penalty=1e-3, target_density=0.25
    ),
}


@pytest.mark.filterwarnings("ignore::cs_jax.CollapsedLayerWarning")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_it_composes_with(wrap: Any) -> None:
    """Trains with a compiled step and reaches the density; helpers find the state inside the wrappers."""
    tx = wrap(make(target_density=0.25))
    params, state = train(tx, PARAMS, tx.init(PARAMS), 12)
    assert int(find_state(state).step) == (6 if hasattr(state, "mini_step") else 12)
    assert cs_jax.density(cs_jax.ticket_masks(state)) == 0.25
    assert float(loss_fn(cs_jax.masked_params(params, state))) < float(loss_fn(PARAMS))
    state = cs_jax.next_round(state)
    assert int(find_state(state).round) == 1
    params, state = train(tx, params, state, 4)
    params, state = cs_jax.rewind(tx, state, PARAMS)
    train(tx, params, state, 2)


def test_clipping_sees_the_gradient_at_the_masked_weights() -> None:
    seen = []
    spy = optax.stateless(lambda updates, params: seen.append(updates) or updates)
    tx = optax.chain(spy, make())
    state = tx.init(PARAMS)
    step(tx, PARAMS, state)
    assert_equal(seen[0], jax.grad(loss_fn)(cs_jax.masked_params(PARAMS, state)))


def test_accumulated_steps_are_one_step_on_all_of_the_batch() -> None:
    tx = make()
    whole = step(tx, PARAMS, tx.init(PARAMS))
    accumulating = optax.MultiSteps(tx, 2).gradient_transformation()
    params, state = PARAMS, accumulating.init(PARAMS)
    for half in (slice(0, 8), slice(8, 16)):
        params, state = step(accumulating, params, state, lambda p, half=half: loss_fn(p, X[half], Y[half]))
    assert_close((params, find_state(state).scores), (whole[0], whole[1].scores), rtol=1e-5, atol=1e-6)


def test_hyperparameters_can_be_changed_while_training() -> None:
    tx = optax.inject_hyperparams(continuous_sparsification)(
        optax.sgd(0.0), optax.sgd(1.0), epochs=2, steps_per_epoch=2, penalty=0.0
    )
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    compiled = jax.jit(functools.partial(step, tx, loss=lambda params: 0.0 * loss_fn(params)))
    _, state = compiled(zero, tx.init(zero))
    assert float(find_state(state).scores["out"]["kernel"][0, 0]) == 0.0
    state.hyperparams["penalty"] = jnp.float32(0.1)
    _, state = compiled(zero, state)
    assert float(find_state(state).scores["out"]["kernel"][0, 0]) == pytest.approx(-0.1 * 2 * 0.25)


def test_a_scan_over_steps_is_the_loop() -> None:
    tx = make(target_density=0.25)
    looped = train(tx, PARAMS, tx.init(PARAMS), 6)
    scan = jax.jit(lambda carry: lax.scan(lambda carry, _: (step(tx, *carry), None), carry, length=6)[0])
    assert_close(scan((PARAMS, tx.init(PARAMS))), looped, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vmapped_searches_are_the_single_ones() -> None:
    tx = make(target_density=0.25)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    params, state = stacked, jax.vmap(tx.init)(stacked)
    vmapped = jax.jit(jax.vmap(functools.partial(step, tx)))
    for _ in range(4):
        params, state = vmapped(params, state)
    for index, start in enumerate((PARAMS, jax.tree.map(lambda leaf: 2 * leaf, PARAMS))):
        single = train(tx, start, tx.init(start), 4)
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], (params, state)), single, rtol=1e-4, atol=1e-5)


def test_rounds_of_vmapped_searches_begin_by_vmap_and_tickets_are_counted_one_by_one() -> None:
    tx = make(target_density=0.25)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    state = jax.vmap(cs_jax.next_round)(jax.vmap(tx.init)(stacked))
    assert state.round.tolist() == [1, 1]
    params, state = jax.jit(jax.vmap(functools.partial(step, tx)))(stacked, state)
    single = jax.tree.map(lambda leaf: leaf[0], state)
    assert cs_jax.density(cs_jax.ticket_masks(single)) == 0.25


def test_a_ticket_outlives_a_donating_step() -> None:
    tx = make(target_density=0.25)
    params, state = cs_jax.rewind(tx, train(tx, PARAMS, tx.init(PARAMS), 2)[1], PARAMS)
    ticket = cs_jax.current_masks(state)
    jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))(params, state)
    assert cs_jax.density(ticket) == 0.25


def test_a_single_array_is_a_model_too() -> None:
    tx = make(target_density=0.25)
    weights = PARAMS["hidden"]["kernel"]
    params, state = weights, tx.init(weights)
    for _ in range(3):
        params, state = step(tx, params, state, lambda w: ((X @ w) ** 2).mean())
    assert cs_jax.density(cs_jax.ticket_masks(state)) == 0.25


def test_scores_lie_where_their_weights_do() -> None:
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = {"kernel": jax.device_put(jnp.ones((4, 4)), sharding)}
    assert make().init(params).scores["kernel"].sharding == sharding


def test_state_and_weights_can_be_donated() -> None:
    tx = make(target_density=0.25)
    params = jax.tree.map(jnp.copy, PARAMS)
    donating = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    state = tx.init(params)
    for _ in range(3):
        params, state = donating(params, state)
    assert_close((params, state), train(tx, PARAMS, tx.init(PARAMS), 3), rtol=1e-5, atol=1e-6)
    params, state = donating(params, cs_jax.next_round(state))
    donating(*cs_jax.rewind(tx, state, PARAMS))


def test_a_new_step_round_or_temperature_does_not_retrace() -> None:
    tx, traces = make(target_density=0.25), []
    compiled = jax.jit(lambda params, state: traces.append(1) or step(tx, params, state))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = compiled(params, state)
    params, state = compiled(params, cs_jax.next_round(state))
    assert len(traces) == 1


def test_bfloat16_weights_stay_bfloat16_and_their_scores_move_in_float32() -> None:
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    tx = make(optax.sgd(0.05), optax.sgd(1e-3))
    params, state = train(tx, narrow, tx.init(narrow), 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.scores)} == {jnp.dtype(jnp.float32)}
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(state.scores))
    masked = cs_jax.masked_params(params, state)
    assert {leaf.dtype for leaf in jax.tree.leaves(masked)} == {jnp.dtype(jnp.bfloat16)}


def test_state_memory_is_scores_and_their_momentum_beyond_plain_optax() -> None:
    dense = optax.adam(0.1).init(PARAMS)
    sparse = make(optax.adam(0.1), optax.sgd(1.0, momentum=0.9)).init(PARAMS)

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    weights = sum(leaf["kernel"].nbytes for leaf in PARAMS.values())
    assert size(sparse) - size(dense) == 2 * weights + 6 * 4  # six scalars


def template(tx: Any, phase: str, params: Any) -> Any:
    """Template for restoring in a process that has only the optimizer and the weights."""
    state = tx.init(params)
    if phase == "ticket":
        state = cs_jax.freeze_ticket(state, masks=cs_jax.current_masks(state))
    return {"params": params, "opt_state": state}


@pytest.mark.parametrize("phase", ["search", "ticket"])
def test_flax_serializes_the_state(phase: str) -> None:
    tx = make(target_density=0.25)
    params, state = train(tx, PARAMS, tx.init(PARAMS), 3)
    if phase == "ticket":
        params, state = cs_jax.rewind(tx, state, PARAMS)
    stored = serialization.to_bytes({"params": params, "opt_state": state})
    restored = serialization.from_bytes(template(tx, phase, PARAMS), stored)
    assert_equal(restored["opt_state"], state)


@pytest.mark.parametrize("phase", ["search", "ticket"])
def test_the_state_is_checkpointed_by_orbax_like_any_other(tmp_path: Path, phase: str) -> None:
    tx = optax.chain(optax.clip(1.0), make(optax.adam(0.01), target_density=0.25, where=cs_jax.Rule(group="entry")))
    params, state = train(tx, PARAMS, tx.init(PARAMS), 3)
    if phase == "ticket":
        params, state = cs_jax.rewind(tx, state, PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "opt_state": state})
        checkpointer.wait_until_finished()
        empty = jax.eval_shape(functools.partial(template, tx, phase), PARAMS)
        restored = checkpointer.restore(tmp_path / "state", empty)
    assert_equal(restored, {"params": params, "opt_state": state})
    continued = train(tx, restored["params"], restored["opt_state"], 2)
    assert_equal(continued, train(tx, params, state, 2))


def test_a_loop_that_forgets_masked_params_fails_at_its_first_step() -> None:
    tx = make()
    state = tx.init(PARAMS)
    gradient = jax.grad(loss_fn)(PARAMS)
    with pytest.raises(
        TypeError,
        match=r"masked_params None: update requires the masked weights; compute masked = cs_jax.masked_params",
    ):
        tx.update(gradient, state, PARAMS)
    with pytest.raises(TypeError, match="masked_params None: update requires the masked weights"):
        jax.jit(optax.chain(optax.clip(1.0), tx).update)(gradient, (optax.EmptyState(), state), PARAMS)
    with pytest.raises(ValueError, match="masked_params 'hidden/kernel': must not be the weight itself"):
        tx.update(gradient, state, PARAMS, masked_params=PARAMS)


@pytest.mark.parametrize("wrong", ["the weights", "a copy of them", "those of another round"])
def test_other_weights_than_the_masked_ones_spoil_the_update(wrong: str) -> None:
    """Inside jit, values are compared, because arguments have no identity."""
    tx = make()
    params, state = train(tx, PARAMS, tx.init(PARAMS), 4)
    masked = {
        "the weights": params,
        "a copy of them": jax.tree.map(jnp.copy, params),
        "those of another round": cs_jax.masked_params(params, cs_jax.next_round(state)),
    }[wrong]
    gradient = jax.grad(loss_fn)(masked)
    update = jax.jit(tx.update)
    updates, _ = update(gradient, state, params, masked_params=masked)
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(updates))
    right = cs_jax.masked_params(params, state)
    updates, _ = update(gradient, state, params, masked_params=right)
    assert not any(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(updates))


def test_differentiating_through_masked_params_is_refused() -> None:
    state = make().init(PARAMS)
    with pytest.raises(TypeError, match="masked_params: must not be differentiated"):
        jax.grad(lambda params: loss_fn(cs_jax.masked_params(params, state)))(PARAMS)
    with pytest.raises(TypeError, match="masked_params: must not be differentiated"):
        jax.jit(jax.grad(lambda params: loss_fn(jax.jit(cs_jax.masked_params)(params, state))))(PARAMS)


def test_right_after_a_reset_there_is_no_ticket() -> None:
    tx = make()
    _, state = train(tx, PARAMS, tx.init(PARAMS), 10)
    with (
        pytest.warns(cs_jax.CollapsedLayerWarning),
        pytest.raises(
            ValueError,
            match="every score is 0 or below, so the ticket keeps no weight; take the ticket .*, before next_round",
        ),
    ):
        cs_jax.ticket_masks(cs_jax.next_round(state))


STATE = make().init(PARAMS)
TICKET = cs_jax.freeze_ticket(STATE, masks=cs_jax.current_masks(STATE))
GRADIENT = jax.grad(loss_fn)(PARAMS)
MASKED = jax.tree.map(lambda leaf: 1.0 * leaf, PARAMS)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: make(epochs=0), ValueError, "epochs 0: must be a whole number of at least 1"),
        (lambda: make(steps_per_epoch=2.5), ValueError, "steps_per_epoch 2.5: must be a whole number"),
        (lambda: make(epochs="3"), ValueError, "epochs '3': must be a whole number"),
        (lambda: make(penalty=None), ValueError, "penalty None: must be a finite number"),
        (
            lambda: make().init({"kernel": jnp.ones((2, 2)), "act": jax.nn.relu}),
            TypeError,
            "params 'act' of type .*: must be an array; remove other leaves, as with eqx.filter",
        ),
        (lambda: make(rounds=0), ValueError, "rounds 0: must be a whole number"),
        (lambda: make(final_temp=0.5), ValueError, "final_temp 0.5: must be a finite number of at least 1"),
        (lambda: make(penalty=-1.0), ValueError, "penalty -1.0: must be a finite number of at least 0"),
        (lambda: make(score_tx=0.1), TypeError, "score_tx 0.1: must be an optax transformation"),
        (
            lambda: make(init_value=-100.0).init(PARAMS),
            ValueError,
            "value -100: must be a finite number of at least -80",
        ),
        (lambda: make(target_density=0.0).init(PARAMS), ValueError, "target_density 0: must be a share above 0"),
        (lambda: make(target_density=1.5).init(PARAMS), ValueError, "target_density 1.5: must be a share"),
        (lambda: make(target_density="a").init(PARAMS), TypeError, "target_density 'a': must be a number"),
        (
            lambda: make(target_density=0.01).init(PARAMS),
            ValueError,
            "keeps 1 of 72 weights, but one score in each layer of hidden/kernel, out/kernel needs 2 weights; "
            "use at least 0.0278, or allow_empty_layers=True",
        ),
        (
            lambda: make().init({"bias": jnp.ones(3)}),
            ValueError,
            r"params with 1 leaves \(bias\): the rules select no weights to mask",
        ),
        (lambda: make(where="*/kernl").init(PARAMS), ValueError, r"did you mean out/kernel, hidden/kernel\?"),
        (
            lambda: make().update(GRADIENT, STATE, masked_params=MASKED),
            TypeError,
            "params None: update requires the weights",
        ),
        (
            lambda: make().update({"hidden": {}}, STATE, PARAMS, masked_params=MASKED),
            ValueError,
            "gradient with leaves nothing: must contain masked leaf 'hidden/kernel'",
        ),
        (
            lambda: make().update(jax.tree.map(lambda g: g[:1], GRADIENT), STATE, PARAMS, masked_params=MASKED),
            ValueError,
            r"gradient 'hidden/kernel' of shape \(1, 8\): must have shape \(6, 8\)",
        ),
        (
            lambda: make().update(GRADIENT, optax.EmptyState(), PARAMS, masked_params=MASKED),
            ValueError,
            "state EmptyState: must be a state that init or update returned",
        ),
        (
            lambda: cs_jax.masked_params(PARAMS, optax.adam(0.1).init(PARAMS)),
            ValueError,
            "opt_state of type .*: must contain one state of continuous_sparsification, not 0",
        ),
        (
            lambda: cs_jax.masked_params({"other": jnp.ones((2, 2))}, STATE),
            ValueError,
            "masks 'hidden/kernel': must have the path of a weight; params have other",
        ),
        (
            lambda: cs_jax.freeze_ticket(STATE, masks={"hidden": {"kernel": jnp.ones((6, 8))}}),
            ValueError,
            r"masks 'out/kernel' missing: must have shape \(8, 3\)",
        ),
        (
            lambda: cs_jax.rewind(make(), TICKET, {"hidden": {"kernel": jnp.ones((6, 8))}}),
            ValueError,
            "masks 'out/kernel': must have the path of a weight",
        ),
        (lambda: cs_jax.next_round(STATE, reset="never"), ValueError, "reset 'never': must be 'paper' or"),
        (
            lambda: cs_jax.next_round(STATE._replace(scores={})),
            ValueError,
            "contains a ticket with fixed masks; pass the state of a search",
        ),
        (lambda: jax.jit(cs_jax.ticket_masks)(STATE), TypeError, "scores: must not be traced; make a ticket outside"),
        (
            lambda: cs_jax.ticket_masks(STATE._replace(scores=jax.tree.map(lambda s: s + jnp.nan, STATE.scores))),
            ValueError,
            "scores 'hidden/kernel': must be finite numbers",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
