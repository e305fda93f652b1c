"""Places arrays for compiled functions: on the default device, or on a mesh of devices."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from cs_jax.data.stream import ImageStream
from cs_jax.training.mesh import MeshLayout


@dataclass(eq=False)
class Placement:
    """Places weights, data and batch indices.

    Attributes:
        mesh_layout: layout on several devices; None is the default device.
    """

    mesh_layout: MeshLayout | None = None

    def place(self, tree: PyTree) -> PyTree:
        """Weights and arrays with the shapes of weights, placed for compiled steps."""
        return tree if self.mesh_layout is None else self.mesh_layout.place(tree, self.mesh_layout.state(tree))

    def copy(self, tree: PyTree) -> PyTree:
        """Copies of weights, placed as in `place`, which can be donated to a step."""
        return jax.tree.map(jnp.copy, self.place(tree))

    def place_everywhere(self, tree: PyTree) -> PyTree:
        """Data, copied whole to every device. A stream is returned unchanged: its batches are placed when read."""
        if self.mesh_layout is None or isinstance(tree, ImageStream):
            return tree
        return self.mesh_layout.place(tree, self.mesh_layout.whole)

    def shardings(self, tree: PyTree) -> PyTree:
        """Shardings that `place` gives to arrays of these shapes."""
        if self.mesh_layout is not None:
            return self.mesh_layout.state(tree)
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), tree)

    def place_batch(self, indices: np.ndarray) -> np.ndarray | jax.Array:
        """Indices of one batch, (batch,), split over the devices that share a batch."""
        if self.mesh_layout is None:
            return indices
        return self.mesh_layout.place(indices, self.mesh_layout.batch(indices.size))

    def place_batches(self, indices: np.ndarray) -> jax.Array:
        """Indices of several batches, (steps, batch), each split over the devices that share a batch."""
        if self.mesh_layout is None:
            return jnp.asarray(indices)
        return self.mesh_layout.place(indices, self.mesh_layout.batches(indices.shape[1]))
