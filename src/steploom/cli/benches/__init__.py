"""``steploom bench``: workloads, what they are sent to, and what they have shown."""
