"""Ranks: several processes that are one worker."""
