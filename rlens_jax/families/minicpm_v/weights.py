"""Published names of MiniCPM-V 2.6: `llm.*` (Qwen2), `vpm.*` (SigLIP) and `resampler.*`."""

from dataclasses import replace

from rlens_jax.families.decoder_weights import EMBEDDING, HEAD, decoder_parts
from rlens_jax.families.minicpm_v.model import MiniCPMVConfig
from rlens_jax.families.siglip_weights import siglip_parts
from rlens_jax.families.table import Ignored, Part, Row, Table

LLM = "llm."
QKV = ("q_proj", "k_proj", "v_proj")


def table(config: MiniCPMVConfig) -> Table:
    """The mapping for a model of these sizes."""
    sizes = {letter.lower(): size for letter, size in config.resampler.sizes.items()}
    decoder = (replace(part, source=LLM + part.source) for part in decoder_parts(config.decoder))
    return Table(
        parts=(
            *decoder,
            *siglip_parts(config.vision, "vpm.", "vision.tower."),
            Part(
                "vpm.post_layernorm.",
                "vision.post_norm.",
                sizes,
                (Row("weight", "scale", "e -> e"), Row("bias", "bias", "e -> e")),
            ),
            Part(
                "resampler.",
                "vision.resampler.",
                sizes,
                (
                    Row("query", "query", "q d -> q d"),
                    Row("kv_proj.weight", "kv_proj.kernel", "d e -> e d"),
                    Row("ln_q.weight", "query_norm.scale", "d -> d"),
                    Row("ln_q.bias", "query_norm.bias", "d -> d"),
                    Row("ln_kv.weight", "kv_norm.scale", "d -> d"),
                    Row("ln_kv.bias", "kv_norm.bias", "d -> d"),
                    Row(
                        "attn.in_proj_weight",
                        tuple(f"{x}.kernel" for x in QKV),
                        "(three n h) d -> three d n h",
                    ),
                    Row("attn.in_proj_bias", tuple(f"{x}.bias" for x in QKV), "(three n h) -> three n h"),
                    Row("attn.out_proj.weight", "o_proj.kernel", "d (n h) -> n h d"),
                    Row("attn.out_proj.bias", "o_proj.bias", "d -> d"),
                    Row("ln_post.weight", "post_norm.scale", "d -> d"),
                    Row("ln_post.bias", "post_norm.bias", "d -> d"),
                    Row("proj", "proj.kernel", "d m -> d m"),  # the published code multiplies x @ proj
                ),
            ),
        ),
        ignored=(
            Ignored(r"llm\.model\..*inv_freq", "rotary frequencies follow from config.json"),
            Ignored(r"resampler\.pos_embed", "sine and cosine positions follow from the sizes"),
        ),
        copies={LLM + HEAD: LLM + EMBEDDING} if config.decoder.tied_head else None,
    )
