"""What ``benchmarks/simulate.py`` is made of: costs, a worker of numbers, the virtual clock, figures, pictures."""
