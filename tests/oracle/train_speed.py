"""Pairs trained a second by TRL, DataDreamer and flowrun, side by side, by hand:

    python tests/oracle/train_speed.py models/SmolLM2-135M-Instruct.Q4_1.gguf target/debug/flowrun [PEER]

PEER is a python that has DataDreamer (see peer.py). Same weights in bf16, 43 pairs of 37 prompt and 33 answer tokens a side, LoRA of rank 8 on all linear layers, one epoch
of DPO, the reference's log-probs included, loading not. TRL trains batches of 8 and of 1; flowrun steps every 8 pairs.
The sides take turns; the median of three tries each is printed.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

PAIRS, PROMPT, ANSWER, TRIES = 43, 37, 33, 3


def texts(tokenizer) -> Dataset:
    """Words of one token each; TRL adds an end token to answers."""
    words = [w for w in (tokenizer.decode([i]) for i in range(1000, 20000)) if w[:1] == " " and w[1:].isalpha()]
    draw = random.Random(0)
    text = lambda count: "".join(draw.choices(words, k=count))
    rows = [{"prompt": text(PROMPT), "chosen": text(ANSWER - 1), "rejected": text(ANSWER - 1)} for _ in range(PAIRS)]
    return Dataset.from_list(rows)


def main() -> None:
    model_file, flowrun = sys.argv[1:3]
    peer = sys.argv[3] if len(sys.argv) > 3 else None
    threads = os.cpu_count()
    torch.set_num_threads(threads)
    folder, name = os.path.split(os.path.abspath(model_file))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    tokenizer.pad_token = tokenizer.eos_token
    data = texts(tokenizer)
    print(f"torch {torch.__version__}, trl {trl.__version__}, {threads} threads")

    def theirs(batch: int) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
        with tempfile.TemporaryDirectory() as out:
            config = DPOConfig(output_dir=out, per_device_train_batch_size=batch, num_train_epochs=1, bf16=False,
                               learning_rate=1e-4, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True,
                               gradient_accumulation_steps=8 // batch, gradient_checkpointing=False,
                               dataloader_pin_memory=False, disable_tqdm=True)
            lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
            start = time.perf_counter()
            trainer.train()
            return PAIRS / (time.perf_counter() - start)

    def ours() -> float:
        command = [flowrun, "bench", "train", "--model", model_file, "--dtype", "bf16", "--device", "cpu", "--threads",
                   str(threads), "--concurrency", str(PAIRS), "--prompt-tokens", str(PROMPT), "--new-tokens",
                   str(ANSWER), "--json"]
        report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in report.items()}, flush=True)
        return report["pairs_per_second"]

    work = tempfile.mkdtemp()
    if peer:
        tokenizer.save_pretrained(work)
        AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(work)
        json.dump(list(data), open(os.path.join(work, "pairs.json"), "w"))

    def peers() -> float:
        if not peer:
            return float("nan")
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "peer_train.py")
        command = [peer, script, work, os.path.join(work, "pairs.json"), str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])["pairs_per_second"]

    tries = [(ours(), theirs(8), theirs(1), peers()) for _ in range(TRIES)]
    mine, *others = (statistics.median(side) for side in zip(*tries))
    print(f"flowrun {mine:.2f} pairs/s")
    for name, other in zip(("TRL, batch size 8", "TRL, batch size 1", "DataDreamer"), others):
        print(f"{name}: {other:.2f} pairs/s, {mine / other:.2f}x")


if __name__ == "__main__":
    main()
