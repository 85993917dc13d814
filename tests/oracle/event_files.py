"""TensorBoard's own writer and reader beside flowrun's event files.

    pip install tensorboard
    python tests/oracle/event_files.py fixture     # makes tests/fixtures/tensorboard/expected from lines.jsonl
    python tests/oracle/event_files.py read RUN    # every scalar of a run, as TensorBoard reads it

The fixture is what `tensorboard.summary.writer` writes for the lines of `metrics.jsonl` in `lines.jsonl`, under the tags
that transformers' TensorBoardCallback gives them.
"""

import io
import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tensorboard"
NO_FIGURES = {"time", "event", "round", "stage", "step", "skipped", "kind"}


def tag(event, key):
    """transformers.integrations.rewrite_logs."""
    if key.startswith("eval_"):
        return "eval/" + key.removeprefix("eval_")
    return "train/" + key if event == "step" else "eval/" + key


def fixture():
    stream = io.BytesIO()
    writer = RecordWriter(stream)
    for number, text in enumerate((FIXTURES / "lines.jsonl").read_text().splitlines()):
        line = json.loads(text)
        if number == 0:
            writer.write(Event(wall_time=line["time"], file_version="brain.Event:2").SerializeToString())
        figures = [(k, v) for k, v in line.items() if k not in NO_FIGURES and isinstance(v, (int, float))]
        values = [Summary.Value(tag=tag(line["event"], key), simple_value=value) for key, value in figures]
        event = Event(wall_time=line["time"], step=line["step"], summary=Summary(value=values))
        writer.write(event.SerializeToString())
    (FIXTURES / "expected").write_bytes(stream.getvalue())


def read(run):
    for directory in sorted({path.parent for path in Path(run, "tensorboard").rglob("*tfevents*")}):
        events = EventAccumulator(str(directory))
        events.Reload()
        for name in events.Tags()["scalars"]:
            points = [(point.step, point.value) for point in events.Scalars(name)]
            print(directory.relative_to(run), name, *points)


if __name__ == "__main__":
    fixture() if sys.argv[1] == "fixture" else read(sys.argv[2])
