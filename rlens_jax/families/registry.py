"""The supported model families, and the reading of a config.json as one of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from rlens_jax.config import LIMITS
from rlens_jax.data.benchmarks.catalogue import Instance, Turn
from rlens_jax.errors import UserError, foreign, suggest
from rlens_jax.families import internvl, llava, llava_next, llava_onevision, minicpm_v, qwen2_5_vl, qwen2_vl, qwen3_vl
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.family import Family
from rlens_jax.families.generation_config import NEUTRAL
from rlens_jax.families.image_files import MOST_PIXELS, NESTED_FILE, PROCESSOR_FILE, read_processor_fields
from rlens_jax.families.refusals import refuse_unsupported
from rlens_jax.families.table import Table
from rlens_jax.files import quoted
from rlens_jax.flops import TowerAttention
from rlens_jax.kept_tokens import Pooling, TowerSelection
from rlens_jax.models.forward import FamilyConfig, VisionLanguageModel
from rlens_jax.models.generation import Penalty
from rlens_jax.models.prompt import ImageArrays, ImageSize, Measure, Preparer
from rlens_jax.pruning import Pruning

FAMILIES: tuple[Family[Any], ...] = (
    internvl.FAMILY,
    llava.FAMILY,
    llava_next.FAMILY,
    llava_onevision.FAMILY,
    minicpm_v.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen2_vl.FAMILY,
    qwen3_vl.FAMILY,
)
"""`Any`, because each family has its own type of config."""


@dataclass(frozen=True)
class ModelKind:
    """The model that a config.json describes."""

    model_type: str
    config: FamilyConfig
    """An instance of the family's own dataclass."""
    fields: Mapping[str, Any]
    """The whole config.json, which is kept with converted weights."""
    family: Family[Any]

    def abstract(self, dtype: DTypeLike) -> VisionLanguageModel:
        """The model with shapes and dtypes in place of arrays; nothing is allocated."""
        return nnx.eval_shape(lambda: self.family.model(self.config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))

    def with_own_head(self) -> "ModelKind":
        """The same model with a head that is not the embedding, whatever config.json says."""
        decoder = replace(self.config.decoder, tied_head=False)
        config: Any = self.config  # of the family's own class, a dataclass
        return replace(self, config=replace(config, decoder=decoder))

    def preparer(self, folder: Path, limits: Mapping[str, int] = MappingProxyType({})) -> Preparer:
        """Prepares images and prompts with a model folder's files.

        Args:
            folder: it holds the files.
            limits: of the sizes of images, by names in `config.LIMITS`; they take the place of the folder's.

        Raises:
            UserError: a file is missing or does not fit config.json, the family has no such setting, or a value is out of range.
        """
        own = self.family.limits
        for name, value in limits.items():
            if name not in own:
                near = "" if name in LIMITS else suggest(name, LIMITS)
                known = f"it has {', '.join(own)}" if own else "its config.json alone decides the sizes of images"
                raise UserError(f"{name}: a model of the type {self.model_type} has no such setting{near}; {known}")
            if not 1 <= value <= MOST_PIXELS:
                raise UserError(f"{name} must be from 1 to {MOST_PIXELS}, not {value}")
        with foreign(f"{folder}: the files for texts or images are not usable", "; copy those of the published model"):
            return self.family.preparer(folder, self.config, *([limits] if limits else []))

    def image_sizes(self, patch_slots: Sequence[int]) -> list[ImageSize]:
        """The buckets of images that bucket sizes in patches stand for; UserError if none of them holds an image."""
        sizes = [size for slots in patch_slots for size in self.family.image_sizes(self.config, slots)]
        if not sizes:
            raise UserError(f"compute.patch_slots: none of {list(patch_slots)} holds the patches of one view of an image")
        return list(dict.fromkeys(sizes))

    def image_arrays(self, size: ImageSize) -> ImageArrays:
        """Shapes and dtypes of a prepared image, padded to a bucket of this size."""
        return self.family.image_arrays(self.config, size)

    def measure(self, folder: Path, limits: Mapping[str, Any]) -> Measure:
        """The rule that sizes images by width and height: `limits`, else the folder's image processor, else the published one.

        Raises:
            UserError: the file of the image processor is not usable.
        """
        found = any((folder / name).exists() for name in (PROCESSOR_FILE, NESTED_FILE))
        fields = read_processor_fields(folder)[0] if found else {}
        return self.family.measure(self.config, {**fields, **limits})

    def check_pruning(self, pruning: Pruning | None) -> None:
        """Raise UserError if the family cannot have this pruning, with what is possible."""
        if isinstance(pruning, Pooling):
            side = self.family.grid(self.config)
            if side is None:
                raise UserError(
                    f"pooling needs images that become square grids of one size, and those of {self.model_type} do not; "
                    "possible are random, strided, divprune and cdpruner-embeddings, or smaller images"
                )
            if side != pruning.side:
                raise UserError(f"pooling: an image of this model is {side} x {side} visual tokens, so side must be {side}")

        if isinstance(pruning, TowerSelection) and self.tower_attention is None:
            raise UserError(
                f"{pruning.title} chooses visual tokens by the attention of patches, and those of {self.model_type} have no "
                "patches of their own; possible are random, strided, divprune and cdpruner-embeddings"
            )

    @property
    def tower_attention(self) -> TowerAttention | None:
        """The attention in the tower by which visual tokens may be chosen."""
        return self.family.attention(self.config)

    def penalty(self, factor: float, placeholders: Collection[int]) -> Penalty | None:
        """The repetition penalty of this factor for a chat with these placeholders, None if it changes nothing."""
        if factor == NEUTRAL:
            return None
        return Penalty(factor, self.family.penalises_prompt(self.config), tuple(sorted(placeholders)))

    def table(self) -> Table:
        """The mapping of the published tensors."""
        return self.family.table(self.config)

    def benchmark_prompt(self, instance: Instance, *, step_by_step: bool = True) -> Turn:
        """The user's turn for a benchmark question.

        `step_by_step` chooses VLMEvalKit's chain-of-thought prompts, where it has them for the family. Teacher forcing scores
        the first tokens of an answer, so it uses VLMEvalKit's prompts with `use_cot` off.
        """
        return self.family.benchmark_prompt(instance, self.config, step_by_step)


def read_kind(fields: Mapping[str, Any], where: str) -> ModelKind:
    """Read the fields of a config.json; `where` names their source in error messages.

    Raises:
        UserError: the family is not supported, or a field is missing or asks for a computation that is not supported.
    """
    model_type = str(fields.get("model_type"))
    refuse_unsupported(fields, where)
    family = family_of(model_type, where)
    return ModelKind(model_type, family.model_types[model_type](ConfigReader(fields, where)), fields, family)


def family_of(model_type: str, where: str) -> Family[Any]:
    """The family with this `model_type`, of which it may have several; UserError, beginning with `where`, if there is none."""
    for family in FAMILIES:
        if model_type in family.refused:
            raise UserError(f"{where}: model_type {quoted(model_type)} {family.refused[model_type]}")
    families = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in families:
        raise UserError(
            f"{where}: model_type {quoted(model_type)} is not supported{suggest(model_type, families)}; "
            f"supported are: {', '.join(sorted(families))}"
        )
    return families[model_type]
