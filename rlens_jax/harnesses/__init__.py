"""A plan as a model of other people's harnesses: VLMEvalKit and lmms-eval (docs/harnesses.md)."""
