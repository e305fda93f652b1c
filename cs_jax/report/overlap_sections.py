"""Sections of a sweep: mask overlap between methods and seeds, and density of each layer."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cs_jax.report import heatmaps, plots
from cs_jax.report.heatmaps import Matrix
from cs_jax.report.mask_sections import LONG_TABLE, shown_z
from cs_jax.report.pages import Plot, Section, Table, percent, plot
from cs_jax.sweep.results import SweptTicket
from cs_jax.sweep.statistics import shown_target
from cs_jax.tickets import overlap as mask_overlap

LABEL = 16  # maximum number of characters of a method's name in a plot


class Pairing(NamedTuple):
    """Mask overlap of two methods at equal seeds, or of one method at different seeds."""

    method: str
    other: str
    pairs: int
    shared: float  # mean over the pairs
    chance: float  # mean over the pairs
    zs: list[float]  # z of each pair for which z is defined


def sections(tickets: Sequence[SweptTicket]) -> list[Section]:
    """Sections with mask overlap and layer density at each target; empty if no ticket has a target or initial score."""
    overlaps, densities = Section("Overlap of masks"), Section("Density of layers")
    tables = []
    for number, (target, group) in enumerate(_groups(tickets).items()):
        found = [*_pairings(group)]
        if found:
            overlaps.parts.append(_overlap_plot(f"overlap-{number}", target, _methods(group), found))
            rows = [_row(pairing) for pairing in found]
            head = ("Method", "Other method", "Pairs", "Shared", "By chance", "z, minimum to maximum")
            caption = f"Overlap, {target}"
            tables.append(Table(caption, head, rows, words=2, wide=True, folded=len(rows) > LONG_TABLE))
        densities.parts.append(_density_plot(f"layer-density-{number}", target, group))
    overlaps.parts.extend(tables)  # after the plots, which form a grid on a wide page
    if overlaps.parts:
        overlaps.texts.append(
            "Shared: number of weights kept by both masks, divided by the number of weights that the sparser mask "
            "keeps; mean over pairs. Diagonal: two seeds of one method. Other cells: two methods at the same seed. By "
            "chance: expected value of Shared for random masks that keep the same number of weights in each layer. z: "
            "distance of a pair from the expected value for random masks, in standard deviations."
        )
    densities.texts.append("Share of weights kept in each layer, mean over seeds. The colour scale is logarithmic.")
    return [section for section in (overlaps, densities) if section.parts]


def shown_share(share: float) -> str:
    """A target in percent, without trailing zeros: "2%", "0.5%"."""
    return f"{100 * share:.4g}%"


def _groups(tickets: Sequence[SweptTicket]) -> dict[str, list[SweptTicket]]:
    """Tickets by label of their target and initial score, densest first; without tickets that have neither."""
    axes = {(ticket.target, ticket.initial_score) for ticket in tickets} - {(None, None)}
    falling = sorted(axes, key=lambda axis: [np.inf if value is None else -value for value in axis])
    return {
        _words(*axis): [ticket for ticket in tickets if (ticket.target, ticket.initial_score) == axis]
        for axis in falling
    }


def _words(target: float | None, initial_score: float | None) -> str:
    return shown_target(target, initial_score, lambda share: f"density {shown_share(share)}")


def _methods(tickets: Sequence[SweptTicket]) -> list[str]:
    return [*dict.fromkeys(ticket.method for ticket in tickets)]


def _pairings(tickets: Sequence[SweptTicket]) -> Iterator[Pairing]:
    """Overlap of each pair of methods, and of each method with itself, if two tickets of the same network exist."""
    for method, other in itertools.combinations_with_replacement(_methods(tickets), 2):
        overlaps = [
            mask_overlap.overlap(one.masks, two.masks)
            for one, two in itertools.combinations(tickets, 2)
            if {one.method, two.method} == {method, other}
            and (method == other or one.seed == two.seed)
            and _shapes(one) == _shapes(two)
        ]
        if overlaps:
            shared, chance = (
                statistics.fmean(entry) for entry in zip(*[(o.shared, o.chance) for o in overlaps], strict=True)
            )
            zs = [overlap.z for overlap in overlaps if overlap.z is not None]
            yield Pairing(method, other, len(overlaps), shared, chance, zs)


def _shapes(ticket: SweptTicket) -> dict[str, tuple[int, ...]]:
    return {name: mask.shape for name, mask in ticket.masks.items()}


def _overlap_plot(name: str, target: str, methods: Sequence[str], found: Sequence[Pairing]) -> Plot:
    shares = np.full((len(methods), len(methods)), np.nan)
    texts = np.full(shares.shape, "", object)
    for pairing in found:
        places = methods.index(pairing.method), methods.index(pairing.other)
        for place in (places, places[::-1]):
            shares[place] = pairing.shared
            texts[place] = f"{_whole(pairing.shared)}\n({_whole(pairing.chance)})"
    labels = plots.short(methods, length=LABEL, kind="method")
    pairs = [f"{one.method} and {one.other} {percent(one.shared)}, by chance {percent(one.chance)}" for one in found]
    title, remark = f"Mask overlap, {target}", "Shared, and in brackets By chance; diagonal: two seeds of one method"
    figure = heatmaps.matrix(Matrix(labels, labels, shares, texts), title=title)
    return plot(name, title, remark, f"{title}: {'; '.join(pairs)}.", figure)


def _whole(share: float) -> str:
    """A share in whole percent; with one significant digit below 1%."""
    return f"{100 * share:.0f}%" if share == 0 or share >= 0.0095 else f"{100 * share:.1g}%"


def _row(pairing: Pairing) -> list[str]:
    ends = [*dict.fromkeys(map(shown_z, (min(pairing.zs), max(pairing.zs))))] if pairing.zs else ["-"]
    other = "other seeds" if pairing.other == pairing.method else pairing.other
    return [
        pairing.method, other, str(pairing.pairs), percent(pairing.shared), percent(pairing.chance), " to ".join(ends)
    ]  # fmt: skip


def _density_plot(name: str, target: str, tickets: Sequence[SweptTicket]) -> Plot:
    methods = _methods(tickets)
    layers = [*dict.fromkeys(layer for ticket in tickets for layer in ticket.masks)]
    shares = np.array([[_layer_density(tickets, method, layer) for method in methods] for layer in layers])
    texts = np.array([[_whole(share) for share in row] for row in shares], object)
    ends = [(float(np.nanmin(column)), float(np.nanmax(column))) for column in shares.T]
    ranges = [f"{method} {percent(low)} to {percent(high)}" for method, (low, high) in zip(methods, ends, strict=True)]
    labels = plots.short(methods, length=LABEL, kind="method")
    title, remark = f"Layer densities, {target}", "share of weights kept; input at the top"
    figure = heatmaps.matrix(Matrix(heatmaps.layer_labels(layers), labels, shares, texts), log=True, title=title)
    return plot(name, title, remark, f"{title}, minimum to maximum density: {'; '.join(ranges)}.", figure)


def _layer_density(tickets: Sequence[SweptTicket], method: str, layer: str) -> float:
    """Density of a layer, mean over the seeds of a method; NaN if the method's network has no such layer."""
    masks = [ticket.masks[layer] for ticket in tickets if ticket.method == method and layer in ticket.masks]
    return statistics.fmean(np.count_nonzero(mask) / max(1, mask.size) for mask in masks) if masks else np.nan
