"""Evaluation of plans on devices."""
