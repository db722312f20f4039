"""A bench over the toy model of the ranking's tests: two datasets, answers that the dense model gets right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax

from rlens_jax.checkpoints.leaves import place
from rlens_jax.config import ReportConfig, RunConfig, SearchConfig
from rlens_jax.engine.inputs import Split, build_split
from rlens_jax.engine.programs import Programs
from rlens_jax.engine.scoring import Scoring, TeacherForcing
from rlens_jax.paper_studies.study import Variant
from rlens_jax.paper_studies.study_bench import Bench
from rlens_jax.paper_studies.study_programs import make_scoring
from rlens_jax.search.journal import Journal
from rlens_jax.sharding.mesh import make_mesh
from tests.engine.toy import CONFIG, REDUCTION, STOP, ToyPreparer, answered, shapes_of, toy_model, toy_programs, toy_samples

ONE_BUCKET = shapes_of((16,), (24,), 8)
"""Every variant is compiled for each bucket."""

TOY_CONFIG = RunConfig(
    model="toy",
    reduction=REDUCTION,
    search=SearchConfig(position_layers=3),
    report=ReportConfig(random_rankings=2, bootstrap_samples=40),
)


class ToyRun:
    """What of a run does not depend on its folder: the splits, and programs that stay compiled."""

    def __init__(self) -> None:
        self.mesh = make_mesh(jax.devices()[:1], 1)
        self.model = place(toy_model(), self.mesh)
        programs = toy_programs()
        known = answered(toy_samples(), programs, ONE_BUCKET)
        # An answer as long as the limit has no end that teacher forcing could confirm.
        right = [sample for sample in known if len(sample.answers[0].split()) < programs.new_tokens]
        right = [replace(sample, dataset=f"half {i % 2}") for i, sample in enumerate(right)]
        split = build_split(right, ToyPreparer(), programs, ONE_BUCKET, True, sharing=False)
        self.splits: dict[str, Split] = {"validation": split, "test": split}
        self._scorings: dict[Variant, Scoring] = {}

    def scoring(self, variant: Variant) -> Scoring:
        if variant not in self._scorings:
            self._scorings[variant] = make_scoring(self.model, self.mesh, variant, 0, (STOP,))
        return self._scorings[variant]

    def programs(self, variant: Variant) -> Programs:
        """What is behind the scoring of a variant without pruning."""
        scoring = self.scoring(variant)
        assert isinstance(scoring, TeacherForcing)
        return scoring.programs

    @contextmanager
    def bench(self, folder: Path, scoring_of: Callable[[Variant], Scoring] | None = None) -> Iterator[Bench]:
        with Journal.open(folder, {"test": "1"}) as journal:
            yield Bench(TOY_CONFIG, CONFIG.decoder, self.splits, journal, scoring_of or self.scoring, {})
