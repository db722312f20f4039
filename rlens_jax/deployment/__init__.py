"""Reduced models in use: loaded once, compiled for their plan alone, answering prompts."""
