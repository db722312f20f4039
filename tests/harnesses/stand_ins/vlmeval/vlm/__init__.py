"""As in VLMEvalKit."""
