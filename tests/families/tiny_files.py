"""Files of tiny model folders, made without PyTorch: a tokenizer of bytes, and the image processor of MiniCPM-V 2.6."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

PATCH, RESOLUTION, NUM_QUERIES = 8, 64, 5


def byte_tokenizer(special: Sequence[str]) -> Tokenizer:
    """A tokenizer with a token for each byte, from 0, and these special tokens, from 256."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def preprocessor_json(**overrides) -> dict:
    """preprocessor_config.json in the published form."""
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor"},
        "max_slice_nums": 9,
        "scale_resolution": RESOLUTION,
        "patch_size": PATCH,
        "use_image_id": True,
        "image_feature_size": NUM_QUERIES,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
        "slice_mode": True,
        "norm_mean": [0.5, 0.4, 0.6],
        "norm_std": [0.5, 0.6, 0.45],
        "version": 2.6,
        **overrides,
    }
