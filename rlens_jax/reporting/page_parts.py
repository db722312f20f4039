"""What the HTML pages share: the files that they are made of, their template environment, and how it writes values."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from rlens_jax.reporting.chart import MINUS
from rlens_jax.reporting.measure_text import measure_of, metric_text, objective_text


def asset(name: str) -> str:
    """The text of a file of this folder."""
    return files("rlens_jax.reporting").joinpath(name).read_text(encoding="utf-8")


def content_hash(text: str) -> str:
    """The hash by which the page's content security policy allows its script or style, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def environment() -> Environment:
    """Templates of this folder; all values are escaped."""
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "as_dict": asdict,
        "percent": percent,
        "objective": objective_text,
        "metric": lambda value, search: metric_text(measure_of(search), value).replace(" ", "\N{NO-BREAK SPACE}"),
        "threshold": lambda share: f"{100 * share:g} %",
        "points": _points,
        "interval": lambda interval: f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}",
        "ms": lambda seconds: f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}",
    }
    return environment


def plain_page(title: str, heading: str, section: Markup, *, model: str, num_layers: int, device: str) -> str:
    """A page with one section and no script."""
    style, template = asset("report.css"), environment().get_template("plain_page.html.jinja")
    about = {"model": model, "num_layers": num_layers, "device": device}
    return template.render(title=title, heading=heading, section=section, style=style, style_hash=content_hash(style), **about)


def percent(share: float) -> str:
    """A share as text."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%".replace("-", MINUS)


def interval_text(interval: Mapping[str, float], sign: str = "") -> str:
    """A value in its own unit, and the interval around it; `sign` "+" also marks what is not negative."""
    value, low, high = (format(interval[name], f"{sign}.2f") for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _points(margin: Mapping[str, float]) -> str:
    value, low, high = (f"{100 * margin[name]:+.1f}".replace("-", MINUS) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
