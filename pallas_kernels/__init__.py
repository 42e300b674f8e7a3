"""Kernels on plain arrays: one folder an operation, several implementations each, picked by
`dispatch`.

Nothing here knows of models or checkpoints; a weight is raw bytes plus a small static description.
"""
