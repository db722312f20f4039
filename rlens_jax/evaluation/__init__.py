"""What a reduced model is worth: answers, scores, costs and times beside those of the dense model."""
