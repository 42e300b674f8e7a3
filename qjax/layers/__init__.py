"""Layers: Flax modules that know neither checkpoint formats nor numeric types."""
