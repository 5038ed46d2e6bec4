"""Ragged rows: calls whose text has lengths of its own are padded and masked, by the rules of their families."""
