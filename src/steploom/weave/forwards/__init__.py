"""Forwards: how the real modules are run, as recorded graphs where there are, and when they need not be run at all."""
