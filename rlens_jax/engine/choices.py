"""What a run chooses by itself where its configuration leaves a field open."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from rlens_jax.config import ComputeConfig, Dtype, RunConfig
from rlens_jax.engine.preparing import PreparedSplit
from rlens_jax.engine.shapes import Shapes, image_padding, row_padding
from rlens_jax.ops.ffn_tpu import suited_form
from rlens_jax.plans import Reduction
from rlens_jax.sharding.mesh import check_fits, make_mesh, one_kind


def chosen_dtype(configured: Dtype | None, platform: str) -> Dtype:
    """The configured dtype. None is bfloat16 on an accelerator, as models are published, and float32 on a CPU, which has no fast
    bfloat16 products; `platform` is JAX's name of it.
    """
    return configured or ("float32" if platform == "cpu" else "bfloat16")


def dtype_on(mesh: Mesh, compute: ComputeConfig) -> Dtype:
    """The dtype of a run on these devices."""
    return chosen_dtype(compute.dtype, mesh.devices.flat[0].platform)


def mesh_of(compute: ComputeConfig, sizes: Mapping[str, int]) -> Mesh:
    """The mesh of a run on all devices, for a decoder with these sizes of axes.

    Raises:
        UserError: devices or decoder do not divide over it, or no kernel fetches the decoder's FFN units there.
    """
    check_fits(sizes, compute.model_shards)
    mesh = make_mesh(jax.devices(), compute.model_shards)
    units, kind = sizes["F"] // compute.model_shards, one_kind(jax.devices())
    suited_form(units, sizes["D"], dtype_on(mesh, compute), kind, compute.ffn_path)  # the form is chosen with the model's arrays
    return mesh


def described(given: RunConfig, config: RunConfig, shapes: Shapes, splits: Sequence[PreparedSplit]) -> str:
    """What decides the computation of a run and why, in a few lines; `config` is `given` with its open fields filled in."""
    rows, images = (f"{share(shapes, splits):.1%} padding" for share in (row_padding, image_padding))
    slots = _origin(given.compute.text_slots and given.compute.visual_slots, "chosen from the samples")
    sizes = _origin(given.compute.patch_slots, "chosen from the samples")
    return "\n  ".join(
        (
            f"settings for {config.model}:",
            _reduction_line(config.reduction),
            dtype_line(given.compute.dtype, config.compute.dtype),
            f"text + visual slots: {shapes.identity['rows']} ({slots}; {rows})",
            f"image sizes: {shapes.identity['images']} ({sizes}; {images})",
        )
    )


def dtype_line(given: str | None, chosen: str | None) -> str:
    """The dtype of weights and computation, and why it is this one."""
    return f"dtype: {chosen} ({_origin(given, 'by the device')})"


def _reduction_line(reduction: Reduction) -> str:
    text = (
        f"reduction: R = {reduction.attention_range}, {100 * reduction.active_fraction:.4g} % of the FFN units, "
        f"{100 * reduction.probe_fraction:.4g} % of the visual tokens as probes"
    )
    numbers = [(one.attention_range, one.active_fraction, one.probe_fraction) for one in (reduction, Reduction())]
    return f"{text} ({'as in the paper' if numbers[0] == numbers[1] else 'configured; the paper has 256, 20 % and 10 %'})"


def _origin(configured: object, otherwise: str) -> str:
    return "configured" if configured else otherwise


def with_dtype(config: RunConfig, platform: str) -> RunConfig:
    """The configuration of a run on devices of this platform of JAX, with its dtype filled in."""
    return replace(config, compute=replace(config.compute, dtype=chosen_dtype(config.compute.dtype, platform)))
