"""Aside: text encoders, VAEs and what a pipeline does with them run beside the ticks."""
