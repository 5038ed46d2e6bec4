"""Verifying: whether a merged call gave each row what it would have got alone, or only what rounding explains."""
