"""Data sets as images on the device, or as a stream."""
