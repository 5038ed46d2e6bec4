"""The page at ``/``: one watches images develop, and the batch that they share."""
