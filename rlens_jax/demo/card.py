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
54 words and nothing else; it says something about the method, little about large models. What it can do, and what every one of
its layers is worth, is measured by `python -m rlens_jax.demo.measure`.

## How it was made

`python -m rlens_jax.demo.train --output DIR` in the rlens_jax repository, on two CPU cores, from random weights, seed in the
code; `training_log.jsonl` is its log. While training, auxiliary classifiers read what a cell holds, what the cells asked for
hold, and which value a question names, and one attention head is told where to look; none of that is part of the model.

The published weights are one line of checkpoints of this command, but not one undisturbed run of it: the command was improved
while it ran, and training went on from the last checkpoint each time. Questions asked in parallel came in about step 1200, the
head that is told where to look about step 1400 (looking evenly at all cells: step 4200), classifiers of inks and of the cells
asked for at steps 2600 and 3300, more questions a page at step 3800, and the mix of questions changed at steps 3800 to 4300. A
run from scratch with the command as it is now has these from its first step; it was not made in full.

## Data and licences

The handwritten digits are the 1797 images of the UCI "Optical Recognition of Handwritten Digits" test set (E. Alpaydin,
C. Kaynak, 1998; CC BY 4.0) as scikit-learn ships them (`sklearn.datasets.load_digits`, BSD-3-Clause). 1297 of them were used
for training, 250 each for validation and test. Pages, questions and weights are released under Apache-2.0.
"""
