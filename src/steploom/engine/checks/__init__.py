"""What is found out about a request before anything is queued, and what is kept of its arguments."""
