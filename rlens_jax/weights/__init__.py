"""Published safetensors -> mapping table -> Flax model -> Orbax, and back."""
