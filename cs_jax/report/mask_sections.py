"""Sections of a run: density of layers, flip rate, mask overlap between rounds, linear mode connectivity, scores."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cs_jax.experiment.config import SEARCH, TICKET
from cs_jax.experiment.connectivity import barrier_note
from cs_jax.experiment.storage.paths import MASKS_FILE, METRICS_FILE, SCORES_FILE
from cs_jax.report import heatmaps, plots
from cs_jax.report.epoch_sections import AFTERWARDS, spans
from cs_jax.report.pages import Plot, Section, Table, describe_lines, percent, plot
from cs_jax.report.plots import Line, YAxis
from cs_jax.report.read_arrays import Bits, Masks
from cs_jax.report.read_run import Epoch, Run
from cs_jax.tickets import overlap as mask_overlap
from cs_jax.tickets.overlap import Overlap

LONG_TABLE = 12  # rows; longer tables are folded
LOG_RATIO = 10.0  # the flip rate has a logarithmic axis if maximum / minimum is at least this ratio


def layers(run: Run) -> Section:
    """Section with the density of each layer, in the ticket or the last epoch, and over the search."""
    section = Section("Layers")
    of_ticket = [epoch for epoch in run.epochs if epoch.phase in (SEARCH, TICKET)]
    known = [(epoch, shares) for epoch in of_ticket if (shares := _layer_shares(epoch))]
    if not known:
        section.notes.append(f"{METRICS_FILE} has no layer densities.")
        return section
    last, shares = known[-1]
    empty = [name for name, share in shares.items() if share == 0]
    if empty:
        named = ", ".join(empty[:10]) + " …" * (len(empty) > 10)
        section.notes.append(f"{len(empty)} of {len(shares)} layers keep no weights: {named}.")
    title = "ticket" if last.phase == TICKET or run.summary else f"round {last.round}, epoch {last.epoch}"
    ends = f"{percent(min(shares.values()))} to {percent(max(shares.values()))}"
    alt = f"Bar chart of the density of {len(shares)} layers: {ends}."
    figure = heatmaps.bars([*shares], [*shares.values()])
    section.parts.append(
        plot("layers", f"Density of each layer, {title}", "share of weights kept; input at the top", alt, figure)
    )
    if run.phase(SEARCH):
        section.parts.append(_layers_by_epoch(run, [*shares]))
    section.parts.append(_layer_table(run, shares))
    return section


def _layer_shares(epoch: Epoch) -> dict[str, float]:
    return {name: share for name, share in epoch.layer_density.items() if share is not None}


def _layers_by_epoch(run: Run, names: Sequence[str]) -> Plot:
    by_epoch = [_layer_shares(epoch) for epoch in run.phase(SEARCH)]
    table = np.array([[shares.get(name, math.nan) for shares in by_epoch] for name in names])
    figure = heatmaps.heat(names, table, [span for span in spans(run) if span.label not in AFTERWARDS])
    alt = f"Heat map of the density of {len(names)} layers over {len(by_epoch)} epochs of the search."
    title, remark = "Density of each layer over the search", "hard masks; brighter is denser"
    return plot("layers-by-epoch", title, remark, alt, figure)


def _layer_table(run: Run, shares: Mapping[str, float]) -> Table:
    sizes = (run.masks and run.masks.sizes) or (run.scores and run.scores.sizes) or {}

    def row(name: str) -> list[str]:
        kept = f"{round(shares[name] * sizes[name]):,} of {sizes[name]:,}" if name in sizes else "-"
        return [name, kept, percent(shares[name])]

    folded = len(shares) > LONG_TABLE
    return Table("Density of each layer", ("Layer", "Weights kept", "Density"), [*map(row, shares)], folded=folded)


def masks(run: Run) -> Section:
    """Section with the flip rate over the search, and the overlap of the masks of the rounds and the ticket."""
    section = Section("Masks")
    flips = _flips(run)
    if flips is not None:
        section.parts.append(flips)
    if run.masks is None or not run.masks.rounds:
        if run.search_epochs:
            section.notes.append(f"{MASKS_FILE} is missing: no round has finished, or the run has another version.")
        else:
            section.texts.append("The ticket's masks were chosen before training, without a search.")
        return section
    if run.masks.sizes is None:
        section.notes.append("Rounds are not compared yet: the layer sizes are unknown until there is a ticket.")
        return section
    rows = _overlap_rows(run.masks, run.masks.sizes)
    if rows:
        section.texts.append(
            "Both keep: number of weights kept by both masks. Shared: this number, divided by the number of weights "
            "that the sparser mask keeps. By chance: expected value of Shared for random masks that keep the same "
            "number of weights in each layer. z: distance of Both keep from its expected value for these random masks, "
            "in standard deviations. Flipped: share of all maskable weights that only one of the two masks keeps."
        )
        head = ("Mask", "Other mask", "Both keep", "Shared", "By chance", "z", "Flipped")
        caption = "Mask overlap between ends of rounds, and between the last round and the ticket"
        section.parts.append(Table(caption, head, rows, words=2, wide=True, folded=len(rows) > LONG_TABLE))
    return section


def _flips(run: Run) -> Plot | None:
    epochs = run.phase(SEARCH)
    rates = [math.nan if epoch.flip_rate is None else epoch.flip_rate for epoch in epochs]
    known = [rate for rate in rates if math.isfinite(rate)]
    if not known:
        return None
    flipped = [rate for rate in known if rate > 0]
    log = bool(flipped) and max(flipped) >= LOG_RATIO * min(flipped)
    remark = "share of maskable weights whose hard mask changed in an epoch" + "; logarithmic axis" * log
    if log and len(flipped) < len(known):
        remark += f"; {len(known) - len(flipped)} epochs without a flip are not drawn"
        rates = [rate if rate > 0 else math.nan for rate in rates]
    line = Line("search", [1.0 + index for index in range(len(rates))], rates)
    figure = plots.curves([line], YAxis("flip rate", percent=True, log=log, from_zero=not log), spans(run))
    alt = f"Flip rate by epoch. {describe_lines([line], percents=True)}"
    return plot("flip-rate", "Flip rate", remark, alt, figure)


def _overlap_rows(masks: Masks, sizes: Mapping[str, int]) -> list[list[str]]:
    """Rows of the overlap table: each pair of rounds, then the last round and the ticket."""
    rounds = {f"round {number}": _unpacked(bits, sizes) for number, bits in masks.rounds.items()}
    pairs = [(line.name, line.other, line.overlap) for line in mask_overlap.overlap_table(rounds)]
    if masks.ticket is not None and rounds:
        last, kept = [*rounds.items()][-1]
        pairs.append((last, "ticket", mask_overlap.overlap(kept, _unpacked(masks.ticket, sizes))))
    return [[name, other, *_overlap_row(overlap, sum(sizes.values()))] for name, other, overlap in pairs]


def _unpacked(bits: Bits, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    return {name: np.unpackbits(bits[name], count=size) for name, size in sizes.items()}


def _overlap_row(overlap: Overlap, size: int) -> list[str]:
    flipped = (sum(overlap.of) - 2 * overlap.kept) / max(1, size)
    shares = [percent(overlap.shared), percent(overlap.chance), shown_z(overlap.z), percent(flipped)]
    return [f"{overlap.kept:,}", *shares]


def shown_z(z: float | None) -> str:
    """A z value with a sign; "-" if random masks have no variance."""
    return "-" if z is None else f"{z:+,.1f}".replace("-", "−")


def connectivity(run: Run) -> Section | None:
    """Section with error and loss on the line between two retrainings of the ticket; None if not measured."""
    found = run.connectivity
    if found is None:
        return None
    section = Section("Linear mode connectivity")
    accuracies = " and ".join(percent(child.test_accuracy) for child in found.children)
    shares, errors, losses = ([getattr(point, name) for point in found.points] for name in ("share", "error", "loss"))
    note = barrier_note(errors, losses)
    section.texts.append(
        "The ticket was retrained twice; the two retrainings differ only in the order of the batches and in the "
        f"augmentation. Test accuracy of the two networks: {accuracies}. Barrier: maximum on the line between the "
        f"networks minus the mean of the two ends. The barrier is {100 * found.barrier:.2f} percentage points for the "
        f"error and {found.loss_barrier:.4f} for the loss{note and f' ({note})'}. A barrier near 0 means that the "
        "ticket is stable to SGD noise."
    )
    ends = f"{percent(errors[0])} and {percent(errors[-1])} at the ends, {percent(max(errors))} at most"
    alt = f"Test error and loss of {len(shares)} networks on the line: error {ends}; "
    alt += f"loss {losses[0]:.4g} and {losses[-1]:.4g} at the ends, {max(losses):.4g} at most."
    figure = plots.line_between(shares, errors, losses)
    title, remark = (
        "Linear mode connectivity",
        "on the test set, with new BatchNorm statistics at every point; dotted line: mean of the two ends",
    )
    section.parts.append(plot("connectivity", title, remark, alt, figure))
    return section


def scores(run: Run) -> Section | None:
    """Section with a histogram of the scores at the start and end of each round; None for a method without scores."""
    if not run.method.learns_masks and not (run.scores and run.scores.rounds):
        return None
    section = Section("Scores")
    if run.scores is None or not run.scores.rounds:
        section.notes.append(f"{SCORES_FILE} is missing or has no round yet.")
        return section
    section.texts.append(
        f"{run.method.remark_on_scores} Before: at the start of the round, after the reset. After: at the end of the "
        "round, before the next reset."
    )
    edges, rounds, _ = run.scores
    counts = [counts for entry in rounds for counts in (entry.before, entry.after) if counts is not None]
    filled = np.flatnonzero(np.sum(counts, axis=0))
    bins = (int(filled[0]), int(filled[-1])) if filled.size else (0, len(edges) - 2)
    for number, before, after in rounds:
        if after is None:
            section.notes.append(f"Round {number} has not finished: only the scores at the start are shown.")
        figure = plots.histogram(edges, before, after, bins, cut=run.method.cuts_at_zero)
        alt = f"Histogram of {before.sum():,} scores in round {number}. {_share_above_zero(edges, before, after)}"
        section.parts.append(
            plot(f"scores-round-{number}", f"Round {number}", "number of weights by score", alt, figure)
        )
    return section


def _share_above_zero(edges: np.ndarray, before: np.ndarray, after: np.ndarray | None) -> str:
    shares = [
        f"{percent(counts[edges[1:] > 0].sum() / max(1, counts.sum()))} above 0 {when}"
        for counts, when in ((before, "before"), (after, "after"))
        if counts is not None
    ]
    return ", ".join(shares) + "."
