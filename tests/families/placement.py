"""Where a loaded model's numbers are, against the PyTorch parameters; the reshapes are written out, here and in the tests."""

import numpy as np
import torch
from flax import nnx

from rlens_jax.checkpoints.leaves import arrays_of, shapes_of, unstacked


class Placement:
    """Compares parameters bit by bit, and remembers which."""

    def __init__(self, model: nnx.Module):
        self._ours = {name: np.asarray(array) for name, array in arrays_of(model).items()}
        self._all = {(place.path, place.layer) for place in unstacked(shapes_of(model)).values()}
        self._compared: set[tuple[str, int | None]] = set()

    def check(self, name: str, parameter: torch.Tensor, layer: int | None = None) -> None:
        """One parameter, or a layer of a stacked one."""
        self._compared.add((name, layer))
        actual = self._ours[name] if layer is None else self._ours[name][layer]
        np.testing.assert_array_equal(actual, parameter.detach().numpy(), err_msg=name)

    def check_linear(self, name: str, linear: torch.nn.Linear, layer: int | None = None) -> None:
        """With its bias."""
        self.check(f"{name}.kernel", linear.weight.T, layer)
        self.check(f"{name}.bias", linear.bias, layer)

    def check_norm(self, name: str, norm: torch.nn.LayerNorm, layer: int | None = None) -> None:
        """With its bias."""
        self.check(f"{name}.scale", norm.weight, layer)
        self.check(f"{name}.bias", norm.bias, layer)

    def check_decoder(self, text: torch.nn.Module, head: torch.nn.Linear, num_heads: int) -> None:
        """A Qwen2, Qwen3, Llama or Mistral decoder; `num_heads` of queries."""
        self.check("decoder.embedding", text.embed_tokens.weight)
        self.check("decoder.norm.scale", text.norm.weight)
        self.check("decoder.head", head.weight)
        width = text.norm.weight.shape[0]
        for i, layer in enumerate(text.layers):
            at, attention, mlp = "decoder.layers.", layer.self_attn, layer.mlp
            self.check(at + "input_norm.scale", layer.input_layernorm.weight, i)
            self.check(at + "ffn_norm.scale", layer.post_attention_layernorm.weight, i)
            kv_heads = attention.k_proj.out_features // attention.head_dim
            for part, heads in (("q_proj", num_heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
                linear = getattr(attention, part)
                self.check(f"{at}attention.{part}.kernel", linear.weight.T.reshape(width, heads, -1), i)
                if linear.bias is not None:
                    self.check(f"{at}attention.{part}.bias", linear.bias.reshape(heads, -1), i)
            for part in ("q_norm", "k_norm"):
                if hasattr(attention, part):
                    self.check(f"{at}attention.{part}.scale", getattr(attention, part).weight, i)
            output = attention.o_proj.weight.T.reshape(num_heads, -1, width)
            self.check(at + "attention.o_proj.kernel", output, i)
            self.check(at + "ffn.gate_proj.kernel", mlp.gate_proj.weight, i)
            self.check(at + "ffn.up_proj.kernel", mlp.up_proj.weight, i)
            self.check(at + "ffn.down_proj.kernel", mlp.down_proj.weight.T, i)

    def check_heads(self, name: str, linear: torch.nn.Linear, layer: int) -> None:
        """A projection of 24 numbers to the three heads of a tiny tower."""
        self.check(f"{name}.kernel", linear.weight.T.reshape(24, 3, 8), layer)
        self.check(f"{name}.bias", linear.bias.reshape(3, 8), layer)

    def check_mixed(self, name: str, linear: torch.nn.Linear, layer: int) -> None:
        """The projection of those heads back."""
        self.check(f"{name}.kernel", linear.weight.T.reshape(3, 8, 24), layer)
        self.check(f"{name}.bias", linear.bias, layer)

    def check_siglip(self, at: str, tower: torch.nn.Module, unused: int = 0) -> None:
        """A tiny SigLIP tower, or CLIP's, without its last `unused` layers."""
        embeddings, layers = tower.embeddings, tower.encoder.layers
        self.check(f"{at}patch_embed.kernel", embeddings.patch_embedding.weight.reshape(24, -1).T)
        if embeddings.patch_embedding.bias is not None:
            self.check(f"{at}patch_embed.bias", embeddings.patch_embedding.bias)
        self.check(f"{at}position_embedding", embeddings.position_embedding.weight)
        for i, layer in enumerate(layers[: len(layers) - unused]):
            for part in ("q_proj", "k_proj", "v_proj"):
                self.check_heads(f"{at}layers.{part}", getattr(layer.self_attn, part), i)
            self.check_mixed(f"{at}layers.o_proj", layer.self_attn.out_proj, i)
            self.check_linear(f"{at}layers.fc1", layer.mlp.fc1, i)
            self.check_linear(f"{at}layers.fc2", layer.mlp.fc2, i)
            self.check_norm(f"{at}layers.attention_norm", layer.layer_norm1, i)
            self.check_norm(f"{at}layers.mlp_norm", layer.layer_norm2, i)

    def assert_complete(self) -> None:
        """Every parameter was compared."""
        assert self._compared == self._all
