"""Weights that rules select in models of four libraries, the printed table, and refused rules."""

import dataclasses
from collections import OrderedDict
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import cs_jax
from cs_jax import NM, Axes, Block, Head, Rule
from cs_jax.core import rules, trees


def shaped(**shapes: tuple[int, ...]) -> Any:
    """Tree of arrays of the given shapes, by path; `__` means a slash."""
    leaves = {tuple(path.split("__")): jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return trees.nest(leaves)


def selected(params: Any, where: Any = None) -> list[str]:
    return [leaf.name for leaf in cs_jax.select(params, where).masked]


NET = shaped(
    encoder__layer_0__kernel=(4, 8),
    encoder__layer_0__bias=(8,),
    encoder__layer_1__kernel=(8, 8),
    encoder__layer_1__bias=(8,),
    head__kernel=(8, 2),
    head__bias=(2,),
)


@pytest.mark.parametrize(
    "where, expected",
    [
        (None, ["encoder/layer_0/kernel", "encoder/layer_1/kernel"]),
        ("kernel", ["encoder/layer_0/kernel", "encoder/layer_1/kernel", "head/kernel"]),
        ("**/kernel", ["encoder/layer_0/kernel", "encoder/layer_1/kernel", "head/kernel"]),
        ("*/kernel", ["head/kernel"]),
        ("encoder/*/kernel", ["encoder/layer_0/kernel", "encoder/layer_1/kernel"]),
        ("encoder/{layer_1,layer_7}/kernel", ["encoder/layer_1/kernel"]),
        (["**/kernel", "!head/*"], ["encoder/layer_0/kernel", "encoder/layer_1/kernel"]),
        ("!encoder/layer_0/*", ["encoder/layer_1/kernel"]),
        (["head/kernel", "head/bias"], ["head/bias", "head/kernel"]),
        (lambda path, leaf: leaf.shape == (8, 8), ["encoder/layer_1/kernel"]),
        (lambda path, leaf: path.startswith("head/k"), ["head/kernel"]),
        ([Rule("head/kernel"), Rule()], ["encoder/layer_0/kernel", "encoder/layer_1/kernel", "head/kernel"]),
    ],
)
def test_globs_functions_and_the_default_select(where: Any, expected: list[str]) -> None:
    assert selected(NET, where) == expected


def test_the_first_rule_that_selects_a_weight_decides() -> None:
    first = Rule("encoder/layer_0/kernel", group="output_channel")
    shapes = [leaf.score_shape for leaf in cs_jax.select(NET, [first, Rule("encoder/**/kernel")]).masked]
    assert shapes == [(1, 8), (8, 8)]


@pytest.mark.parametrize(
    "path, masked",
    [
        ("Dense_0/kernel", True),
        ("Conv_0/kernel", True),
        ("MultiHeadDotProductAttention_0/query/kernel", True),
        ("linear/w", True),
        ("lstm/w_i", True),
        ("gru/weight_ih", True),
        ("mlp/in_proj_weight", True),
        ("block/wq", True),
        ("W1", True),
        ("block/wqkv", True),
        ("mlp/up_proj", True),
        ("ConvBN_0/Conv_0/kernel", True),
        ("PreNorm_0/Dense_0/kernel", True),
        ("Head_0/key/kernel", True),
        ("MultiHead_0/kernel", True),
        ("PatchEmbed_0/Conv_0/kernel", True),
        ("params/0", True),
        ("Dense_0/bias", False),
        ("attention/b", False),
        ("Embed_0/embedding", False),
        ("token_embed/w", False),
        ("wte/weight", False),
        ("wpe", False),
        ("pos_embedding/kernel", False),
        ("LayerNorm_0/weight", False),
        ("ln_1/weight", False),
        ("RMSNorm_0/w", False),
        ("bn/scale", False),
        ("lm_head/kernel", False),
        ("head/kernel", False),
        ("classifier/kernel", False),
        ("cls_token", False),
        ("decoder/logits/w", False),
    ],
)
def test_the_default_goes_by_names(path: str, masked: bool) -> None:
    params = trees.nest({tuple(path.split("/")): np.ones((4, 4)), ("other", "kernel"): np.ones((2, 2))})
    assert (path in selected(params)) == masked


def test_the_default_wants_two_axes_and_floats() -> None:
    params = {"a": {"kernel": np.ones(3)}, "b": {"kernel": np.ones((2, 2), int)}, "c": {"kernel": np.ones((2, 2))}}
    assert selected(params) == ["c/kernel"]


class Net(eqx.Module):
    table: eqx.nn.Embedding
    scaled: eqx.nn.LayerNorm
    layers: list
    act: Any = jax.nn.relu


def test_equinox_modules_are_known_by_their_class() -> None:
    """Names of embedding and norm weights do not identify them; None and functions are skipped."""
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [eqx.nn.Conv2d(1, 2, 3, key=keys[0], use_bias=False), eqx.nn.GRUCell(2, 3, key=keys[1])]
    net = Net(eqx.nn.Embedding(5, 4, key=keys[2]), eqx.nn.LayerNorm((4, 4)), layers)
    expected = ["layers/0/weight", "layers/1/weight_ih", "layers/1/weight_hh"]
    assert selected(eqx.filter(net, eqx.is_inexact_array)) == expected
    assert selected(net) == expected


def test_attention_and_recurrent_cells_are_reached_in_every_library() -> None:
    attention = nn.MultiHeadDotProductAttention(2)
    params = attention.init(jax.random.key(0), jnp.ones((1, 3, 4)))["params"]
    assert selected(params) == [f"{name}/kernel" for name in ("key", "out", "query", "value")]
    cell = nn.LSTMCell(3)
    params = cell.init(jax.random.key(0), cell.initialize_carry(jax.random.key(0), (1, 2)), jnp.ones((1, 2)))["params"]
    assert selected(params) == [f"{side}{gate}/kernel" for side in "hi" for gate in "fgio"]
    state = nnx.state(nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), decode=False), nnx.Param)
    assert selected(state) == [f"{name}/kernel" for name in ("key", "out", "query", "value")]
    state = nnx.state(nnx.GRUCell(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert selected(state) == ["dense_h/kernel", "dense_i/kernel"]
    make = hk.without_apply_rng(
        hk.transform(lambda x: hk.MultiHeadAttention(2, 2, w_init=hk.initializers.Constant(1.0))(x, x, x))
    )
    with jax.numpy_rank_promotion("allow"):
        params = make.init(jax.random.key(0), jnp.ones((3, 4)))
    names = ("key", "linear", "query", "value")
    assert selected(params) == [f"multi_head_attention/{name}/w" for name in names]


def test_boxed_weights_have_the_name_of_their_box() -> None:
    dense = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))
    assert selected(dense.init(jax.random.key(0), jnp.ones((1, 2)))) == ["params/kernel"]
    assert selected({"value": np.ones((2, 2)), "kernel": np.ones((2, 2))}, ["value", "kernel"]) == ["kernel", "value"]


@pytest.mark.parametrize(
    "path, shape, rule, score_shape",
    [
        ("dense/kernel", (4, 6), Rule(group="output_channel"), (1, 6)),
        ("dense/kernel", (4, 6), Rule(group="input_channel"), (4, 1)),
        ("dense/weight", (6, 4), Rule(group="output_channel"), (6, 1)),
        ("dense/weight", (6, 4), Rule(group="input_channel"), (1, 4)),
        ("dense/weight", (6, 4), Rule(group="output_channel", layout="in_out"), (1, 4)),
        ("linear/w", (4, 6), Rule(group="output_channel"), (1, 6)),
        ("conv/kernel", (3, 3, 4, 6), Rule(group="output_channel"), (1, 1, 1, 6)),
        ("conv/kernel", (3, 3, 4, 6), Rule(group="input_channel"), (1, 1, 4, 1)),
        ("conv/weight", (6, 4, 3, 3), Rule(group="output_channel"), (6, 1, 1, 1)),
        ("conv/kernel", (3, 3, 4, 6), Rule(group=Block((2, 3))), (3, 3, 2, 2)),
        ("conv/kernel", (3, 3, 4, 6), Rule(group=Block((3, 3, 4, 1))), (1, 1, 1, 6)),
        ("conv/weight", (6, 4, 3, 3), Rule(group=Block((2, 3))), (2, 2, 3, 3)),
        ("conv/kernel", (3, 3, 4, 6), Rule(group=Axes((0, -1))), (3, 1, 1, 6)),
        ("attention/query/kernel", (8, 2, 4), Rule(group=Head()), (1, 2, 1)),
        ("attention/query/kernel", (8, 2, 4), Rule(group="output_channel"), (1, 2, 4)),
        ("attention/query/kernel", (8, 2, 4), Rule(group="input_channel"), (8, 1, 1)),
        ("attention/out/kernel", (2, 4, 8), Rule(group=Head(2)), (2, 1, 1)),
        ("attention/out/kernel", (2, 4, 8), Rule(group="output_channel"), (1, 1, 8)),
        ("stacked/value/kernel", (5, 8, 2, 4), Rule(group=Head(), stacked=1), (5, 1, 2, 1)),
        ("stacked/dense/kernel", (5, 8, 4), Rule(group="output_channel", stacked=1), (5, 1, 4)),
        ("stacked/dense/weight", (5, 4, 8), Rule(group="output_channel", stacked=1), (5, 4, 1)),
        ("stacked/dense/weight", (5, 4, 8), Rule(group=Block((2, 4)), stacked=1), (5, 1, 4)),
        ("conv/kernel", (3, 8, 4), Rule(group="output_channel", stacked=0), (1, 1, 4)),
        ("conv/out/kernel", (3, 3, 8, 4), Rule(group="output_channel"), (1, 1, 1, 4)),
        ("ConvTranspose_0/kernel", (3, 3, 8, 4), Rule(group="output_channel", layout="in_out"), (1, 1, 1, 4)),
        ("attention/query_proj/weight", (8, 6), Rule(group=Head(2)), (2, 1)),
        ("attention/output_proj/weight", (6, 8), Rule(group=Head(2)), (1, 2)),
        ("multi_head_attention/linear/w", (8, 6), Rule(group=Head(2)), (2, 1)),
        ("dense/kernel", (4, 6), Rule(group=NM(2, 4)), (4, 6)),
    ],
)
def test_scores_have_the_shape_of_their_groups(path: str, shape: Any, rule: Rule, score_shape: Any) -> None:
    own = tuple(path.split("/"))
    leaves = {own: jax.ShapeDtypeStruct(shape, jnp.float32)}
    if own[-2] in ("query", "value") or path == "attention/out/kernel":  # known by the projections beside them
        shapes = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
        beside = {(*own[:-2], name, "kernel"): np.ones((*shape[:-3], *size)) for name, size in shapes.items()}
        leaves = beside | leaves
    selection = cs_jax.select(trees.nest(leaves), dataclasses.replace(rule, where=path))
    assert [leaf.score_shape for leaf in selection.masked] == [score_shape]


def test_one_row_of_an_array_without_a_name_is_a_bias() -> None:
    assert selected([(np.ones((4, 3)), np.ones((1, 3))), (np.ones((3, 2)), np.ones((1, 2)))]) == ["0/0", "1/0"]
    assert selected(np.ones((4, 3))) == [""]


def test_paths_that_read_alike_are_both_masked() -> None:
    params = {"a/b": {"kernel": np.ones((2, 2))}, "a": {"b": {"kernel": np.ones((3, 3))}}}
    assert [leaf.shape for leaf in cs_jax.select(params, "**/kernel").masked] == [(3, 3), (2, 2)]


def test_describe_folds_long_paths_and_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x[red]" * 30
    cs_jax.describe({long: {"kernel": np.ones((2, 2))}}, target_density=0.01, allow_empty_layers=True)
    assert f"{long}/kernel" in "".join(capsys.readouterr().out.split()).replace("2×2yes44100.0%", "")


def test_describe_prints_every_array_and_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    cs_jax.describe(NET, Rule("encoder/**/kernel", group=Block((2, 2))), target_density=0.25)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert rows[0] == ["path", "shape", "masked", "scores", "entries", "share"]
    assert ["encoder/layer_0/kernel", "4×8", "by", "2×2", "8", "32", "24.6%"] in rows
    assert ["encoder/layer_1/bias", "8", "-", "8", "6.2%"] in rows
    assert ["head/kernel", "8×2", "no", "16", "12.3%"] in rows
    text = [" ".join(row) for row in rows[-2:]]
    assert text[0] == "96 of 130 weights have a mask (73.8%), in 2 arrays"
    assert text[1] == "24 of 96 weights to keep in all 2 arrays (density 0.25)"


def test_a_selection_is_static_and_equal_to_its_like() -> None:
    first, second = (cs_jax.select(NET, target_density=0.5) for _ in range(2))
    assert first == second and hash(first) == hash(second) and jax.tree.leaves(first) == []
    assert first != cs_jax.select(NET, target_density=0.4)


@pytest.mark.parametrize(
    "rule_targets, target, keeps",
    [
        ((None, None), 0.5, [48]),
        ((0.25, None), None, [8]),
        ((0.25, 0.5), None, [8, 32]),
        ((0.25, None), 0.5, [8, 40]),
    ],
)
def test_targets_of_rules_and_of_the_whole(rule_targets: Any, target: float | None, keeps: list[int]) -> None:
    where = [
        Rule(f"encoder/layer_{index}/kernel", target_density=density) for index, density in enumerate(rule_targets)
    ]
    assert [budget.keep for budget in cs_jax.select(NET, where, target_density=target).budgets] == keeps


def test_what_patterns_keep_counts_towards_the_target() -> None:
    where = [Rule("encoder/layer_1/kernel", group=NM(1, 4)), Rule("encoder/layer_0/kernel")]
    (budget,) = cs_jax.select(NET, where, target_density=0.25).budgets
    assert (budget.keep, budget.size) == (24 - 16, 32)


ATTENTION = {name: {"kernel": np.ones((4, 2, 3))} for name in ("query", "key", "value", "out")}
INTEGER = {"kernel": np.ones((2, 2), np.int8), "other": {"kernel": np.ones((2, 2))}}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: cs_jax.select(NET, "encoder/layer_*/kernle"),
            ValueError,
            "glob 'encoder/layer_.*': matches none of 6 leaves .*; did you mean encoder/layer_",
        ),
        (
            lambda: cs_jax.select(NET, "encoder/layer_0"),
            ValueError,
            "did you mean encoder/layer_0/bias, encoder/layer_0/kernel",
        ),
        (lambda: cs_jax.select(NET, ["**/kernel", "!tail/*"]), ValueError, r"glob 'tail/\*': matches none"),
        (
            lambda: cs_jax.select(NET, "**"),
            ValueError,
            r"rule '\*\*': selects all 6 leaves, including encoder/layer_0/bias",
        ),
        (lambda: cs_jax.select(NET, lambda path, leaf: True), ValueError, "selects all 6 leaves, including"),
        (lambda: cs_jax.select(NET, lambda path, leaf: False), ValueError, "rule .*: selects none of 6 leaves"),
        (
            lambda: cs_jax.select(NET, ["**/kernel", "!**/kernel"]),
            ValueError,
            "params with 6 leaves .*: the rules select no weights to mask; set `where`",
        ),
        (
            lambda: cs_jax.select(NET, [Rule(), Rule("encoder/**/kernel")]),
            ValueError,
            "must select a weight that no earlier rule selects",
        ),
        (lambda: cs_jax.select(NET, []), ValueError, r"where \[\]: must contain a glob or rule"),
        (lambda: cs_jax.select(NET, [Rule(), "a"]), TypeError, "where: must not mix globs and rules"),
        (lambda: cs_jax.select(NET, 3), TypeError, "where 3: must be a glob, a list of globs, or a function"),
        (
            lambda: cs_jax.select({"bias": np.ones(3)}),
            ValueError,
            r"params with 1 leaves \(bias\): the rules select no weights to mask",
        ),
        (lambda: cs_jax.select({}), ValueError, "params with no leaves: the rules select no weights to mask"),
        (lambda: cs_jax.select(INTEGER, "kernel"), ValueError, "weights 'kernel' of dtype int8: must have a float"),
        (
            lambda: cs_jax.select({"a": 1.0, "kernel": np.ones((2, 2))}, "a"),
            ValueError,
            "weights 'a' 1.0: must be a float array",
        ),
        (
            lambda: cs_jax.select({"kernel": np.ones((0, 2))}),
            ValueError,
            r"of shape \(0, 2\): must have an entry to mask",
        ),
        (
            lambda: cs_jax.select(OrderedDict([(0, np.ones(2)), ("0", np.ones(2))])),
            ValueError,
            "path '0': must belong to one leaf, not to two",
        ),
        (lambda: Rule(layout="nhwc"), ValueError, "layout 'nhwc': must be one of auto, in_out, out_in"),  # pyright: ignore
        (lambda: Rule(group="channel"), TypeError, "group 'channel': must be 'entry'"),  # pyright: ignore
        (lambda: Rule(group=NM(3, 2)), ValueError, "NM n=3, m=2: must have 1 <= n <= m"),
        (lambda: Rule(group=NM(0, 2)), ValueError, "NM n=0, m=2: must have 1 <= n <= m"),
        (lambda: Rule(group=Block((0, 2))), ValueError, r"Block shape \(0, 2\): must have sizes of at least 1"),
        (lambda: Rule(group=Block(4)), TypeError, "Block shape 4: must be a tuple of whole numbers"),  # pyright: ignore
        (lambda: Rule(group=Axes(0)), TypeError, "Axes axes 0: must be a tuple of whole numbers"),  # pyright: ignore
        (lambda: Rule(group=Head("a")), TypeError, "Head num_heads 'a': must be a whole number, or None"),  # pyright: ignore
        (lambda: Rule(group=NM(2.0, 4.0)), TypeError, "NM n and m .2.0, 4.0.: must be whole numbers"),  # pyright: ignore
        (lambda: Rule(stacked=-1), ValueError, "stacked -1: must be a whole number of at least 0, or None"),
        (lambda: cs_jax.select(NET, "encoder/**"), ValueError, "selects all 4 leaves, including encoder/layer_0/bias"),
        (
            lambda: cs_jax.select({"kernel": np.ones((2, 2), complex)}, "kernel"),
            ValueError,
            "weights 'kernel' of dtype complex128: must have a real float dtype",
        ),
        (lambda: Rule(group=Head(0)), ValueError, "Head num_heads 0: must be at least 1"),
        (lambda: Rule(target_density=0.0), ValueError, "target_density 0: must be a share above 0 and at most 1"),
        (lambda: Rule(target_density=2), ValueError, "target_density 2: must be a share"),
        (lambda: Rule(target_density=True), TypeError, "target_density True: must be a number"),
        (
            lambda: Rule(group=NM(1, 2), target_density=0.5),
            ValueError,
            r"target_density 0.5: must be None for group NM\(1, 2\), whose density is 0.5",
        ),
        (
            lambda: cs_jax.select(NET, Rule(group=Block((3, 3)))),
            ValueError,
            r"weights 'encoder/layer_0/kernel' of shape \(4, 8\): blocks of \(3, 3\) must divide the shape",
        ),
        (
            lambda: cs_jax.select(NET, Rule(group=Block((2, 2, 2)))),
            ValueError,
            r"of shape \(4, 8\): blocks of \(2, 2, 2\) must have 2 sizes, or two if input",
        ),
        (
            lambda: cs_jax.select(NET, Rule(group=NM(2, 3))),
            ValueError,
            r"'encoder/layer_0/kernel' of shape \(4, 8\): axis 0 has size 4; for a 2:3 pattern, .* multiple of 3",
        ),
        (
            lambda: cs_jax.select(NET, Rule(group=Axes((2,)))),
            ValueError,
            r"of shape \(4, 8\): Axes names axis 2; use axes from -2 to 1",
        ),
        (
            lambda: cs_jax.select(NET, Rule("head/bias", group="output_channel")),
            ValueError,
            r"weights 'head/bias' of shape \(2,\): must have an input and an output axis",
        ),
        (
            lambda: cs_jax.select({"matrix": np.ones((2, 2))}, Rule("matrix", group="output_channel")),
            ValueError,
            "weights 'matrix': ambiguous: the name does not indicate the input axis; set layout=",
        ),
        (
            lambda: cs_jax.select(NET, Rule("head/kernel", group=Head(2))),
            ValueError,
            "weights 'head/kernel': Head requires a query, key, value or output projection, and the layer name 'head' "
            "does not indicate one; use Axes or Block as the group",
        ),
        (
            lambda: cs_jax.select({"query": {"kernel": np.ones((4, 6))}}, Rule(group=Head())),
            ValueError,
            r"of shape \(4, 6\): must have an axis of heads; or give the number of heads, as in Head\(8\)",
        ),
        (
            lambda: cs_jax.select({"query": {"kernel": np.ones((4, 6))}}, Rule(group=Head(4))),
            ValueError,
            "Head num_heads 4 must divide 6, the size of axis 1",
        ),
        (
            lambda: cs_jax.select(ATTENTION, Rule("query/kernel", group=Head(4))),
            ValueError,
            "Head num_heads 4 must be 2, the size of the axis of heads; or leave num_heads out",
        ),
        (
            lambda: cs_jax.select({"query": {"kernel": np.ones((4, 2, 3))}}, Rule(group="output_channel")),
            ValueError,
            r"'query/kernel' of shape \(4, 2, 3\): ambiguous: a 1D convolution kernel \(set stacked=0 in the rule\)",
        ),
        (
            lambda: cs_jax.select({"conv2_d_transpose": {"w": np.ones((3, 3, 4, 2))}}, Rule(group="output_channel")),
            ValueError,
            "ambiguous: libraries differ in the input axis of a transposed convolution; set layout=",
        ),
        (
            lambda: cs_jax.select(NET, Rule("encoder/layer_0/kernel", target_density=0.9), target_density=0.5),
            ValueError,
            "target_density 0.5: cannot keep exactly 16 weights; .* keep 29, and the other arrays have 0",
        ),
        (
            lambda: cs_jax.select(
                NET, [Rule("encoder/layer_1/kernel", target_density=0.9), Rule()], target_density=0.5
            ),
            ValueError,
            "target_density 0.5: cannot keep exactly 48 weights; rules with targets and N:M patterns keep 58",
        ),
        (
            lambda: cs_jax.select(NET, Rule(group="output_channel"), target_density=0.1),
            ValueError,
            "keeps 10 of 96 weights, but one score in each layer of .* needs 12 weights; use at least 0.125",
        ),
        (lambda: jax.jit(lambda t: rules.check_density(t))(0.5), TypeError, "target_density: must not be traced"),
    ],
)
def test_wrong_rules_are_refused_by_name(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_empty_layers_are_allowed_on_demand() -> None:
    selection = cs_jax.select(NET, Rule(group="output_channel"), target_density=0.1, allow_empty_layers=True)
    assert selection.budgets[0].keep == 10
