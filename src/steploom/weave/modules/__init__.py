"""Modules: what programs share, what the application and its requests change about it, and how that is kept apart."""
