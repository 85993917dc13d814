"""Writes tests/fixtures/answers/: answers as they are tokenised within whole conversations and whole texts.

`cases`: a tokenizer, a template, and conversations of a prompt and an answer. `prompt_ids` are those of the prompt with
the assistant's turn opened, `answer_ids` what the conversation has behind them up to the end of the words, and `behind`
what the template ends the turn with. Left out are answers that the prompt's last token grows into.
`texts`: texts without template, cut in two, and the ids of the whole.

The tokenizers are those of tokenizer_kinds.py, and two that put SentencePiece's mark of a word's start in front of every
piece of a text or of none. Run by hand:

    python tests/oracle/answers.py

with transformers 4.57, tokenizers 0.22.
"""

import json
import shutil
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tokenizer_kinds import fallback_decoder, sentence_piece

FIXTURES = Path(__file__).parent.parent / "fixtures"
OUT = FIXTURES / "answers"
TEMPLATES = {
    # The answer stands behind a line end.
    "lines": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Behind a space that the opened turn doesn't have; both sides of the words are stripped.
    "brackets": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    # Behind a special token, without and with a space.
    "special": "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
    "special-space": "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else ' ' + m['content'] }}"
    "{{ eos_token }}{% endfor %}",
}
PROMPTS = ["Hello, world!", "Who are you?\n", "  spaces  "]
ANSWERS = [
    "Hello", "hello world", " Hello", "  two spaces", "Hello ", "\nHello", "The quick brown fox.\n\nNew paragraph.",
    "42", "1,000,000", "naïve café", "你好，世界！", "😀 flags", "▁mark", "def f(x):\n    return x ** 2", "(a)", "'s",
]
TEXTS = [
    ("The quick", " brown fox"), ("The quick ", "brown fox"), ("The qu", "ick"), ("", "Hello"), ("Hello", ""),
    ("Hello\n", "world"), ("Hello</s>", "world"), ("Hello</s>", " world"), ("1,000", ",000"), ("a  ", "  b"),
    ("def f(x):\n", "    return x"), ("naïve", " café"), ("Hello", " "), ("\n", "\n"), ("ends with a mark▁", "x"),
]
KINDS = ["llama2", "llama2-legacy", "gemma", "qwen2", "llama3", "metaspace-always", "metaspace-never"]


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def metaspace(scheme: str) -> None:
    tokenizer = sentence_piece(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = fallback_decoder(strip=scheme == "always")
    folder = OUT / f"metaspace-{scheme}"
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(folder / "tokenizer_config.json", config)


def conversation(tokenizer, template: str, prompt: str, answer: str):
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    turns = [dict(role="user", content=prompt), dict(role="assistant", content=answer)]
    apply = lambda turns, **options: tokenizer.apply_chat_template(turns, chat_template=template, **options)
    opened = apply(turns[:1], add_generation_prompt=True)
    text, whole = apply(turns, tokenize=False), apply(turns)
    assert whole == ids(text)
    # The words end where the template goes on.
    head = text[: text.rindex(answer.strip()) + len(answer.strip())]
    if template != TEMPLATES["brackets"]:
        head = text[: text.rindex(answer) + len(answer)]
    said = ids(head)
    if said[: len(opened)] != opened or whole[: len(said)] != said:
        return None
    return dict(
        prompt=prompt, answer=answer, prompt_ids=opened, answer_ids=said[len(opened) :], behind=whole[len(said) :]
    )


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    metaspace("always")
    metaspace("never")
    cases, texts = [], []
    for kind in KINDS:
        folder = OUT / kind
        tokenizer = AutoTokenizer.from_pretrained(folder if folder.exists() else FIXTURES / "tokenizers" / kind)
        ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, template in TEMPLATES.items():
            rows = [conversation(tokenizer, template, p, a) for p in PROMPTS for a in ANSWERS]
            kept = [row for row in rows if row]
            print(kind, name, len(kept), "of", len(rows))
            cases.append(dict(tokenizer=kind, template=name, rows=kept))
        rows = [dict(before=before, text=text, ids=ids(before + text)) for before, text in TEXTS]
        texts.append(dict(tokenizer=kind, rows=rows))
    write(OUT / "expected.json", dict(templates=TEMPLATES, cases=cases, texts=texts))


if __name__ == "__main__":
    main()
