//! The figures as a page and as a plot.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;

use flowrun::engine::Summary;
use flowrun::judge::interval::wilson;

use crate::measure::{Accuracy, accuracies, agreement, mean};

const ROUNDS: u32 = 3;

type Tasks = BTreeMap<String, Accuracy>;

/// By round, from what the model could do before.
fn rounds(run: &Summary) -> Result<Vec<Tasks>, Box<dyn Error>> {
    let mut all = vec![accuracies(run, 1, "before")?];
    for round in 1..=ROUNDS {
        all.push(accuracies(run, round, "answers")?);
    }
    Ok(all)
}

fn seconds(run: &Summary) -> f64 {
    run.json["seconds_wall"].as_f64().unwrap_or(f64::NAN)
}

pub fn page(runs: &[Summary], own: &Summary) -> Result<String, Box<dyn Error>> {
    let mut out = String::from(INTRODUCTION);
    out += "\n| seed | round | mean | largest | last | sum | mean, lenient | pairs | seconds |\n";
    out += "|---|---|---|---|---|---|---|---|---|\n";
    for (seed, run) in runs.iter().enumerate() {
        for (round, tasks) in rounds(run)?.iter().enumerate() {
            let pairs = (round > 0).then(|| run.json["rounds"][round - 1]["judge"]["paired"].to_string());
            let time = if round == ROUNDS as usize { format!("{:.0}", seconds(run)) } else { String::new() };
            let label = if round == 0 { "before".into() } else { round.to_string() };
            let of = |task: &str| tasks.get(task).map_or(f64::NAN, Accuracy::share);
            writeln!(
                out,
                "| {seed} | {label} | **{:.3}** | {:.3} | {:.3} | {:.3} | {:.3} | {} | {time} |",
                mean(tasks, Accuracy::share),
                of("largest"),
                of("last"),
                of("sum"),
                mean(tasks, Accuracy::lenient_share),
                pairs.unwrap_or_default(),
            )?;
        }
    }
    out += "\n![Accuracy by round](learning-rounds.svg)\n";
    others(&mut out, runs)?;
    gates(&mut out, runs)?;
    own_judge(&mut out, own)?;
    Ok(out)
}

const INTRODUCTION: &str = "\
# Does the loop learn?

`make learn` writes this page: it runs `flows/iterative_rpo.toml` for three seeds and makes the tables and the plot.

The model is SmolLM2-135M-Instruct. It is asked two-digit sums, the last word of a list and the largest of three
numbers; each round has 96 questions and eight answers to each. A rule says which answers are right, and pairs of a
right and a wrong answer train an adapter (DPO plus the likelihood of the chosen answer). The figures are for greedy
answers to 300 held-out questions per task. These share no pair of numbers, no triple and no word with the training
questions (`tests/it/learn.rs`). An answer is right if its last word is the expected one. *Lenient* accepts the
expected word anywhere, so the difference is due to format alone. The questions, answers and scores of every round are
in `runs/learn/rule-SEED/round-R/measured/rows.parquet`. Seconds are for the whole run, including all measurements, on
a machine that also did other work. [judging.md](judging.md) discusses the figures.
";

/// Tasks that were not trained on.
fn others(out: &mut String, runs: &[Summary]) -> Result<(), Box<dyn Error>> {
    *out += "\n## Tasks that were not trained\n\n100 questions each, before and after the three rounds.\n\n";
    *out += "| seed | | difference | first | smallest | mean, lenient |\n|---|---|---|---|---|---|\n";
    for (seed, run) in runs.iter().enumerate() {
        for (label, round, stage) in [("before", 1, "others_before"), ("after", ROUNDS, "others_after")] {
            let tasks = accuracies(run, round, stage)?;
            let of = |task: &str| tasks.get(task).map_or(f64::NAN, Accuracy::share);
            let lenient = mean(&tasks, Accuracy::lenient_share);
            let [d, f, s] = ["difference", "first", "smallest"].map(of);
            writeln!(out, "| {seed} | {label} | {d:.2} | {f:.2} | {s:.2} | {lenient:.2} |")?;
        }
    }
    Ok(())
}

fn gates(out: &mut String, runs: &[Summary]) -> Result<(), Box<dyn Error>> {
    *out += "\n## The gate\n\nSixty held-out questions, the round's adapter against the base; a tie counts half.\n\n";
    *out += "| seed | round | wins | 95 % interval | right, with and without | empty answers |\n|---|---|---|---|---|---|\n";
    for (seed, run) in runs.iter().enumerate() {
        gate_rows(out, &seed.to_string(), run)?;
    }
    Ok(())
}

fn gate_rows(out: &mut String, label: &str, run: &Summary) -> Result<(), Box<dyn Error>> {
    for round in run.json["rounds"].as_array().into_iter().flatten() {
        let gate = &round["gate"];
        let of = |name: &str| gate[name].as_f64().unwrap_or(f64::NAN);
        writeln!(
            out,
            "| {label} | {} | {:.2} | {:.2} to {:.2} | {:.2}, {:.2} | {} |",
            round["round"],
            of("win_rate"),
            of("win_rate_low"),
            of("win_rate_high"),
            of("score"),
            of("score_against"),
            gate["empty"],
        )?;
    }
    Ok(())
}

/// The same tasks with the model's verdicts.
fn own_judge(out: &mut String, own: &Summary) -> Result<(), Box<dyn Error>> {
    *out += "\n## The model as its own judge\n\nThe same questions and answers, with the model's pairwise verdicts \
             (label probabilities in both orders, neighbours among the eight answers) in place of the rule. \
             Agreement is of those pairs where exactly one answer is right; guessing agrees with half.\n\n";
    *out += "| round | pairs with one right answer | ties | agreement | 95 % interval | same verdict in both orders | \
             for the first position | accuracy, mean |\n|---|---|---|---|---|---|---|---|\n";
    let accuracy = rounds(own)?;
    for round in 1..=ROUNDS {
        let found = agreement(own, round)?;
        let judged = (found.pairs - found.ties) as f64;
        let [low, high] = wilson(found.agreed as f64, judged);
        let health = &own.json["rounds"][round as usize - 1]["stages"]["judge"]["health"];
        let of = |name: &str| health[name].as_f64().unwrap_or(f64::NAN);
        writeln!(
            out,
            "| {round} | {} | {} | {:.3} | {low:.3} to {high:.3} | {:.3} | {:.3} | {:.3} |",
            found.pairs,
            found.ties,
            found.agreed as f64 / judged,
            of("swap_consistency"),
            of("first_slot_rate"),
            mean(&accuracy[round as usize], Accuracy::share),
        )?;
    }
    writeln!(
        out,
        "\nMean accuracy before training: {:.3}. The gate, which measures here but does not stop the run:\n",
        mean(&accuracy[0], Accuracy::share)
    )?;
    *out += "| | round | wins | 95 % interval | right, with and without | empty answers |\n|---|---|---|---|---|---|\n";
    gate_rows(out, "own judge", own)
}

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 48.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 40.0;

/// Mean accuracy by round, a line a seed.
pub fn plot(runs: &[Summary]) -> Result<String, Box<dyn Error>> {
    let x = |round: usize| LEFT + (WIDTH - LEFT - 24.0) * round as f64 / f64::from(ROUNDS);
    let y = |share: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\" role=\"img\" aria-label=\"Mean accuracy by round\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for tick in 0..=5 {
        let (share, at) = (f64::from(tick) / 5.0, y(f64::from(tick) / 5.0));
        writeln!(out, "<path d=\"M{LEFT} {at}H{}\" stroke=\"#ddd\"/>", WIDTH - 24.0)?;
        writeln!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{share:.1}</text>", LEFT - 8.0, at + 4.0)?;
    }
    for round in 0..=ROUNDS as usize {
        let label = if round == 0 { "before".into() } else { format!("round {round}") };
        writeln!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", x(round), HEIGHT - 16.0)?;
    }
    for ((seed, run), color) in runs.iter().enumerate().zip(["#1f77b4", "#d62728", "#2ca02c"]) {
        let shares: Vec<f64> = rounds(run)?.iter().map(|tasks| mean(tasks, Accuracy::share)).collect();
        let points: Vec<String> =
            shares.iter().enumerate().map(|(round, share)| format!("{:.1},{:.1}", x(round), y(*share))).collect();
        writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>",
            points.join(" ")
        )?;
        let label = TOP + 16.0 * seed as f64 + 8.0;
        writeln!(out, "<text x=\"{}\" y=\"{label}\" fill=\"{color}\">seed {seed}</text>", LEFT + 12.0)?;
    }
    out += "</svg>\n";
    Ok(out)
}
