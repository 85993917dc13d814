"""Tokens a second of transformers' generate and of flowrun, side by side, by hand:

    python tests/oracle/speed.py models/SmolLM2-135M-Instruct.Q4_1.gguf target/debug/flowrun [threads]

Same weights, bf16, batch, prompt length (32) and new tokens (48), temperature 1, end of turn ignored, prefill
counted, loading not. The two take turns; the median of three tries each is printed.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

PROMPT, NEW, TRIES = 32, 48, 3


def main() -> None:
    model_file, flowrun = sys.argv[1:3]
    threads = int(sys.argv[3]) if len(sys.argv) > 3 else os.cpu_count()
    torch.set_num_threads(threads)
    folder, name = os.path.split(os.path.abspath(model_file))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16).eval()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {threads} threads")

    def theirs(batch: int, new: int) -> float:
        ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT))
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new,
                                 do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=2)
        assert out.shape == (batch, PROMPT + new)
        return batch * new / (time.perf_counter() - start)

    def ours(batch: int) -> float:
        command = [flowrun, "bench", "generate", "--model", model_file, "--dtype", "bf16", "--device", "cpu",
                   "--threads", str(threads), "--concurrency", str(batch), "--new-tokens", str(NEW),
                   "--prompt-tokens", str(PROMPT), "--json"]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["tokens_per_second"]

    print("batch  transformers  flowrun  ratio")
    for batch in (1, 2, 8, 32):
        theirs(batch, 2)
        pairs = [(theirs(batch, NEW), ours(batch)) for _ in range(TRIES)]
        a, b = (statistics.median(side) for side in zip(*pairs))
        print(f"{batch:5}  {a:12.1f}  {b:7.1f}  {b / a:5.2f}")


if __name__ == "__main__":
    main()
