"""Where arrays are on several devices: one mesh, batches split over one of its axes, large weights over the other."""

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
"""Axes of the mesh: examples of a batch are split over the first, entries of large arrays over the second."""

MIN_SIZE = 4096
"""Entries of an array from which it is split: what is smaller costs less to have everywhere than to bring together."""


@dataclass(frozen=True)
class MeshLayout:
    """A mesh, and what of an array each of its devices has. Devices that share a weight are of one process.

    Scores, masks, momentum and snapshot lie as their weights do: the rule places all arrays of one shape alike.

    Attributes:
        mesh: with the axes "data" and "model".
    """

    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        """Every device has all of it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def batch(self, size: int) -> NamedSharding:
        """Of an array of so many examples: split over "data", or whole where they cannot be split evenly."""
        evenly = size % self.mesh.shape[DATA] == 0
        return NamedSharding(self.mesh, PartitionSpec(DATA)) if evenly else self.whole

    def check_batch(self, size: int) -> None:
        """Refuses a batch that cannot be split evenly.

        Raises:
            ConfigError: says by what it has to divide.
        """
        parts = self.mesh.shape[DATA]
        if size % parts:
            raise ConfigError(f"--batch-size: got {size}, wanted a multiple of the {parts} devices that share a batch")

    def batches(self, size: int) -> NamedSharding:
        """Of rows of so many examples each, as `batch`."""
        return NamedSharding(self.mesh, PartitionSpec(None, *self.batch(size).spec))

    def state(self, tree: PyTree) -> PyTree:
        """Shardings of weights, and of all that has their shapes.

        An array of at least `MIN_SIZE` entries is split over "model" along its longest axis that divides evenly, into
        more than one entry each (the last of equal ones). One with names (`flax.linen.with_partitioning`) is split
        along the axis that is named "model", and no other.

        Args:
            tree: arrays or their shapes; boxes with names where there are some.

        Returns:
            Tree like `tree`, of shardings in place of arrays.
        """

        def place(node: Any) -> Any:
            if not isinstance(node, meta.AxisMetadata):
                return NamedSharding(self.mesh, self._split(node.shape))
            names = nn.get_partition_spec(node)
            known = PartitionSpec(*(name if name == MODEL else None for name in names))  # never over processes
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
        """A batch of so many examples, of which each process has read its share, in the order of the processes."""
        sharding = self.batch(size)
        if sharding.is_fully_replicated:
            return self.place(processes.gather_rows(share, size), sharding)
        return jax.make_array_from_process_local_data(sharding, share, (size, *share.shape[1:]))

    def place(self, tree: PyTree, shardings: PyTree) -> PyTree:
        """Arrays where they belong; those that are there already are not copied.

        Args:
            tree: arrays, the same in every process.
            shardings: one for all of them, or a tree of them.
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
    """The mesh of as many devices as were asked for; None where that is one device of one process.

    Args:
        data: devices to split batches over; None is 1, or under several processes all that "model" leaves.
        model: devices to split large arrays over.

    Raises:
        ConfigError: there are less devices, or under several processes more.
    """
    devices = jax.device_count()
    if model > devices:
        raise ConfigError(f"--model-parallel: got {model}, wanted at most {devices}, the devices there are")
    local = jax.local_device_count()
    if jax.process_count() > 1 and local % model:
        raise ConfigError(f"--model-parallel: got {model}, wanted a divisor of the {local} devices of each process")
    if data is None:
        data = devices // model if jax.process_count() > 1 else 1
    wanted = f"{devices // model}, so that all {devices} devices of the {jax.process_count()} processes take part"
    if jax.process_count() > 1 and data * model != devices:
        raise ConfigError(f"--data-parallel: got {data} beside --model-parallel {model}, wanted {wanted}")
    if data * model > devices:
        raise ConfigError(
            f"--data-parallel: got {data} beside --model-parallel {model}, which are {data * model} devices, wanted at "
            f"most the {devices} that there are"
        )
    if data * model == 1:
        return None
    used = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))[: data * model]
    return MeshLayout(Mesh(np.reshape(used, (data, model)), (DATA, MODEL), (AxisType.Auto, AxisType.Auto)))
