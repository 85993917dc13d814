//! From logits and uniforms to tokens: inverse of the cumulative distribution.

use tch::{Kind, Tensor};

use super::request::Sampling;
use crate::torch::TorchError;

/// The token drawn for one row, and its log-prob at temperature 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    pub token: u32,
    pub logprob: f32,
}

/// How a row is drawn; rows of one way are drawn together.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Greedy,
    /// Temperature alone: no filter needs an order of the vocabulary.
    Plain,
    Filtered,
}

fn way(s: &Sampling) -> Way {
    if s.temperature <= 0.0 || s.top_k == Some(1) {
        Way::Greedy
    } else if s.top_p >= 1.0 && s.top_k.is_none() && s.min_p.is_none() {
        Way::Plain
    } else {
        Way::Filtered
    }
}

/// Draws one token a row. `logits` is `[rows, vocabulary]`, float32; `rows` gives each row's way of
/// sampling and its uniform in `[0, 1)`. One small transfer to the host.
pub fn draw(logits: &Tensor, rows: &[(&Sampling, f32)]) -> Result<Vec<Drawn>, TorchError> {
    let logprobs = logits.f_log_softmax(-1, Kind::Float)?;
    let tokens = match rows.first().map(|(s, _)| way(s)) {
        // Nearly always all rows are of one kind, and nothing has to be gathered.
        Some(first) if first != Way::Filtered && rows.iter().all(|(s, _)| way(s) == first) => {
            draw_alike(first, logits, &logprobs, rows)?
        }
        _ => {
            let one = |i: usize| -> Result<Tensor, TorchError> {
                let (row, logprob) = (logits.f_narrow(0, i as i64, 1)?, logprobs.f_narrow(0, i as i64, 1)?);
                match way(rows[i].0) {
                    Way::Filtered => draw_filtered(&row, rows[i].0, rows[i].1),
                    way => draw_alike(way, &row, &logprob, &rows[i..=i]),
                }
            };
            let tokens = (0..rows.len()).map(one).collect::<Result<Vec<_>, _>>()?;
            Tensor::f_cat(&tokens, 0)?
        }
    };
    let picked = logprobs.f_gather(1, &tokens, false)?;
    // f64 holds every token id and every float32 exactly: one transfer for both.
    let both = Tensor::f_cat(&[tokens.f_to_kind(Kind::Double)?, picked.f_to_kind(Kind::Double)?], 1)?;
    let mut host = vec![0.0_f64; rows.len() * 2];
    both.f_contiguous()?.f_copy_data(&mut host, rows.len() * 2)?;
    Ok(host.chunks_exact(2).map(|pair| Drawn { token: pair[0] as u32, logprob: pair[1] as f32 }).collect())
}

/// Greedy or plain rows; `[rows, 1]`, i64.
fn draw_alike(way: Way, logits: &Tensor, logprobs: &Tensor, rows: &[(&Sampling, f32)]) -> Result<Tensor, TorchError> {
    if way == Way::Greedy {
        return Ok(logits.f_argmax(-1, true)?);
    }
    let probabilities = if rows.iter().all(|(s, _)| s.temperature == 1.0) {
        logprobs.f_exp()?
    } else {
        let scale: Vec<f32> = rows.iter().map(|(s, _)| (1.0 / s.temperature) as f32).collect();
        let scale = Tensor::f_from_slice(&scale)?.f_unsqueeze(1)?.f_to_device(logits.device())?;
        logits.f_mul(&scale)?.f_softmax(-1, Kind::Float)?
    };
    let uniforms: Vec<f32> = rows.iter().map(|(_, u)| *u).collect();
    invert(&probabilities, &Tensor::f_from_slice(&uniforms)?.f_unsqueeze(1)?.f_to_device(logits.device())?)
}

/// First index at which the cumulative sum exceeds `uniform` of the total; `[rows, 1]`, i64.
fn invert(probabilities: &Tensor, uniforms: &Tensor) -> Result<Tensor, TorchError> {
    let last = probabilities.size2()?.1 - 1;
    let cumulative = probabilities.f_cumsum(-1, Kind::Float)?;
    // The total is 1 up to rounding; a uniform near 1 must not fall past the end.
    let targets = uniforms.f_mul(&cumulative.f_narrow(1, last, 1)?)?;
    let found = targets.f_searchsorted(&cumulative, false, true, "right", None::<Tensor>)?;
    Ok(found.f_clamp_max(last)?)
}

/// One row under top-k, top-p or min-p; `[1, 1]`, i64.
fn draw_filtered(logits: &Tensor, s: &Sampling, uniform: f32) -> Result<Tensor, TorchError> {
    let probabilities = logits.f_div_scalar(s.temperature)?.f_softmax(-1, Kind::Float)?;
    let vocabulary = logits.size2()?.1;
    let most = s.top_k.map_or(vocabulary, |k| (k as i64).clamp(1, vocabulary));
    // Sorting the vocabulary is dear on a CPU and seldom needed: look at more of it until what is
    // kept is certain.
    let mut look = most.min(128);
    loop {
        let (top, ids) = probabilities.f_topk(look, -1, true, true)?;
        let mut values = vec![0.0_f32; look as usize];
        top.f_copy_data(&mut values, look as usize)?;
        if let Some(kept) = kept(&values, look == most, most < vocabulary, s) {
            let chosen = pick(&values[..kept], uniform);
            return Ok(ids.f_narrow(1, chosen as i64, 1)?);
        }
        look = (look * 4).min(most);
    }
}

/// How many of the likeliest tokens stay. `None` when more of them have to be looked at. `top` falls;
/// `complete` says that no further token can be kept; `renormalise` that top-k cut the rest off, so
/// that top-p is a share of what top-k left.
fn kept(top: &[f32], complete: bool, renormalise: bool, s: &Sampling) -> Option<usize> {
    let total = if renormalise { top.iter().map(|p| f64::from(*p)).sum() } else { 1.0 };
    if renormalise && !complete {
        return None;
    }
    let mut count = top.len();
    let mut certain = complete;
    if s.top_p < 1.0 {
        let mut below = 0.0;
        // The token that crosses the threshold stays.
        if let Some(crossing) = top.iter().position(|p| {
            below += f64::from(*p);
            below >= s.top_p * total
        }) {
            count = crossing + 1;
            certain = true;
        }
    }
    if let Some(min_p) = s.min_p {
        let floor = f64::from(top[0]) * min_p;
        if let Some(first) = top.iter().position(|p| f64::from(*p) < floor) {
            count = count.min(first.max(1));
            certain = true;
        }
    }
    certain.then_some(count)
}

fn pick(weights: &[f32], uniform: f32) -> usize {
    let total: f64 = weights.iter().map(|p| f64::from(*p)).sum();
    let target = f64::from(uniform) * total;
    let mut sum = 0.0;
    let found = weights.iter().position(|p| {
        sum += f64::from(*p);
        sum > target
    });
    found.unwrap_or(weights.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::Stream;

    const LOGITS: [f32; 6] = [1.0, 3.0, -2.0, 2.5, 0.0, 2.9];

    fn sampling() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::greedy(1) }
    }

    /// Share of each token in many draws.
    fn shares(s: &Sampling) -> [f64; 6] {
        const DRAWS: usize = 20_000;
        let logits = Tensor::from_slice(&LOGITS).unsqueeze(0).repeat([100, 1]);
        let mut counts = [0; 6];
        for batch in 0..DRAWS / 100 {
            let rows: Vec<_> =
                (0..100).map(|i| (s, Stream { key: 9, row: batch as u64, index: i }.uniform(3))).collect();
            for drawn in draw(&logits, &rows).unwrap() {
                counts[drawn.token as usize] += 1;
            }
        }
        counts.map(|c| f64::from(c) / DRAWS as f64)
    }

    fn softmax(temperature: f32, keep: &[usize]) -> [f64; 6] {
        let weight = |i: usize| if keep.contains(&i) { f64::from(LOGITS[i] / temperature).exp() } else { 0.0 };
        let total: f64 = (0..6).map(weight).sum();
        std::array::from_fn(|i| weight(i) / total)
    }

    fn close(s: &Sampling, expected: [f64; 6]) {
        for (i, (share, p)) in shares(s).into_iter().zip(expected).enumerate() {
            // five standard deviations
            assert!((share - p).abs() <= 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(), "token {i}: {share} for {p}");
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let all = [0, 1, 2, 3, 4, 5];
        close(&sampling(), softmax(1.0, &all));
        close(&Sampling { temperature: 0.5, ..sampling() }, softmax(0.5, &all));
        close(&Sampling { top_k: Some(3), ..sampling() }, softmax(1.0, &[1, 5, 3]));
        // 1 and 5 hold 0.705 of it: the token that crosses 0.8 stays
        close(&Sampling { top_p: 0.8, ..sampling() }, softmax(1.0, &[1, 5, 3]));
        close(&Sampling { top_p: 0.7, ..sampling() }, softmax(1.0, &[1, 5]));
        close(&Sampling { top_p: 0.3, ..sampling() }, softmax(1.0, &[1]));
        close(&Sampling { min_p: Some(0.5), ..sampling() }, softmax(1.0, &[1, 5, 3]));
        // a share of what top-k left
        close(&Sampling { top_k: Some(2), top_p: 0.4, ..sampling() }, softmax(1.0, &[1]));
    }

    #[test]
    fn greedy_is_the_argmax_and_mixed_rows_keep_their_own_way() {
        let logits = Tensor::from_slice(&LOGITS).unsqueeze(0).repeat([3, 1]);
        let (greedy, hot, filtered) =
            (Sampling::greedy(1), sampling(), Sampling { top_k: Some(2), top_p: 0.1, ..sampling() });
        let drawn = draw(&logits, &[(&greedy, 0.9), (&hot, 0.999_999), (&filtered, 0.9)]).unwrap();
        assert_eq!((drawn[0].token, drawn[2].token), (1, 1));
        assert_eq!(drawn[1].token, 5);
        let expected = (softmax(1.0, &[0, 1, 2, 3, 4, 5])[1]).ln();
        assert!((f64::from(drawn[0].logprob) - expected).abs() < 1e-5);
    }
}
