"""Published checkpoints: reading, conversion, storage and placement on devices."""
