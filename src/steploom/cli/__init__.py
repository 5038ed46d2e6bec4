"""The command line: ``steploom demo``, ``steploom generate``, ``steploom doctor``.

Here, and nowhere else in the package, an event loop is picked, logging is configured and text is printed.
"""
