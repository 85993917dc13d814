//! What a round's verdicts and scores say about the judge.
//!
//! A judge that lies looks busy: its verdicts follow the place of an answer, its length, or nothing. Counted
//! from the rows that a stage sends, those of an earlier run too.

use std::collections::HashMap;

use datafusion::arrow::array::{Array, AsArray, BooleanArray, Float64Array, StringArray};
use datafusion::arrow::datatypes::{Float64Type, UInt32Type};
use datafusion::arrow::record_batch::RecordBatch;
use metrics::{Counter, Gauge};
use serde_json::{Value, json};

use crate::engine::StageContext;
use crate::judge::Verdict;
use crate::llm::Finish;
use crate::observe::Metrics;
use crate::stages::columns;

/// Bars of the histogram of scores.
const BARS: usize = 10;

/// The counts of a stage in a round.
pub struct Health {
    verdicts: [(Verdict, u64, Counter); 3],
    unreadable: (u64, Counter),
    /// Of them, those where the judge was cut off.
    cut: u64,
    judged: u64,
    /// Pairs asked about in both orders, and those where both named the same answer.
    both: (u64, u64),
    first_slot: Mean,
    /// Characters of the preferred answer and of the other.
    characters: [Mean; 2],
    /// Pairs where the preferred answer is the longer one, of those with a difference.
    longer: Mean,
    scores: Scores,
    /// With the labelled set.
    agreement: Option<Value>,
    metrics: Metrics,
    stage: String,
    /// Those that have had a value.
    gauges: HashMap<&'static str, Gauge>,
}

/// A mean that is added to.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }

    fn json(&self) -> Value {
        json!(self.value())
    }
}

/// The distribution of scores.
#[derive(Debug, Clone, Default)]
struct Scores {
    /// Lowest and highest of the scale; `None` where the rule has none.
    range: Option<[f64; 2]>,
    all: Mean,
    squares: f64,
    bars: [u64; BARS],
    /// At the top of the scale.
    top: u64,
    variance: Mean,
    /// Of scores and lengths, for their correlation.
    with_length: Moments,
}

/// Sums for Pearson's correlation.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    n: f64,
    x: f64,
    y: f64,
    xx: f64,
    yy: f64,
    xy: f64,
}

impl Moments {
    fn add(&mut self, x: f64, y: f64) {
        self.n += 1.0;
        self.x += x;
        self.y += y;
        self.xx += x * x;
        self.yy += y * y;
        self.xy += x * y;
    }

    /// `None` where either side is constant.
    fn correlation(&self) -> Option<f64> {
        let Self { n, x, y, xx, yy, xy } = *self;
        let (a, b) = (n * xx - x * x, n * yy - y * y);
        (a > 1e-9 * n * xx && b > 1e-9 * n * yy).then(|| (n * xy - x * y) / (a * b).sqrt())
    }
}

impl Health {
    /// `range` is the scale of the scores, where there are scores and a scale.
    pub fn new(ctx: &StageContext, range: Option<[f64; 2]>) -> Self {
        Self::of(&ctx.metrics, &ctx.stage, range)
    }

    fn of(metrics: &Metrics, stage: &str, range: Option<[f64; 2]>) -> Self {
        let counter = |verdict: Verdict| {
            let labels = [("stage", stage), ("verdict", verdict.as_str())];
            (verdict, 0, metrics.counter("flowrun_judge_verdicts_total", &labels))
        };
        Self {
            verdicts: [Verdict::A, Verdict::B, Verdict::Tie].map(counter),
            unreadable: (0, metrics.counter("flowrun_judge_unreadable_total", &[("stage", stage)])),
            cut: 0,
            judged: 0,
            both: (0, 0),
            first_slot: Mean::default(),
            characters: [Mean::default(); 2],
            longer: Mean::default(),
            scores: Scores { range, ..Scores::default() },
            agreement: None,
            metrics: metrics.clone(),
            stage: stage.into(),
            gauges: HashMap::new(),
        }
    }

    /// A figure that this judge has; one that it can't have is no metric, or it would be watched as 0.
    fn tell(&mut self, name: &'static str, value: Option<f64>) {
        if let Some(value) = value {
            let fresh = || self.metrics.gauge(name, &[("stage", &self.stage)]);
            self.gauges.entry(name).or_insert_with(fresh).set(value);
        }
    }

    /// Counts rows that the stage sends.
    pub fn count(&mut self, out: &RecordBatch) {
        let pairs = out.column_by_name("verdict").is_some();
        // The stage made these rows; what can't be read in them is not counted.
        let _ = if pairs { self.count_pairs(out) } else { self.count_scores(out) };
        let scale = self.scores.range.is_some();
        let ratio = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        self.tell("flowrun_judge_tie_ratio", ratio(self.ties(), self.judged).filter(|_| pairs));
        self.tell("flowrun_judge_unreadable_ratio", ratio(self.unreadable.0, self.judged));
        self.tell("flowrun_judge_first_slot_ratio", self.first_slot.value());
        self.tell("flowrun_judge_swap_consistency_ratio", ratio(self.both.1, self.both.0));
        self.tell("flowrun_judge_longer_wins_ratio", self.longer.value());
        self.tell("flowrun_judge_score_mean", self.scores.all.value());
        self.tell(
            "flowrun_judge_score_saturation_ratio",
            ratio(self.scores.top, self.scores.all.count).filter(|_| scale),
        );
        self.tell("flowrun_judge_length_correlation", self.scores.with_length.correlation());
    }

    /// What the judge made of the labelled set: the share of verdicts, or the rank correlation of scores.
    pub fn agreement(&mut self, outcome: Value) {
        let agreement = outcome["agreement"].as_f64().or(outcome["kendall"].as_f64());
        self.tell("flowrun_judge_labelled_agreement", agreement);
        self.agreement = Some(outcome);
    }

    fn share(&self, of: u64) -> f64 {
        if self.judged == 0 { 0.0 } else { of as f64 / self.judged as f64 }
    }

    fn ties(&self) -> u64 {
        self.verdicts.iter().find(|(v, ..)| *v == Verdict::Tie).map_or(0, |(_, n, _)| *n)
    }

    fn count_pairs(&mut self, out: &RecordBatch) -> Option<()> {
        let verdicts = columns::strings(out, "verdict").ok()?;
        let parsed = out.column_by_name("parsed")?.as_boolean_opt()?;
        let consistent: &BooleanArray = out.column_by_name("consistent")?.as_boolean_opt()?;
        let first_slot: &Float64Array = out.column_by_name("first_slot")?.as_primitive_opt::<Float64Type>()?;
        let (chosen, rejected) = (columns::strings(out, "chosen").ok()?, columns::strings(out, "rejected").ok()?);
        for i in 0..out.num_rows() {
            self.judged += 1;
            for (verdict, count, counter) in &mut self.verdicts {
                if verdict.as_str() == verdicts.value(i) {
                    *count += 1;
                    counter.increment(1);
                }
            }
            if !parsed.value(i) {
                self.count_unreadable(was_cut(out, i));
            }
            if consistent.is_valid(i) {
                self.both.0 += 1;
                self.both.1 += u64::from(consistent.value(i));
            }
            if first_slot.is_valid(i) {
                self.first_slot.add(first_slot.value(i));
            }
            if chosen.is_valid(i) && rejected.is_valid(i) {
                self.count_lengths(characters(&chosen, i), characters(&rejected, i));
            }
        }
        Some(())
    }

    fn count_unreadable(&mut self, cut: bool) {
        self.unreadable.0 += 1;
        self.unreadable.1.increment(1);
        self.cut += u64::from(cut);
    }

    fn count_lengths(&mut self, chosen: f64, rejected: f64) {
        self.characters[0].add(chosen);
        self.characters[1].add(rejected);
        if chosen != rejected {
            self.longer.add(f64::from(u8::from(chosen > rejected)));
        }
    }

    fn count_scores(&mut self, out: &RecordBatch) -> Option<()> {
        let scores = out.column_by_name("score")?.as_primitive_opt::<Float64Type>()?;
        let variances = out.column_by_name("score_variance")?.as_primitive_opt::<Float64Type>()?;
        let samples = out.column_by_name("score_samples").and_then(|c| c.as_primitive_opt::<UInt32Type>());
        let texts = columns::strings(out, "generation").ok();
        let histogram = self.metrics.histogram("flowrun_judge_score", &[("stage", &self.stage)]);
        for i in 0..out.num_rows() {
            self.judged += 1;
            if scores.is_null(i) || !scores.value(i).is_finite() || samples.is_some_and(|s| s.value(i) == 0) {
                self.count_unreadable(was_cut(out, i));
                continue;
            }
            let length = texts.as_ref().map(|texts| characters(texts, i));
            self.scores.add(scores.value(i), variances.is_valid(i).then(|| variances.value(i)), length);
            histogram.record(scores.value(i));
        }
        Some(())
    }

    /// For `summary.json`.
    pub fn summary(&self) -> Value {
        let mut summary = json!({
            "judged": self.judged,
            "unreadable": self.unreadable.0,
            "unreadable_rate": (self.judged > 0).then(|| self.share(self.unreadable.0)),
            "unreadable_cut": self.cut,
        });
        let pairs: u64 = self.verdicts.iter().map(|(_, n, _)| n).sum();
        if pairs > 0 {
            let count = |wanted: Verdict| self.verdicts.iter().find(|(v, ..)| *v == wanted).map_or(0, |(_, n, _)| *n);
            summary["pairs"] = json!(pairs);
            summary["verdict_a"] = json!(count(Verdict::A));
            summary["verdict_b"] = json!(count(Verdict::B));
            summary["ties"] = json!(self.ties());
            summary["tie_rate"] = json!(self.share(self.ties()));
            summary["first_slot_rate"] = self.first_slot.json();
            summary["swap_consistency"] = json!((self.both.0 > 0).then(|| self.both.1 as f64 / self.both.0 as f64));
            summary["longer_wins_rate"] = self.longer.json();
            summary["chosen_characters"] = self.characters[0].json();
            summary["rejected_characters"] = self.characters[1].json();
        }
        if self.scores.all.count > 0 {
            summary["score"] = self.scores.summary();
        }
        if let Some(agreement) = &self.agreement {
            summary["labelled"] = agreement.clone();
        }
        summary
    }

    /// A line for the log where the verdicts are worth nothing.
    pub fn warn(&self, stage: &str) {
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        let share = self.share(self.unreadable.0);
        if share == 1.0 || (self.judged >= 8 && share > 0.5) {
            let share = percent(share);
            tracing::warn!(stage, "{share} of the judge's answers could not be read; look at judge_generation");
        }
        if self.cut > 0 {
            let cut = self.cut;
            tracing::warn!(stage, "{cut} of the judge's answers were cut off before a verdict; raise max_new_tokens");
        }
        if self.judged >= 8 && self.ties() == self.judged && share < 0.5 {
            tracing::warn!(stage, "all {} verdicts are ties, so no pairs come of them", self.judged);
        }
        let slot = self.first_slot.value().filter(|_| self.first_slot.count >= 20);
        if let Some(slot) = slot.filter(|slot| !(0.1..=0.9).contains(slot)) {
            let share = percent(slot);
            tracing::warn!(
                stage,
                "{share} of the verdicts are for the answer shown first: the judge has a position bias"
            );
        }
    }
}

/// Whether a text of the judge about row `i` was cut off.
fn was_cut(out: &RecordBatch, i: usize) -> bool {
    let cut = |reason: Option<&str>| reason.is_some_and(|reason| reason != Finish::Stop.as_str());
    let of_pair =
        columns::strings(out, "judge_finish_reason").is_ok_and(|all| all.is_valid(i) && cut(Some(all.value(i))));
    let lists = out.column_by_name("judge_finish_reasons").and_then(|lists| lists.as_list_opt::<i32>());
    let reasons = lists.filter(|lists| lists.is_valid(i)).map(|lists| lists.value(i));
    let of_score = reasons.is_some_and(|all| all.as_string_opt::<i32>().is_some_and(|all| all.iter().any(cut)));
    of_pair || of_score
}

fn characters(texts: &StringArray, i: usize) -> f64 {
    texts.value(i).chars().count() as f64
}

impl Scores {
    fn add(&mut self, score: f64, variance: Option<f64>, length: Option<f64>) {
        self.all.add(score);
        self.squares += score * score;
        variance.into_iter().for_each(|v| self.variance.add(v));
        length.into_iter().for_each(|length| self.with_length.add(score, length));
        if let Some([low, high]) = self.range {
            let place = (score - low) / (high - low) * BARS as f64;
            self.bars[(place.max(0.0) as usize).min(BARS - 1)] += 1;
            self.top += u64::from(score >= high);
        }
    }

    fn summary(&self) -> Value {
        let (n, mean) = (self.all.count as f64, self.all.value().unwrap_or(f64::NAN));
        json!({
            "mean": mean,
            "deviation": (self.squares / n - mean * mean).max(0.0).sqrt(),
            "range": self.range,
            "histogram": self.range.map(|_| self.bars),
            "saturation": self.range.map(|_| self.top as f64 / n),
            "mean_variance": self.variance.value(),
            "length_correlation": self.with_length.correlation(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use datafusion::arrow::array::{ArrayRef, UInt32Array};

    use super::*;

    #[test]
    fn pairs_are_counted() {
        let mut health = Health::of(&Metrics::default(), "judge", None);
        let text = |of: Vec<Option<&str>>| Arc::new(StringArray::from(of)) as ArrayRef;
        let batch = RecordBatch::try_from_iter([
            ("verdict", text(vec![Some("a"), Some("b"), Some("tie"), Some("tie")])),
            ("parsed", Arc::new(BooleanArray::from(vec![true, true, true, false]))),
            ("judge_finish_reason", text(vec![Some("stop"), Some("length"), None, Some("length")])),
            ("consistent", Arc::new(BooleanArray::from(vec![Some(true), Some(true), Some(false), None]))),
            ("first_slot", Arc::new(Float64Array::from(vec![Some(0.5), Some(0.5), Some(1.0), None]))),
            ("chosen", text(vec![Some("long answer"), Some("b"), None, None])),
            ("rejected", text(vec![Some("short"), Some("also long"), None, None])),
        ])
        .unwrap();
        health.count(&batch);
        let summary = health.summary();
        assert_eq!(summary["pairs"], 4);
        assert_eq!(summary["tie_rate"], 0.5);
        assert_eq!((&summary["unreadable_rate"], &summary["unreadable_cut"]), (&json!(0.25), &json!(1)));
        assert!((summary["swap_consistency"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((summary["first_slot_rate"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(summary["longer_wins_rate"], 0.5);
        assert_eq!(summary["chosen_characters"], 6.0);
    }

    #[test]
    fn scores_are_counted() {
        let mut health = Health::of(&Metrics::default(), "judge", Some([0.0, 5.0]));
        let batch = RecordBatch::try_from_iter([
            ("generation", Arc::new(StringArray::from(vec!["a", "bbb", "cc", "x"])) as ArrayRef),
            ("score", Arc::new(Float64Array::from(vec![Some(1.0), Some(5.0), Some(3.0), None]))),
            ("score_variance", Arc::new(Float64Array::from(vec![Some(0.0), Some(1.0), Some(0.5), None]))),
            ("score_samples", Arc::new(UInt32Array::from(vec![1, 1, 1, 0]))),
        ])
        .unwrap();
        health.count(&batch);
        let summary = health.summary();
        assert_eq!(summary["unreadable"], 1);
        let score = &summary["score"];
        assert_eq!(score["mean"], 3.0);
        assert!((score["saturation"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-12);
        assert!((score["length_correlation"].as_f64().unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(score["histogram"], json!([0, 0, 1, 0, 0, 0, 1, 0, 0, 1]));
        assert!(Moments::default().correlation().is_none());
    }
}
