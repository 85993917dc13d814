"""Writes tests/fixtures/tokenizers/: small tokenizers of every kind, and what transformers makes of them.

Each directory is a tokenizer as a model's directory has it, trained here on the corpus of
`tokenizer.py`, with an expected.json of ids and decoded text that transformers' AutoTokenizer gives.
Some of the directories contradict themselves, as those in the wild do: which file wins is
transformers' choice. The Rust tests compare and need no Python. Run by hand:

    python tests/oracle/tokenizer_kinds.py

with transformers 4.57, tokenizers 0.22.
"""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from tokenizer import TEXTS

OUT = Path(__file__).parent.parent / "fixtures" / "tokenizers"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Written out special tokens, with and without space around them.
SPECIAL_TEXTS = [
    "<s>", "<s>Hello</s>", " <s> a </s> b", "a<s> b</s>c", "Hello <s>.", "<unk>", "<0x0A>", "▁", "▁▁a ▁b", " ▁",
    "<bos>", "<bos>text<eos>", "<start_of_turn>user\nhi<end_of_turn>\n", "\n\n  <end_of_turn>",
    "<|begin_of_text|>x<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "a <tool_call> b </tool_call>", "x <extra> y", "x<extra>y", "<pad><pad>", "MixedCASE <Extra>", "wor<mask>ds <mask>  more",
]
CORPUS = TEXTS + SPECIAL_TEXTS


def special(*contents: str) -> list[AddedToken]:
    return [AddedToken(content, special=True, normalized=False) for content in contents]


def byte_level(pre_tokenizer, tokens: list[AddedToken], **options) -> Tokenizer:
    """GPT-2's kind; `tokens` come after the vocabulary, as in Llama 3 and Qwen 2."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    tokenizer.add_tokens(tokens)
    return tokenizer


def sentence_piece(first: list[str], normalized: tuple[str, ...] = ()) -> Tokenizer:
    """Llama 2's kind, without its normalizer and pre-tokenizer; `first` come before the bytes, some of
    them looked for in the normalized text, as the first Llama has them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=first + BYTES, limit_alphabet=70, show_progress=False
    )
    trained.train_from_iterator(TEXTS * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    # As SentencePiece scores what it learnt: the sooner, the higher. With every way to join a piece, as
    # transformers converts such models.
    merges = generate_merges(vocab, {piece: -id for piece, id in vocab.items()})
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=text in normalized) for text in first])
    return tokenizer


def fallback_decoder(strip: bool):
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(parts + ([decoders.Strip(" ", 1, 0)] if strip else []))


def split_and_bytes(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama3() -> tuple[Tokenizer, dict, dict]:
    tokens = special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = byte_level(split_and_bytes(LLAMA3), tokens, ignore_merges=True)
    begin = "<|begin_of_text|>"
    template = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|eot_id|>",
              "clean_up_tokenization_spaces": True}
    return tokenizer, config, {}


def qwen2() -> tuple[Tokenizer, dict, dict]:
    calls = [AddedToken(content, special=False, normalized=False) for content in ("<tool_call>", "</tool_call>")]
    tokens = special("<|endoftext|>", "<|im_start|>", "<|im_end|>") + calls
    tokenizer = byte_level(split_and_bytes(QWEN2), tokens)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {"tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "add_bos_token": False,
              "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return tokenizer, config, {}


def llama2(legacy: bool, normalized: tuple[str, ...] = ()) -> tuple[Tokenizer, dict, dict]:
    tokenizer = sentence_piece(["<unk>", "<s>", "</s>"], normalized)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = fallback_decoder(strip=True)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "legacy": legacy}
    return tokenizer, config, {}


def gemma() -> tuple[Tokenizer, dict, dict]:
    tokenizer = sentence_piece(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = fallback_decoder(strip=False)
    tokenizer.add_special_tokens(special("<start_of_turn>", "<end_of_turn>"))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "  ", "    ")])
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
              "pad_token": "<pad>", "add_bos_token": True, "add_eos_token": False}
    return tokenizer, config, {}


def tokens_in_the_map() -> tuple[Tokenizer, dict, dict]:
    """GPT-2's kind with a space in front that tokenizer_config.json takes back; special tokens that only
    special_tokens_map.json has, one of them in contradiction to tokenizer_config.json; one that isn't
    special in tokenizer.json."""
    end = [AddedToken("<|endoftext|>", special=False, normalized=False)]
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), end)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    tokens = {"eos_token": "</s>", "mask_token": mask, "additional_special_tokens": ["<extra>", "<pad>"]}
    return tokenizer, config, tokens


def tokens_in_the_config() -> tuple[Tokenizer, dict, dict]:
    """added_tokens_decoder with tokens and flags that tokenizer.json doesn't have, a map that contradicts
    and is ignored, and begin-of-text switched off by a null."""
    tokenizer, config, _ = llama2(legacy=True, normalized=("</s>",))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {
        "0": {"content": "<unk>", **flags}, "1": {"content": "<s>", **flags, "rstrip": True},
        "2": {"content": "</s>", **flags, "normalized": True}, "480": {"content": "<extra>", **flags, "special": False, "normalized": True},
        "481": {"content": "<pad>", **flags, "lstrip": True},
    }
    config |= {"added_tokens_decoder": decoder, "add_bos_token": None, "add_eos_token": True, "pad_token": "<pad>"}
    return tokenizer, config, {"eos_token": "<s>", "mask_token": "<mask>"}


KINDS = {
    "llama3": llama3, "qwen2": qwen2, "llama2-legacy": lambda: llama2(True), "llama2": lambda: llama2(False),
    "gemma": gemma, "tokens-in-the-map": tokens_in_the_map, "tokens-in-the-config": tokens_in_the_config,
}


def expected(tokenizer) -> dict:
    ids = lambda text, framed: tokenizer(text, add_special_tokens=framed)["input_ids"]
    decode = lambda tokens, skip: tokenizer.decode(
        tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    plain, framed = ids("a", False), ids("a", True)
    at = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    before, after = framed[:at], framed[at + len(plain) :]
    rows = []
    for text in CORPUS:
        tokens = ids(text, False)
        assert ids(text, True) == before + tokens + after, text
        rows.append({"text": text, "ids": tokens, "decoded": decode(tokens, False), "skipped": decode(tokens, True)})
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return {"before": before, "after": after, "special": named, "size": len(tokenizer), "rows": rows}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    write = lambda path, value: path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    for name, build in KINDS.items():
        folder = OUT / name
        folder.mkdir(parents=True)
        tokenizer, config, tokens = build()
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        write(folder / "tokenizer_config.json", config)
        if tokens:
            write(folder / "special_tokens_map.json", tokens)
        loaded = AutoTokenizer.from_pretrained(folder)
        print(name, type(loaded).__name__, len(loaded), loaded.special_tokens_map)
        write(folder / "expected.json", expected(loaded))


if __name__ == "__main__":
    main()
