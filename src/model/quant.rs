//! The encodings of weights in GGUF files, back to `f32`.
//!
//! Weights are stored in blocks: some small integers, with a scale and perhaps a minimum. The older
//! encodings (`Q4_0` .. `Q8_0`) have blocks of 32 elements; the K-quants have super-blocks of 256 with
//! a scale of few bits for each 32 or 16 of them. Layouts: `ggml-common.h`. Values are those of
//! gguf-py's `dequantize`, which transformers uses, to the last bit, the sign of a zero included:
//! `tests/oracle/quant.py` writes what the tests compare with. Hence no product is rearranged here.

use half::{bf16, f16};

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl Encoding {
    /// What is read, for messages.
    pub(super) const NAMES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";

    /// By the number that `ggml_type` gives it.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// Elements and bytes of the smallest unit that is stored.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 2 + 16),
            Self::Q4_1 => (32, 4 + 16),
            Self::Q5_0 => (32, 2 + 4 + 16),
            Self::Q5_1 => (32, 4 + 4 + 16),
            Self::Q8_0 => (32, 2 + 32),
            Self::Q4K => (256, 4 + 12 + 128),
            Self::Q5K => (256, 4 + 12 + 32 + 128),
            Self::Q6K => (256, 128 + 64 + 16 + 2),
        }
    }

    /// Fills `out` with the elements that `bytes` stores, as many blocks as both have.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => blocks(bytes, out, |bytes, [value]| *value = f32::from_le_bytes(*bytes)),
            Self::F16 => blocks(bytes, out, |[low, high], [value]| *value = half(*low, *high)),
            Self::BF16 => blocks(bytes, out, |bytes, [value]| *value = bf16::from_le_bytes(*bytes).to_f32()),
            Self::Q4_0 => blocks(bytes, out, q4_0),
            Self::Q4_1 => blocks(bytes, out, q4_1),
            Self::Q5_0 => blocks(bytes, out, q5_0),
            Self::Q5_1 => blocks(bytes, out, q5_1),
            Self::Q8_0 => blocks(bytes, out, q8_0),
            Self::Q4K => blocks(bytes, out, q4_k),
            Self::Q5K => blocks(bytes, out, q5_k),
            Self::Q6K => blocks(bytes, out, q6_k),
        }
    }
}

// Loops here count for themselves. In the project's one build profile an iterator over a range or the
// filling of a vector is code that a dependency has brought along, unoptimised: it took half of the
// time to load a model.

fn blocks<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    let (blocks, values) = (bytes.as_chunks().0, out.as_chunks_mut().0);
    let count = blocks.len().min(values.len());
    let mut i = 0;
    while i < count {
        decode(&blocks[i], &mut values[i]);
        i += 1;
    }
}

fn half(low: u8, high: u8) -> f32 {
    f16::from_le_bytes([low, high]).to_f32()
}

/// The low nibbles of 16 bytes are the first half of a block, the high nibbles the second; bit `i` of
/// `fifth` goes on top of element `i`.
fn nibbles(quants: &[u8; 16], fifth: u32, out: &mut [f32; 32], value: impl Fn(u32) -> f32) {
    let mut i = 0;
    while i < 16 {
        let low = u32::from(quants[i] & 15) | (((fifth >> i) & 1) << 4);
        let high = u32::from(quants[i] >> 4) | (((fifth >> (i + 16)) & 1) << 4);
        out[i] = value(low);
        out[i + 16] = value(high);
        i += 1;
    }
}

fn q4_0([s0, s1, quants @ ..]: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half(*s0, *s1);
    nibbles(quants, 0, out, |q| scale * (q as f32 - 8.0));
}

fn q4_1([s0, s1, m0, m1, quants @ ..]: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, min) = (half(*s0, *s1), half(*m0, *m1));
    nibbles(quants, 0, out, |q| scale * q as f32 + min);
}

fn q5_0([s0, s1, f0, f1, f2, f3, quants @ ..]: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half(*s0, *s1);
    nibbles(quants, u32::from_le_bytes([*f0, *f1, *f2, *f3]), out, |q| scale * (q as f32 - 16.0));
}

fn q5_1([s0, s1, m0, m1, f0, f1, f2, f3, quants @ ..]: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, min) = (half(*s0, *s1), half(*m0, *m1));
    nibbles(quants, u32::from_le_bytes([*f0, *f1, *f2, *f3]), out, |q| scale * q as f32 + min);
}

fn q8_0([s0, s1, quants @ ..]: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half(*s0, *s1);
    let mut i = 0;
    while i < 32 {
        out[i] = f32::from(quants[i].cast_signed()) * scale;
        i += 1;
    }
}

/// Scale and minimum, of 6 bits each, of group `i` of the 8 in a super-block. The first four lie in the
/// low bits of bytes 0..4 and 4..8; the low nibbles of the other four share bytes 8..12, and their two
/// high bits are on top of the first.
fn scale_and_min(packed: &[u8; 12], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// The low nibbles of 32 bytes are one group of a super-block, the high nibbles the next; bit `g` of
/// byte `i` of `fifth` goes on top of element `i` of group `g`.
fn k_groups(scale: f32, min: f32, packed: &[u8; 12], fifth: &[u8; 32], quants: &[u8; 128], out: &mut [f32; 256]) {
    let (quants, _) = quants.as_chunks::<32>();
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (group_scale, group_min) = scale_and_min(packed, group);
        let (scale, min) = (scale * group_scale, min * group_min);
        let quants = &quants[group / 2];
        let shift = group % 2 * 4;
        let mut i = 0;
        while i < 32 {
            let q = quants[i] >> shift & 15 | (fifth[i] >> group & 1) << 4;
            out[i] = scale * f32::from(q) - min;
            i += 1;
        }
    }
}

fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (head, quants) = parts::<144, 16, 128>(block);
    let ([s0, s1, m0, m1], packed) = parts::<16, 4, 12>(head);
    k_groups(half(*s0, *s1), half(*m0, *m1), packed, &[0; 32], quants, out);
}

fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (head, quants) = parts::<176, 48, 128>(block);
    let (head, fifth) = parts::<48, 16, 32>(head);
    let ([s0, s1, m0, m1], packed) = parts::<16, 4, 12>(head);
    k_groups(half(*s0, *s1), half(*m0, *m1), packed, fifth, quants, out);
}

/// Four low bits and two high bits an element, a scale for each 16 of them, no minimum.
fn q6_k([bytes @ .., s0, s1]: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half(*s0, *s1);
    let (bytes, scales) = parts::<208, 192, 16>(bytes);
    let (low, _) = bytes.as_chunks::<32>();
    let high = &low[4..];
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Each half of a super-block has 64 bytes of low bits and 32 of high ones, for four groups.
        let (part, of) = (group % 4, group / 4);
        let (low, high) = (&low[2 * of + part % 2], &high[of]);
        let mut i = 0;
        while i < 32 {
            let q = low[i] >> (part / 2 * 4) & 15 | (high[i] >> (2 * part) & 3) << 4;
            let scale = scale * f32::from(scales[2 * group + i / 16].cast_signed());
            out[i] = scale * f32::from(q.cast_signed() - 32);
            i += 1;
        }
    }
}

/// The first `A` and the last `B` of `N = A + B` bytes.
fn parts<const N: usize, const A: usize, const B: usize>(bytes: &[u8; N]) -> (&[u8; A], &[u8; B]) {
    const { assert!(A + B == N) };
    (bytes.first_chunk().unwrap_or(&[0; A]), bytes.last_chunk().unwrap_or(&[0; B]))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::model::gguf::Gguf;

    /// `tests/oracle/quant.py` writes blocks of every encoding and what gguf-py decodes them to.
    #[test]
    fn blocks_decode_as_in_gguf_py() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quants.gguf");
        let gguf = Gguf::open(&path).unwrap();
        let read = |name: &str, first, count| {
            let mut values = Vec::new();
            gguf.read_rows(name, first, count, &mut values).unwrap();
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        for name in ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"] {
            let encoding = gguf.tensor(name).unwrap().encoding;
            assert_eq!(format!("{encoding:?}"), name.replace("_K", "K"));
            let expected = format!("{name}.values");
            assert_eq!(read(name, 0, 2), read(&expected, 0, 2), "{name}");
            assert_eq!(read(name, 1, 1), read(&expected, 1, 1), "{name}");
        }
    }
}
