"""Checkpoint formats: one file each, which turns stored tensors into QArrays and back."""
