//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011).
//!
//! Every sampled token has a uniform of its own, named by where it belongs and not by when it is
//! drawn, so batch size, order and restarts don't choose the random numbers.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox4x32.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let wide = |m: u32, c: u32| u64::from(m) * u64::from(c);
        let (first, second) = (wide(MULTIPLIERS[0], counter[0]), wide(MULTIPLIERS[1], counter[2]));
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The random stream of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// From [`stream_key`].
    pub key: u64,
    /// `_row`
    pub row: u64,
    /// `_candidate`, or a pair and draw.
    pub index: u32,
}

impl Stream {
    /// A seed for another's generator, from 0 up, where one can't draw token by token.
    pub fn seed(self) -> i64 {
        let counter = [self.row as u32, (self.row >> 32) as u32, self.index, u32::MAX];
        let words = philox(counter, [self.key as u32, (self.key >> 32) as u32]);
        (u64::from(words[0]) << 32 | u64::from(words[1])) as i64 & i64::MAX
    }

    /// The uniform of token `position`, in `[0, 1)` with 24 bits.
    pub fn uniform(self, position: u32) -> f32 {
        let counter = [self.row as u32, (self.row >> 32) as u32, self.index, position];
        let word = philox(counter, [self.key as u32, (self.key >> 32) as u32])[0];
        (word >> 8) as f32 / (1_u32 << 24) as f32
    }
}

/// The key of a stage's streams in a round.
pub fn stream_key(seed: u64, stage: &str, round: u32) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&round.to_le_bytes()).update(stage.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniforms_are_uniform_and_streams_differ() {
        let key = stream_key(0, "sample", 1);
        let draws: Vec<f32> =
            (0..100).flat_map(|row| (0..100).map(move |p| Stream { key, row, index: 0 }.uniform(p))).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f32>() / draws.len() as f32;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        assert_ne!(stream_key(0, "sample", 1), stream_key(0, "sample", 2));
        assert_ne!(Stream { key, row: 1, index: 0 }.uniform(0), Stream { key, row: 1, index: 1 }.uniform(0));
    }
}
