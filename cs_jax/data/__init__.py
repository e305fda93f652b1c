"""Data sets as images in device memory, or as a stream from files.

Sources (`digits`, `tfds`) read a data set on the host; `registry` maps names of data sets to sources. `load` splits the
examples of a source and computes the constants for normalization. A new source is one module with a function like
`digits.opened`, and one line in `registry.SOURCES`.
"""
