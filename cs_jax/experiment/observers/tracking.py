"""Figures of a run as they come: for TensorBoard, and for any tracker of one's own.

A tracker is told once an epoch, so it costs a step nothing.
"""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from cs_jax.core import trees
from cs_jax.core.arrays import on_host
from cs_jax.core.errors import CsJaxWarning
from cs_jax.experiment.config import Config
from cs_jax.experiment.progress import EpochRecord, Observer, Progress

HISTOGRAM_BUCKETS = 64


class TrackerWarning(CsJaxWarning):
    """A tracker failed, and the run goes on without it."""


class TrackingError(OSError):
    """A tracker failed, and the run is not to go on without it."""


class Tracker(Protocol):
    """Where figures go: the interface for Weights & Biases, MLflow and anything else.

    Subclass it, and leave out what is of no use. Where a method raises, the run warns once and goes on without this
    tracker, which is not called again. A `TrackingError` ends the run instead.
    """

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Takes all figures of an epoch, at its end; called on the thread of the run, which waits.

        Args:
            step: epochs over all phases that were done before, so from 0. It grows by 1 from call to call, and begins
                with the epoch that a resumed run goes on with, which the run may have logged before.
            scalars: finite numbers by tag, such as "search/loss"; a figure without a meaning is absent.
            histograms: float64 arrays by tag, such as "search/scores/conv0/kernel"; any shapes, free to be kept.
        """

    def close(self) -> None:
        """Called once, when the run ends in whatever way."""


class Tracking(Observer):
    """Tells trackers of every epoch. A context manager, so that they are closed.

    Args:
        config: of the run.
        trackers: each is told by itself; one that fails does not keep the others from it.

    Raises:
        TrackingError: a tracker raised it.

    Warns:
        TrackerWarning: a tracker raised anything else, and is told nothing more.
    """

    def __init__(self, config: Config, trackers: Iterable[Tracker]) -> None:
        self._config = config
        self._trackers = list(trackers)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for tracker in list(self._trackers):
            with self._surviving(tracker):
                tracker.close()

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        if not self._trackers:
            return
        step = progress.epochs_done(self._config) - 1
        scalars, entries = scalars_of(record), histograms_of(progress)
        for tracker in list(self._trackers):
            with self._surviving(tracker):
                tracker.log(step, scalars, entries)

    @contextlib.contextmanager
    def _surviving(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:  # of a server or a library that this package knows nothing of
            self._trackers = [other for other in self._trackers if other is not tracker]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"the run goes on without {type(tracker).__name__}, which failed with {reason}",
                TrackerWarning,
                stacklevel=3,
            )


def scalars_of(record: EpochRecord) -> dict[str, float]:
    """Every number of an epoch by its tag, which is its phase and its name in metrics.jsonl; None is left out.

    Beside those are the cross-entropy, which is the loss less the penalty, and the density of each layer under
    `layer_density`.
    """
    figures = record._asdict()
    figures.pop("phase")
    layers = figures.pop("layer_density")
    figures["cross_entropy"] = record.loss - record.penalty
    figures |= {f"layer_density/{name}": density for name, density in layers.items()}
    return {f"{record.phase}/{name}": float(value) for name, value in figures.items() if value is not None}


def histograms_of(progress: Progress) -> dict[str, np.ndarray]:
    """The scores of each masked array by its tag, copied in float64; nothing where masks are fixed."""
    leaves = trees.leaves_by_path(progress.state.scores)
    # in float32 there may be no room for buckets between scores that are nearly equal
    return {f"{progress.phase}/scores/{trees.name(path)}": on_host(leaf).astype(float) for path, leaf in leaves.items()}


class TensorBoard(Tracker):
    """Writes event files for TensorBoard, without TensorFlow.

    Each process writes a file of its own, which begins with the first figures: nothing is left behind by a run that
    fails before. When `log` returns, figures are on the disk. Those that an earlier file has of a step that comes
    again do not show.

    Args:
        folder: where event files go; made with the first of them.

    Raises:
        TrackingError: a file cannot be written, as on a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        values: list[dict[str, Any]] = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        values += [{"tag": tag, "histo": _histogram(entries)} for tag, entries in histograms.items()]
        with self._telling_errors():
            if self._writer is None:
                self._writer = _open(self._folder)
                self._write(file_version="brain.Event:2")
                self._write(step=step, session_log={"status": "START"})  # voids what older files have from here on
            self._write(step=step, summary={"value": values})
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._telling_errors():
                self._writer.close()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto import event_pb2

        messages: Any = event_pb2  # made as it is loaded, so that no type checker knows what it holds
        self._writer.write(messages.Event(wall_time=time.time(), **content).SerializeToString())

    @contextlib.contextmanager
    def _telling_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(OSError):  # what it still holds cannot be written either
                    writer.close()
            reason = f"{error.strerror}: figures for TensorBoard cannot be written"
            raise TrackingError(error.errno, reason, str(self._folder)) from error


def _open(folder: Path) -> Any:
    """A writer of records to a new file, which writes at once: in the thread of `SummaryWriter` errors are lost."""
    from tensorboardX import RecordWriter  # loads for a while, and not every run wants it

    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))  # of the file: two of one second would have one name without it
    return RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{number}"))


def _histogram(entries: np.ndarray) -> dict[str, Any]:
    """TensorBoard's histogram of all entries: counts in buckets of equal width, by their upper limits."""
    flat = np.asarray(entries, float).ravel()
    least, most = flat.min(), flat.max()
    counts, edges = np.histogram(flat, HISTOGRAM_BUCKETS if least < most else 1)
    return {
        "min": least,
        "max": most,
        "num": flat.size,
        "sum": flat.sum(),
        "sum_squares": np.square(flat).sum(),
        "bucket_limit": [*edges[1:-1], most],
        "bucket": counts.tolist(),
    }
