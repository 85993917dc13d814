"""Writes tests/fixtures/families: tiny random models of every family and what transformers computes.

    python tests/oracle/families.py

with torch 2.11, transformers 4.57 and peft 0.21, when a family is added. A directory a model: config.json,
model.safetensors (bf16; computed in float32 on both sides) and expected.safetensors with the ids of two
texts, their logits, and the greedy continuation of the first. Contexts are longer than the sliding
windows. Two models come with LoRA adapters as PEFT writes them, and the logits under each.
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).parent.parent / "fixtures" / "families"
VOCABULARY, TOKENS, NEW = 64, 26, 12

SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
MODELS = {
    "llama": dict(model_type="llama", num_key_value_heads=4),
    "llama3": dict(model_type="llama", rope_theta=500000.0, rope_scaling=LLAMA3, rms_norm_eps=1e-5),
    "llama-linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=2.0), num_key_value_heads=1),
    "llama-dynamic": dict(model_type="llama", rope_scaling=dict(rope_type="dynamic", factor=2.0)),
    "llama-yarn": dict(model_type="llama", rope_scaling=dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=0.5)),
    "llama-biases": dict(model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    "mistral": dict(model_type="mistral", sliding_window=8),
    "mistral-whole": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2-window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen2-yarn": dict(model_type="qwen2", rope_scaling=dict(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=32, mscale=0.8, mscale_all_dim=0.5, truncate=False)),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "smollm3": dict(model_type="smollm3", num_hidden_layers=4),
    "gemma2": dict(model_type="gemma2", head_dim=16, query_pre_attn_scalar=24, sliding_window=8),
    "gemma3": dict(model_type="gemma3_text", head_dim=16, query_pre_attn_scalar=24, sliding_window=8,
                   num_hidden_layers=3, sliding_window_pattern=3, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "phi3": dict(model_type="phi3", sliding_window=10),
    "phi3-long": dict(model_type="phi3", head_dim=None, partial_rotary_factor=0.5, original_max_position_embeddings=40,
                      rope_scaling=dict(type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 4.0])),
}
ADAPTERS = {
    "llama3": {
        "one": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
        "two": LoraConfig(r=2, lora_alpha=4, use_rslora=True, init_lora_weights=False,
                          target_modules=r".*\.(self_attn\.[qv]_proj|mlp\.down_proj)"),
    },
    "phi3": {"one": LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", init_lora_weights=False)},
}


def build(settings: dict):
    settings = {k: v for k, v in {**SHAPE, **settings}.items() if k != "head_dim" or v is not None}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # wide enough that every part of a block shows in the logits
            spread = 0.3 if "norm" in name or name.endswith("bias") else 1.5 / parameter.shape[-1] ** 0.5
            values = torch.randn_like(parameter) * spread
            if "norm" in name and not config.model_type.startswith("gemma"):
                values += 1.0
            parameter.copy_(values.to(torch.bfloat16).float())
    return model.eval()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(row.unsqueeze(0)).logits[0] for row in ids]).float()


@torch.no_grad()
def greedy(model, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(NEW):
        ids = torch.cat([ids, model(ids.unsqueeze(0)).logits[0, -1:].argmax(-1)])
    return ids[TOKENS:]


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, settings) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = build(settings)
        where = OUT / name
        where.mkdir(parents=True)
        ids = torch.randint(3, VOCABULARY, (2, TOKENS))
        expected = {"ids": ids, "logits": logits(model, ids), "greedy": greedy(model, ids[0])}
        # a copy: rounding the rotary frequencies too would change what the adapters below are added to
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(where)
        (where / "generation_config.json").unlink(missing_ok=True)
        for adapter, config in ADAPTERS.get(name, {}).items():
            adapted = get_peft_model(model, config)
            adapted.save_pretrained(where / adapter)
            (where / adapter / "README.md").unlink()
            expected[f"logits {adapter}"] = logits(adapted, ids)
            expected[f"greedy {adapter}"] = greedy(adapted, ids[0])
            model = adapted.unload()
        save_file({k: v.contiguous() for k, v in expected.items()}, where / "expected.safetensors")
        print(name, json.loads((where / "config.json").read_text())["architectures"],
              f"logits up to {expected['logits'].abs().max():.1f}")


if __name__ == "__main__":
    main()
