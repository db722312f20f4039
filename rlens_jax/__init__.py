"""RedundancyLens (arXiv 2501.19036) for JAX and TPU: which layers of a multimodal LLM waste visual computation."""

__version__ = "0.1.0"
