"""Pairs trained a second by DataDreamer 0.46, for train_speed.py: `python peer_train.py MODEL_DIR PAIRS.json THREADS`.

What is timed is its Trainer's own `train`: the reference's log-probs, one epoch over the pairs at batch size 1 with
8 accumulated, and the evaluation of one pair before and after.
"""

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    model, file, threads = sys.argv[1:4]
    torch.set_num_threads(int(threads))
    from datadreamer import DataDreamer
    from datadreamer.steps import DataSource
    from datadreamer.trainers import TrainHFDPO
    from peft import LoraConfig

    seconds = []
    inner = transformers.Trainer.train

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        result = inner(self, *args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    transformers.Trainer.train = timed
    pairs = json.load(open(file))
    columns = {name: [pair[name] for pair in pairs] for name in ("prompt", "chosen", "rejected")}
    with DataDreamer(os.path.join(tempfile.mkdtemp(), "out")):
        train = DataSource("train", columns)
        validation = DataSource("validation", {name: values[:1] for name, values in columns.items()})
        lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
        trainer = TrainHFDPO("align", model_name=model, peft_config=lora, device="cpu", dtype="bfloat16",
                             chat_prompt_template="{{prompt}}", system_prompt=None)
        sides = {"train": train, "validation": validation}
        inputs = {f"{side}_{name}{'s' if name == 'prompt' else ''}": step.output[name]
                  for side, step in sides.items() for name in columns}
        trainer.train(**inputs, epochs=1, batch_size=1, gradient_accumulation_steps=8, learning_rate=1e-4)
    print(json.dumps({"pairs_per_second": len(pairs) / seconds[0]}))


if __name__ == "__main__":
    main()
