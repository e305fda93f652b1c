"""Sphinx configuration: `pip install -e '.[docs]' && sphinx-build -W docs docs/_build`."""

import cs_jax

project = "cs_jax"
author = "the cs_jax developers"
release = version = cs_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cs_jax {release}"
myst_heading_anchors = 3
default_role = "code"  # single backticks in docstrings are code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"PyTree": "PyTree", "Where": "Where", "ArrayLike": "ArrayLike", "DTypeLike": "DTypeLike"}
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Warns", "params_style")]
python_use_unqualified_type_names = True
