"""Blame: whose fault it is that a pipeline raised."""
