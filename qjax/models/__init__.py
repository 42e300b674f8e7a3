"""Decoder models: what they are (config) and how they run (one file a family)."""
