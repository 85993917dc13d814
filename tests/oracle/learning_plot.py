"""Draws the validation figures of a run's first trainer as SVG, by hand:

    python tests/oracle/learning_plot.py RUN/metrics.jsonl docs/learning.svg
"""

import json
import sys

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 760, 300, 56, 34, 46, 70
PANEL = (WIDTH - 2 * LEFT - GAP) / 2


def panel(x0, title, points, low, high, start):
    """One curve over the steps; `start` is where a judge that knows nothing stands."""
    last = points[-1][0]
    x = lambda step: x0 + PANEL * step / last
    y = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)
    out = [f'<text x="{x0}" y="{TOP - 14}" class="title">{title}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        out.append(f'<line x1="{x0}" x2="{x0 + PANEL}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        out.append(f'<text x="{x0 - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    out.append(f'<line x1="{x0}" x2="{x0 + PANEL}" y1="{y(start):.1f}" y2="{y(start):.1f}" class="start"/>')
    for step in sorted({0, points[len(points) // 2][0], last}):
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{x0 + PANEL / 2}" y="{HEIGHT - 8}" text-anchor="middle">optimizer step</text>')
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    out.append(f'<polyline points="{line}" class="curve"/>')
    out += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.5" class="dot"/>' for s, v in points]
    return out


def main(metrics, target):
    events = [json.loads(line) for line in open(metrics)]
    found = [e for e in events if "eval_rewards/margins" in e and e["round"] == 1]
    margins = [(e["step"], e["eval_rewards/margins"]) for e in found]
    # before the first step every margin is 0, and a pair is neither right nor wrong
    accuracies = [(e["step"], e["eval_rewards/accuracies"] if e["step"] else 0.5) for e in found]
    top = max(v for _, v in margins)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Validation margin and accuracy over the steps of a round</title>",
        "<style>rect{fill:#fff}text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.grid{stroke:#ddd}"
        ".start{stroke:#999;stroke-dasharray:4}.curve{fill:none;stroke:#1f6feb;stroke-width:2}.dot{fill:#1f6feb}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}"/>',
        *panel(LEFT, "Validation margin", margins, min(0.0, *(v for _, v in margins)), top, 0.0),
        *panel(LEFT + PANEL + GAP, "Validation accuracy", accuracies, 0.25, 1.0, 0.5),
        "</svg>",
    ]
    open(target, "w").write("\n".join(out) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
