"""A Hugging Face model in PyTorch under a plan (extra `torch`), one question at a time."""

import io
from collections.abc import Sequence

import torch
from PIL import Image

from rlens_jax.checkpoints import orbax_store
from rlens_jax.checkpoints.model_folder import find_model
from rlens_jax.config import Dtype
from rlens_jax.errors import UserError, foreign
from rlens_jax.families.generation_config import read_generation_config
from rlens_jax.harnesses.backends import MAX_NEW_TOKENS, Question
from rlens_jax.parity.dump import load_processor, load_torch_model
from rlens_jax.plan_file import PlanFile
from rlens_jax.torch_twin import reduced


class TorchBackend:
    """The model of a published folder in transformers, with layers reduced by `torch_twin`.

    Args:
        model: a folder as published, "embedded", or a name on the hub.
        plan: without token pruning.
        seed: of random probes.
        dtype: of weights and computation; None means bfloat16 on a GPU and float32 on a CPU.
        device: as PyTorch names it; None is the GPU if there is one.

    Raises:
        UserError: the plan prunes tokens, or transformers cannot load the model without running its code.
    """

    def __init__(self, model: str, plan: PlanFile, *, seed: int = 0, dtype: Dtype | None = None, device: str | None = None):
        if plan.pruning is not None:
            raise UserError(f"the back end torch cannot prune tokens ({plan.pruning.label()}); the back end jax can")
        folder = find_model(model)
        if orbax_store.is_store(folder):
            raise UserError(f"{folder}: is a converted folder, which PyTorch cannot read; convert it back with --to-hf")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        self._processor, self._generation = load_processor(folder), read_generation_config(folder)
        with foreign(f"the device {device} is not usable"):
            self._model = load_torch_model(folder, dtype, "sdpa").to(device)
        self._plan, self._seed = plan, seed

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """See `Backend.answer`."""
        with reduced(self._model, self._plan.plan, self._plan.reduction, seed=self._seed):
            return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> str:
        with foreign("transformers cannot prepare a question"):
            content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in question.parts]
            turn = [{"role": "user", "content": content}]
            text = self._processor.apply_chat_template(turn, add_generation_prompt=True)
            images = [
                Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB") for image in question.images
            ]
            inputs = self._processor(text=[text], images=images or None, return_tensors="pt")
            inputs = inputs.to(self._model.device, self._model.dtype)
        # The penalty is said, so that the back ends agree on it whatever transformers has read of the folder.
        decoding = self._generation.decoding(MAX_NEW_TOKENS, question.max_new_tokens, question.repetition_penalty)
        options = {"max_new_tokens": decoding.max_new_tokens, "repetition_penalty": decoding.repetition_penalty}
        tokens = self._model.generate(**inputs, **options, do_sample=False, num_beams=1)
        return str(self._processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
