"""Checks and measures flowrun on one device, what matters most first. Every step is a process of its own under a
time limit of its own: one that fails, hangs or crashes hides nothing of the others.

    ./check.sh                      every step, on cuda:0
    ./check.sh --short              what fits into 300 seconds
    ./check.sh --only decode flow   steps whose names begin so
    ./check.sh --short cpu:0        tries the script itself on any machine, with small sizes

Written to $OUT as steps end: table.txt, figures.jsonl (a line a step), log.txt (what the steps printed), summary.json
and trace.json of the flow, and flowrun's cache of compiled kernels. Fails where a comparison, a process or a time
limit does; speeds fail nothing.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = "2.11.0"
SHORT_SECONDS = 300.0
# Kept of a short run for killing its last step and for writing the table.
RESERVE_SECONDS = 4.0
# A step that has less than this left is not begun: hardly any would end.
LEAST_SECONDS = 10.0
# With less than this left, a short run measures the large model before the flow.
FLOW_SECONDS = 150.0
LOG_BYTES_A_STEP = 64 << 10
# Of a file that is given away.
MOST_BYTES = 15 << 20

INTERRUPTED = "interrupted"

DOCTORS = ["kernels", "flash", "graphs", "sampling", "adapters", "scoring", "decoding", "training"]
# Random weights write no verdict that could be read: the judge compares the labels' probabilities, in one order.
FLOW_SETS = {
    "models.policy.weights": "dummy",
    "models.policy.chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    "stages.judge.read": "logits",
    "stages.judge.order": "random",
}


@dataclass(frozen=True)
class Goal:
    """What one H100 is to reach; less is better where the goal is below the floor."""

    figure: str
    floor: float
    goal: float

    def text(self, figures: dict) -> str:
        share = "share" in self.figure
        floor, goal = (f"{100 * n:.0f}" if share else f"{n:,.0f}" for n in (self.floor, self.goal))
        value = figures.get(self.figure)
        sign = 1 if self.goal > self.floor else -1
        verdict = "" if value is None else "below floor"
        for name, bound in [("floor", self.floor), ("goal", self.goal)]:
            if value is not None and sign * value >= sign * bound:
                verdict = name
        return f"{floor}/{goal}{' %' if share else ''} {verdict}".rstrip()


@dataclass(frozen=True)
class Step:
    name: str
    kind: str
    command: list[str]
    limit: float
    goal: Goal | None = None
    # Name of the step of plain torch that does the same.
    peer: str = ""
    # Why it can't run here.
    absent: str = ""


@dataclass
class Result:
    name: str
    result: str
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)
    # What went wrong, in words.
    trouble: str = ""
    command: list[str] = field(default_factory=list)

    def failed(self) -> bool:
        return self.result in ("FAILED", "timed out")


@dataclass(frozen=True)
class Sizes:
    """How much is measured. On a processor just enough to try the script."""

    model: str = "tinyllama-1.1b"
    # Prompt and new tokens of decoding, and sequences.
    decode: tuple[int, int] = (236, 128)
    rows: tuple[int, ...] = (32, 256)
    # Sequences and prompt tokens; pairs, prompt and answer tokens.
    prefill: tuple[int, int] = (32, 1024)
    dpo: tuple[int, int, int] = (64, 128, 256)
    # Prompts of three rounds, tokens of an answer, pairs of a training step.
    flow: tuple[int, int, int] = (96, 64, 8)
    # The long table: sequences, their tokens, contexts of the largest usual batch, pairs scored, answers trained.
    table_rows: tuple[int, ...] = (1, 8, 64, 128)
    table_tokens: tuple[int, int] = (32, 128)
    contexts: tuple[int, ...] = (128, 512, 1024, 2048)
    context_rows: int = 32
    scored: tuple[int, ...] = (48, 512)
    trained: tuple[int, ...] = (128, 512)


SMALL = Sizes(model="smollm2-135m", decode=(16, 16), rows=(4, 8), prefill=(4, 128), dpo=(8, 16, 16), flow=(12, 8, 2),
              table_rows=(1, 2), table_tokens=(16, 8), contexts=(64,), context_rows=2, scored=(4,), trained=(8,))


class Machine:
    """Where steps run, and with what around them."""

    def __init__(self, device: str, out: Path, scratch: Path) -> None:
        self.device, self.out, self.scratch = device, out, scratch
        self.gpu = device.startswith("cuda")
        self.index = device.partition(":")[2] or "0"
        self.torch, version_file = find_torch()
        self.torch_version = re.search(r"__version__ = '([^']+)'", version_file).group(1)
        libraries = [self.torch / "lib", *sorted(self.torch.parent.glob("nvidia/*/lib"))]
        before = [p for p in [os.environ.get("LD_LIBRARY_PATH")] if p]
        self.flowrun_env = os.environ | {"LD_LIBRARY_PATH": ":".join([*map(str, libraries), *before])}
        self.flowrun_env["FLOWRUN_KERNEL_CACHE"] = str(out)

    def env(self, command: list[str]) -> dict[str, str]:
        # Python finds torch's libraries by itself.
        return dict(os.environ) if command[0] == sys.executable else self.flowrun_env

    def header(self) -> str:
        version = said(["./flowrun", "--version"], self.flowrun_env).removeprefix("flowrun ")
        name = said(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
        if not name:
            models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
            name = f"{models[0] if models else 'a processor'}, {os.cpu_count()} cores"
        return f"flowrun {version or 'that does not start'}, torch {self.torch_version}, {self.device}\n{name}"


def find_torch() -> tuple[Path, str]:
    """Torch's folder and its version.py. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable} has no torch; PYTHON=... names a Python that has torch {TORCH}")
    folder = Path(spec.origin).parent
    version = (folder / "version.py").read_text()
    if f"__version__ = '{TORCH}" not in version:
        sys.exit(f"{folder} is not torch {TORCH}, which flowrun is built for")
    return folder, version


def said(command: list[str], env: dict[str, str] | None = None) -> str:
    """What a command that should take no time prints; nothing where it fails."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# Steps


def all_steps(m: Machine) -> list[Step]:
    sizes = Sizes() if m.gpu else SMALL
    return [*doctors(m), *decodes(m, sizes), *passes(m, sizes), flow(m, sizes), *(large(m) if m.gpu else []),
            *table(m, sizes)]


def bench(m: Machine, what: str, model: str, rows: int, prompt: int, new: int, *more: str) -> list[str]:
    return ["./flowrun", "bench", what, "--device", m.device, "--model", f"shapes/{model}", "--dummy", "--concurrency",
            str(rows), "--prompt-tokens", str(prompt), "--new-tokens", str(new), *more, "--json"]


def torch(m: Machine, mode: str, model: str, rows: tuple[int, ...], prompt: int, new: int, *more: str) -> list[str]:
    return [sys.executable, "plain_torch.py", mode, "--device", m.device, "--shape", f"shapes/{model}",
            "--concurrency", *map(str, rows), "--prompt-tokens", str(prompt), "--new-tokens", str(new), *more, "--json"]


def doctors(m: Machine) -> Iterator[Step]:
    def doctor(part: str) -> list[str]:
        return ["./flowrun", "doctor", "--device", m.device, "--model", "shapes/smollm2-135m", "--dummy",
                "--only", part, "--json"]

    yield Step("libraries", "doctor", doctor("libraries"), 60)
    for part in DOCTORS:
        # Two threads of a busy processor wait for each other most of the time.
        yield Step(part, "doctor", doctor(part), 40 if m.gpu else 80)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    absent = "" if tool and m.gpu else "no compute-sanitizer" if m.gpu else "no GPU"
    command = [tool or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *doctor("kernels")]
    yield Step("memcheck", "doctor", command, 60, absent=absent)


def decodes(m: Machine, sizes: Sizes) -> Iterator[Step]:
    decoded = "decode_tokens_per_second"
    goals = {32: Goal(decoded, 15_000, 25_000), 256: Goal(decoded, 60_000, 85_000)}
    for rows in sizes.rows:
        command = bench(m, "generate", sizes.model, rows, *sizes.decode)
        yield Step(f"decode-{rows}-eager", "generate", [*command, "--eager"], 40, peer="decode-torch")
        if m.gpu:
            yield Step(f"decode-{rows}-graphs", "generate", command, 40, goals.get(rows), "decode-torch")
    yield Step("decode-torch", "torch", torch(m, "decode", sizes.model, sizes.rows, *sizes.decode), 60)


def passes(m: Machine, sizes: Sizes) -> Iterator[Step]:
    """Prefill and training: many tokens at once."""
    rows, prompt = sizes.prefill
    yield Step("prefill", "prefill", bench(m, "generate", sizes.model, rows, prompt, 2), 40,
               Goal("prefill_arithmetic_share", 0.4, 0.6), "prefill-torch")
    yield Step("prefill-torch", "torch", torch(m, "prefill", sizes.model, (rows,), prompt, 2), 40)
    pairs, prompt, answer = sizes.dpo
    yield Step("dpo", "train", bench(m, "train", sizes.model, pairs, prompt, answer), 40,
               Goal("train_arithmetic_share", 0.3, 0.5), "dpo-torch")
    # Pairs of a step and tokens of a pass about as flowrun has them.
    batches = ["--step-pairs", "32", "--micro-batch", "8"] if m.gpu else ["--step-pairs", "8", "--micro-batch", "4"]
    yield Step("dpo-torch", "torch", torch(m, "dpo", sizes.model, (pairs,), prompt, answer, *batches), 40)


def flow(m: Machine, sizes: Sizes) -> Step:
    prompts, answer, step = sizes.flow
    data = m.scratch / "prompts.jsonl"
    words = ["red", "tall", "old", "quiet"]
    texts = [f"Name {i % 7 + 2} things that are {words[i % 4]}, number {i}." for i in range(prompts)]
    data.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    sets = FLOW_SETS | {
        "models.policy.source": str(HERE / "shapes" / sizes.model),
        "stages.prompts.dataset": str(data),
        "stages.prompts.take": prompts,
        "stages.sample.max_new_tokens": answer,
        "stages.align.gradient_accumulation_steps": step,
    }
    if not m.gpu:
        # Few rows, of which some must be for validation, trained once.
        sets |= {"stages.halves.outputs": {"train": 0.75, "validation": 0.25}, "stages.align.epochs": 1}
    pairs = [word for key, value in sets.items() for word in ("--set", f"{key}={toml(value)}")]
    command = ["./flowrun", "flows/self_reward.toml", "--fresh", "--output", str(m.scratch / "run")]
    return Step("flow", "flow", [*command, "--device", m.device, *pairs], 90, Goal("wall_seconds", 60, 30))


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def large(m: Machine) -> Iterator[Step]:
    yield Step("llama-decode", "generate", bench(m, "generate", "llama-3.1-8b", 64, 512, 256), 60,
               Goal("decode_tokens_per_second", 5_000, 9_000))
    # One step of 2 x 2048 tokens.
    yield Step("llama-train", "train", bench(m, "train", "llama-3.1-8b", 1, 1024, 1024), 60)


def table(m: Machine, sizes: Sizes) -> Iterator[Step]:
    """What is only measured where there is time."""
    for rows in sizes.table_rows:
        command = bench(m, "generate", sizes.model, rows, *sizes.table_tokens)
        yield Step(f"table-{rows}-eager", "generate", [*command, "--eager"], 60)
        if m.gpu:
            yield Step(f"table-{rows}-graphs", "generate", command, 60)
    for prompt in sizes.contexts:
        command = bench(m, "generate", sizes.model, sizes.context_rows, prompt, sizes.table_tokens[1])
        yield Step(f"table-context-{prompt}", "generate", command, 60)
    for rows in sizes.scored:
        yield Step(f"table-score-{rows}", "score", bench(m, "score", sizes.model, rows, 130, 1), 60)
    pairs, prompt, _ = sizes.dpo
    for answer in sizes.trained:
        yield Step(f"table-train-{answer}", "train", bench(m, "train", sizes.model, pairs, prompt, answer), 60)


# Running one


def run(m: Machine, step: Step, limit: float) -> tuple[Result, str]:
    """Its result, and what it printed."""
    began, code, why = time.monotonic(), None, "killed"
    memory = GpuMemory(m.index) if m.gpu and step.kind == "flow" else None
    with open(m.scratch / "stdout", "wb") as stdout, open(m.scratch / "stderr", "wb") as stderr:
        try:
            process = subprocess.Popen(step.command, env=m.env(step.command), stdin=subprocess.DEVNULL, stdout=stdout,
                                       stderr=stderr, start_new_session=True)
        except OSError as error:
            return Result(step.name, "FAILED", trouble=f"can't be started: {error}", command=step.command), ""
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:
            why = INTERRUPTED
        finally:
            end(process)
    taken = time.monotonic() - began
    printed, errors = tail(m.scratch / "stdout", MOST_BYTES), tail(m.scratch / "stderr", LOG_BYTES_A_STEP)
    result = judged(m, step, code, limit, printed, errors)
    result.seconds = round(taken, 1)
    if why == INTERRUPTED:
        result.result, result.trouble = "not run", f"{INTERRUPTED} after {taken:.0f} s"
    if memory and (most := memory.end()):
        result.figures["peak_gpu_mib"] = most
    return result, f"{printed}\n{errors}".encode()[-LOG_BYTES_A_STEP:].decode(errors="replace").strip()


def end(process: subprocess.Popen) -> None:
    """Ends what is left of its group. One that even that doesn't end (a driver that hangs) is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        pass


class GpuMemory:
    """The most memory of a GPU in use, looked at once a second."""

    def __init__(self, index: str) -> None:
        self.most, self.over = 0, threading.Event()
        query = ["nvidia-smi", "--id", index, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        threading.Thread(target=self.look, args=[query], daemon=True).start()

    def look(self, query: list[str]) -> None:
        while not self.over.wait(1.0):
            used = said(query)
            self.most = max(self.most, int(used) if used.isdigit() else 0)

    def end(self) -> int:
        self.over.set()
        return self.most


def judged(m: Machine, step: Step, code: int | None, limit: float, printed: str, errors: str) -> Result:
    result = Result(step.name, "ok", command=step.command)
    try:
        result.figures = flow_figures(m) if step.kind == "flow" else last_object(printed) or {}
    except Exception as error:  # whatever stands there, the other steps are still to be run
        result.trouble = f"its files can't be read: {error!r}"
    if step.name == "memcheck":
        result.figures["memcheck"] = " ".join(re.findall(r"ERROR SUMMARY: (.*)", printed + errors)[-1:])
    last_words = (errors.strip().splitlines() or [""])[-1]
    if code is None and limit < step.limit:
        result.result, result.trouble = "not run", f"cut off after {limit:.0f} s, at the end of a short run"
    elif code is None:
        result.result, result.trouble = "timed out", f"killed at its limit of {limit:.0f} s. {last_words}"
    elif code != 0:
        how = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        result.result, result.trouble = "FAILED", f"{how}. {last_words}"
    elif not result.figures:
        result.result, result.trouble = "FAILED", result.trouble or "it printed no JSON"
    else:
        try:
            WORDS[step.kind](result.figures)
            found = findings(result.figures)
            if any(not f.get("passes") for f in found):
                result.result, result.trouble = "FAILED", "the exit code is 0 all the same"
            elif step.kind == "doctor" and step.name != "libraries" and not found:
                result.result = "not here"
        except Exception as error:
            result.result, result.trouble = "FAILED", f"figures of an unknown kind: {error!r}"
    return result


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def last_object(text: str) -> dict | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                # NaN is no JSON, and nobody's figure.
                return json.loads(line, parse_constant=lambda _: None)
            except ValueError:
                continue
    return None


def tail(path: Path, most: int) -> str:
    data = path.read_bytes() if path.exists() else b""
    return data[-most:].decode(errors="replace")


def flow_figures(m: Machine) -> dict:
    """Of the run's summary and trace, which are kept."""
    folder = m.scratch / "run"
    if not (folder / "summary.json").exists():
        return {}
    for name in ("summary.json", "trace.json"):
        if (folder / name).stat().st_size < MOST_BYTES:
            shutil.copy(folder / name, m.out / name)
    summary = json.loads((folder / "summary.json").read_text())
    busy = busy_seconds(json.loads((folder / "trace.json").read_text())["traceEvents"])
    wall = summary["seconds_wall"]
    return {
        "status": summary["status"],
        "wall_seconds": wall,
        "rounds": len(summary["rounds"]),
        "busy_share": {device: sum(parts.values()) / wall for device, parts in busy.items()},
        "busy_seconds": busy,
        "optimizer_steps": sum(r.get("train", {}).get("steps") or 0 for r in summary["rounds"]),
        "peak_rss_bytes": summary["peak_rss_bytes"],
    }


def busy_seconds(events: list[dict]) -> dict[str, dict[str, float]]:
    """Seconds that each device worked, by what it did. Intervals of a trace may span gaps; `busy_us` doesn't."""
    busy: dict[str, dict[str, float]] = {}
    for event in events:
        track = event.get("args", {}).get("track", "")
        if event.get("ph") == "X" and re.fullmatch(r"(cpu|cuda):\d+", track):
            parts = busy.setdefault(track, {})
            seconds = event["args"].get("busy_us", event["dur"]) / 1e6
            parts[event["name"]] = parts.get(event["name"], 0.0) + seconds
    return busy


# Figures in words


def findings(figures: dict) -> list[dict]:
    return figures.get("findings") or []


def is_number(value: object) -> bool:
    # NaN and infinities are told as text.
    return isinstance(value, (int, float))


def percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f} %"


def number(value: float | None, digits: int = 0) -> str:
    return "?" if value is None else f"{value:,.{digits}f}"


def words(step: Step, result: Result, results: dict[str, Result]) -> str:
    try:
        figures = WORDS[step.kind](result.figures) if result.figures else ""
    except Exception:  # of a step that failed, which says why by itself
        figures = ""
    peer = results[step.peer].figures if step.peer in results else {}
    beside = ratio(step, result.figures, peer)
    parts = [shortened(result.trouble, 200), figures, f"{beside} x torch" if beside else ""]
    return "; ".join(part for part in parts if part)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def doctor_words(f: dict) -> str:
    found, off = findings(f), f.get("off") or {}
    wrong = [c for c in found if not c.get("passes")]
    shares = [c["mean"] / c["bound"] for c in found if is_number(c.get("mean")) and c.get("bound")]
    parts = [f["memcheck"]] if f.get("memcheck") else []
    if wrong:
        names = ", ".join(f"{c.get('name')} ({c.get('mean')}, bound {c.get('bound')})" for c in wrong[:3])
        parts.append(f"{len(wrong)} of {len(found)} comparisons fail: {names}{', ...' if len(wrong) > 3 else ''}")
    elif found:
        parts.append(f"{len(found)} comparisons, worst {percent(max(shares, default=0.0))} of its bound")
    elif f.get("facts"):
        parts.append(f"{len(f['facts'])} facts, below")
    else:
        parts.append("nothing to compare")
    return "; ".join([*parts, *(["off: " + ", ".join(off)] if off else [])])


def generate_words(f: dict) -> str:
    return (f"{number(f['tokens_per_second'])} tokens/s, decode {number(f['decode_tokens_per_second'])}, step "
            f"{number(f['step_ms_p50'], 2)} ms (p99 {number(f['step_ms_p99'], 2)}), "
            f"{percent(f['decode_bandwidth_share'])} of the bandwidth")


def prefill_words(f: dict) -> str:
    return (f"{number(f['prefill_tokens_per_second'])} prompt tokens/s, "
            f"{percent(f['prefill_arithmetic_share'])} of the matrix rate")


def train_words(f: dict) -> str:
    return (f"{number(f['pairs_per_second'], 2)} pairs/s, {number(f['train_tokens_per_second'])} trained tokens/s, "
            f"{percent(f['train_arithmetic_share'])} of the matrix rate")


def score_words(f: dict) -> str:
    return (f"{number(f['requests_per_second'], 1)} requests/s, {number(f['tokens_per_second'])} tokens/s, "
            f"{percent(f['arithmetic_share'])} of the matrix rate")


def flow_words(f: dict) -> str:
    def device(name: str) -> str:
        parts = sorted(f["busy_seconds"][name].items(), key=lambda part: -part[1])
        return f"{name} busy {percent(f['busy_share'][name])} ({', '.join(f'{n} {s:.1f}' for n, s in parts)})"

    memory = f"{f['peak_rss_bytes'] / (1 << 30):.1f} GiB of memory"
    if "peak_gpu_mib" in f:
        memory += f", {f['peak_gpu_mib'] / 1024:.1f} GiB of the GPU's"
    return "; ".join([f"wall {f['wall_seconds']:.1f} s, {f['rounds']} rounds, {f['optimizer_steps']} steps",
                      *map(device, f["busy_seconds"]), memory])


def torch_words(f: dict) -> str:
    if f["mode"] == "prefill":
        return prefill_words(f)
    if f["mode"] == "dpo":
        return train_words(f)
    runs = [f"{r['concurrency']} {'graphs' if r['graphs'] else 'eager'}: {number(r['tokens_per_second'])} tokens/s, "
            f"decode {number(r['decode_tokens_per_second'])}, step {number(r['step_ms'], 2)} ms" for r in f["runs"]]
    return "; ".join([*runs, *(shortened(error, 120) for error in f["errors"])])


WORDS: dict[str, Callable[[dict], str]] = {
    "doctor": doctor_words, "generate": generate_words, "prefill": prefill_words, "train": train_words,
    "score": score_words, "flow": flow_words, "torch": torch_words,
}


def ratio(step: Step, ours: dict, peer: dict) -> str:
    """How many times as fast as plain torch: all of it, and for decoding the steps alone too."""
    if step.kind == "generate" and peer:
        kind = (ours.get("concurrency"), "--eager" not in step.command)
        peer = next((r for r in peer.get("runs", []) if (r["concurrency"], r["graphs"]) == kind), {})
    keys = {"generate": ["tokens_per_second", "decode_tokens_per_second"], "prefill": ["prefill_tokens_per_second"],
            "train": ["pairs_per_second"]}.get(step.kind, [])
    both = [(ours.get(key), peer.get(key)) for key in keys]
    return " and ".join(f"{a / b:.2f}" for a, b in both if a and b)


def rows(m: Machine, steps: list[Step], results: dict[str, Result]) -> Iterator[list[str]]:
    yield ["step", "result", "seconds", *(["H100 floor/goal"] if m.gpu else []), "figures"]
    for step in steps:
        r = results.get(step.name) or Result(step.name, "not run")
        goal = [step.goal.text(r.figures) if step.goal else ""] if m.gpu else []
        yield [step.name, r.result, f"{r.seconds:.1f}" if r.seconds else "", *goal, words(step, r, results)]


def facts(results: dict[str, Result]) -> list[str]:
    """What doctors told beside their comparisons, once each."""
    lines: dict[str, None] = {}
    for r in results.values():
        for kind, sign in [("facts", ""), ("off", "off: ")]:
            told = r.figures.get(kind)
            for name, text in told.items() if isinstance(told, dict) else []:
                lines[shortened(f"{sign}{name}: {text}", 300)] = None
    return list(lines)


def rendered(m: Machine, header: str, steps: list[Step], results: dict[str, Result], seconds: float) -> str:
    cells = list(rows(m, steps, results))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() for row in cells]
    failed = [s.name for s in steps if s.name in results and results[s.name].failed()]
    left = [s.name for s in steps if s.name not in results or results[s.name].result == "not run"]
    ends = [f"not run: {', '.join(left)}"] if left else []
    ends += [INTERRUPTED] if stopped(results) else []
    ends += [f"FAILED: {', '.join(failed)}"] if failed else [] if stopped(results) else ["all that ran passed"]
    return "\n".join([header, "", *lines, "", *facts(results), f"{seconds:.0f} s", *ends]) + "\n"


def stopped(results: dict[str, Result]) -> bool:
    return any(r.trouble.startswith(INTERRUPTED) for r in results.values())


# Running all


class Output:
    """The files of $OUT. A call with --only adds to those of an earlier one."""

    def __init__(self, folder: Path, adding: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not adding:
            for name in ("table.txt", "figures.jsonl", "log.txt", "summary.json", "trace.json"):
                (folder / name).unlink(missing_ok=True)
        earlier = folder / "table.txt"
        self.before = earlier.read_text() + "\n" if earlier.exists() else ""

    def table(self, text: str) -> None:
        (self.folder / "table.txt").write_text(self.before + text)

    def add(self, result: Result, printed: str) -> None:
        line = {"name": result.name, "result": result.result, "seconds": result.seconds, "figures": result.figures}
        line |= {"trouble": result.trouble} if result.trouble else {}
        self.append("figures.jsonl", json.dumps(line | {"command": result.command}) + "\n")
        self.append("log.txt", f"== {result.name}: {result.result}\n== {' '.join(result.command)}\n{printed}\n\n")

    def append(self, name: str, text: str) -> None:
        path = self.folder / name
        data = (path.read_bytes() if path.exists() else b"") + text.encode()
        if len(data) > MOST_BYTES:
            data = data[-MOST_BYTES:].partition(b"\n")[2]
            path.write_bytes(data)
        else:
            with open(path, "ab") as file:
                file.write(text.encode())


def run_all(m: Machine, output: Output, steps: list[Step], short: bool, began: float) -> dict[str, Result]:
    header, results, queue = m.header(), {}, list(steps)
    print(header, flush=True)

    def left() -> float:
        return SHORT_SECONDS - RESERVE_SECONDS - (time.monotonic() - began) if short else float("inf")

    while queue and not stopped(results):
        if queue[0].name == "flow" and left() < FLOW_SECONDS:
            queue.sort(key=lambda step: not step.name.startswith("llama-"))
        step = queue.pop(0)
        limit, printed = min(step.limit, left()), ""
        if step.absent:
            result = Result(step.name, "not here", trouble=step.absent, command=step.command)
        elif limit < LEAST_SECONDS:
            result = Result(step.name, "not run", trouble="no time left", command=step.command)
        else:
            result, printed = run(m, step, limit)
        results[step.name] = result
        output.add(result, printed)
        seconds = time.monotonic() - began
        output.table(rendered(m, header, steps, results, seconds))
        print(f"{seconds:5.0f} s  {step.name}: {result.result}. {words(step, result, results)}", flush=True)
    print("\n" + rendered(m, header, steps, results, time.monotonic() - began), end="", flush=True)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help=f"at most {SHORT_SECONDS:.0f} seconds; no long table")
    parser.add_argument("--only", nargs="+", metavar="STEP", default=[], help="steps whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the steps and their limits, run none")
    parser.add_argument("device", nargs="?", metavar="DEVICE", help="cuda:0 unless it is named; cpu:0 tries the script")
    args = parser.parse_args()
    # `--only decode cpu:0` has no other way to tell.
    devices = [word for word in args.only if re.fullmatch(r"(cpu|cuda)(:\d+)?", word)]
    args.only = [word for word in args.only if word not in devices]
    args.device = args.device or (devices or ["cuda:0"])[0]
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", args.device):
        parser.error(f"{args.device} is no device; cuda:0 or cpu:0 is")
    return args


def chosen(steps: list[Step], args: argparse.Namespace) -> list[Step]:
    for word in args.only:
        if not any(step.name.startswith(word) for step in steps):
            sys.exit(f"no step begins with {word}; --list shows them")
    if args.only:
        return [step for step in steps if step.name.startswith(tuple(args.only))]
    return [step for step in steps if not (args.short and step.name.startswith("table-"))]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    began, args = time.monotonic(), arguments()
    # Whoever ends this script wants its steps ended too, and what they found.
    signal.signal(signal.SIGTERM, interrupted)
    out = Path(os.environ.get("OUT", "figures")).resolve()
    os.chdir(HERE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        m = Machine(args.device, out, Path(scratch))
        steps = chosen(all_steps(m), args)
        if args.list:
            print("\n".join(f"{step.name:22} {step.limit:4.0f} s" for step in steps))
            return 0
        results = run_all(m, Output(out, bool(args.only)), steps, args.short, began)
    return 1 if stopped(results) or any(result.failed() for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
