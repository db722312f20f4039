"""Images and prompts of a Qwen3-VL checkpoint: prepared as those of Qwen2-VL, with its own limits."""

PUBLISHED_PIXELS = {"shortest_edge": 256**2, "longest_edge": 4096**2}
"""Least and most pixels of an image after resizing in the published checkpoints' file; they are no edges."""
