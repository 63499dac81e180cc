"""How Sphinx builds these pages: ``sphinx-build -W --keep-going -n docs docs/_build``."""

import fmoe

project = "fmoe"
author = "the authors of fmoe"
version = release = fmoe.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fmoe {release}"
html_static_path = ["_static"]
html_css_files = ["fmoe.css"]

# Links to headings, by the names GitHub gives them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
# Docstrings say what things are, with shapes; signatures stay short.
autodoc_typehints = "none"
autodoc_preserve_defaults = True

nitpicky = True
