"""Writes tests/fixtures/quants.gguf: every encoding of weights that is read, and what it decodes to.

For each encoding there is a tensor of that name, [2, 2 blocks] of random bytes with scales of a
sensible size, and NAME.values, the same in F32 as gguf-py's `dequantize` gives it, which is what
transformers loads. The Rust tests compare bit for bit and need no Python. Run by hand when an
encoding is added:

    python tests/oracle/quant.py
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

# Where the half-precision scales of a block lie, which random bytes would make NaN.
SCALES = {
    "F16": [0], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
ROWS, BLOCKS = 2, 2


def random_rows(name: str, kind: GGMLQuantizationType, random: np.random.Generator) -> np.ndarray:
    elements, size = GGML_QUANT_SIZES[kind]
    # Where an element is a block, as many as a block of the others has.
    blocks = ROWS * BLOCKS * (32 if elements == 1 else 1)
    rows = random.integers(0, 256, (blocks, size), dtype=np.uint8)
    for at in SCALES[name]:
        scales = random.normal(0, 0.1, blocks).astype(np.float16)
        # The smallest numbers of half precision, too.
        scales[0] = 6e-8
        rows[:, at : at + 2] = scales.view(np.uint8).reshape(blocks, 2)
    if name == "BF16":
        rows = (random.normal(0, 0.1, blocks).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        rows = rows.view(np.uint8)
    return rows.reshape(ROWS, -1)


def main() -> None:
    random = np.random.default_rng(0)
    writer = GGUFWriter(Path(__file__).parent.parent / "fixtures" / "quants.gguf", "llama")
    for name in SCALES:
        kind = GGMLQuantizationType[name]
        rows = random_rows(name, kind, random)
        values = quants.dequantize(rows, kind).reshape(ROWS, -1)
        assert np.isfinite(values).all() and values.dtype == np.float32
        writer.add_tensor(name, rows, raw_dtype=kind)
        writer.add_tensor(f"{name}.values", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
