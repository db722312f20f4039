"""Abstract inputs of a run's programs: shapes, dtypes and places on the mesh, from a configuration and a config.json alone.

Nothing is allocated and no weight is read, so a model folder with only a config.json is enough.
Axis letters as in `rlens_jax.engine.programs`; W work groups.
"""

import math
from collections.abc import Iterator

import jax
from flax import nnx
from jax.sharding import Mesh

from rlens_jax.config import RunConfig
from rlens_jax.dry_run.program import ProgramSpec
from rlens_jax.engine.abstract import Placed, abstract_model, bytes_on_device, decoder_arguments
from rlens_jax.engine.inputs import images_together
from rlens_jax.engine.programs import Programs
from rlens_jax.families.registry import ModelKind
from rlens_jax.layout import Bucket
from rlens_jax.ops.attention_tpu import kernel_flops
from rlens_jax.sharding.model_axis import WORK


def program_specs(config: RunConfig, kind: ModelKind, mesh: Mesh, *, all_buckets: bool) -> Iterator[ProgramSpec]:
    """The programs that a run of this configuration executes on these devices.

    Args:
        config: of the run.
        kind: the model.
        mesh: the slice's devices.
        all_buckets: of every size, or only of the largest.
    """
    compute = config.compute
    model = abstract_model(kind, compute.dtype, mesh)
    weights = bytes_on_device(nnx.state(model))
    programs = Programs(
        model,
        mesh,
        config.reduction,
        seed=config.seed,
        new_tokens=config.search.max_new_tokens,
        stop_token=0,
    )
    rows = compute.batch_size * programs.groups
    chosen = slice(None) if all_buckets else slice(-1, None)
    for patches in compute.patch_slots[chosen]:
        (leading, *_), *_ = kind.image_arrays(patches)
        num_images = images_together(compute.batch_size, math.prod(leading[:-1])) * programs.groups
        images = abstract_images(kind, patches, num_images, mesh)
        yield ProgramSpec(
            "encode",
            f"patches {patches}",
            lambda images=images: programs.lower("encode", images),  # type: ignore[misc]
            vision_depth(kind),
            num_images,
            weights + bytes_on_device(images),
        )
    for visual in compute.visual_slots[chosen]:
        for text in compute.text_slots[chosen]:
            yield from _decoder_specs(config, programs, Bucket(text, visual), rows, weights)


def _decoder_specs(
    config: RunConfig, programs: Programs, bucket: Bucket, rows: int, weights: int
) -> Iterator[ProgramSpec]:
    layers = programs.config.num_layers
    arguments = decoder_arguments(programs, bucket, rows)
    if config.search.objective == "teacher_forced":
        del arguments["generate"]
    else:
        del arguments["layers"], arguments["outcome"], arguments["embed"]
    kernels = _kernel_flops(config, programs, bucket)
    for name, given in arguments.items():
        yield ProgramSpec(
            name,
            f"text {bucket.text}, visual {bucket.visual}",
            lambda name=name, given=given: programs.lower(name, *given),  # type: ignore[misc]
            layers if name in ("layers", "generate") else 0,
            rows,
            weights + bytes_on_device(given),
            steps=programs.new_tokens if name == "generate" else 1,
            kernel_flops=kernels if name in ("layers", "generate") else (0, 0),
            beside_states=True,
        )


def _kernel_flops(config: RunConfig, programs: Programs, bucket: Bucket) -> tuple[int, int]:
    """Arithmetic of a device's attention kernels in one layer, dense and hollow."""
    if programs.kernel != "splash":
        return 0, 0
    heads = programs.config.num_heads // config.compute.model_shards * config.compute.batch_size
    dense, hollow = (
        kernel_flops(bucket, reach, heads, programs.config.head_dim)
        for reach in (None, config.reduction.attention_range)
    )
    return dense, hollow


def abstract_images(kind: ModelKind, patches: int, rows: int, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays of prepared images in a bucket of so many patches, as the family's `Preparer` pads and stacks them."""
    place = Placed(mesh)
    return tuple(place((rows, *shape), dtype) for shape, dtype in kind.image_arrays(patches))


def vision_depth(kind: ModelKind) -> int:
    """Layers of the vision tower."""
    return int(kind.config.vision.depth)


def mesh_shape(mesh: Mesh) -> tuple[int, int]:
    """Devices along `work` and `model`."""
    return mesh.shape[WORK], mesh.size // mesh.shape[WORK]
