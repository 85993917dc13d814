"""An exported model in transformers against base and adapter in PEFT, by hand:

    flowrun export ADAPTER --model BASE --merge --dtype f32 --out MERGED
    python tests/oracle/export.py BASE ADAPTER MERGED

BASE is a directory or a .gguf file. Prints the largest difference of logits in float32, and whether the
merged directory's tokenizer writes the same prompt.
"""

import os
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(cls, where: str, **options):
    if where.endswith(".gguf"):
        folder, name = os.path.split(os.path.abspath(where))
        return cls.from_pretrained(folder, gguf_file=name, **options)
    return cls.from_pretrained(where, **options)


def main() -> None:
    base, adapter, merged = sys.argv[1:4]
    tokenizer = load(AutoTokenizer, merged)
    chat = [{"role": "user", "content": "Name three colours, and say why."}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    same = text == load(AutoTokenizer, base).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = load(AutoModelForCausalLM, merged, dtype=torch.float32)(ids).logits
        theirs = PeftModel.from_pretrained(load(AutoModelForCausalLM, base, dtype=torch.float32), adapter)(ids).logits
    print(f"{ids.shape[1]} tokens, same prompt: {same}, largest difference {(ours - theirs).abs().max():.1e}, "
          f"logits up to {theirs.abs().max():.1f}")


if __name__ == "__main__":
    main()
