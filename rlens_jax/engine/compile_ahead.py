"""Compiles all programs of a run before the first is used, side by side: one after another, they take minutes on a slice."""

import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlens_jax.engine.encoding import images_together
from rlens_jax.engine.model_programs import Program
from rlens_jax.engine.profile import part
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.shapes import Block, Shapes
from rlens_jax.engine.sizes import abstract_images, decoder_arguments
from rlens_jax.layout import Bucket

TOGETHER = 16
"""Programs that are compiled at a time (our decision): each takes a core and some GB of the host."""


def compile_ahead(programs: Programs, shapes: Shapes, blocks: Mapping[Bucket, Block], *, forced: bool) -> None:
    """Compile the programs for every bucket; `forced` says whether answers are teacher-forced, else they are generated."""
    with part("compile"):
        compile_together(_all(programs, shapes, blocks, forced))


def compile_together(calls: Iterable[tuple[Program, tuple[Any, ...]]]) -> None:
    """Compile programs for their arguments. Python traces one program after another, while XLA compiles those before."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        started = [pool.submit(program.ahead(*arguments)) for program, arguments in calls]
        for each in started:
            each.result()


def _all(
    programs: Programs, shapes: Shapes, blocks: Mapping[Bucket, Block], forced: bool
) -> Iterator[tuple[Program, tuple[Any, ...]]]:
    for size in shapes.images:
        images = images_together(shapes.batch_size, math.prod(size)) * programs.groups
        yield programs.encode_program, (abstract_images(shapes.arrays_of(size), images, programs.mesh),)
    for bucket, block in blocks.items():
        arguments = decoder_arguments(programs, bucket, block.rows * programs.groups, block.places)
        yield from ((program, own) for program, own in arguments.items() if (program.name == "generate") != forced)
