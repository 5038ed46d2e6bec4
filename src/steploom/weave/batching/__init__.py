"""Batching: which calls run together, how their rows become one call, and how its result is split again."""
