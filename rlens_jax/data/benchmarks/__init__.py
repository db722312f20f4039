"""The benchmarks of the paper and of the field, read from VLMEvalKit's TSV files.

All facts come from VLMEvalKit (open-compass/VLMEvalKit @ e8e78f05, 2026-08-18). One difference is deliberate: VLMEvalKit writes
every image to a file first, which encodes it again if that is a .jpg: of a TSV file above 1 GiB, or as `image_path` says, and
before 2026-02-19 all. Here a model sees the bytes of the TSV file. docs/benchmarks.md lists the benchmarks and their rules.
"""
