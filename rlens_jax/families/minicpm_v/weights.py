"""Published names of MiniCPM-V 2.6: `llm.*` (Qwen2), `vpm.*` (SigLIP) and `resampler.*`."""

from dataclasses import replace

from rlens_jax.families.minicpm_v.model import MiniCPMVConfig
from rlens_jax.families.siglip import siglip_parts
from rlens_jax.families.table import EMBEDDING, HEAD, QKV, Ignored, Part, Row, Table, decoder_parts, linear, norm, pattern_sizes

LLM = "llm."


def table(config: MiniCPMVConfig) -> Table:
    """The mapping for a model of these sizes."""
    sizes = pattern_sizes(config.resampler.sizes)
    return Table(
        parts=(
            *(replace(part, source=LLM + part.source) for part in decoder_parts(config.decoder)),
            *siglip_parts(config.vision, "vpm.", "vision.tower."),
            Part("vpm.", "vision.", sizes, norm("post_layernorm", "post_norm", "e")),
            Part(
                "resampler.",
                "vision.resampler.",
                sizes,
                (
                    Row("query", "query", "q m -> q m"),
                    *linear("kv_proj", "kv_proj", "m e -> e m", bias=False),
                    *norm("ln_q", "query_norm", "m"),
                    *norm("ln_kv", "kv_norm", "m"),
                    *linear("attn.in_proj", QKV, "(three n h) m -> three m n h", separator="_"),
                    *linear("attn.out_proj", "o_proj", "m (n h) -> n h m"),
                    *norm("ln_post", "post_norm", "m"),
                    Row("proj", "proj.kernel", "m d -> m d"),  # the published code computes x @ proj
                ),
            ),
        ),
        ignored=(
            Ignored(r"llm\.model\..*inv_freq", "rotary frequencies follow from config.json"),
            Ignored(r"resampler\.pos_embed", "sine and cosine positions follow from the sizes"),
        ),
        copies={LLM + HEAD: LLM + EMBEDDING} if config.decoder.tied_head else None,
    )
