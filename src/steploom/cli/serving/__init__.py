"""``steploom serve``: its settings, where it listens, and how it ends."""
