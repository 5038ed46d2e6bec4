"""Sphinx configuration; ``nox -s docs`` builds with warnings as errors."""

from __future__ import annotations

import importlib.metadata

project = "steploom"
author = "The steploom authors"
copyright = "2026, the steploom authors"
version = release = importlib.metadata.version("steploom")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.mermaid",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "steploom"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2e7dd7", "color-brand-content": "#2e7dd7"},
    "dark_css_variables": {"color-brand-primary": "#7db4f0", "color-brand-content": "#7db4f0"},
}

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
