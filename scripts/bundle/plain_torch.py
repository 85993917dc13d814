"""A plain torch loop over a Llama-shaped model with random weights: the yardstick that flowrun is measured beside.

    python plain_torch.py decode  --device cuda:0 --shape shapes/tinyllama-1.1b --concurrency 32 256
    python plain_torch.py prefill --device cuda:0 --shape shapes/tinyllama-1.1b --concurrency 32 --prompt-tokens 1024
    python plain_torch.py dpo     --device cuda:0 --shape shapes/tinyllama-1.1b --concurrency 64
    python plain_torch.py selftest

Written as one would on a page: a static cache, scaled_dot_product_attention, fused projections, no compiler. What it
counts is what `flowrun bench` counts. Prints one JSON object; fails where a part of it did.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 8


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    theta: float
    eps: float
    tied: bool

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @staticmethod
    def read(folder: str) -> "Shape":
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            c = json.load(file)
        return Shape(c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"],
                     c["num_key_value_heads"], c["vocab_size"], c["rope_theta"], c["rms_norm_eps"],
                     c["tie_word_embeddings"])


class Linear(nn.Module):
    """Frozen matrices with one input, as one product. Each may get a LoRA adapter of its own (alpha = rank)."""

    def __init__(self, width: int, parts: list[int], **options) -> None:
        super().__init__()
        self.width, self.parts, self.adapted = width, parts, False
        self.weight = nn.Parameter(torch.randn(sum(parts), width, **options).mul_(0.02), requires_grad=False)

    def add_adapter(self) -> None:
        # In float32, as optimizers want their parameters.
        options = {"device": self.weight.device, "dtype": torch.float32}
        down = torch.randn(RANK * len(self.parts), self.width, **options) / self.width**0.5
        self.down, self.adapted = nn.Parameter(down), True
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(n, RANK, **options)) for n in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if not self.adapted:
            return y
        narrow = F.linear(x, self.down.to(x.dtype)).split(RANK, dim=-1)
        return y + torch.cat([F.linear(n, up.to(x.dtype)) for n, up in zip(narrow, self.up)], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Cache:
    """Keys and values of `rows` sequences of one length, in place from the start."""

    def __init__(self, shape: Shape, rows: int, length: int, **options) -> None:
        # Attention wants masks in multiples of eight.
        self.length = -(-length // 64) * 64
        size = (shape.layers, 2, rows, shape.kv_heads, self.length, shape.head)
        self.all = torch.zeros(size, **options)


class Block(nn.Module):
    def __init__(self, shape: Shape, **options) -> None:
        super().__init__()
        self.shape, kv = shape, shape.kv_heads * shape.head
        self.qkv = Linear(shape.hidden, [shape.hidden, kv, kv], **options)
        self.out = Linear(shape.hidden, [shape.hidden], **options)
        self.gate_up = Linear(shape.hidden, [shape.inner, shape.inner], **options)
        self.down = Linear(shape.inner, [shape.hidden], **options)
        ones = torch.ones(shape.hidden, **options)
        self.norms = nn.ParameterList(nn.Parameter(ones.clone(), requires_grad=False) for _ in range(2))

    def norm(self, x: Tensor, which: int) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), self.norms[which], self.shape.eps)

    def attention(self, x: Tensor, place: "Place", cache: Tensor | None) -> Tensor:
        s, (rows, tokens) = self.shape, x.shape[:2]
        qkv = self.qkv(x).view(rows, tokens, s.heads + 2 * s.kv_heads, s.head).transpose(1, 2)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], dim=1)
        q, k = rotated(q, place.cos, place.sin), rotated(k, place.cos, place.sin)
        if cache is not None:
            cache[0].index_copy_(2, place.positions, k)
            cache[1].index_copy_(2, place.positions, v)
        if cache is None or tokens > 1:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # One token a sequence: the heads that share keys are as good as rows of one head, so that every kernel
            # will do, those that take a mask among them.
            k, v = cache[0, :, :, : place.span], cache[1, :, :, : place.span]
            y = F.scaled_dot_product_attention(q.reshape(rows, s.kv_heads, -1, s.head), k, v, attn_mask=place.mask)
            y = y.reshape(rows, s.heads, 1, s.head)
        return self.out(y.transpose(1, 2).reshape(rows, tokens, s.hidden))

    def forward(self, x: Tensor, place: "Place", cache: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm(x, 0), place, cache)
        gate, up = self.gate_up(self.norm(x, 1)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


@dataclass
class Place:
    """Where the tokens of a pass stand, the same for all rows."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    span: int | None
    mask: Tensor | None


class Model(nn.Module):
    def __init__(self, shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab, shape.hidden, **options).mul_(0.02), False)
        self.blocks = nn.ModuleList(Block(shape, **options) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden, **options), False)
        self.head = self.embedding
        if not shape.tied:
            self.head = nn.Parameter(torch.randn(shape.vocab, shape.hidden, **options).mul_(0.02), False)
        rates = shape.theta ** (-torch.arange(0, shape.head, 2, device=device, dtype=torch.float32) / shape.head)
        angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), rates).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, ids: Tensor, positions: Tensor, cache: Cache | None = None, span: int | None = None) -> Tensor:
        """Hidden states. A pass of one token looks at the first `span` of the cache; without it at all, masked, which
        is what a graph can replay."""
        mask = None
        if cache is not None and ids.shape[1] == 1 and span is None:
            mask = (torch.arange(cache.length, device=ids.device) <= positions).view(1, 1, 1, -1)
        place = Place(positions, self.cos[positions], self.sin[positions], span, mask)
        x = F.embedding(ids, self.embedding)
        for i, block in enumerate(self.blocks):
            x = block(x, place, None if cache is None else cache.all[i])
        return F.rms_norm(x, (self.shape.hidden,), self.norm, self.shape.eps)

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head).float()

    def weights(self) -> int:
        """Those that every token is multiplied with: all but the input embedding."""
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad)
        return frozen - (0 if self.shape.tied else self.embedding.numel())

    def linears(self) -> list[Linear]:
        return [m for m in self.modules() if isinstance(m, Linear)]


def sampled(logits: Tensor) -> Tensor:
    """One token a row at temperature 1. An exponential race in place of multinomial, which waits for the device."""
    probabilities = logits.softmax(dim=-1)
    return (probabilities / torch.empty_like(probabilities).exponential_(1)).argmax(dim=-1, keepdim=True)


class Decoder:
    """Sequences of one length, decoded side by side."""

    def __init__(self, model: Model, ids: Tensor, new: int) -> None:
        self.model, self.ids, self.prompt = model, ids, ids.shape[1]
        options = {"device": ids.device, "dtype": model.norm.dtype}
        self.cache = Cache(model.shape, ids.shape[0], self.prompt + new, **options)
        self.tokens = torch.zeros(ids.shape[0], 1, dtype=torch.long, device=ids.device)
        self.position = torch.zeros(1, dtype=torch.long, device=ids.device)

    def prefill(self) -> None:
        x = self.model(self.ids, torch.arange(self.prompt, device=self.ids.device), self.cache)
        self.tokens.copy_(sampled(self.model.logits(x[:, -1])))
        self.position.fill_(self.prompt)

    def step(self, span: int | None = None) -> None:
        x = self.model(self.tokens, self.position, self.cache, span)
        self.tokens.copy_(sampled(self.model.logits(x[:, -1])))
        self.position += 1

    def graph(self) -> torch.cuda.CUDAGraph:
        """A step as a graph, after a few that make what is made once, on a stream of their own."""
        self.position.fill_(self.prompt)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def matrix_rate(device: torch.device) -> float:
    """Operations a second of a large square bf16 product, the best of some tries, of the values that flowrun bench
    multiplies: how fast a GPU is depends on them."""
    side = 8192 if device.type == "cuda" else 1024
    square = torch.ones(side, side, device=device, dtype=torch.bfloat16) / side
    return 2 * side**3 / min(seconds(lambda: square @ square, device) for _ in range(8))


def some_ids(shape: Shape, rows: int, tokens: int, device: torch.device) -> Tensor:
    return torch.randint(0, shape.vocab, (rows, tokens), device=device)


@torch.inference_mode()
def decode(args: argparse.Namespace, model: Model, device: torch.device) -> dict:
    runs, errors = [], []
    for rows in args.concurrency:
        for graphs in [False, True] if device.type == "cuda" else [False]:
            try:
                runs.append(decode_once(args, model, device, rows, graphs))
            except Exception as error:  # the other runs are of use without this one
                errors.append(f"{rows} sequences, {'graphs' if graphs else 'eager'}: {error}"[:500])
    return {"runs": runs, "errors": errors}


def decode_once(args: argparse.Namespace, model: Model, device: torch.device, rows: int, graphs: bool) -> dict:
    prompt, new = args.prompt_tokens, args.new_tokens
    decoder = Decoder(model, some_ids(model.shape, rows, prompt, device), new)
    graph = decoder.graph() if graphs else None

    def steps(count: int) -> None:
        for i in range(count):
            graph.replay() if graph else decoder.step(prompt + i + 1)

    decoder.prefill()
    steps(min(4, new - 1))
    prefill = seconds(decoder.prefill, device)
    # The first of the new tokens is the prefill's.
    decoding = seconds(lambda: steps(new - 1), device)
    step = decoding / (new - 1)
    return {"concurrency": rows, "graphs": graphs, "prompt_tokens": prompt, "new_tokens": new,
            "tokens_per_second": rows * new / (prefill + decoding), "decode_tokens_per_second": rows / step,
            "step_ms": 1e3 * step, "prefill_tokens_per_second": rows * prompt / prefill}


@torch.inference_mode()
def prefill(args: argparse.Namespace, model: Model, device: torch.device) -> dict:
    rows, prompt = args.concurrency[0], args.prompt_tokens
    decoder = Decoder(model, some_ids(model.shape, rows, prompt, device), 1)
    decoder.prefill()
    took = statistics.median(seconds(decoder.prefill, device) for _ in range(3))
    head = model.head.numel()
    # The head is for the last token of a prompt only.
    operations = 2 * ((model.weights() - head) * rows * prompt + head * rows)
    rate = matrix_rate(device)
    return {"concurrency": rows, "prompt_tokens": prompt, "prefill_tokens_per_second": rows * prompt / took,
            "prefill_arithmetic_share": operations / took / rate, "gigaflops": rate / 1e9}


class Dpo:
    """DPO of LoRA adapters; their base is the reference."""

    def __init__(self, model: Model, prompt: int, micro_batch: int, step: int) -> None:
        self.model, self.prompt, self.micro_batch, self.pairs_per_step = model, prompt, micro_batch, step
        for linear in model.linears():
            linear.add_adapter()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)

    def answers(self, ids: Tensor, lengths: Tensor, adapted: bool) -> Tensor:
        """Log-probs of the answers, one a row. Padding is at the end, where no token looks at it."""
        for linear in self.model.linears():
            linear.adapted = adapted
        x = self.model(ids, torch.arange(ids.shape[1], device=ids.device))
        logits = self.model.logits(x[:, self.prompt - 1 : -1])
        targets = ids[:, self.prompt :]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        inside = torch.arange(targets.shape[1], device=ids.device) < (lengths - self.prompt)[:, None]
        return -(losses * inside).sum(dim=1)

    def micro_batches(self, ids: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        """`ids` is pairs, sides, tokens: the chosen and the rejected of a pair share a batch."""
        pairs = zip(ids.split(self.micro_batch), lengths.split(self.micro_batch))
        return [(i.transpose(0, 1).flatten(0, 1), n.transpose(0, 1).flatten()) for i, n in pairs]

    @torch.no_grad()
    def reference(self, ids: Tensor, lengths: Tensor) -> list[Tensor]:
        return [self.answers(i, n, adapted=False) for i, n in self.micro_batches(ids, lengths)]

    def train(self, ids: Tensor, lengths: Tensor, reference: list[Tensor]) -> float:
        """The first loss: ln 2, because training starts at the reference."""
        first, done = None, 0
        for (i, n), before in zip(self.micro_batches(ids, lengths), reference):
            chosen, rejected = (self.answers(i, n, adapted=True) - before).chunk(2)
            loss = -F.logsigmoid(0.1 * (chosen - rejected)).sum()
            (loss / self.pairs_per_step).backward()
            first, done = loss.detach() / len(chosen) if first is None else first, done + len(chosen)
            if done % self.pairs_per_step < len(chosen) or done == len(ids):
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return float(first)


def dpo(args: argparse.Namespace, model: Model, device: torch.device) -> dict:
    pairs, prompt, answer = args.concurrency[0], args.prompt_tokens, args.new_tokens
    weights = model.weights()
    trainer = Dpo(model, prompt, args.micro_batch, args.step_pairs)
    ids = some_ids(model.shape, pairs * 2, prompt + answer, device).view(pairs, 2, -1)
    ids[:, 1, :prompt] = ids[:, 0, :prompt]
    lengths = torch.full((pairs, 2), prompt + answer, device=device)

    warm = args.micro_batch
    first = trainer.train(ids[:warm], lengths[:warm], trainer.reference(ids[:warm], lengths[:warm]))
    reference: list[Tensor] = []
    scoring = seconds(lambda: reference.extend(trainer.reference(ids, lengths)), device)
    training = seconds(lambda: trainer.train(ids, lengths, reference), device)
    rate = matrix_rate(device)
    # As flowrun counts: a prompt is one for both of its answers, and a token takes four operations a weight.
    tokens = pairs * (prompt + 2 * answer)
    return {"pairs": pairs, "prompt_tokens": prompt, "answer_tokens": answer, "first_loss": first,
            "reference_seconds": scoring, "train_seconds": training, "pairs_per_second": pairs / (scoring + training),
            "train_tokens_per_second": tokens / training,
            "train_arithmetic_share": 4 * weights * tokens / training / rate, "gigaflops": rate / 1e9}


@torch.no_grad()
def decoded_like_whole(model: Model, masked: bool) -> float:
    """The largest difference of logits between decoding over the cache and one pass over everything."""
    ids, prompt = some_ids(model.shape, 3, 40, torch.device("cpu")), 24
    whole = model.logits(model(ids, torch.arange(40)))
    cache = Cache(model.shape, 3, 40, device="cpu", dtype=torch.float32)
    found = [model.logits(model(ids[:, :prompt], torch.arange(prompt), cache))]
    for i in range(prompt, 40):
        x = model(ids[:, i : i + 1], torch.tensor([i]), cache, None if masked else i + 1)
        found.append(model.logits(x))
    return float((torch.cat(found, dim=1) - whole).abs().max())


@torch.no_grad()
def answers_one_by_one(model: Model, ids: Tensor, lengths: Tensor, prompt: int) -> list[Tensor]:
    """What Dpo.reference gives for single pairs, without batches and padding."""
    def side(text: Tensor) -> Tensor:
        logprobs = model.logits(model(text[None], torch.arange(len(text))))[0].log_softmax(dim=-1)
        return sum(logprobs[i - 1, text[i]] for i in range(prompt, len(text)))

    return [torch.stack([side(pair[i][: n[i]]) for i in range(2)]) for pair, n in zip(ids, lengths)]


def selftest() -> dict:
    torch.manual_seed(0)
    decoding = 0.0
    for tied in (False, True):
        shape = Shape(64, 160, 3, 8, 2, 97, 10000.0, 1e-5, tied)
        model = Model(shape, 64, torch.device("cpu"), torch.float32)
        for p in model.parameters():
            p.mul_(5.0)  # far enough from zero that a mistake shows
        decoding = max(decoding, *(decoded_like_whole(model, masked) for masked in (False, True)))
    ids, lengths = some_ids(shape, 8, 20, torch.device("cpu")).view(4, 2, 20), torch.randint(8, 21, (4, 2))
    expected = torch.stack(answers_one_by_one(model, ids, lengths, 6))
    trainer = Dpo(model, 6, 2, 4)
    before = [p.detach().clone() for p in trainer.parameters]

    def apart(adapted: bool) -> Tensor:
        with torch.no_grad():
            batches = trainer.micro_batches(ids, lengths)
            return torch.cat([trainer.answers(i, n, adapted).view(2, -1).T for i, n in batches]) - expected

    reference = trainer.reference(ids, lengths)
    losses = [trainer.train(ids, lengths, reference) for _ in range(8)]
    moved = all(bool((a != b.detach()).any()) for a, b in zip(before, trainer.parameters))
    margin = float((apart(True)[:, 0] - apart(True)[:, 1]).mean())
    scoring = float(apart(False).abs().max())
    passes = decoding < 1e-4 and scoring < 1e-3 and abs(losses[0] - 0.693147) < 1e-5 and margin > 0 and moved
    return {"decoding_difference": decoding, "scoring_difference": scoring, "losses": losses, "margin": margin,
            "adapters_moved": moved, "passes": passes, "errors": [] if passes else ["the self-test does not pass"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["decode", "prefill", "dpo", "selftest"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="shapes/smollm2-135m", help="folder with a config.json")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32], help="sequences, or pairs")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128, help="decoded, or of each of two answers")
    parser.add_argument("--micro-batch", type=int, default=8, help="pairs of a pass")
    parser.add_argument("--step-pairs", type=int, default=32, help="pairs of an optimizer step")
    parser.add_argument("--json", action="store_true", help="the default; there is nothing else")
    args = parser.parse_args()
    if args.mode == "selftest":
        result = selftest()
    else:
        device = torch.device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.manual_seed(0)
        with torch.no_grad():
            model = Model(Shape.read(args.shape), args.prompt_tokens + args.new_tokens, device, torch.bfloat16)
        result = {"decode": decode, "prefill": prefill, "dpo": dpo}[args.mode](args, model, device)
    print(json.dumps({"mode": args.mode, "device": args.device, "torch": torch.__version__, **result}))
    return 1 if result.get("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
