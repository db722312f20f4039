"""The section of report.html about single samples."""

import base64
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from rlens_jax.reporting.page_parts import environment


def seen_section(fields: Mapping[str, Any]) -> Markup:
    """The pictures of a seen.json, a part for each sample."""
    # Imported late: most runs have no such section, and importing matplotlib takes a second.
    from rlens_jax.reporting.seen_plot import plot_layers, plot_sample

    pictures = [(sample, _encoded(plot_sample(sample, "png"))) for sample in fields["samples"]]
    template = environment().get_template("seen.html.jinja")
    return Markup(template.render(seen=fields, layers=_encoded(plot_layers(fields, "png")), samples=pictures))


def _encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()
