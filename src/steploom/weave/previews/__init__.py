"""Previews: small pictures of what a request will become."""
