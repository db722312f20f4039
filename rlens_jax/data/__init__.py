"""Samples (images, question, answers) and where they come from."""
