"""The peer, timed: DataDreamer 0.46 samples, judges and trains with SmolLM2-135M as the seed does.

    python -m venv /tmp/dd && /tmp/dd/bin/pip install datadreamer.dev==0.46.0 gguf 'numpy<2' 'pyarrow<20' datasets==3.2.0 rich
    /tmp/dd/bin/python tests/oracle/peer.py models/SmolLM2-135M-Instruct.Q4_1.gguf flows/data/prompts.jsonl

Prints one JSON object: tokens really produced (not padded ones) and seconds for sampling 48 prompts
twice (at most 48 new tokens, bf16, batch size 2), judgements a second at batch size 1, and seconds of one
epoch of DPO over the pairs. Loading a model is not counted.
"""
import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def to_directory(gguf: str, out: str) -> None:
    folder, name = os.path.split(os.path.abspath(gguf))
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(out)


def main() -> None:
    gguf, prompts_file = sys.argv[1:3]
    rows = int(sys.argv[3]) if len(sys.argv) > 3 else 48
    from datadreamer import DataDreamer
    from datadreamer.llms import HFTransformers
    from datadreamer.steps import DataSource, JudgeGenerationPairsWithPrompt, Prompt
    from datadreamer.trainers import TrainHFDPO
    from peft import LoraConfig

    prompts = [json.loads(line)["prompt"] for line in open(prompts_file)][:rows]
    work = tempfile.mkdtemp()
    model = os.path.join(work, "model")
    to_directory(gguf, model)
    template = "<|im_start|>system\n{{system_prompt}}<|im_end|>\n<|im_start|>user\n{{prompt}}<|im_end|>\n<|im_start|>assistant\n"
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    chat = {"chat_prompt_template": template, "system_prompt": system}
    out = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with DataDreamer(os.path.join(work, "out")):
        source = DataSource("prompts", {"question": prompts})
        llm = HFTransformers(model, dtype="bfloat16", **chat)
        llm.model  # noqa: B018  (loads)
        tokenizer = llm.tokenizer
        seconds, tokens, generations = 0.0, 0, []
        for candidate in range(2):
            start = time.time()
            step = Prompt(
                f"sample {candidate}",
                inputs={"prompts": source.output["question"]},
                args={"llm": llm, "batch_size": 2, "top_p": 1.0, "seed": candidate, "max_new_tokens": 48},
            )
            seconds += time.time() - start
            texts = list(step.output["generations"])
            tokens += sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 1 for t in texts)
            generations.append(step)
        out["sample"] = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        start = time.time()
        judged = JudgeGenerationPairsWithPrompt(
            "judge",
            args={"llm": llm, "batch_size": 1, "max_new_tokens": 5},
            inputs={
                "prompts": source.output["question"],
                "a": generations[0].output["generations"],
                "b": generations[1].output["generations"],
            },
        )
        seconds = time.time() - start
        out["judge"] = {"judgements": rows, "seconds": seconds, "judgements_per_second": rows / seconds}
        pairs = judged.map(
            lambda row: {
                "question": row["prompts"],
                "chosen": row["a"] if row["judgements"] == "Response A" else row["b"],
                "rejected": row["b"] if row["judgements"] == "Response A" else row["a"],
            },
            lazy=False,
            name="pairs",
        )
        splits = pairs.splits(train_size=0.9, validation_size=0.1)
        trainer = TrainHFDPO("align", model_name=model, peft_config=LoraConfig(), device="cpu", dtype="bfloat16", **chat)
        start = time.time()
        columns = {
            f"{side}_{name}": splits[side].output[column]
            for side in ("train", "validation")
            for name, column in (("prompts", "question"), ("chosen", "chosen"), ("rejected", "rejected"))
        }
        trainer.train(**columns, epochs=1, batch_size=1, gradient_accumulation_steps=8)
        seconds = time.time() - start
        count = len(list(splits["train"].output["question"]))
        out["train"] = {"pairs": count, "seconds": seconds, "pairs_per_second": count / seconds}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
