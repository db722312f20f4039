"""The eight benchmarks of the paper, read from VLMEvalKit's TSV files.

Facts are those of VLMEvalKit (open-compass/VLMEvalKit @ e8e78f05, 2026-08-18). One difference is on purpose: VLMEvalKit
writes every image to NAME.jpg before a model sees it, which encodes it anew; here a model sees the bytes of the file.
"""
