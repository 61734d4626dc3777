"""Text: encoders, decoders (dense, grouped-query, mixture of experts, state space) and encoder–decoders of ``transformers``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from architectures.base import BATCH, Architecture, mask, tokens, transformers_model

LENGTH = 11
VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
# Not every config knows these ids by default to lie inside a small vocabulary.
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SMALL, **SPECIAL, "use_cache": False, "tie_word_embeddings": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}


def _ids(*more: str) -> Callable[[], dict[str, Tensor]]:
    def example() -> dict[str, Tensor]:
        made = {"input_ids": tokens(BATCH, LENGTH)}
        if "attention_mask" in more:
            made["attention_mask"] = mask(BATCH, LENGTH)
        return made

    return example


def _pair() -> dict[str, Tensor]:
    return {"input_ids": tokens(BATCH, LENGTH), "decoder_input_ids": tokens(BATCH, LENGTH - 2)}


def _encoder(
    name: str,
    model: str,
    config: str,
    *,
    masked: bool = True,
    without: tuple[str, ...] = (),
    **values: Any,
) -> Architecture:
    common = {key: value for key, value in SMALL.items() if key not in without}
    build = transformers_model(model, config, **{**common, **values})
    return Architecture(name, "text encoder", build, _ids(*["attention_mask"] * masked))


def _decoder(name: str, model: str, config: str, **values: Any) -> Architecture:
    build = transformers_model(model, config, **{**DECODER, **values})
    return Architecture(name, "text decoder", build, _ids())


def _grouped(name: str, model: str, config: str, **values: Any) -> Architecture:
    build = transformers_model(model, config, **{**GROUPED, **values})
    return Architecture(name, "text decoder", build, _ids())


def _both(name: str, model: str, config: str, **values: Any) -> Architecture:
    common = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "use_cache": False,
        **SPECIAL,
    }
    build = transformers_model(model, config, **{**common, **values})
    return Architecture(name, "text encoder–decoder", build, _pair)


BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
}
T5 = {
    "d_ff": 64,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}

ENCODERS = (
    _encoder("BERT", "BertModel", "BertConfig"),
    _encoder("BERT for classification", "BertForSequenceClassification", "BertConfig"),
    _encoder("RoBERTa", "RobertaModel", "RobertaConfig"),
    _encoder("XLM-RoBERTa", "XLMRobertaForTokenClassification", "XLMRobertaConfig"),
    _encoder(
        "DistilBERT",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dim=32,
        hidden_dim=64,
        n_heads=4,
        n_layers=2,
    ),
    _encoder("ALBERT (tied layers)", "AlbertModel", "AlbertConfig", embedding_size=16),
    _encoder("ELECTRA", "ElectraForSequenceClassification", "ElectraConfig", embedding_size=16),
    _encoder("DeBERTa", "DebertaModel", "DebertaConfig"),
    _encoder(
        "DeBERTa-v3",
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
    ),
    _encoder("MPNet", "MPNetModel", "MPNetConfig"),
    _encoder(
        "ModernBERT",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=8,
        **SPECIAL,
    ),
    _encoder("FNet", "FNetModel", "FNetConfig", masked=False),
    _encoder(
        "SqueezeBERT",
        "SqueezeBertModel",
        "SqueezeBertConfig",
        embedding_size=32,
        q_groups=2,
        k_groups=2,
        v_groups=2,
        post_attention_groups=1,
        intermediate_groups=2,
        output_groups=2,
    ),
    _encoder("ConvBERT", "ConvBertModel", "ConvBertConfig", embedding_size=32, head_ratio=2),
    _encoder(
        "Nyströmformer",
        "NystromformerModel",
        "NystromformerConfig",
        num_landmarks=11,
        segment_means_seq_len=11,
    ),
    _encoder(
        "MobileBERT",
        "MobileBertModel",
        "MobileBertConfig",
        embedding_size=16,
        intra_bottleneck_size=16,
        true_hidden_size=16,
    ),
    _encoder("RoFormer", "RoFormerModel", "RoFormerConfig", embedding_size=32),
    _encoder(
        "Funnel",
        "FunnelModel",
        "FunnelConfig",
        without=("num_hidden_layers", "max_position_embeddings"),
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        block_sizes=[1, 1],
        num_decoder_layers=1,
    ),
    _encoder("ESM-2", "EsmModel", "EsmConfig", position_embedding_type="rotary", mask_token_id=3),
    _encoder(
        "XLNet",
        "XLNetModel",
        "XLNetConfig",
        without=("max_position_embeddings",),
        d_model=32,
        n_head=4,
        d_inner=64,
        n_layer=2,
    ),
    _encoder("NomicBERT", "NomicBertModel", "NomicBertConfig", head_dim=8),
    _encoder("LayoutLM", "LayoutLMModel", "LayoutLMConfig"),
    _encoder("I-BERT", "IBertModel", "IBertConfig"),
)

DECODERS = (
    _decoder(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=40
    ),
    _decoder(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    _decoder("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    _decoder(
        "GPT-J",
        "GPTJForCausalLM",
        "GPTJConfig",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        rotary_dim=4,
    ),
    _decoder(
        "GPT-BigCode (multi-query)",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        multi_query=True,
    ),
    _decoder(
        "CodeGen",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=40,
        rotary_dim=4,
    ),
    _decoder("OPT", "OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32),
    _decoder("BLOOM", "BloomForCausalLM", "BloomConfig", n_layer=2, n_head=4),
    _decoder("Falcon (multi-query)", "FalconForCausalLM", "FalconConfig"),
    _decoder(
        "Falcon (new, grouped)",
        "FalconForCausalLM",
        "FalconConfig",
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    _grouped("Llama (grouped queries)", "LlamaForCausalLM", "LlamaConfig"),
    _grouped("Mistral", "MistralForCausalLM", "MistralConfig", sliding_window=8),
    _grouped("Qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    _grouped("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", head_dim=8),
    _grouped("Gemma", "GemmaForCausalLM", "GemmaConfig", head_dim=8),
    _grouped(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
    ),
    _grouped(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
    ),
    _grouped("Phi", "PhiForCausalLM", "PhiConfig"),
    _grouped("Phi-3 (fused qkv, gate and up)", "Phi3ForCausalLM", "Phi3Config"),
    _grouped("StableLM", "StableLmForCausalLM", "StableLmConfig"),
    _grouped("Cohere", "CohereForCausalLM", "CohereConfig"),
    _grouped("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config"),
    _grouped("Granite", "GraniteForCausalLM", "GraniteConfig"),
    _grouped("GLM", "GlmForCausalLM", "GlmConfig", head_dim=8),
    _grouped("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config"),
    _grouped("Nemotron", "NemotronForCausalLM", "NemotronConfig"),
    _decoder("Persimmon", "PersimmonForCausalLM", "PersimmonConfig"),
    _decoder(
        "MPT", "MptForCausalLM", "MptConfig", d_model=32, n_heads=4, n_layers=2, max_seq_len=40
    ),
    _grouped("StarCoder2", "Starcoder2ForCausalLM", "Starcoder2Config", sliding_window=8),
    _decoder(
        "XGLM",
        "XGLMForCausalLM",
        "XGLMConfig",
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
    ),
    _decoder(
        "CTRL",
        "CTRLLMHeadModel",
        "CTRLConfig",
        n_embd=32,
        n_layer=2,
        n_head=4,
        dff=64,
        n_positions=40,
    ),
    _grouped("DiffLlama", "DiffLlamaForCausalLM", "DiffLlamaConfig", head_dim=8),
    # Mixtures of experts.
    _grouped(
        "Mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2
    ),
    _grouped(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    _grouped(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=8,
    ),
    _grouped("OLMoE", "OlmoeForCausalLM", "OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    _grouped(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=8,
    ),
    _grouped(
        "Granite MoE",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    _decoder(
        "DeepSeek-V2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
    ),
    _decoder(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    ),
    # State spaces, recurrences and hybrids.
    _decoder(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        state_size=4,
        conv_kernel=4,
        time_step_rank=4,
        expand=2,
    ),
    _decoder(
        "Mamba-2",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        state_size=8,
        conv_kernel=4,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=4,
        expand=2,
    ),
    _decoder(
        "Falcon-Mamba",
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        state_size=4,
        conv_kernel=4,
        time_step_rank=4,
        expand=2,
    ),
    _decoder("RWKV", "RwkvForCausalLM", "RwkvConfig", attention_hidden_size=32, context_length=40),
    _grouped(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=8,
        head_dim=8,
    ),
    _grouped(
        "Jamba",
        "JambaForCausalLM",
        "JambaConfig",
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    _decoder(
        "xLSTM",
        "xLSTMForCausalLM",
        "xLSTMConfig",
        num_heads=4,
        num_blocks=2,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
        chunk_size=8,
        mode="inference",
    ),
    _grouped(
        "LFM2",
        "Lfm2ForCausalLM",
        "Lfm2Config",
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    _grouped(
        "Bamba",
        "BambaForCausalLM",
        "BambaConfig",
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
        mamba_expand=2,
    ),
)

BOTH = (
    _both("T5", "T5ForConditionalGeneration", "T5Config", **T5),
    _both("Flan-T5 (gated)", "T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        **T5),
    _both("mT5", "MT5ForConditionalGeneration", "MT5Config", **T5),
    _both("LongT5", "LongT5ForConditionalGeneration", "LongT5Config", local_radius=4, **T5),
    _both("Switch", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **T5),
    _both("BART", "BartForConditionalGeneration", "BartConfig", forced_eos_token_id=None, **BART),
    _both("mBART", "MBartForConditionalGeneration", "MBartConfig", forced_eos_token_id=None, **BART),
    _both("Marian", "MarianMTModel", "MarianConfig", forced_eos_token_id=None, **BART),
    _both("Pegasus", "PegasusForConditionalGeneration", "PegasusConfig", forced_eos_token_id=None, **BART),
    _both("M2M-100", "M2M100ForConditionalGeneration", "M2M100Config", forced_eos_token_id=None, **BART),
    _both("Blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", forced_eos_token_id=None, **BART),
    _both("ProphetNet", "ProphetNetForConditionalGeneration", "ProphetNetConfig", hidden_size=32, num_encoder_layers=2,
        num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=40, ngram=2),
    _both("LED", "LEDForConditionalGeneration", "LEDConfig", forced_eos_token_id=None, attention_window=4,
        max_encoder_position_embeddings=40, max_decoder_position_embeddings=40, **{k: v for k,
        v in BART.items() if k != "max_position_embeddings"}),
)  # fmt: skip

ARCHITECTURES = (*ENCODERS, *DECODERS, *BOTH)
