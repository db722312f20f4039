"""Write bundles with a Hugging Face model in PyTorch, dense and reduced by `torch_twin` (extra `torch`).

All cases have the same inputs: two prompts of different lengths, with one and with two textured images of different sizes,
prepared by the processor and the chat template of the checkpoint.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.checkpoint import kind_in
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.config import Dtype
from rlens_jax.errors import UserError
from rlens_jax.families.image_files import PROCESSOR_FILE
from rlens_jax.families.registry import read_kind
from rlens_jax.files import json_text, read_json_object
from rlens_jax.parity.bundle import EMBEDDINGS, KEPT, LOGITS, new_bundle, states_name
from rlens_jax.parity.constants import constants_of
from rlens_jax.plans import Plan, Reduction

QUESTIONS = (
    ("what do you see ?", ((96, 160),)),
    ("where do these two pictures differ , and which one is the larger ?", ((64, 128), (128, 96))),
)
"""Texts, and heights and widths of their images."""


def dump(
    model: str, bundle: Path, plans: Sequence[Plan], reduction: Reduction, with_states: bool, advance: Callable[[], None]
) -> Path:
    """Write a bundle with one case per plan.

    Args:
        model: a folder as published (not a converted one), with tokenizer and processor files; or "embedded".
        bundle: the new folder.
        with_states: also write the states after each half of each layer.
        advance: called after each case.

    Raises:
        UserError: PyTorch or the processor is missing, transformers has no class for the model, or a plan does not fit it.
    """
    from transformers import CONFIG_MAPPING

    folder = find_model(model)
    if orbax_store.is_store(folder):
        raise UserError(f"{folder}: is a converted folder, which PyTorch cannot read; convert it back with --to-hf")
    kind = kind_in(folder)
    if kind.model_type not in CONFIG_MAPPING:  # code in a model folder is never run
        raise UserError(
            f"{folder}: transformers has no class of model_type {kind.model_type!r}; write a bundle with the published code "
            f"({', '.join(kind.family.reference.names)} and results, see rlens_jax/parity/bundle.py)"
        )
    for plan in plans:
        plan.validate(kind.config.decoder.num_layers)
    if bundle.exists():
        raise UserError(f"{bundle}: exists already; name a new folder or remove it")
    theirs = load_torch_model(folder)
    inputs = make_inputs(folder, kind.family.reference.names)
    framework = {"name": "pytorch", "version": version("torch"), "transformers": version("transformers")}
    name, family = folder.resolve().name, kind.model_type
    # As transformers fills the config.json, and not as this package does.
    constants = constants_of(read_kind(theirs.config.to_dict(), f"{folder}: transformers' config").config)
    with new_bundle(bundle, model=name, family=family, framework=framework, dtype="float32", constants=constants) as writer:
        for plan in plans:
            writer.add(plan, reduction, run_case(theirs, inputs, plan, reduction, with_states))
            advance()
    return bundle


def load_torch_model(folder: Path, dtype: Dtype = "float32", attention: str = "eager") -> Any:
    """Load the Hugging Face model of a folder. UserError if transformers cannot, without running code of the folder."""
    try:
        from transformers import AutoModelForImageTextToText

        import rlens_jax.torch_twin  # noqa: F401  (fails without PyTorch)
    except ImportError as error:
        raise UserError(f"--dump runs PyTorch: install the extra torch ({error})") from None
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: transformers cannot load it ({_first_line(error)})") from None
    return model.eval().requires_grad_(False)


def load_processor(folder: Path) -> Any:
    """Load the processor of a folder in transformers. UserError if there is none that works without running code."""
    from transformers import AutoProcessor

    try:
        with _with_known_processor(folder) as readable:
            return AutoProcessor.from_pretrained(readable, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, AttributeError) as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: no usable processor ({_first_line(error)})")


def make_inputs(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Inputs of the model for `QUESTIONS` from the processor of the checkpoint: right-padded PyTorch tensors."""
    processor = load_processor(folder)
    try:
        messages = [
            [{"role": "user", "content": [*[{"type": "image"}] * len(sizes), {"type": "text", "text": text}]}]
            for text, sizes in QUESTIONS
        ]
        texts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
        rng = np.random.default_rng(0)
        images = [[texture(rng, *size) for size in sizes] for _, sizes in QUESTIONS]
        # Set here, because the default of a processor overrides that of its tokenizer.
        inputs = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    except (OSError, ValueError, AttributeError) as error:
        raise _unusable(folder, error) from None
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise UserError(f"{folder}: its processor returns {', '.join(unknown)}, which bundles cannot hold")
    return dict(inputs)


@contextmanager
def _with_known_processor(folder: Path) -> Iterator[Path]:
    """The folder as transformers can read it.

    Early files name an image processor that transformers has no more, such as Qwen2_5_VLImageProcessor. Without the name, it
    takes the one of the `model_type`. UserError if the file is not a JSON object.
    """
    import transformers

    path = folder / PROCESSOR_FILE
    fields = read_json_object(path) if path.exists() else {}
    named = fields.pop("image_processor_type", None)
    if named is None or str(named).removesuffix("Fast") in dir(transformers):
        yield folder
        return
    with TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            if file.name != path.name:
                (Path(temporary) / file.name).symlink_to(file.absolute())
        (Path(temporary) / path.name).write_text(json_text(fields))
        yield Path(temporary)


def run_case(model: Any, inputs: Mapping[str, Any], plan: Plan, reduction: Reduction, with_states: bool) -> dict[str, np.ndarray]:
    """Run a Hugging Face model on PyTorch inputs; returns the tensors of a case."""
    from rlens_jax.torch_twin import decoder_layers, reduced

    with reduced(model, plan, reduction) as record, _states(decoder_layers(model) if with_states else ()) as states:
        logits = model(**inputs).logits
    tensors = {**inputs, LOGITS: logits.float(), **states}
    for layer, units in record.kept_units.items():
        name = f"kept_units.{layer}"
        assert KEPT.fullmatch(name)
        tensors[name] = units
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


@contextmanager
def _states(layers: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Record the states before the first layer and after each half of each layer while the context is open."""
    states: dict[str, Any] = {}
    handles: list[Any] = []

    def after_layer(name: str) -> Callable[..., None]:
        def keep(_: Any, __: Any, output: Any) -> None:
            states[name] = (output[0] if isinstance(output, tuple) else output).float()

        return keep

    def before(name: str) -> Callable[..., None]:
        def keep(_: Any, arguments: Any) -> None:
            states[name] = arguments[0].float()

        return keep

    try:
        for number, layer in enumerate(layers):
            if number == 0:
                handles.append(layer.input_layernorm.register_forward_pre_hook(before(EMBEDDINGS)))
            # The input of the second norm is the residual stream after attention.
            norm = layer.post_attention_layernorm
            handles.append(norm.register_forward_pre_hook(before(states_name(number, "attention"))))
            handles.append(layer.register_forward_hook(after_layer(states_name(number, "ffn"))))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def texture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """An image of waves, an edge and noise, in which all patches differ."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    channels = []
    for _ in range(3):
        waves = sum(np.sin(2 * np.pi * (a * x + b * y + phase)) for a, b, phase in rng.uniform(-7, 7, (4, 3)))
        channels.append(waves + 2 * (x > rng.uniform(0.2, 0.8)) + rng.normal(0, 0.5, x.shape))
    pixels = np.stack(channels, axis=-1)
    return Image.fromarray(np.clip(128 + 30 * pixels, 0, 255).astype(np.uint8))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
