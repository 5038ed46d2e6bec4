"""Models: from what the settings name to a pipeline that is ready to serve, or an error that says what to do."""
