"""Writes tests/fixtures/sampling.json: what transformers' logits processors make of random logits.

Each case has logits, a prompt, the tokens generated so far and the keys of a sampler; what is expected
are the tokens that stay, with their probabilities. transformers has no presence penalty: it is
subtracted here, after the repetition penalty, as vLLM does. No case lies so near a threshold that
float32 decides it. Run by hand:

    python tests/oracle/sampling.py

with torch 2.11, transformers 4.57.
"""

import itertools
import json
from pathlib import Path

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

OUT = Path(__file__).parent.parent / "fixtures" / "sampling.json"
VOCABULARY = 24


def expected(logits, prompt, generated, keys, nudge=0.0):
    """Probabilities, 0 for what is filtered out; `nudge` moves the thresholds."""
    ids = torch.tensor([prompt + generated])
    scores = logits.unsqueeze(0).clone()
    if keys["repetition_penalty"] != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(keys["repetition_penalty"])(ids, scores)
    for token in set(generated):
        scores[0, token] -= keys["presence_penalty"]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(keys["temperature"])])
    if keys["top_k"] is not None:
        warpers.append(TopKLogitsWarper(keys["top_k"]))
    if keys["top_p"] < 1.0:
        warpers.append(TopPLogitsWarper(keys["top_p"] + nudge))
    if keys["min_p"] is not None:
        warpers.append(MinPLogitsWarper(keys["min_p"] + nudge))
    return warpers(ids, scores).softmax(-1)[0]


def main():
    torch.manual_seed(5)
    ways = itertools.product([1.0, 1.3, 0.8], [0.0, 0.7, -0.5], [1.0, 0.6, 1.7], [None, 7], [1.0, 0.8], [None, 0.1])
    names = ["repetition_penalty", "presence_penalty", "temperature", "top_k", "top_p", "min_p"]
    cases = []
    for way in ways:
        keys = dict(zip(names, way))
        while True:
            logits = (torch.randn(VOCABULARY) * 2).round(decimals=3)
            prompt = torch.randint(VOCABULARY, (6,)).tolist()
            # Some of it is in the prompt, some is said twice.
            generated = prompt[:2] + torch.randint(VOCABULARY, (4,)).tolist() + [logits.argmax().item()] * 2
            found = [expected(logits, prompt, generated, keys, nudge) for nudge in (-1e-4, 0.0, 1e-4)]
            if all(torch.equal(f > 0, found[1] > 0) for f in found):
                break
        kept = {str(i): float(f"{p:.6g}") for i, p in enumerate(found[1].tolist()) if p > 0}
        cases.append(keys | {"logits": [round(v, 3) for v in logits.tolist()], "prompt": prompt,
                             "generated": generated, "expected": kept})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    OUT.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} cases")


if __name__ == "__main__":
    main()
