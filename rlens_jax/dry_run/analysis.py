"""A dry run: every program of a run compiled for a slice, and what that says about the run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rlens_jax.dry_run.program import CompiledProgram, Program, ProgramSpec, compile_program
from rlens_jax.dry_run.roofline import Estimate, estimates
from rlens_jax.dry_run.topology import Slice
from rlens_jax.dry_run.workload import Workload


@dataclass(frozen=True)
class DryRun:
    """Everything found out about a run on a slice."""

    where: Slice
    mesh_shape: tuple[int, int]
    programs: tuple[Program, ...]
    workload: Workload
    estimates: tuple[Estimate, ...]
    """One for each bucket of the decoder; none when a program did not compile."""

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)


def dry_run(
    specs: Iterable[ProgramSpec],
    where: Slice,
    mesh_shape: tuple[int, int],
    workload: Workload,
    progress: Callable[[str], None],
) -> DryRun:
    """Compile the programs for the slice and estimate the run.

    Args:
        specs: the programs; they lower for the slice's devices.
        where: the slice.
        mesh_shape: devices along `work` and `model`.
        workload: how often the programs run, and what memory is taken beside them.
        progress: is told what is being compiled.
    """
    programs: list[Program] = []
    for spec in specs:
        progress(f"compiling {spec.name} ({spec.bucket})")
        programs.append(
            compile_program(
                spec,
                mesh_shape,
                resident_bytes=workload.resident_bytes,
                memory_limit=where.memory_limit,
            )
        )
    made = [program for program in programs if isinstance(program, CompiledProgram)]
    known = estimates(made, workload.phases, where) if len(made) == len(programs) else []
    return DryRun(where, mesh_shape, tuple(programs), workload, tuple(known))
