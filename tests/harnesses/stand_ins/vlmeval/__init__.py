"""Stands in for VLMEvalKit: the parts of its interface that the adapter uses, as of ms-vlmeval 0.0.20."""
