//! From logits and uniforms to tokens: inverse of the cumulative distribution.

use tch::{Device, Kind, Tensor};

use super::request::Sampling;
use crate::torch::{TorchError, cpu, gpu};

/// How one row is drawn, and its uniform in `[0, 1)`.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub sampling: &'a Sampling,
    pub uniform: f32,
    /// What penalties touch; `None` where there are none.
    pub seen: Option<&'a Seen>,
}

impl Row<'_> {
    /// Whether nothing but a temperature matters.
    fn is_plain(&self) -> bool {
        self.seen.is_none() && way(self.sampling) != Way::Filtered
    }
}

/// Distinct tokens of a prompt and its answer so far, as penalties need them.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Each with whether the answer has it.
    tokens: Vec<(u32, bool)>,
}

impl Seen {
    /// `None` where `sampling` penalises nothing.
    pub fn new(sampling: &Sampling, prompt: &[u32]) -> Option<Self> {
        let mut tokens: Vec<u32> = match (sampling.repetition_penalty, sampling.presence_penalty) {
            (1.0, 0.0) => return None,
            (1.0, _) => Vec::new(),
            _ => prompt.to_vec(),
        };
        tokens.sort_unstable();
        tokens.dedup();
        Some(Self { tokens: tokens.into_iter().map(|token| (token, false)).collect() })
    }

    /// A token of the answer.
    pub fn push(&mut self, token: u32) {
        match self.tokens.iter_mut().find(|t| t.0 == token) {
            Some(known) => known.1 = true,
            None => self.tokens.push((token, true)),
        }
    }
}

/// The token drawn for one row, and its log-prob at temperature 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drawn {
    pub token: u32,
    pub logprob: f32,
}

/// Rows of one way are drawn together.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Greedy,
    /// Temperature alone: no filter needs an order of the vocabulary.
    Plain,
    Filtered,
}

fn way(s: &Sampling) -> Way {
    if s.temperature <= 0.0 {
        Way::Greedy
    } else if s.top_p >= 1.0 && s.top_k.is_none() && s.min_p.is_none_or(|p| p <= 0.0) {
        Way::Plain
    } else {
        Way::Filtered
    }
}

/// Draws one token a row from `logits`, `[rows, vocabulary]` in float32. One small transfer to the
/// host; filtered rows need another. Penalties change what is drawn, not its log-prob.
pub fn draw(logits: &Tensor, rows: &[Row<'_>]) -> Result<Vec<Drawn>, TorchError> {
    if logits.device() == Device::Cpu && logits.kind() == Kind::Float && rows.iter().all(Row::is_plain) {
        return draw_plain(logits, rows);
    }
    if let Some(plan) = plan(logits.device(), rows) {
        let plan = Tensor::f_from_slice(&plan)?.f_view([3, -1])?.f_to_device(logits.device())?;
        return draw_planned(logits, rows, &plan);
    }
    let probabilities = logits.f_softmax(-1, Kind::Float)?;
    let tokens = match penalised(logits, rows)? {
        None => tokens(logits, &probabilities, rows)?,
        Some(lowered) => tokens(&lowered, &lowered.f_softmax(-1, Kind::Float)?, rows)?,
    };
    // log(sum(exp(logits))), from the likeliest token: its probability is never too small for a logarithm.
    let log_sum = logits.f_amax(-1, true)?.f_sub(&probabilities.f_amax(-1, true)?.f_log()?)?;
    let logprobs = logits.f_gather(1, &tokens, false)?.f_sub(&log_sum)?;
    let both = [tokens.f_to_kind(Kind::Double)?, logprobs.f_to_kind(Kind::Double)?];
    // f64 holds every token id and every float32 exactly: one transfer for both.
    let host = to_host(&Tensor::f_cat(&both, 1)?)?;
    Ok(host.chunks_exact(2).map(|pair| Drawn { token: pair[0] as u32, logprob: pair[1] as f32 }).collect())
}

/// What [`draw_planned`] needs to know of the rows, `[3, rows]`; `None` where the device does not draw by plan.
/// It can be sent to a GPU ahead of the logits' pass, which it would have to wait for afterwards.
pub fn plan(device: Device, rows: &[Row<'_>]) -> Option<Vec<i64>> {
    let how = |r: &Row<'_>| gpu::How {
        temperature: r.sampling.temperature.max(0.0) as f32,
        uniform: r.uniform,
        top_k: r.sampling.top_k.map_or(0, |k| u32::try_from(k).unwrap_or(u32::MAX)),
        top_p: r.sampling.top_p as f32,
        min_p: r.sampling.min_p.unwrap_or(0.0) as f32,
    };
    let gpu = gpu::of(device).filter(|gpu| gpu.uses(gpu::Path::Sampling));
    gpu.map(|_| gpu::plan(rows.iter().map(how)))
}

/// [`draw`] in one operation on a GPU: `plan` (`[3, rows]`, i64) is of [`plan`].
pub fn draw_planned(logits: &Tensor, rows: &[Row<'_>], plan: &Tensor) -> Result<Vec<Drawn>, TorchError> {
    let Some(gpu) = gpu::of(logits.device()) else {
        return Err(TorchError::Operation("drawing by plan needs a GPU".into()));
    };
    let logits = logits.f_contiguous()?;
    let lowered = penalised(&logits, rows)?;
    let drawn = gpu.draw(&logits, lowered.as_ref().unwrap_or(&logits), &plan.f_contiguous()?)?;
    let mut host = vec![0_i64; drawn.numel()];
    let count = host.len();
    drawn.f_copy_data(&mut host, count)?;
    let unpack = |packed: i64| {
        let (token, logprob) = gpu::drawn(packed);
        Drawn { token, logprob }
    };
    Ok(host.into_iter().map(unpack).collect())
}

/// Logits after the penalties of all rows; `None` where no row has any.
fn penalised(logits: &Tensor, rows: &[Row<'_>]) -> Result<Option<Tensor>, TorchError> {
    if rows.iter().all(|r| r.seen.is_none()) {
        return Ok(None);
    }
    let vocabulary = logits.size2()?.1;
    // f64 holds every place: one transfer for all three.
    let (mut places, mut factors, mut less) = (Vec::new(), Vec::new(), Vec::new());
    for (row, start) in rows.iter().zip((0..).step_by(vocabulary as usize)) {
        // A prompt's ids may lie beyond the logits of a model; those are never drawn.
        let seen = row.seen.iter().flat_map(|s| &s.tokens).filter(|t| i64::from(t.0) < vocabulary);
        for &(token, answered) in seen {
            places.push((start + i64::from(token)) as f64);
            factors.push(row.sampling.repetition_penalty);
            less.push(if answered { row.sampling.presence_penalty } else { 0.0 });
        }
    }
    let count = places.len() as i64;
    let host = Tensor::f_from_slice(&[places, factors, less].concat())?.f_view([3, count])?;
    let host = host.f_to_device(logits.device())?;
    let places = host.f_get(0)?.f_to_kind(Kind::Int64)?;
    let (factors, less) = (host.f_get(1)?.f_to_kind(Kind::Float)?, host.f_get(2)?.f_to_kind(Kind::Float)?);
    let found = logits.f_take(&places)?;
    let above = found.f_gt(0.0)?;
    let repeated = found.f_div(&factors)?.f_where_self(&above, &found.f_mul(&factors)?)?;
    Ok(Some(logits.f_put(&places, &repeated.f_sub(&less)?, false)?))
}

/// Nothing but temperatures, on a CPU.
fn draw_plain(logits: &Tensor, rows: &[Row<'_>]) -> Result<Vec<Drawn>, TorchError> {
    let temperatures: Vec<f32> = rows.iter().map(|r| r.sampling.temperature.max(0.0) as f32).collect();
    let uniforms: Vec<f32> = rows.iter().map(|r| r.uniform).collect();
    let drawn = cpu::draw(&logits.f_contiguous()?, &temperatures, &uniforms)?;
    Ok(drawn.into_iter().map(|(token, logprob)| Drawn { token: token as u32, logprob }).collect())
}

fn to_host(tensor: &Tensor) -> Result<Vec<f64>, TorchError> {
    let mut host = vec![0.0; tensor.numel()];
    tensor.f_contiguous()?.f_copy_data(&mut host, tensor.numel())?;
    Ok(host)
}

/// `[rows, 1]`, i64.
fn tokens(logits: &Tensor, probabilities: &Tensor, rows: &[Row<'_>]) -> Result<Tensor, TorchError> {
    let first = rows.first().map_or(Way::Greedy, |r| way(r.sampling));
    if rows.iter().all(|r| way(r.sampling) == first) {
        // Nearly always, and nothing has to be gathered.
        return tokens_of(first, logits, probabilities, rows);
    }
    let options = (Kind::Int64, logits.device());
    let mut tokens = Tensor::f_zeros([rows.len() as i64, 1], options)?;
    for wanted in [Way::Greedy, Way::Plain, Way::Filtered] {
        let places: Vec<usize> = (0..rows.len()).filter(|i| way(rows[*i].sampling) == wanted).collect();
        if places.is_empty() {
            continue;
        }
        let rows: Vec<Row<'_>> = places.iter().map(|i| rows[*i]).collect();
        let places: Vec<i64> = places.into_iter().map(|i| i as i64).collect();
        let places = Tensor::f_from_slice(&places)?.f_to_device(logits.device())?;
        let (logits, probabilities) = (logits.f_index_select(0, &places)?, probabilities.f_index_select(0, &places)?);
        tokens = tokens.f_index_copy_(0, &places, &tokens_of(wanted, &logits, &probabilities, &rows)?)?;
    }
    Ok(tokens)
}

fn tokens_of(way: Way, logits: &Tensor, probabilities: &Tensor, rows: &[Row<'_>]) -> Result<Tensor, TorchError> {
    match way {
        Way::Greedy => Ok(logits.f_argmax(-1, true)?),
        Way::Plain => invert(&heated(logits, probabilities, rows)?, rows),
        Way::Filtered => filtered(&heated(logits, probabilities, rows)?, rows),
    }
}

/// Probabilities at each row's temperature.
fn heated(logits: &Tensor, probabilities: &Tensor, rows: &[Row<'_>]) -> Result<Tensor, TorchError> {
    if rows.iter().all(|r| r.sampling.temperature == 1.0) {
        return Ok(probabilities.shallow_clone());
    }
    let temperatures: Vec<f32> = rows.iter().map(|r| r.sampling.temperature as f32).collect();
    let temperatures = Tensor::f_from_slice(&temperatures)?.f_unsqueeze(1)?.f_to_device(logits.device())?;
    // The largest is subtracted first, so that a temperature near 0 is greedy and not infinite.
    let mut lowered = logits.f_sub(&logits.f_amax(-1, true)?)?;
    Ok(lowered.f_div_(&temperatures)?.f_softmax(-1, Kind::Float)?)
}

/// First index at which the cumulative sum exceeds the uniform's share of the total; `[rows, 1]`, i64.
///
/// First among the sums of blocks, then within one block: a running sum over the vocabulary is slow on
/// a CPU and gathers rounding errors.
fn invert(probabilities: &Tensor, rows: &[Row<'_>]) -> Result<Tensor, TorchError> {
    let (count, vocabulary) = probabilities.size2()?;
    let block = (1..=1024).rev().find(|size| vocabulary % size == 0).unwrap_or(1);
    let blocks = vocabulary / block;
    let uniforms: Vec<f32> = rows.iter().map(|r| r.uniform).collect();
    let uniforms = Tensor::f_from_slice(&uniforms)?.f_unsqueeze(1)?.f_to_device(probabilities.device())?;

    let parts = probabilities.f_view([count, blocks, block])?;
    let (in_block, rest) = search(&parts.f_sum_dim_intlist(2_i64, false, Kind::Float)?, &uniforms)?;
    let place = in_block.f_unsqueeze(2)?.f_expand([count, 1, block], false)?;
    let chosen = parts.f_gather(1, &place, false)?.f_squeeze_dim(1)?;
    let (offset, _) = search(&chosen, &rest)?;
    Ok(in_block.f_mul_scalar(block)?.f_add(&offset)?)
}

/// Where `shares` of the total (`[rows, 1]`) fall among `weights` (`[rows, n]`): the place, `[rows, 1]`
/// i64, and the share of that place's own weight. A place without weight is never found.
fn search(weights: &Tensor, shares: &Tensor) -> Result<(Tensor, Tensor), TorchError> {
    let last = weights.size2()?.1 - 1;
    let cumulative = weights.f_cumsum(-1, Kind::Float)?;
    let total = cumulative.f_narrow(1, last, 1)?;
    let targets = shares.f_clamp(0.0, 1.0 - f64::from(f32::EPSILON))?.f_mul(&total)?;
    let places = targets.f_searchsorted(&cumulative, false, true, "right", None::<Tensor>)?.f_clamp_max(last)?;
    let weight = weights.f_gather(1, &places, false)?;
    let before = cumulative.f_gather(1, &places, false)?.f_sub(&weight)?;
    Ok((places, targets.f_sub(&before)?.f_div(&weight)?))
}

/// Rows under top-k, top-p or min-p; `[rows, 1]`, i64.
fn filtered(probabilities: &Tensor, rows: &[Row<'_>]) -> Result<Tensor, TorchError> {
    let stay = stay(probabilities, rows)?;
    let tokens: Vec<i64> = stay.iter().zip(rows).map(|(stay, row)| pick(stay, row.uniform)).collect();
    Ok(Tensor::f_from_slice(&tokens)?.f_unsqueeze(1)?.f_to_device(probabilities.device())?)
}

/// The tokens that each row's filters leave, likeliest first, with their probabilities before.
///
/// The likeliest tokens are looked at on the host, more and more of them until it is certain which
/// stay: sorting the vocabulary is dear on a CPU and seldom needed.
fn stay(probabilities: &Tensor, rows: &[Row<'_>]) -> Result<Vec<Vec<(f64, i64)>>, TorchError> {
    let vocabulary = probabilities.size2()?.1 as usize;
    let mut stay = vec![Vec::new(); rows.len()];
    let mut open: Vec<usize> = (0..rows.len()).collect();
    let mut look = vocabulary.min(128);
    while !open.is_empty() {
        let places: Vec<i64> = open.iter().map(|i| *i as i64).collect();
        let places = Tensor::f_from_slice(&places)?.f_to_device(probabilities.device())?;
        let (top, ids) = probabilities.f_index_select(0, &places)?.f_topk(look as i64, -1, true, true)?;
        let host = to_host(&Tensor::f_cat(&[top.f_to_kind(Kind::Double)?, ids.f_to_kind(Kind::Double)?], 1)?)?;
        let mut undecided = Vec::new();
        for (&row, host) in open.iter().zip(host.chunks_exact(2 * look)) {
            let (top, ids) = host.split_at(look);
            let mut likeliest: Vec<(f64, i64)> = top.iter().zip(ids).map(|(p, id)| (*p, *id as i64)).collect();
            match kept(&mut likeliest, look == vocabulary, rows[row].sampling) {
                Some(count) => {
                    likeliest.truncate(count);
                    stay[row] = likeliest;
                }
                None => undecided.push(row),
            }
        }
        open = undecided;
        look = vocabulary.min(look * 8);
    }
    Ok(stay)
}

/// How many of the likeliest tokens stay, in transformers' order of filters; `None` where more have to
/// be looked at. Of equally likely tokens the one with the lower id comes first; all that are as
/// likely as the last of top-k stay.
fn kept(likeliest: &mut [(f64, i64)], complete: bool, s: &Sampling) -> Option<usize> {
    likeliest.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let (most, least) = (likeliest.first()?.0, likeliest.last()?.0);
    // Of those equal to the last that was looked at, others may have been left out.
    let known = if complete { likeliest.len() } else { likeliest.partition_point(|t| t.0 > least) };
    let known = &likeliest[..known];
    let mut count = complete.then_some(known.len());
    let mut total = 1.0;
    if let Some(k) = s.top_k {
        match known.get(k.saturating_sub(1)) {
            Some(last) => {
                let stay = known.partition_point(|t| t.0 >= last.0);
                total = known[..stay].iter().map(|t| t.0).sum();
                count = Some(stay);
            }
            None if complete => {}
            None => return None,
        }
    }
    if s.top_p < 1.0 {
        let mut sum = 0.0;
        // The token that crosses the threshold stays.
        let crossing = known[..count.unwrap_or(known.len())].iter().position(|t| {
            sum += t.0;
            sum >= s.top_p * total
        });
        count = crossing.map(|i| i + 1).or(count);
    }
    if let Some(min_p) = s.min_p {
        let stay = known.partition_point(|t| t.0 >= most * min_p);
        if stay < known.len() || complete {
            count = Some(count.map_or(stay, |c| c.min(stay)).max(1));
        }
    }
    count
}

fn pick(likeliest: &[(f64, i64)], uniform: f32) -> i64 {
    let target = f64::from(uniform) * likeliest.iter().map(|t| t.0).sum::<f64>();
    let mut sum = 0.0;
    let found = likeliest.iter().find(|t| {
        sum += t.0;
        sum > target
    });
    found.or(likeliest.last()).map_or(0, |t| t.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::Stream;

    const LOGITS: [f32; 6] = [1.0, 3.0, -2.0, 2.5, 0.0, 2.9];
    const DRAWS: usize = 20_000;

    fn sampling() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::greedy(1) }
    }

    fn row(sampling: &Sampling, uniform: f32) -> Row<'_> {
        Row { sampling, uniform, seen: None }
    }

    /// How often each token comes in many draws.
    fn counts(logits: &Tensor, s: &Sampling) -> Vec<f64> {
        let logits = logits.unsqueeze(0).repeat([1000, 1]);
        let mut counts = vec![0.0; logits.size()[1] as usize];
        for batch in 0..DRAWS / 1000 {
            let uniform = |index| Stream { key: 9, row: batch as u64, index }.uniform(3);
            let rows: Vec<_> = (0..1000).map(|i| row(s, uniform(i))).collect();
            for drawn in draw(&logits, &rows).unwrap() {
                counts[drawn.token as usize] += 1.0;
            }
        }
        counts
    }

    fn softmax(logits: &[f32], temperature: f32, keep: impl Fn(usize) -> bool) -> Vec<f64> {
        let weight = |i: usize| if keep(i) { f64::from(logits[i] / temperature).exp() } else { 0.0 };
        let total: f64 = (0..logits.len()).map(weight).sum();
        (0..logits.len()).map(|i| weight(i) / total).collect()
    }

    /// Pearson's chi-square over the tokens that are expected at least five times, against five
    /// standard deviations above its mean.
    fn follows(counts: &[f64], expected: &[f64]) {
        let (mut statistic, mut freedom) = (0.0, -1.0);
        for (i, (count, p)) in counts.iter().zip(expected).enumerate() {
            let wanted = p * DRAWS as f64;
            assert!(*p > 0.0 || *count == 0.0, "token {i} was cut off and came {count} times");
            if wanted >= 5.0 {
                statistic += (count - wanted) * (count - wanted) / wanted;
                freedom += 1.0;
            }
        }
        let limit = freedom + 5.0 * (2.0 * freedom + 1.0_f64).sqrt();
        assert!(statistic <= limit, "chi-square {statistic} of {freedom} degrees");
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = Tensor::from_slice(&LOGITS);
        let check = |s: &Sampling, temperature: f32, keep: &[usize]| {
            follows(&counts(&logits, s), &softmax(&LOGITS, temperature, |i| keep.contains(&i)));
        };
        let all = [0, 1, 2, 3, 4, 5];
        check(&sampling(), 1.0, &all);
        check(&Sampling { temperature: 0.5, ..sampling() }, 0.5, &all);
        check(&Sampling { top_k: Some(3), ..sampling() }, 1.0, &[1, 5, 3]);
        check(&Sampling { top_k: Some(3), temperature: 2.0, ..sampling() }, 2.0, &[1, 5, 3]);
        // 1 and 5 hold 0.705 of it: the token that crosses 0.8 stays
        check(&Sampling { top_p: 0.8, ..sampling() }, 1.0, &[1, 5, 3]);
        check(&Sampling { top_p: 0.7, ..sampling() }, 1.0, &[1, 5]);
        check(&Sampling { top_p: 0.3, ..sampling() }, 1.0, &[1]);
        check(&Sampling { min_p: Some(0.5), ..sampling() }, 1.0, &[1, 5, 3]);
        check(&Sampling { min_p: Some(1.0), ..sampling() }, 1.0, &[1]);
        // a share of what top-k left
        check(&Sampling { top_k: Some(2), top_p: 0.4, ..sampling() }, 1.0, &[1]);
    }

    #[test]
    fn large_vocabularies_are_drawn_in_blocks_and_looked_at_in_parts() {
        // 3 blocks of 1024, nearly flat: top-p has to look past the first 128
        let values: Vec<f32> = (0..3072).map(|i| ((i * 37) % 3072) as f32 / 1024.0).collect();
        let logits = Tensor::from_slice(&values);
        let exact = softmax(&values, 1.0, |_| true);
        let by_256 = |counts: &[f64]| counts.chunks(256).map(|c| c.iter().sum()).collect::<Vec<f64>>();
        follows(&by_256(&counts(&logits, &sampling())), &by_256(&exact));
        let mut order: Vec<usize> = (0..3072).collect();
        order.sort_by(|a, b| exact[*b].total_cmp(&exact[*a]));
        let mut sum = 0.0;
        let crossing = order
            .iter()
            .position(|i| {
                sum += exact[*i];
                sum >= 0.5
            })
            .unwrap();
        let expected = softmax(&values, 1.0, |i| order[..=crossing].contains(&i));
        follows(&by_256(&counts(&logits, &Sampling { top_p: 0.5, ..sampling() })), &by_256(&expected));
    }

    #[test]
    fn tokens_without_probability_are_never_drawn() {
        let mut values = [f32::NEG_INFINITY; 2048];
        values[1500] = 1.0;
        values[3] = 1.0;
        let logits = Tensor::from_slice(&values).unsqueeze(0).repeat([3, 1]);
        let s = sampling();
        let rows = [0.0, 0.499, 1.0 - f32::EPSILON / 2.0].map(|uniform| row(&s, uniform));
        let tokens: Vec<u32> = draw(&logits, &rows).unwrap().iter().map(|d| d.token).collect();
        assert_eq!(tokens, [3, 3, 1500]);
    }

    #[test]
    fn ties() {
        let logits = Tensor::from_slice(&[0.0_f32, 2.0, 1.0, 2.0, 1.0]);
        // the lower id first, and all that are as likely as the last of top-k
        let first = |s: &Sampling| counts(&logits, s).iter().map(|c| *c > 0.0).collect::<Vec<_>>();
        assert_eq!(first(&Sampling::greedy(1)), [false, true, false, false, false]);
        assert_eq!(first(&Sampling { top_k: Some(3), ..sampling() }), [false, true, true, true, true]);
        assert_eq!(first(&Sampling { top_p: 0.1, ..sampling() }), [false, true, false, false, false]);
        // more equals than are looked at first
        let flat = Tensor::zeros([1000], (Kind::Float, tch::Device::Cpu));
        let drawn = counts(&flat, &Sampling { top_k: Some(10), ..sampling() });
        assert!(drawn.iter().all(|c| *c > 0.0));
    }

    #[test]
    fn mixed_rows_keep_their_own_way() {
        let logits = Tensor::from_slice(&LOGITS).unsqueeze(0).repeat([4, 1]);
        let (greedy, plain) = (Sampling::greedy(1), sampling());
        let filtered = Sampling { top_k: Some(2), top_p: 0.1, ..sampling() };
        let hot = Sampling { temperature: 100.0, ..sampling() };
        let drawn = draw(&logits, &[row(&greedy, 0.9), row(&plain, 0.999_999), row(&filtered, 0.9), row(&hot, 0.45)]);
        let drawn = drawn.unwrap();
        assert_eq!(drawn.iter().map(|d| d.token).collect::<Vec<_>>(), [1, 5, 1, 2]);
        for d in drawn {
            let expected = softmax(&LOGITS, 1.0, |_| true)[d.token as usize].ln();
            assert!((f64::from(d.logprob) - expected).abs() < 1e-5, "at temperature 1");
        }
    }

    #[test]
    fn logprobs_of_the_unlikely_are_finite() {
        let logits = Tensor::from_slice(&[0.0_f32, -200.0]).unsqueeze(0);
        let hot = Sampling { temperature: 1000.0, ..sampling() };
        let drawn = draw(&logits, &[row(&hot, 0.99)]).unwrap();
        assert_eq!((drawn[0].token, drawn[0].logprob), (1, -200.0));
    }

    fn seen(s: &Sampling, prompt: &[u32], answer: &[u32]) -> Option<Seen> {
        let mut seen = Seen::new(s, prompt);
        seen.iter_mut().for_each(|seen| answer.iter().for_each(|token| seen.push(*token)));
        seen
    }

    /// A case of tests/oracle/sampling.py.
    #[derive(serde::Deserialize)]
    struct Case {
        repetition_penalty: f64,
        presence_penalty: f64,
        temperature: f64,
        top_k: Option<usize>,
        top_p: f64,
        min_p: Option<f64>,
        logits: Vec<f32>,
        prompt: Vec<u32>,
        generated: Vec<u32>,
        /// Probabilities of the tokens that stay.
        expected: std::collections::BTreeMap<i64, f64>,
    }

    impl Case {
        fn read() -> Vec<Self> {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sampling.json");
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
        }

        fn sampling(&self) -> Sampling {
            let &Self { repetition_penalty, presence_penalty, temperature, top_k, top_p, min_p, .. } = self;
            Sampling { repetition_penalty, presence_penalty, temperature, top_k, top_p, min_p, ..sampling() }
        }

        fn differs(&self, found: &[(i64, f64)]) -> bool {
            let total: f64 = found.iter().map(|(_, p)| p).sum();
            found.len() != self.expected.len()
                || found
                    .iter()
                    .any(|(token, p)| self.expected.get(token).is_none_or(|e| (p / total - e).abs() > 1e-5 * e + 1e-7))
        }
    }

    #[test]
    fn distributions_are_those_of_transformers() {
        let cases = Case::read();
        let samplings: Vec<_> = cases.iter().map(Case::sampling).collect();
        let seen: Vec<_> = cases.iter().zip(&samplings).map(|(c, s)| seen(s, &c.prompt, &c.generated)).collect();
        let both = samplings.iter().zip(&seen);
        let rows: Vec<_> = both.map(|(s, seen)| Row { seen: seen.as_ref(), ..row(s, 0.5) }).collect();
        let logits = Tensor::stack(&cases.iter().map(|c| Tensor::from_slice(&c.logits)).collect::<Vec<_>>(), 0);
        // All in one batch, as a step of the server.
        let lowered = penalised(&logits, &rows).unwrap().unwrap();
        let heated = heated(&lowered, &lowered.softmax(-1, Kind::Float), &rows).unwrap();
        let stay = stay(&heated, &rows).unwrap();
        let drawn = draw(&logits, &rows).unwrap();
        for (i, case) in cases.iter().enumerate() {
            let found: Vec<_> = match way(&samplings[i]) {
                Way::Filtered => stay[i].iter().map(|(p, token)| (*token, *p)).collect(),
                _ => {
                    (0..).zip(Vec::<f32>::try_from(heated.get(i as i64)).unwrap().into_iter().map(f64::from)).collect()
                }
            };
            assert!(!case.differs(&found), "case {i}, {:?}: {found:?}", samplings[i]);
            assert!(case.expected.contains_key(&i64::from(drawn[i].token)), "case {i}");
            let unpenalised = softmax(&case.logits, 1.0, |_| true)[drawn[i].token as usize].ln();
            assert!(
                (f64::from(drawn[i].logprob) - unpenalised).abs() < 1e-5,
                "case {i}: at temperature 1, unpenalised"
            );
        }
    }

    #[test]
    fn penalties_touch_their_own_rows_only() {
        let logits = Tensor::from_slice(&LOGITS).unsqueeze(0).repeat([3, 1]);
        let (none, present) = (Sampling::greedy(1), Sampling { presence_penalty: 0.2, ..Sampling::greedy(1) });
        let repeated = Sampling { repetition_penalty: 1.5, ..Sampling::greedy(1) };
        assert_eq!(Seen::new(&none, &[1]), None);
        // What is only in the prompt counts as a repetition and not as present; ids beyond the logits are nothing.
        let (present_seen, repeated_seen) = (seen(&present, &[5], &[1, 1]), seen(&repeated, &[5, 1, 99], &[1]));
        let rows = [
            row(&none, 0.0),
            Row { seen: present_seen.as_ref(), ..row(&present, 0.0) },
            Row { seen: repeated_seen.as_ref(), ..row(&repeated, 0.0) },
        ];
        let tokens: Vec<u32> = draw(&logits, &rows).unwrap().iter().map(|d| d.token).collect();
        assert_eq!(tokens, [1, 5, 3]);
        assert_eq!(Vec::<f32>::try_from(logits.get(1)).unwrap(), LOGITS, "the logits stay as they are");
    }
}
