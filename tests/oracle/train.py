"""Makes tests/fixtures/tiny-llama: a tiny random Llama, two adapters and what TRL and PEFT compute
with them. The Rust tests compare with these files and need no Python.

    python tests/oracle/train.py tests/fixtures/tiny-llama

Needs torch 2.11, transformers 4.57, peft 0.21, trl 0.24, datasets.
"""

import json
import math
import os
import random
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WORDS = (
    "the a small red blue river house stone cat dog bird walks sings sleeps under over near bright cold "
    "warm night day sun moon tree green path old new quiet loud and but then because one two three"
).split()
BETA, BATCH, ACCUMULATION, EPOCHS, RATE = 0.1, 2, 2, 2, 5e-3
WHOLE_RATE, WHOLE_DECAY = 5e-4, 0.5


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def tokenizer(out):
    rng = random.Random(0)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([sentence(rng, 5, 20) for _ in range(200)], trainer)
    inner.add_special_tokens([AddedToken(t, special=True) for t in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    fast.save_pretrained(out)
    # one file holds the template, as in the models of the time
    jinja = out / "chat_template.jinja"
    if jinja.exists():
        jinja.unlink()
    config = json.loads((out / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "special_tokens_map.json").unlink(missing_ok=True)
    return fast


def model(out, vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        torch_dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)


def adapter(base, out, zero):
    """An adapter on every linear layer but the head; `zero` leaves B at zero, as PEFT starts."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    if not zero:
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    peft.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    file = out / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = "tiny-llama"
    file.write_text(json.dumps(config, indent=2) + "\n")


def log_probs(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def first_step(base, adapter_dir, pairs, out):
    """Log-probs, logits, DPO loss and its gradients for one micro-batch, by autograd alone."""
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter_dir, is_trainable=True)
    expected, losses = [], []
    for pair in pairs:
        policy = [log_probs(peft, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        with torch.no_grad(), peft.disable_adapter():
            reference = [log_probs(peft, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        delta = (policy[0].sum() - reference[0].sum()) - (policy[1].sum() - reference[1].sum())
        losses.append(-torch.nn.functional.logsigmoid(BETA * delta))
        expected.append(
            {
                "policy": [p.tolist() for p in policy],
                "reference": [r.tolist() for r in reference],
                "loss": losses[-1].item(),
            }
        )
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum((g**2).sum().item() for g in gradients.values()))
    save_file(gradients, out / "gradients.safetensors")
    with torch.no_grad():
        logits = peft(torch.tensor([pairs[0]["prompt"]])).logits[0, -1]
    return {"pairs": expected, "loss": loss.item(), "grad_norm": norm, "logits": logits.tolist()}


class Sequential(DPOTrainer):
    """Row order, and the loss of each micro-batch as it is (the log rounds it to four digits)."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = getattr(self, "losses", []) + [loss.item()]
        return loss


class Record(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **_):
        if logs and "loss" in logs:
            self.steps.append({k: float(v) for k, v in logs.items()})


def trajectory(base, start, texts, tokenizer, loss, smoothing, final=None):
    """TRL's steps from the adapter `start`; without one every weight of the base is trained."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if start:
        model = PeftModel.from_pretrained(model, start, is_trainable=True)
    record = Record()
    args = DPOConfig(
        output_dir="/tmp/flowrun-oracle",
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=EPOCHS,
        learning_rate=RATE if start else WHOLE_RATE,
        lr_scheduler_type="linear",
        weight_decay=0.01 if start else WHOLE_DECAY,
        max_grad_norm=1.0,
        beta=BETA,
        loss_type=loss.split("+"),
        label_smoothing=smoothing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        max_length=512,
        max_prompt_length=None,
        logging_nan_inf_filter=False,
    )
    trainer = Sequential(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        callbacks=[record],
    )
    columns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    ids = [{c.removesuffix("_input_ids"): row[c] for c in columns} for row in trainer.train_dataset]
    trainer.train()
    for i, step in enumerate(record.steps):
        step["loss"] = sum(trainer.losses[i * ACCUMULATION : (i + 1) * ACCUMULATION]) / ACCUMULATION
    if final:
        named = model.named_parameters()
        save_file({n.replace(".default", ""): p.detach() for n, p in named if "lora_" in n or not start}, final)
    return ids, record.steps


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    fast = tokenizer(out)
    model(out, len(fast))
    expected = out / "expected"
    expected.mkdir(exist_ok=True)
    adapter(out, out / "adapter", zero=False)
    adapter(out, out / "fresh", zero=True)

    rng = random.Random(7)
    texts = [
        {"prompt": sentence(rng, 3, 9), "chosen": " " + sentence(rng, 2, 14), "rejected": " " + sentence(rng, 2, 14)}
        for _ in range(16)
    ]
    # bco_pair is not among them: TRL 0.24 shifts its rewards by a running mean.
    losses = [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1), ("exo_pair", 0.1), ("nca_pair", 0.0),
              ("sppo_hard", 0.0), ("apo_zero", 0.0), ("apo_down", 0.0), ("discopop", 0.0), ("sigmoid+sft", 0.0)]
    result = {"beta": BETA, "learning_rate": RATE, "batch_size": BATCH, "accumulation": ACCUMULATION, "epochs": EPOCHS}
    result["trajectories"] = {}
    for loss, smoothing in losses:
        final = expected / "final.safetensors" if loss == "sigmoid" else None
        ids, steps = trajectory(out, out / "fresh", texts, fast, loss, smoothing, final)
        result["trajectories"][loss] = {"label_smoothing": smoothing, "steps": steps}
    _, steps = trajectory(out, None, texts, fast, "sigmoid", 0.0, expected / "final-model.safetensors")
    result["whole"] = {"learning_rate": WHOLE_RATE, "weight_decay": WHOLE_DECAY, "steps": steps}
    result["pairs"] = [text | {"ids": row} for text, row in zip(texts, ids)]
    result["first_step"] = first_step(out, out / "adapter", ids[:BATCH], expected)
    messages = [{"role": "user", "content": "the small cat"}]
    text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    result["chat"] = {"text": text, "ids": fast(text, add_special_tokens=False)["input_ids"]}
    (expected / "train.json").write_text(json.dumps(result, indent=1) + "\n")


main()
