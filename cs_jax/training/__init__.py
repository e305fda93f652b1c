"""One training step, epochs on devices, several devices and processes.

`step` defines the step and `compiled` compiles it. `executor` runs epochs and evaluations; `epoch`, `evaluation`,
`streamed` and `placement` are its parts. `mesh` and `processes` are for several devices and processes. `shared_device`
and `batched_states` run several runs on one device.
"""
