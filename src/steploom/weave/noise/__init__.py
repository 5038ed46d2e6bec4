"""Noise schedulers: a copy for each request, whose steps are observed, chosen by the request, and taken together."""
