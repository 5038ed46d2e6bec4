"""GPU benchmarks: architectures of real size with random weights. ``python benchmarks/gpu --help``."""
