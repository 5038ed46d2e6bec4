"""The engine: requests in, events and outputs out, one tick loop between."""
