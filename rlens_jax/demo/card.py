"""The model card of the embedded model."""

MODEL_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# rlens_jax embedded model

A Qwen2-VL of 12 decoder layers, width 128, made to try RedundancyLens on a laptop: `python -m rlens_jax.rank` uses it when
no other model is named. It reads pages of handwritten digits (32 cells of 16 x 16 pixels in a grid of 4 x 8 or 8 x 4, four
inks) and answers questions such as `digit at row 3 column 5 ?`, `largest digit of row 2 ?`, `is there a 7 in row 4 ?`. It knows
54 words and nothing else; it says something about the method, little about large models.

## How it was made

`python -m rlens_jax.demo.train --output DIR` in the rlens_jax repository, on two CPU cores, from random weights, seed in the
code; `training_log.jsonl` is its log. While training, three auxiliary classifiers read digit, row and column of each cell
from the states after the third decoder layer; they are not part of the model.

## Data and licences

The handwritten digits are the 1797 images of the UCI "Optical Recognition of Handwritten Digits" test set (E. Alpaydin,
C. Kaynak, 1998; CC BY 4.0) as scikit-learn ships them (`sklearn.datasets.load_digits`, BSD-3-Clause). 1297 of them were used
for training, 250 each for validation and test. Pages, questions and weights are released under Apache-2.0.
"""
