"""The templates of pages, which share one style sheet; whatever is put into them is escaped."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """The template of a page. It may include ``report.css``."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
    loader = FunctionLoader(lambda name: files("friends.bench").joinpath(name).read_text(encoding="utf-8"))
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
