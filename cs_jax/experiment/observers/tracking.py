"""Experiment tracking: metrics and score histograms of every epoch, for TensorBoard and other trackers.

Trackers are called once per epoch, so they do not slow down the steps.
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
    """A tracker failed, and the run continues without this tracker."""


class TrackingError(OSError):
    """A tracker failed, and the run must not continue without this tracker."""


class Tracker(Protocol):
    """Interface of trackers, for Weights & Biases, MLflow and others.

    Subclasses override the methods that they need. If a method raises, the run warns once and continues without this
    tracker, which is not called again. A `TrackingError` ends the run instead.
    """

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Receives the metrics of an epoch at its end. The thread of the run waits for the call.

        Args:
            step: number of earlier epochs in all phases, from 0; grows by 1 per call. A resumed run logs the epochs
                after its checkpoint again, with the same step numbers.
            scalars: finite numbers by tag, such as "search/loss". A metric that does not apply is absent.
            histograms: float64 arrays by tag, such as "search/scores/conv0/kernel"; any shapes. The tracker may keep
                the arrays.
        """

    def close(self) -> None:
        """Called once, when the run ends, fails or is interrupted."""


class Tracking(Observer):
    """Passes the metrics of every epoch to trackers. Context manager; closes the trackers at the end.

    Args:
        config: settings of the run.
        trackers: called one after another. A tracker that fails does not affect the other trackers.

    Raises:
        TrackingError: a tracker raised this error.

    Warns:
        TrackerWarning: a tracker raised another error, and is not called again.
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
            with self._warn_if_failed(tracker):
                tracker.close()

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        if not self._trackers:
            return
        step = progress.epochs_done(self._config) - 1
        scalars, entries = scalars_of(record), histograms_of(progress)
        for tracker in list(self._trackers):
            with self._warn_if_failed(tracker):
                tracker.log(step, scalars, entries)

    @contextlib.contextmanager
    def _warn_if_failed(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:  # any error of a server or library
            self._trackers = [other for other in self._trackers if other is not tracker]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"{type(tracker).__name__} failed with {reason}; the run continues without this tracker",
                TrackerWarning,
                stacklevel=3,
            )


def scalars_of(record: EpochRecord) -> dict[str, float]:
    """Metrics of an epoch by tag, `PHASE/NAME` with the name in metrics.jsonl; without metrics that are None.

    Further names are `cross_entropy`, which is the loss minus the penalty, and `layer_density/LAYER`.
    """
    figures = record._asdict()
    figures.pop("phase")
    layers = figures.pop("layer_density")
    figures["cross_entropy"] = record.loss - record.penalty
    figures |= {f"layer_density/{name}": density for name, density in layers.items()}
    return {f"{record.phase}/{name}": float(value) for name, value in figures.items() if value is not None}


def histograms_of(progress: Progress) -> dict[str, np.ndarray]:
    """Scores of each maskable array by tag, as float64 copies; empty if the masks are fixed."""
    leaves = trees.leaves_by_path(progress.state.scores)
    # float32 cannot represent bucket edges between nearly equal scores
    return {f"{progress.phase}/scores/{trees.name(path)}": on_host(leaf).astype(float) for path, leaf in leaves.items()}


class TensorBoard(Tracker):
    """Writes event files for TensorBoard, without TensorFlow.

    Each start or resume of a run creates a new file together with the first metrics, so a run that fails earlier leaves
    no file. Metrics are on disk when `log` returns. If a resumed run repeats steps, TensorBoard shows only the new
    values.

    Args:
        folder: directory for event files; created with the first file.

    Raises:
        TrackingError: a file cannot be written, for example on a full disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        values: list[dict[str, Any]] = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        values += [{"tag": tag, "histo": _histogram(entries)} for tag, entries in histograms.items()]
        with self._as_tracking_error():
            if self._writer is None:
                self._writer = _open(self._folder)
                self._write(file_version="brain.Event:2")
                self._write(step=step, session_log={"status": "START"})  # hides later steps of older files
            self._write(step=step, summary={"value": values})
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._as_tracking_error():
                self._writer.close()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto import event_pb2

        messages: Any = event_pb2  # created at import, so type checkers do not know its content
        self._writer.write(messages.Event(wall_time=time.time(), **content).SerializeToString())

    @contextlib.contextmanager
    def _as_tracking_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(OSError):  # its buffer cannot be written either
                    writer.close()
            reason = f"{error.strerror}: metrics for TensorBoard cannot be written"
            raise TrackingError(error.errno, reason, str(self._folder)) from error


def _open(folder: Path) -> Any:
    """Record writer for a new file, in the calling thread. `SummaryWriter` writes in a thread that loses errors."""
    from tensorboardX import RecordWriter  # slow to import, and not needed by every run

    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))  # a different name for two files of the same second
    return RecordWriter(str(folder / f"events.out.tfevents.{time.time():.0f}.{number}"))


def _histogram(entries: np.ndarray) -> dict[str, Any]:
    """TensorBoard's histogram of an array: counts in buckets of equal width, and the upper limits of the buckets."""
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
