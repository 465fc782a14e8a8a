"""Text families: encoders, decoders, encoder-decoders, experts and state spaces, from transformers' own configs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from families.base import WORDS, Batch, Family, Sample, classes, ids, mask
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def classifier(model: str, config: str, **settings: Any) -> Callable[[], Sample]:
    """An encoder with a classification head, its padding masked."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings, num_labels=3))

        def loss(batch: Batch) -> Tensor:
            logits = module(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
            return F.cross_entropy(logits, batch["label"])

        return Sample({"model": module}, {"ids": ids(), "mask": mask(), "label": classes()}, loss)

    return build


def decoder(model: str, config: str, *, masked: bool = True, **settings: Any) -> Callable[[], Sample]:
    """A language model with its own loss, padding masked and not counted."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))

        def loss(batch: Batch) -> Tensor:
            labels = batch["ids"].masked_fill(batch["mask"] == 0, -100)
            extra = {"attention_mask": batch["mask"]} if masked else {}
            found: Tensor = module(input_ids=batch["ids"], labels=labels, **extra).loss
            return found

        return Sample({"model": module}, {"ids": ids(), "mask": mask()}, loss)

    return build


def translator(model: str, config: str, **settings: Any) -> Callable[[], Sample]:
    """An encoder-decoder with its own loss."""

    def build() -> Sample:
        module = getattr(hf, model)(getattr(hf, config)(**settings))

        def loss(batch: Batch) -> Tensor:
            wanted = batch["wanted"].masked_fill(batch["wanted"] < 6, -100)
            found: Tensor = module(input_ids=batch["ids"], attention_mask=batch["mask"], labels=wanted).loss
            return found

        return Sample({"model": module}, {"ids": ids(), "mask": mask(), "wanted": ids(5)}, loss)

    return build


T5 = {
    "vocab_size": WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES = (
    Family("BERT", "encoder", classifier("BertForSequenceClassification", "BertConfig", **SIZES)),
    Family("RoBERTa", "encoder", classifier("RobertaForSequenceClassification", "RobertaConfig", **SIZES)),
    Family(
        "DistilBERT",
        "encoder",
        classifier(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=WORDS,
            dim=32,
            hidden_dim=64,
            n_layers=3,
            n_heads=4,
            max_position_embeddings=32,
            pad_token_id=0,
        ),
    ),
    Family(
        "DeBERTa-v2",
        "encoder",
        classifier(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
    ),
    Family(
        "ModernBERT",
        "encoder",
        classifier("ModernBertForSequenceClassification", "ModernBertConfig", **SIZES, reference_compile=False),
    ),
    Family("T5", "encoder-decoder", translator("T5ForConditionalGeneration", "T5Config", **T5)),
    Family("BART", "encoder-decoder", translator("BartForConditionalGeneration", "BartConfig", **BART)),
    Family(
        "GPT-2",
        "decoder",
        decoder(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=WORDS,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    Family("GPT-NeoX", "decoder", decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES)),
    Family("OPT", "decoder", decoder("OPTForCausalLM", "OPTConfig", **SIZES, ffn_dim=64, word_embed_proj_dim=32)),
    Family("LLaMA", "decoder", decoder("LlamaForCausalLM", "LlamaConfig", **GROUPED)),
    Family("Qwen2", "decoder", decoder("Qwen2ForCausalLM", "Qwen2Config", **GROUPED)),
    Family("Qwen3", "decoder", decoder("Qwen3ForCausalLM", "Qwen3Config", **GROUPED)),
    Family("Gemma 2", "decoder", decoder("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, sliding_window=4)),
    Family("Gemma 3", "decoder", decoder("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, sliding_window=4)),
    Family("Mistral", "decoder", decoder("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4)),
    Family("Phi-3", "decoder", decoder("Phi3ForCausalLM", "Phi3Config", **SIZES, num_key_value_heads=2)),
    Family(
        "Mixtral",
        "decoder with experts",
        decoder("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, output_router_logits=True),
        torch.float32,  # torch has no grouped matrix product in float64
    ),
    Family(
        "Mixtral, no balance loss",
        "the same, router logits not collected",
        decoder("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4),
        torch.float32,
    ),
    Family(
        "Qwen3-MoE",
        "decoder with experts",
        decoder("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GROUPED, **EXPERTS),
        torch.float32,  # torch has no grouped matrix product in float64
    ),
    Family(
        "DeepSeek-V3",
        "decoder with experts",
        decoder(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **{**SIZES, "num_hidden_layers": 4},
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        ),
        torch.float32,  # torch has no grouped matrix product in float64
    ),
    Family(
        "Mamba",
        "state space",
        decoder(
            "MambaForCausalLM",
            "MambaConfig",
            masked=False,
            vocab_size=WORDS,
            hidden_size=32,
            state_size=4,
            num_hidden_layers=3,
            time_step_rank=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
)
