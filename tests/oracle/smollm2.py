"""Writes tests/fixtures/smollm2-parity: what transformers computes with the builtin model.

    python tests/oracle/smollm2.py models/SmolLM2-135M-Instruct.Q4_1.gguf flows/data/prompts.jsonl

with torch 2.11, transformers 4.57, peft 0.21 and gguf; some minutes on two cores. For 20 prompts: the ids of
prompt and greedy answer in float32, the log-prob of every token after the first in float32 and by
how much transformers' own bf16 is off, for the base and for two LoRA adapters, which are written too.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent.parent / "fixtures" / "smollm2-parity"
PROMPTS, NEW = 20, 32


@torch.no_grad()
def log_probs(model, texts: list[torch.Tensor]) -> torch.Tensor:
    rows = []
    for ids in texts:
        logits = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        rows.append(logits.gather(1, ids[1:, None]).squeeze(1))
    return torch.cat(rows)


def adapter(base, where: Path, seed: int) -> None:
    """Random, of a size that changes log-probs by some tenths, rounded to bf16 as it is stored."""
    torch.manual_seed(seed)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * (0.04 if "lora_A" in name else 0.3))
    model.save_pretrained(where)
    model.unload()
    (where / "README.md").unlink()
    file = where / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def main() -> None:
    folder, name = os.path.split(os.path.abspath(sys.argv[1]))
    load = lambda dtype: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    prompts = [json.loads(line)["prompt"] for line in open(sys.argv[2])][:PROMPTS]
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    exact = load(torch.float32)
    texts, answers = [], []
    for prompt in prompts:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = exact.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                               pad_token_id=2, eos_token_id=2)[0]
        texts.append(whole)
        answers.append(ids.shape[1])
    out = {
        "ids": torch.cat(texts), "lengths": torch.tensor([len(t) for t in texts]), "prompts": torch.tensor(answers),
        "base": log_probs(exact, texts),
    }
    for seed, which in enumerate(("one", "two")):
        adapter(exact, OUT / which, seed)
        model = PeftModel.from_pretrained(exact, OUT / which).eval()
        out[which] = log_probs(model, texts)
        exact = model.unload()
    del exact
    rounded = load(torch.bfloat16)
    errors = {"base": (log_probs(rounded, texts) - out["base"]).abs()}
    for which in ("one", "two"):
        model = PeftModel.from_pretrained(rounded, OUT / which).eval()
        errors[which] = (log_probs(model, texts) - out[which]).abs()
        rounded = model.unload()
    save_file({k: v.contiguous() for k, v in out.items()}, OUT / "expected.safetensors")
    figures = {k: {"mean": v.mean().item(), "p99": v.quantile(0.99).item()} for k, v in errors.items()}
    (OUT / "bf16.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(figures, {k: (out[k] - out["base"]).abs().mean().item() for k in ("one", "two")}, len(out["base"]))


if __name__ == "__main__":
    main()
