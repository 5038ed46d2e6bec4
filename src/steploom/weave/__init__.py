"""Weaving: many unmodified pipeline calls share the forwards of one set of modules.

Read in this order: :mod:`~steploom.weave.program` (a suspended pipeline call), :mod:`~steploom.weave.copies` (what
makes it suspend), :mod:`~steploom.weave.hub` (who runs what it waits for),
:mod:`~steploom.weave.batching.merging` (where rows are merged), :mod:`~steploom.weave.verifying.verify` (why that can
be trusted).
"""
