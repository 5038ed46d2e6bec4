"""Traits: what a pipeline takes and makes, found out before anybody asks it for something."""
