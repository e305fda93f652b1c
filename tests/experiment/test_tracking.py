"""Metrics passed to trackers, and TensorBoard event files read back byte for byte."""

import dataclasses
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

from cs_jax.experiment import search
from cs_jax.experiment.observers import tracking
from cs_jax.experiment.observers.tracking import TensorBoard, Tracker, TrackerWarning, Tracking, TrackingError
from cs_jax.experiment.progress import EpochRecord, Observer, Observers, Progress
from cs_jax.methods.controls import DENSE
from cs_jax.training.problem import Problem

event_pb2: Any = pytest.importorskip("tensorboardX.proto.event_pb2")
crc: Any = pytest.importorskip("tensorboardX.record_writer")

CONFIG = dataclasses.replace(small.SEARCH, controls=(DENSE,))
LAYERS = ["hidden0/kernel", "hidden1/kernel"]
PAGE = Path(__file__).parents[2] / "docs" / "experiments" / "tracking.md"


class Log(Tracker):
    """Records all logged values."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.scalars: list[dict[str, float]] = []
        self.histograms: list[dict[str, np.ndarray]] = []
        self.closed = 0

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        self.steps.append(step)
        self.scalars.append(dict(scalars))
        self.histograms.append(dict(histograms))

    def close(self) -> None:
        self.closed += 1


class History(Observer):
    def __init__(self) -> None:
        self.records: list[EpochRecord] = []
        self.scores: list[Any] = []

    def on_epoch_end(self, record: EpochRecord, progress: Progress) -> None:
        self.records.append(record)
        self.scores.append(jax.tree.map(np.array, progress.state.scores))


def run(problem: Problem, *trackers: Tracker) -> History:
    """Runs search, ticket and dense network, two epochs in each round or phase."""
    history = History()
    with Tracking(CONFIG, trackers) as watch:
        observer = Observers(history, watch)
        start = search.begin_search(search.init_state(CONFIG, problem))
        ticket, _ = search.search_ticket(CONFIG, problem, start, observer)
        search.retrain(CONFIG, problem, search.begin_retraining(problem, ticket), observer)
        start = search.begin_retraining(problem, problem.init_ticket(), phase=DENSE)
        search.retrain(CONFIG, problem, start, observer)
    return history


def read_events(path: Path) -> Iterator[Any]:
    """Events of a TFRecord file; each record is length, checksum, data, checksum."""
    content = path.read_bytes()
    while content:
        header, length = content[:8], struct.unpack("<Q", content[:8])[0]
        data = content[12 : 12 + length]
        checksums = struct.unpack("<I", content[8:12]) + struct.unpack("<I", content[12 + length : 16 + length])
        assert checksums == (crc.masked_crc32c(header), crc.masked_crc32c(data))
        yield event_pb2.Event.FromString(data)
        content = content[16 + length :]


def shown(folder: Path) -> dict[tuple[str, int], Any]:
    """Values that TensorBoard shows, by tag and step, without those that a later start removes."""
    values: dict[tuple[str, int], Any] = {}
    for path in sorted(folder.iterdir()):
        for event in read_events(path):
            if event.session_log.status == event_pb2.SessionLog.START:
                values = {key: value for key, value in values.items() if key[1] < event.step}
            for value in event.summary.value:
                assert (value.tag, event.step) not in values
                values[value.tag, event.step] = value
    return values


def test_an_epoch_is_logged_with_every_figure_that_it_has(problem: Problem) -> None:
    log = Log()
    history = run(problem, log)
    assert log.steps == list(range(8)) and log.closed == 1
    for record, scores, scalars, entries in zip(
        history.records, history.scores, log.scalars, log.histograms, strict=True
    ):
        names = ["loss", "penalty", "density", "learning_rate", "epoch", "images_per_second", "seconds"]
        optional = ["round", "temperature", "flip_rate", "soft_accuracy", "hard_accuracy"]
        names += [name for name in optional if getattr(record, name) is not None]
        expected = {f"{record.phase}/{name}": getattr(record, name) for name in names}
        expected[f"{record.phase}/cross_entropy"] = record.loss - record.penalty
        expected |= {f"{record.phase}/layer_density/{layer}": record.layer_density[layer] for layer in LAYERS}
        assert scalars == expected
        if record.phase == "search":
            assert list(entries) == [f"search/scores/{layer}" for layer in LAYERS]
            jax.tree.map(np.testing.assert_array_equal, list(entries.values()), jax.tree.leaves(scores))
        else:
            assert entries == {}
    assert [record.phase for record in history.records] == ["search"] * 4 + ["ticket"] * 2 + ["dense"] * 2


def test_figures_without_a_meaning_are_left_out() -> None:
    record = small.RECORD._replace(
        phase="ticket", round=None, temperature=None, density=0.25, layer_density={"head": 0.25}, soft_accuracy=None
    )
    assert tracking.scalars_of(record) == {
        "ticket/epoch": 2.0,
        "ticket/learning_rate": 0.05,
        "ticket/loss": 2.0,
        "ticket/penalty": 0.5,
        "ticket/cross_entropy": 1.5,
        "ticket/density": 0.25,
        "ticket/layer_density/head": 0.25,
        "ticket/images_per_second": 100.0,
        "ticket/seconds": 1.0,
    }


def test_histograms_do_not_change_with_the_next_step(problem: Problem) -> None:
    log = Log()
    history = run(problem, log)
    first = log.histograms[0]["search/scores/hidden0/kernel"]
    np.testing.assert_array_equal(first, jax.tree.leaves(history.scores[0])[0])
    assert (first != log.histograms[1]["search/scores/hidden0/kernel"]).any()


def test_the_guide_lists_the_tags_that_a_run_has(problem: Problem) -> None:
    log = Log()
    run(problem, log)
    given: dict[str, set[str]] = {}
    for tag in {tag for values in (*log.scalars, *log.histograms) for tag in values}:
        phase, name = tag.split("/", 1)
        given.setdefault(re.sub(r"/hidden.*", "/LAYER", name), set()).add(phase)
    rows = re.findall(r"^\| `([a-z][\w/]*)` \| ([a-z, ]+) \|", PAGE.read_text(), re.MULTILINE)
    assert {name: set(phases.split(", ")) for name, phases in rows} == given


def test_event_files_hold_the_figures_that_were_logged(problem: Problem, tmp_path: Path) -> None:
    log = Log()
    run(problem, log, TensorBoard(tmp_path / "tensorboard"))
    values = shown(tmp_path / "tensorboard")
    pairs = [(tag, step) for step in log.steps for tag in (*log.scalars[step], *log.histograms[step])]
    assert sorted(values) == sorted(pairs)
    for step, scalars, entries in zip(log.steps, log.scalars, log.histograms, strict=True):
        for tag, value in scalars.items():
            assert values[tag, step].simple_value == np.float32(value)
        for tag, scores in entries.items():
            found = values[tag, step].histo
            limits = np.array(found.bucket_limit)
            below = [(scores <= limit).sum() for limit in limits[:-1]]
            # of scores that are a limit to rounding, some may be on its other side
            np.testing.assert_allclose(np.cumsum(found.bucket)[:-1], below, atol=2)
            assert len(limits) == tracking.HISTOGRAM_BUCKETS
            assert (found.num, sum(found.bucket)) == (scores.size, scores.size)
            assert (found.min, found.max) == (scores.min(), scores.max())
            np.testing.assert_allclose(found.sum, scores.sum(dtype=float))
            np.testing.assert_allclose(found.sum_squares, (scores.astype(float) ** 2).sum())


@pytest.mark.parametrize("entries", [[0.5], [-0.03, -0.03], [1.0, np.nextafter(np.float32(1), np.float32(2))]])
def test_equal_and_nearly_equal_scores_have_a_histogram(entries: list[float], tmp_path: Path) -> None:
    scores = np.array(entries, np.float32)
    with closing(TensorBoard(tmp_path)) as board:
        board.log(0, {}, {"search/scores/head": scores})
    found = shown(tmp_path)["search/scores/head", 0].histo
    assert sum(found.bucket) == found.num == scores.size
    assert (found.min, found.max, found.bucket_limit[-1]) == (scores.min(), scores.max(), scores.max())
    assert list(found.bucket_limit) == sorted(found.bucket_limit)


def test_figures_of_epochs_that_come_again_show_once(tmp_path: Path) -> None:
    with closing(TensorBoard(tmp_path)) as first, closing(TensorBoard(tmp_path)) as resumed:  # in the same second
        for step in range(4):
            first.log(step, {"search/loss": step}, {})
        resumed.log(2, {"search/loss": 20.0}, {})
        resumed.log(3, {"search/loss": 30.0}, {})
    values = {step: value.simple_value for (_, step), value in shown(tmp_path).items()}
    assert values == {0: 0.0, 1: 1.0, 2: 20.0, 3: 30.0}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_resumed_run_continues_the_steps(problem: Problem) -> None:
    log = Log()
    progress = search.begin_retraining(problem, problem.init_ticket())._replace(epoch=1)
    search.retrain(CONFIG, problem, progress, Tracking(CONFIG, [log]))
    assert log.steps == [5]  # two rounds of two epochs, and the ticket's first


def test_figures_are_on_disk_when_an_epoch_is_logged(tmp_path: Path) -> None:
    with closing(TensorBoard(tmp_path)) as board:
        board.log(0, {"search/loss": 1.0}, {})
        assert list(shown(tmp_path)) == [("search/loss", 0)]


def test_nothing_is_written_before_the_first_figure(tmp_path: Path) -> None:
    with Tracking(CONFIG, [TensorBoard(tmp_path / "tensorboard")]):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_ends_the_run_and_closes_the_other_trackers(
    problem: Problem, tmp_path: Path
) -> None:
    log = Log()
    with (
        small.largest_file(4000),  # more than an epoch, less than two
        pytest.raises(TrackingError, match="File too large: metrics for TensorBoard cannot be written: '.*board'$"),
    ):
        run(problem, TensorBoard(tmp_path / "tensorboard"), log)
    assert log.steps == [0] and log.closed == 1


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(TrackingError, match="metrics for TensorBoard cannot be written: '.*tensorboard'$"):
        TensorBoard(tmp_path / "tensorboard").log(0, {"search/loss": 1.0}, {})


class Gone(Log):
    """A tracker whose server goes away after the first epoch."""

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        super().log(step, scalars, histograms)
        if step:
            raise ConnectionError("server\ngone")


class StopsAll(Log):
    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        raise TrackingError("no run without figures")


class Interrupted(Log):
    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        raise KeyboardInterrupt


class CannotClose(Log):
    def close(self) -> None:
        raise RuntimeError("still uploading")


def test_the_run_goes_on_without_a_tracker_that_fails_and_says_so_once(problem: Problem) -> None:
    gone, log = Gone(), Log()
    with pytest.warns(TrackerWarning) as caught:
        run(problem, gone, log)
    assert [str(warning.message) for warning in caught] == [
        "Gone failed with ConnectionError: server gone; the run continues without this tracker"
    ]
    assert (gone.steps, gone.closed) == ([0, 1], 0)
    assert (log.steps, log.closed) == (list(range(8)), 1)


@pytest.mark.parametrize("tracker, error", [(StopsAll(), TrackingError), (Interrupted(), KeyboardInterrupt)])
def test_a_tracker_can_end_the_run(problem: Problem, tracker: Tracker, error: type[BaseException]) -> None:
    log = Log()
    with pytest.raises(error):
        run(problem, tracker, log)
    assert log.steps == [] and log.closed == 1


def test_a_tracker_that_cannot_be_closed_is_told_and_the_others_are_closed() -> None:
    log = Log()
    message = "^CannotClose failed with RuntimeError: still uploading; the run continues without this tracker$"
    with pytest.warns(TrackerWarning, match=message):
        with Tracking(CONFIG, [CannotClose(), log]):
            pass
    assert log.closed == 1


def test_a_tracker_may_leave_out_what_it_does_not_want(problem: Problem) -> None:
    class Nothing(Tracker):
        pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TrackerWarning)
        run(problem, Nothing())
    assert [str(warning.message) for warning in caught] == []
