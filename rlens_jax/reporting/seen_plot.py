"""Pictures of the redundancy of single samples, as PNG or SVG bytes; the same results give the same bytes."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from rlens_jax.reporting.plots import Format, drawn

_MAPS = {"attention_map": "attention of the text", "survival_map": "activation in the kept units"}
_PANELS = {
    "overlap": "kept units that two samples have in common",
    "attention": "attention of the text that goes to visual tokens",
}


def plot_layers(fields: Mapping[str, Any], kind: Format) -> bytes:
    """By layer: the overlap of the kept units between samples, and the attention from text to visual tokens."""
    return drawn(lambda: _layers(fields), kind)


def plot_sample(sample: Mapping[str, Any], kind: Format) -> bytes:
    """A sample's image, and the two maps of its visual tokens over it."""
    return drawn(lambda: _sample(sample), kind)


def _layers(fields: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        curves = np.array([sample[name] for sample in fields["samples"]])
        layers = np.arange(curves.shape[1])
        axis.plot(layers, curves.T, color="#0072B2", linewidth=0.8, alpha=0.35)
        mean = {"linewidth": 2, "marker": "o", "markersize": 3, "label": "mean of the samples"}
        axis.plot(layers, curves.mean(axis=0), color="#0072B2", **mean)
        if name == "overlap":
            chance = fields["units"] / fields["ffn_width"]
            axis.axhline(chance, color="black", linestyle=":", linewidth=1, label="by chance")
        axis.legend(frameon=False)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("layer")
        axis.set_ylim(0, 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _sample(sample: Mapping[str, Any]) -> Figure:
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(sample["image"]["base64"]))))
    figure = Figure(figsize=(8, 2.7), layout="constrained")
    image, *maps = figure.subplots(1, 3)
    image.imshow(picture)
    image.set_axis_off()
    for axis, (name, title) in zip(maps, _MAPS.items(), strict=True):
        values = np.array(sample[name])
        if sample["grid"] is None:
            _line(axis, values)
        else:
            _overlay(figure, axis, picture, values.reshape(sample["grid"]))
        axis.set_title(title, fontsize=9)
    return figure


def _overlay(figure: Figure, axis: Axes, picture: np.ndarray, values: np.ndarray) -> None:
    height, width = picture.shape[:2]
    grey = picture.mean(axis=2)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = axis.imshow(values, cmap="viridis", alpha=0.6, extent=whole, interpolation="nearest")
    axis.set_axis_off()
    figure.colorbar(shown, ax=axis, shrink=0.8, format=PercentFormatter(1.0, decimals=1))


def _line(axis: Axes, values: np.ndarray) -> None:
    axis.plot(values, color="#0072B2", linewidth=0.8)
    axis.set_xlabel("visual token")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axis.spines[["top", "right"]].set_visible(False)
