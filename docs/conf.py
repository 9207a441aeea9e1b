"""Settings of Sphinx: the pages of this folder and the docstrings of the package as a site.

`make site` builds it. Sphinx with MyST reads the same Markdown that a repository shows, and autodoc
the docstrings; both are kept by many.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "moe_ops"
version = release = importlib.metadata.version("torch-moe-ops")
copyright = "the moe_ops authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "moe_ops"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Text in single backticks is code, and a link if it names a documented object.
default_role = "py:obj"
# A longer signature has one argument per line.
python_maximum_signature_line_length = 84
# Objects of other libraries that annotations name are not looked up: no site is asked.
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
# Equations are MathML, which browsers draw without a script or a network.
html_math_renderer = "mathml"
# Links to headings, as a repository makes them.
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False
# Optional packages whose names stand in code that runs at import.
autodoc_mock_imports = ["lightning", "onnxscript", "onnx_ir"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
# Several results, each with its name; what results are in a sentence (see plain_text).
napoleon_custom_sections = [("Returns", "params_style"), ("Result", "returns_style")]

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# Where the sources can be read, such as https://example.org/moe_ops/blob/main; links to files that
# are not pages of the site go there, and are plain text without it.
SOURCES = os.environ.get("MOE_OPS_SITE_SOURCES", "").rstrip("/")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def links_outside(app, docname: str, source: list[str]) -> None:
    """Turns links of a page that leave this folder into links to the sources, or into text."""
    folder = (DOCS / docname).parent

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        there = (folder / path).resolve()
        if there.is_relative_to(DOCS) and there.is_file():
            return match[0]
        if not there.exists():
            return match[0]  # Sphinx says that it is missing.
        if not SOURCES:
            return text
        anchor = f"#{anchor}" if anchor else ""
        return f"[{text}]({SOURCES}/{there.relative_to(ROOT).as_posix()}{anchor})"

    source[0] = LINK.sub(replace, source[0])


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Makes reStructuredText of what a docstring says in plain text: examples, results, |x|, H."""
    found: list[str] = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip() == "Example:":
            found += [line.replace("Example:", "Example::"), ""]
            continue
        if line.strip() == "Returns:" and not re.match(r"\s+\w+: ", after):
            line = line.replace("Returns:", "Result:")
        line = re.sub(r"(: [A-Z])\.$", r"\1\.", line)  # "size: H." is no list item H.
        parts = re.split(r"(``.*?``|`.*?`)", line)
        parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        found.append("".join(parts))
    lines[:] = found


def write_math(translator, node) -> None:
    """Writes an equation, inline or a block."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("source-read", links_outside)
    app.connect("autodoc-process-docstring", plain_text, priority=100)  # before napoleon
