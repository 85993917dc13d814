"""Compares an adapter that a run wrote, loaded by PEFT on transformers' base, with what flowrun
computed under it: the log-probability of every token of given completions, and logits where the
file has them. Exits with 1 where the largest difference is above the tolerance.

    python tests/oracle/adapter.py --model DIR_OR_GGUF --adapter RUN/round-1/align/adapter \\
        --scores RUN/scores.jsonl

Without --adapter it compares the base. The scores are the rows of a `scorer` stage as a `sink` writes
them, from a run with `dtype = "f32"` (anything less differs by more than the tolerance):

    [stages.score]
    kind = "scorer"
    input = "probes"            # rows with a prompt and a completion
    model = "policy"
    adapter = "align"           # the trainer; "base" for the base

    [stages.scores]
    kind = "sink"
    input = "score"
    path = "scores.jsonl"

A row may also have `completion_ids`, the sampled tokens, which are then taken as they are, and
`logits`, `[tokens][vocabulary]`: those that each token of the completion is drawn from. Tokens come
from transformers' own tokenizer and chat template, so a difference in these shows too.

An environment for it, on a CPU:

    python3 -m venv oracle && . oracle/bin/activate
    pip install torch==2.11.0 transformers==4.57.6 peft gguf
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer


class Text:
    """The model's tokenizer: prompts through the chat template, completions with their end."""

    def __init__(self, model: Path):
        if model.suffix != ".gguf":
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.end = self.tokenizer.eos_token_id
            return
        from gguf import GGUFReader

        # transformers takes neither the end token nor the pre-tokenizer from the file.
        fields = GGUFReader(model).fields
        self.tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        self.end = fields["tokenizer.ggml.eos_token_id"].contents()
        if fields["tokenizer.ggml.pre"].contents() == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False)
            self.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, prompt) -> list[int]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def completion(self, row: dict) -> list[int]:
        """As many tokens as were scored: the end token is among them or not."""
        count = len(row["logprobs"])
        ids = row.get("completion_ids") or self.ids(row["completion"])
        ids = ids[:-1] if ids[-1:] == [self.end] else ids
        if count - len(ids) not in (0, 1):
            sys.exit(f"{row['completion']!r} has {len(ids)} tokens without its end here and {count} in the scores")
        return (ids + [self.end])[:count]


def load(model: Path, adapter: Path | None):
    where = {"pretrained_model_name_or_path": model}
    if model.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}
    base = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, local_files_only=True)
    return (PeftModel.from_pretrained(base, adapter) if adapter else base).eval()


def difference(ours, theirs: torch.Tensor) -> float:
    """The largest one; nothing that isn't a number passes for small."""
    gap = (torch.tensor(ours, dtype=torch.float32) - theirs).abs().max().item()
    return gap if gap == gap else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    args = parser.parse_args()

    rows = [json.loads(line) for line in args.scores.read_text().splitlines()]
    if not rows:
        sys.exit(f"{args.scores} has no rows")
    text, model = Text(args.model), load(args.model, args.adapter)
    largest, tokens = {}, 0
    for row in rows:
        prompt, completion = text.prompt(row["prompt"]), text.completion(row)
        if not completion:
            continue
        tokens += len(completion)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        found = {"log-prob": difference(row["logprobs"], logprobs)}
        if "logits" in row:
            found["logit"] = difference(row["logits"], logits)
        for name, gap in found.items():
            largest[name] = max(largest.get(name, 0.0), gap)

    under = args.adapter or "the base"
    gaps = ", ".join(f"{name} {gap:.2e}" for name, gap in largest.items())
    print(f"{len(rows)} completions, {tokens} tokens under {under}: largest difference: {gaps}")
    if tokens == 0 or max(largest.values()) > args.tolerance:
        sys.exit(f"above the tolerance of {args.tolerance:g}" if tokens else "nothing to compare")


if __name__ == "__main__":
    main()
