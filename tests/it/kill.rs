//! SIGKILL at moments that a seed chooses: nothing is lost and nothing is made twice.
//!
//! Each kill aims at something that the run directory shows (a journal that has grown so far, a
//! table under its temporary name). What was really going on is read from what the kill left.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::support::Case;
use crate::whole::{
    Found, JOURNALED, Random, Recorded, Size, assert_once, assert_reused, events, is_done, journals, recorded,
};

/// What is killed at or in the middle of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Resume,
    Source,
    Mapper,
    Sampler,
    Judge,
    Scorer,
    Split,
    Trainer,
    Checkpoint,
    WaitingMapper,
    Sink,
    Sealing,
    Adapter,
}

use Moment::{
    Adapter, Checkpoint, Judge, Mapper, Resume, Sampler, Scorer, Sealing, Sink, Source, Split, Trainer, WaitingMapper,
};

const MOMENTS: [Moment; 13] =
    [Resume, Source, Mapper, Sampler, Judge, Scorer, Split, Trainer, Checkpoint, WaitingMapper, Sink, Sealing, Adapter];

/// A round passes them in about this order.
const ROUND: [Moment; 12] =
    [Source, Mapper, Sampler, Judge, Scorer, Split, Trainer, Checkpoint, WaitingMapper, Sink, Sealing, Adapter];

/// How long after its append a row is durable, says the journal.
const DURABLE: Duration = Duration::from_secs(2);

#[test]
fn killed_fifteen_times_a_run_ends_as_if_it_never_was() {
    let mut random = Random::seeded("FLOWRUN_KILL_SEED");
    let mut kills = Kills::over(Size::LONG);
    // In the first round before the second, since a finished round isn't worked on again.
    let mut second = ROUND.to_vec();
    let first: Vec<Moment> = (0..6).map(|_| second.remove(random.below(second.len() as u64) as usize)).collect();
    let mut first: Vec<Moment> = ROUND.into_iter().filter(|moment| first.contains(moment)).collect();
    first.insert(random.below(6) as usize, Resume);
    second.insert(random.below(6) as usize, Resume);
    second.push(Resume);
    let plan =
        [(1, first), (2, second)].into_iter().flat_map(|(round, moments)| moments.into_iter().map(move |m| (round, m)));
    let mut plan: Vec<_> = plan.collect();
    while !plan.is_empty() {
        plan = kills.sequence(plan, &mut random);
    }
    println!("{kills:?}");
    assert_eq!(kills.count, 15);
}

#[test]
#[ignore = "a quarter of an hour and more: make soak"]
fn soak_killed_a_hundred_times_in_every_stage_and_every_write() {
    let mut random = Random::seeded("FLOWRUN_KILL_SEED");
    let wanted = std::env::var("FLOWRUN_KILLS").map_or(100, |n| n.parse().expect("FLOWRUN_KILLS is a number"));
    let mut kills = Kills::over(Size::LONG);
    let enough = |kills: &Kills| kills.count >= wanted && MOMENTS.iter().all(|m| kills.hit[m] >= 10);
    for _ in 0..40 {
        if enough(&kills) {
            break;
        }
        let plan = [1, 2].into_iter().flat_map(|round| {
            // What was hit seldom is tried in each round, the rest now and then.
            let tried: Vec<Moment> = ROUND
                .into_iter()
                .filter(|m| kills.hit[m] < 10 && random.share() < 0.8 || random.share() < 0.2)
                .collect();
            tried.into_iter().flat_map(|m| if m == Judge { vec![Resume, m] } else { vec![m] }).map(move |m| (round, m))
        });
        let plan = plan.collect();
        kills.sequence(plan, &mut random);
        println!("{kills:?}");
    }
    assert!(enough(&kills), "{kills:?}");
}

/// A run that nothing disturbed, and others that are killed again and again.
struct Kills {
    size: Size,
    whole: Case,
    expected: Found,
    count: usize,
    hit: BTreeMap<Moment, usize>,
}

impl Debug for Kills {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:<15} {:>5}", "killed in", "times")?;
        self.hit.iter().try_for_each(|(moment, times)| writeln!(f, "{:<15} {times:>5}", format!("{moment:?}")))?;
        write!(f, "{:<15} {:>5}", "kills", self.count)
    }
}

impl Kills {
    fn over(size: Size) -> Self {
        let whole = size.case();
        let began = Instant::now();
        whole.done(&["flow.toml"]);
        println!("undisturbed: {:.1} s", began.elapsed().as_secs_f64());
        let expected = Found::of(&whole.path("runs/tiny"));
        Self { size, whole, expected, count: 0, hit: MOMENTS.into_iter().map(|moment| (moment, 0)).collect() }
    }

    /// Kills one run at each of these moments in turn, lets it end and looks at what it has then. Returns the moments
    /// for which the run came to its end too early.
    fn sequence(&mut self, plan: Vec<(usize, Moment)>, random: &mut Random) -> Vec<(usize, Moment)> {
        let case = self.size.case();
        let mut plan = plan.into_iter().peekable();
        while let Some(&(round, moment)) = plan.peek() {
            let process = Process::start(&case);
            let aim = Aim::at(&self.whole.path("runs/tiny"), round, moment, random);
            let Some(killed) = process.kill(&aim) else { break };
            let hit = killed.moments();
            println!(
                "{:>6.2} s: aimed at {moment:?} of round {round}, hit {hit:?}; {}",
                killed.lived,
                killed.trained()
            );
            killed.assert_kept();
            self.count += 1;
            plan.next();
            hit.iter().for_each(|moment| *self.hit.entry(*moment).or_default() += 1);
        }
        let was_done = is_done(&case.path("runs/tiny"));
        let process = Process::start(&case);
        let (before, after) = (process.before.clone(), "after its kills");
        let ended = process.wait();
        println!("{:>6.2} s to the end; {}", ended.lived, ended.trained());
        ended.assert_kept();
        let run = &ended.process.run;
        if !was_done {
            assert_reused(run, &before, after);
        }
        Found::of(run).assert_equals(&self.expected, after);
        assert!(!run.join("superseded").exists(), "something was set aside as another run's");
        plan.collect()
    }
}

/// What to wait for, and how long after it to kill.
struct Aim {
    file: PathBuf,
    bytes: u64,
    later: Duration,
}

impl Aim {
    fn at(whole: &Path, round: usize, moment: Moment, random: &mut Random) -> Self {
        let in_round = |name: &str| PathBuf::from(format!("round-{round}/{name}"));
        let journal = |stage: &str| in_round(&format!("{stage}/journal"));
        let share = random.share();
        let grown = |file: PathBuf| {
            let bytes = std::fs::metadata(whole.join(&file)).unwrap().len();
            (file, (bytes as f64 * share) as u64, 0)
        };
        let sealed = JOURNALED[random.below(3) as usize];
        let (file, bytes, later) = match moment {
            Resume => (PathBuf::from("plan.json"), 0, 600),
            // The first of its batches is what `clean` begins its table with.
            Source if round == 1 => (PathBuf::from("plan.json"), 0, 60),
            Source => (in_round("prompts"), 0, 60),
            Mapper => (in_round("prefer/rows.parquet.tmp"), 0, 3000),
            Split => (in_round("halves/train.parquet.tmp"), 0, 3000),
            Sampler => grown(journal("sample")),
            Judge => grown(journal("judge")),
            Scorer => grown(journal("likely")),
            Trainer => grown(journal("align")),
            Checkpoint => (in_round("align/.checkpoint.new.tmp"), 0, 3),
            WaitingMapper => (in_round("ranked/rows.parquet.tmp"), 0, 3),
            Sink => (PathBuf::from(format!("ranked-{round}.parquet.tmp")), 0, 3),
            Sealing => (in_round(&format!("{sealed}/rows.parquet.tmp")), 0, 5),
            Adapter => (in_round("align/.adapter.new.tmp"), 0, 3),
        };
        let later = Duration::from_micros(random.below(later * 1000 + 1));
        Self { file, bytes, later }
    }

    fn reached(&self, run: &Path, born: SystemTime) -> bool {
        std::fs::metadata(run.join(&self.file)).is_ok_and(|m| m.len() >= self.bytes && m.modified().unwrap() >= born)
    }
}

/// A run under way, and what lay in its directory before it.
struct Process {
    child: Child,
    run: PathBuf,
    born: SystemTime,
    before: Recorded,
    steps_before: Vec<Value>,
    /// By round: steps that no later process may make again.
    kept_steps: BTreeMap<u64, u64>,
    /// Lengths of the journals as time goes by.
    lengths: Vec<(Instant, Vec<u64>)>,
}

impl Process {
    fn start(case: &Case) -> Self {
        let run = case.path("runs/tiny");
        let told = File::create(case.path("stderr")).unwrap();
        let (before, steps_before) = (recorded(&run), steps(&run));
        let kept_steps = [1, 2].map(|round| (round, checkpoint(&run.join(format!("round-{round}/align"))))).into();
        let born = SystemTime::now();
        let child = case.command(&["flow.toml"]).stdout(Stdio::null()).stderr(told).spawn().unwrap();
        Self { child, run, born, before, steps_before, kept_steps, lengths: Vec::new() }
    }

    /// Kills the process where it is aimed at; none where it came to its end before that.
    fn kill(mut self, aim: &Aim) -> Option<Ended> {
        let mut at = None;
        while at.is_none_or(|at| Instant::now() < at) {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}: {}", self.told());
                return None;
            }
            at = at.or_else(|| aim.reached(&self.run, self.born).then(|| Instant::now() + aim.later));
            self.look();
            std::thread::sleep(Duration::from_micros(300));
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Some(self.ended())
    }

    /// Lets it come to its end.
    fn wait(mut self) -> Ended {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.told());
        self.ended()
    }

    fn told(&self) -> String {
        std::fs::read_to_string(self.run.join("../../stderr")).unwrap()
    }

    fn look(&mut self) {
        let last = self.lengths.last().map(|(at, _)| *at);
        if last.is_none_or(|at| at.elapsed() > Duration::from_millis(50)) {
            let length = |path: PathBuf| std::fs::metadata(self.run.join(path)).map_or(0, |m| m.len());
            self.lengths.push((Instant::now(), journals().map(|(.., path)| length(path)).collect()));
        }
    }

    fn ended(self) -> Ended {
        let (after, steps) = (recorded(&self.run), steps(&self.run));
        Ended { lived: self.born.elapsed().unwrap().as_secs_f64(), died: Instant::now(), after, steps, process: self }
    }
}

/// What a process left.
struct Ended {
    process: Process,
    lived: f64,
    died: Instant,
    after: Recorded,
    steps: Vec<Value>,
}

impl Ended {
    /// Nothing that was there before it, or that it had for two seconds, is gone or made again.
    fn assert_kept(&self) {
        let Process { run, before, lengths, .. } = &self.process;
        let durable = lengths.iter().rev().find(|(at, _)| *at + DURABLE < self.died).map(|(_, lengths)| lengths);
        for (number, (round, stage, path)) in journals().enumerate() {
            let (place, rows) = (format!("{stage}, round {round}"), &self.after[&path]);
            assert_once(rows, &place);
            assert!(before[&path].iter().all(|row| rows.contains(row)), "{place} has lost rows of an earlier process");
            let length = durable.map_or(0, |lengths| lengths[number] as usize);
            let bytes = std::fs::read(run.join(&path)).unwrap_or_default();
            let had = flowrun::engine::journal::finished(&bytes[..length]);
            assert!(had.iter().all(|row| rows.contains(row)), "{place} has lost rows two seconds old");
        }
        self.assert_steps();
    }

    /// Steps up to the checkpoint are those that were told before, and every step is told once.
    fn assert_steps(&self) {
        let number = |step: &Value| (step["round"].as_u64().unwrap(), step["step"].as_u64().unwrap());
        let mut numbers: Vec<_> = self.steps.iter().map(number).collect();
        numbers.sort_unstable();
        assert!(numbers.is_sorted_by(|a, b| a < b), "a step was told twice");
        let Process { kept_steps, steps_before, .. } = &self.process;
        for (round, kept) in kept_steps {
            let till = |steps: &[Value]| {
                let own = steps.iter().filter(|step| number(step).0 == *round && number(step).1 <= *kept);
                own.cloned().collect::<Vec<_>>()
            };
            assert_eq!(till(&self.steps), till(steps_before), "steps of round {round} before the checkpoint");
        }
    }

    /// Steps that this very process made, by round, in words.
    fn trained(&self) -> String {
        let born = self.process.born.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        let of = |(round, kept): (&u64, &u64)| {
            let own = self.steps.iter().filter(|step| step["round"] == *round);
            let made = own.clone().filter(|step| step["time"].as_f64().unwrap() >= born).count();
            let from = if *kept == u64::MAX { "all were there".into() } else { format!("on from step {kept}") };
            format!("round {round}: {made} steps made, {from}")
        };
        self.process.kept_steps.iter().map(of).collect::<Vec<_>>().join("; ")
    }

    /// What was going on when it was killed, read from what is there.
    fn moments(&self) -> Vec<Moment> {
        let Process { run, born, before, .. } = &self.process;
        let worked = self.after != *before || self.steps != self.process.steps_before;
        let had = before.values().any(|rows| !rows.is_empty());
        let mut hit = Vec::from_iter((had && !worked).then_some(Resume));
        for round in [1, 2] {
            let own = |name: &str| run.join(format!("round-{round}/{name}"));
            let fresh = |path: PathBuf| std::fs::metadata(path).is_ok_and(|m| m.modified().unwrap() >= *born);
            let table = |name: &str| fresh(own(&format!("{name}.parquet")));
            let half = |name: &str| fresh(own(&format!("{name}.parquet.tmp")));
            let grew = |stage: &str| {
                let path = PathBuf::from(format!("round-{round}/{stage}/journal"));
                self.after[&path].len() > before[&path].len() && !table(&format!("{stage}/rows"))
            };
            let began = if round == 1 { fresh(run.join("plan.json")) } else { fresh(own("prompts")) };
            let kept = format!("ranked-{round}.parquet");
            let adapter = fresh(own("align/adapter"));
            let found = [
                (Source, began && own("prompts").exists() && !half("clean/rows") && !table("clean/rows")),
                (Mapper, half("clean/rows") || half("prefer/rows")),
                (Sampler, grew("sample")),
                (Judge, grew("judge")),
                (Scorer, grew("likely")),
                (Split, half("halves/train") || half("halves/validation")),
                (Trainer, grew("align") || self.trained_in(round)),
                (Checkpoint, fresh(own("align/.checkpoint.new.tmp"))),
                (WaitingMapper, half("ranked/rows") || table("likely/rows") && !table("ranked/rows")),
                (Sink, fresh(run.join(format!("{kept}.tmp"))) || table("ranked/rows") && !fresh(run.join(kept))),
                (Sealing, JOURNALED.iter().any(|stage| half(&format!("{stage}/rows")))),
                (Adapter, fresh(own("align/.adapter.new.tmp")) || adapter && !own("align/finished.json").exists()),
            ];
            hit.extend(found.into_iter().filter(|(_, is)| *is).map(|(moment, _)| moment));
        }
        hit.sort_unstable();
        hit.dedup();
        hit
    }

    /// Whether this process made steps of a training that had not come to its end.
    fn trained_in(&self, round: u64) -> bool {
        let of = |steps: &[Value]| steps.iter().rfind(|step| step["round"] == round).cloned();
        let done = self.process.run.join(format!("round-{round}/align/finished.json")).exists();
        !done && of(&self.steps) != of(&self.process.steps_before)
    }
}

fn steps(run: &Path) -> Vec<Value> {
    events(run).into_iter().filter(|event| event["event"] == "step").collect()
}

/// Steps that are in a trainer's checkpoint; all, where it has finished.
fn checkpoint(dir: &Path) -> u64 {
    if dir.join("finished.json").exists() {
        return u64::MAX;
    }
    // Killed between two names, it is still under the second.
    let at = ["checkpoint", ".checkpoint.old.tmp"].map(|name| dir.join(name));
    let found = at.iter().find(|dir| dir.exists()).map(|dir| flowrun::train::checkpoint::progress(dir).unwrap());
    found.flatten().map_or(0, |progress| progress.steps)
}
