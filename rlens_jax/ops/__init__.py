"""The reductions: a plain XLA reference and a fast, work-skipping path for each."""
