"""Writes tests/fixtures/smollm2.json: what transformers makes of the builtin model's GGUF file.

Token ids, decoded text, chat prompts and sums over dequantised weights; the Rust tests compare with
it and need no Python. Run by hand when the model file changes:

    python tests/oracle/tokenizer.py models/SmolLM2-135M-Instruct.Q4_1.gguf

with transformers 4.57, torch 2.11 and gguf. transformers gives this file a LlamaTokenizerFast that
adds a begin-of-text token against the file's own flag and cuts digits in groups before it merges;
ids are therefore taken without special tokens, and from a second tokenizer too that cuts as
llama.cpp's `smollm` does. The script stops if the two disagree on a text without odd digits.
"""

import json
import sys
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\t", " \t \n ", "   leading", "trailing   ", "a  b   c    d",
    "Hello, world!", "hello world", "HELLO WORLD", "The quick brown fox jumps over the lazy dog.",
    "I'm, you're, he'll, she'd, they've, it's, don't", "I'M SHOUTING, CAN'T YOU HEAR?",
    "0", "7", "42", "1234567890", "3.14159", "1,000,000", "2024-02-29T23:59:60Z", "x1y22z333", " 12 345 6789",
    "+1 (555) 010-0199", "1e-3 0xFF 0b1010", "½ ⅓ ² ³ Ⅷ ①", "١٢٣ ४५६ 七八九",
    "def f(x):\n    return x ** 2  # square\n", "fn main() { println!(\"{}\", 1 + 1); }",
    "SELECT prompt, chosen FROM input WHERE verdict <> 'tie';", "{\"a\": [1, 2, {\"b\": null}]}",
    "<html><body class=\"x\">&amp;</body></html>", "for (int i = 0; i < n; ++i) { a[i] *= 2; }",
    "https://example.org/a/b?c=d&e=f#g", "user@example.org", "C:\\Users\\me\\file.txt", "$HOME/.config/*.toml",
    "naïve café résumé", "naïve café (decomposed)", "Straße, Ärger, Übung", "Ελληνικά και αγγλικά",
    "Привет, мир!", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界！", "こんにちは世界", "안녕하세요 세계",
    "😀", "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷 flags", "👍🏽 skin", "emoji 🎉 in 🎈 text", "zero\u200bwidth\u00a0nbsp\u2028line", "\ufeffBOM",
    "math: ∑_{i=1}^{n} x_i ≤ ∫ f dμ", "“quotes” – dashes — …", "a\r\nb\rc\n", "\x00\x01\x7f control",
    "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|><|im_end|>", "text<|endoftext|>text", "<|im_start|", "< |im_end| >",
    "<repo_name>x<file_sep>y<empty_output>", "Supercalifragilisticexpialidocious antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "....!!!!????", "A man, a plan, a canal: Panama.\n\nNew paragraph.",
]

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "Capital of France?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "  Count to 12.\n\n"},
    ],
    [{"role": "user", "content": "2 < 3 & \"quotes\" {{ not.a.variable }} {% raw %}"}],
    [{"role": "user", "content": ""}],
]

TENSORS = [
    "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight", "model.layers.29.mlp.up_proj.weight",
    "model.layers.29.mlp.down_proj.weight", "model.layers.17.self_attn.q_proj.weight",
    "model.layers.29.self_attn.k_proj.weight",
]


def llama_cpp_tokenizer(path: Path) -> Tokenizer:
    fields = GGUFReader(path).fields
    read = lambda key: fields[f"tokenizer.ggml.{key}"].contents()
    tokens = read("tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in read("merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, read("token_type")) if kind == 3])
    return tokenizer


def tokenization(path: Path, reference) -> list[dict]:
    ours, rows = llama_cpp_tokenizer(path), []
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        if ids != reference(text, add_special_tokens=False)["input_ids"]:
            assert any(c.isnumeric() for c in text), f"transformers disagrees on {text!r}"
            print(f"transformers cuts the digits of {text!r} otherwise", file=sys.stderr)
        rows.append({"text": text, "ids": ids, "decoded": ours.decode(ids, skip_special_tokens=False)})
    return rows


def summary(tensor: torch.Tensor) -> dict:
    exact = tensor.double()
    return {
        "shape": list(tensor.shape),
        "sum": exact.sum().item(),
        "abs_sum": exact.abs().sum().item(),
        "first": tensor.flatten()[:8].tolist(),
        # Weighs each row, so that an order of rows that is wrong shows.
        "row_weighted": (exact.reshape(tensor.shape[0], -1).sum(1) * torch.arange(1, tensor.shape[0] + 1)).sum().item(),
    }


def main() -> None:
    path = Path(sys.argv[1])
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chats = []
    for messages in CHATS:
        for prompt in (False, True):
            text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ids = reference(text, add_special_tokens=False)["input_ids"]
            chats.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights = model.state_dict()
    fixture = {
        "tokenization": tokenization(path, reference),
        "chats": chats,
        "weights": {name: summary(weights[name]) for name in TENSORS},
        "weights_bf16": {name: summary(weights[name].bfloat16().float()) for name in TENSORS[3:5]},
    }
    out = Path(__file__).parent.parent / "fixtures" / "smollm2.json"
    out.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
