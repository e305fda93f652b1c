"""Layout of arrays on several devices: one mesh axis splits batches, the other axis splits large weights."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from cs_jax.core.errors import ConfigError
from cs_jax.training import processes

DATA, MODEL = "data", "model"
"""Axes of the mesh: examples of a batch are split over "data", entries of large arrays over "model"."""

MIN_SIZE = 4096
"""Minimum number of entries of an array that is split: copying smaller arrays costs less than gathering them."""


@dataclass(frozen=True)
class MeshLayout:
    """A device mesh and the shardings of arrays on it. Devices that share a weight belong to one process.

    Arrays of the same shape always get the same sharding, so scores, masks and momentum are split like their weights.

    Attributes:
        mesh: has the axes "data" and "model".
    """

    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        """Sharding of an array that is copied whole to every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, size: int) -> NamedSharding:
        """Sharding of an array of `size` examples: split over "data", or whole if it cannot be split evenly."""
        evenly = size % self.mesh.shape[DATA] == 0
        return NamedSharding(self.mesh, PartitionSpec(DATA)) if evenly else self.whole

    def check_batch(self, size: int) -> None:
        """Check that a batch of `size` examples can be split evenly.

        Raises:
            ConfigError: the batch cannot be split evenly; the message gives the number of devices.
        """
        parts = self.mesh.shape[DATA]
        if size % parts:
            devices = f"{parts}, the number of devices that share a batch"
            raise ConfigError(f"--batch-size {size}: must be a multiple of {devices}")

    def batches(self, size: int) -> NamedSharding:
        """Sharding of several batches of `size` examples, (steps, batch): each row as in `batch`."""
        return NamedSharding(self.mesh, PartitionSpec(None, *self.batch(size).spec))

    def state(self, tree: PyTree) -> PyTree:
        """Shardings of weights, and of all arrays with the shapes of weights.

        An array of at least `MIN_SIZE` entries is split over "model", along the longest axis that can be divided into
        equal parts of more than one entry. If several axes are longest, the last of these axes is split. An array with
        axis names (`flax.linen.with_partitioning`) is split only along the axis that is named "model".

        Args:
            tree: arrays or their shapes; arrays with axis names are Flax boxes.

        Returns:
            Tree like `tree`, with shardings in place of arrays.
        """

        def place(node: Any) -> Any:
            if not isinstance(node, meta.AxisMetadata):
                return NamedSharding(self.mesh, self._split(node.shape))
            names = nn.get_partition_spec(node)
            known = PartitionSpec(
                *(name if name == MODEL else None for name in names)
            )  # weights are never split over processes
            return jax.tree.map(lambda _: NamedSharding(self.mesh, known), node)

        return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, meta.AxisMetadata))

    def _split(self, shape: tuple[int, ...]) -> PartitionSpec:
        parts = self.mesh.shape[MODEL]
        axes = [axis for axis, size in enumerate(shape) if size % parts == 0 and size > parts]
        if parts == 1 or not axes or np.prod(shape) < MIN_SIZE:
            return PartitionSpec()
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*(MODEL if axis == longest else None for axis in range(longest + 1)))

    def join(self, share: np.ndarray, size: int) -> jax.Array:
        """Global batch of `size` examples from the share that each process has read, in the order of the processes."""
        sharding = self.batch(size)
        if sharding.is_fully_replicated:
            return self.place(processes.gather_rows(share, size), sharding)
        return jax.make_array_from_process_local_data(sharding, share, (size, *share.shape[1:]))

    def place(self, tree: PyTree, shardings: PyTree) -> PyTree:
        """Arrays with the given shardings; an array that already has its sharding is not copied.

        Args:
            tree: arrays, equal in every process.
            shardings: one sharding for all arrays, or a tree like `tree`.
        """
        if isinstance(shardings, NamedSharding):
            return jax.tree.map(lambda leaf: _placed(leaf, shardings), tree)
        return jax.tree.map(_placed, tree, shardings)


def _placed(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, Tracer):
        return array
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def make_layout(data: int | None, model: int) -> MeshLayout | None:
    """Layout on a mesh of `data * model` devices; None for one device of one process.

    Args:
        data: number of devices that share a batch. None is 1 in a single process. With several processes, None is the
            number of all devices divided by `model`.
        model: number of devices that share each large array of weights.

    Raises:
        ConfigError: too few devices, or, with several processes, not all devices are used.
    """
    devices = jax.device_count()
    if model > devices:
        raise ConfigError(f"--model-parallel {model}: must be at most {devices}, the number of devices")
    local = jax.local_device_count()
    if jax.process_count() > 1 and local % model:
        raise ConfigError(f"--model-parallel {model}: must divide {local}, the number of devices of each process")
    if data is None:
        data = devices // model if jax.process_count() > 1 else 1
    if jax.process_count() > 1 and data * model != devices:
        raise ConfigError(
            f"--data-parallel {data} with --model-parallel {model}: must use all {devices} devices of the "
            f"{jax.process_count()} processes; set --data-parallel {devices // model}"
        )
    if data * model > devices:
        raise ConfigError(
            f"--data-parallel {data} with --model-parallel {model}: requires {data * model} devices, "
            f"but there are {devices}"
        )
    if data * model == 1:
        return None
    used = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[: data * model]
    return MeshLayout(Mesh(np.reshape(used, (data, model)), (DATA, MODEL), (AxisType.Auto, AxisType.Auto)))
