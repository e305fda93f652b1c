"""One training step, epochs on devices, several devices and processes."""
