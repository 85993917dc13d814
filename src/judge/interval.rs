//! How sure a share is.

/// The 95 % interval of a share of which `wins` of `n` were seen (Wilson 1927); halves are allowed.
pub fn wilson(wins: f64, n: f64) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054;
    if n <= 0.0 {
        return [0.0, 1.0];
    }
    let (p, z2) = (wins / n, Z * Z);
    let middle = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    [(middle - half).max(0.0), (middle + half).min(1.0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_intervals() {
        // statsmodels.stats.proportion.proportion_confint(27, 48, method="wilson")
        let [low, high] = wilson(27.0, 48.0);
        assert!((low - 0.422_6).abs() < 1e-3 && (high - 0.692_9).abs() < 1e-3, "{low} {high}");
        assert_eq!(wilson(0.0, 0.0), [0.0, 1.0]);
        assert_eq!(wilson(0.0, 10.0)[0], 0.0);
        assert!((wilson(10.0, 10.0)[1] - 1.0).abs() < 1e-12);
    }
}
