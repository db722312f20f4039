"""The record of a model family: what the rest of the package needs to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from rlens_jax.data.benchmarks.catalogue import Instance, Turn
from rlens_jax.families.config_reader import ConfigReader
from rlens_jax.families.reference_inputs import ReferenceInputs
from rlens_jax.families.table import Table
from rlens_jax.flops import TowerAttention
from rlens_jax.models.decoder import Decoder
from rlens_jax.models.forward import FamilyConfig, VisionLanguageModel
from rlens_jax.models.prompt import ImageArrays, ImageSize, Measure, Preparer

ConfigT = TypeVar("ConfigT", bound=FamilyConfig)
ConfigT_contra = TypeVar("ConfigT_contra", bound=FamilyConfig, contravariant=True)


@runtime_checkable
class MakeVision(Protocol[ConfigT_contra]):
    """Makes a vision module with random parameters."""

    def __call__(self, config: ConfigT_contra, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., Float[Array, "I Z D"]]: ...


@dataclass(frozen=True)
class Family(Generic[ConfigT]):
    """A model family. `ConfigT` is its own frozen dataclass of sizes and constants."""

    model_types: Mapping[str, Callable[[ConfigReader], ConfigT]]
    """Reader of config.json by `model_type`; it raises UserError for a computation that is not supported."""
    vision: MakeVision[ConfigT]
    """Vision tower and connector, from the arrays of prepared images to visual tokens."""
    preparer: Callable[..., Preparer]
    """`preparer(folder, config)`: prepares images and prompts with the files of a model folder. With `limits`, a third argument
    is accepted: values of `limits` that take the place of the folder's."""
    image_sizes: Callable[[ConfigT, int], Sequence[ImageSize]]
    """`image_sizes(config, patches)`: the buckets of images that a value of `compute.patch_slots` stands for, ascending."""
    image_arrays: Callable[[ConfigT, ImageSize], ImageArrays]
    """`image_arrays(config, size)`: the arrays of a prepared image, padded to a bucket of this size."""
    measure: Callable[[ConfigT, Mapping[str, Any]], Measure]
    """`measure(config, fields)`: the rule that sizes images. `fields` are those of the image processor; the published values
    stand for missing ones, and `limits` among them take the place of others."""
    table: Callable[[ConfigT], Table]
    """Mapping between published tensors and our parameters."""
    reference: ReferenceInputs[ConfigT]
    """Model inputs of other frameworks, as parity bundles hold them."""
    benchmark_prompt: Callable[[Instance, ConfigT, bool], Turn]
    """`benchmark_prompt(instance, config, step_by_step)`: the user's turn for a benchmark question."""
    preset: str
    """File in configs/, without its ending, with the settings of a published model of this family."""
    grid: Callable[[ConfigT], int | None] = lambda config: None
    """`grid(config)`: visual tokens per side of the square grid that each image or tile becomes; None if they differ in size."""
    attention: Callable[[ConfigT], TowerAttention | None] = lambda config: None
    """`attention(config)`: the attention by which FasterVLM and VisionZip may choose; None if visual tokens are no patches."""
    penalises_prompt: Callable[[ConfigT], bool] = lambda config: True
    """`penalises_prompt(config)`: whether a repetition penalty counts the prompt's tokens. It does in transformers, unless the
    published code hands over embeddings alone; then new tokens count only."""
    limits: Sequence[str] = ()
    """The names in `config.LIMITS` that the family has settings for."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Values of `model_type` that are known and not supported, and what to use instead, as the end of an error."""

    def model(self, config: ConfigT, *, dtype: DTypeLike, rngs: nnx.Rngs) -> VisionLanguageModel:
        """A model with random parameters."""
        return VisionLanguageModel(self.vision(config, dtype=dtype, rngs=rngs), Decoder(config.decoder, dtype=dtype, rngs=rngs))
