"""Make the book read offline, from a server or straight from the file system.

MathJax is copied beside the pages: one bundle and its fonts of the 24 MB that the package
``sphinx-mathjax-offline`` would copy.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

BUNDLE = "tex-chtml-full.js"
FONTS = "output/chtml/fonts/woff-v2"
# A page opened from the file system may not fetch the summaries that stand below a search result.
NO_SUMMARY = 'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;'


def copy_mathjax(app, exception):
    """Copy the bundle and its fonts into ``_static/mathjax`` of a finished HTML build."""
    if exception is not None or app.builder.format != "html":
        return
    package = find_spec("sphinx-mathjax-offline")
    if package is None:
        raise RuntimeError("the book needs the package sphinx-mathjax-offline: pip install it")
    source = Path(package.submodule_search_locations[0]) / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    (target / FONTS).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / BUNDLE, target / BUNDLE)
    shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)


def use_local_mathjax(app, config):
    """Point the pages at the copy; its menu loads further files, so it is left out."""
    config.mathjax_path = f"mathjax/{BUNDLE}"
    settings = dict(config.mathjax3_config or {})
    settings["options"] = {**settings.get("options", {}), "enableMenu": False}
    config.mathjax3_config = settings


def adapt_search(app, pagename, templatename, context, doctree):
    """Add the one line of script that the search page needs."""
    if pagename == "search":
        app.add_js_file(None, body=NO_SUMMARY)


def setup(app):
    """Register the steps with Sphinx."""
    app.connect("config-inited", use_local_mathjax)
    app.connect("html-page-context", adapt_search)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
