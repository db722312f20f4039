"""The eight benchmarks of the paper, read from VLMEvalKit's TSV files.

All facts come from VLMEvalKit (open-compass/VLMEvalKit @ e8e78f05, 2026-08-18). One difference is deliberate: VLMEvalKit
writes every image to NAME.jpg, which encodes it again; here a model sees the bytes of the TSV file.
"""
