"""The same workload on steploom, on ``pipe(...)`` and on other engines. ``python benchmarks/peers --help``."""
