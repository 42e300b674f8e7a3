"""Tests on eight devices, which jax makes of one CPU where it is told so before it starts.

`tests/test_parallel.py` runs this folder in a process of its own; by hand:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/parallel`.
"""

import os

FLAG = "--xla_force_host_platform_device_count=8"

collect_ignore_glob = [] if FLAG in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]
