//! What can be seen of a run besides its metrics: the trace, its status, the log, the terminal.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Case, stderr, tiny_flow};

/// `(track, name, stage, start, end)` of every interval, microseconds.
fn intervals(case: &Case) -> Vec<(String, String, String, f64, f64)> {
    let trace = case.json("runs/tiny/trace.json");
    let events = trace.as_array().or_else(|| trace["traceEvents"].as_array()).unwrap();
    let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_owned();
    let track = |tid: &serde_json::Value| {
        let named = events.iter().find(|e| e["name"] == "thread_name" && e["tid"] == *tid).unwrap();
        text(&named["args"]["name"])
    };
    let whole = events.iter().filter(|e| e["ph"] == "X");
    let interval = |e: &serde_json::Value| {
        let start = e["ts"].as_f64().unwrap();
        (track(&e["tid"]), text(&e["name"]), text(&e["args"]["stage"]), start, start + e["dur"].as_f64().unwrap())
    };
    whole.map(interval).collect()
}

#[test]
fn training_begins_while_the_sampler_and_the_judge_still_work() {
    let case = Case::new(96, &tiny_flow(1, "").replace("max_new_tokens = 12", "max_new_tokens = 64"));
    case.done(&["flow.toml"]);
    let all = intervals(&case);
    let of = |track: &str, name: &str| {
        all.iter().filter(|i| i.0 == track && i.1 == name).map(|i| (i.3, i.4)).collect::<Vec<_>>()
    };
    let first = |spans: &[(f64, f64)]| spans.iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
    let last = |spans: &[(f64, f64)]| spans.iter().map(|s| s.1).fold(0.0, f64::max);
    let (decode, steps) = (of("cpu:0", "decode"), of("cpu:1", "optimizer"));
    let judged: Vec<_> = all.iter().filter(|i| i.1 == "score" && i.2 == "judge").map(|i| (i.3, i.4)).collect();
    assert!(first(&judged) < last(&decode), "the judge waited for the sampler");
    assert!(first(&steps) < last(&judged), "the trainer waited for the judge");
}

/// A run that takes some seconds, and the process that makes it; it is told to stop at the end.
struct UnderWay {
    child: std::process::Child,
    address: String,
}

impl UnderWay {
    fn start(case: &Case) -> Self {
        let mut child = case.start(&["flow.toml", "--metrics-addr", "127.0.0.1:0"]);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let address =
            lines.by_ref().find_map(|l| l.split("http://").nth(1).map(|a| a.trim_end_matches("/metrics").to_owned()));
        std::thread::spawn(move || lines.count());
        Self { child, address: address.expect("the address is told on stderr") }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn long_flow() -> String {
    tiny_flow(2, "").replace("max_new_tokens = 12", "max_new_tokens = 64")
}

fn status(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_run_is_seen_from_outside_by_its_address_and_by_its_directory() {
    let case = Case::new(3000, &long_flow());
    let run = UnderWay::start(&case);
    let deadline = Instant::now() + Duration::from_secs(60);
    let seen = |of: &str| {
        loop {
            let output = case.run(&["top", of, "--json"]);
            let rows = |status: &Value| status["stages"][1]["rows_out"].as_u64().unwrap_or(0);
            // A run that has just begun answers nothing yet, or nothing much.
            if output.status.success() && rows(&status(&output)) > 0 && status(&output)["stages"][1]["progress"] != 1.0
            {
                return status(&output);
            }
            assert!(Instant::now() < deadline, "{}", stderr(&output));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    for of in [run.address.as_str(), "runs/tiny"] {
        let status = seen(of);
        let stage = &status["stages"][1];
        assert_eq!((&status["flow"], &status["round"], &status["ended"]), (&"tiny".into(), &1.into(), &false.into()));
        assert_eq!((&stage["name"], &stage["state"]), (&"sample".into(), &"running".into()), "{status}");
        let progress = stage["progress"].as_f64().unwrap();
        assert!(progress > 0.0 && progress < 1.0, "{progress}");
        // 1500 source rows are in the round's shard, with two answers each.
        let rows = stage["rows_out"].as_f64().unwrap() / 2.0;
        assert!((progress * 1500.0 - rows).abs() <= 2.0, "{status}");
    }
    assert_eq!(status(&case.run(&["top", "--json"]))["flow"], "tiny", "the run under way in runs/");
    let address = run.address.clone();
    drop(run);
    let status = status(&case.run(&["top", "runs/tiny", "--json"]));
    assert_eq!(status["ended"], true);
    let output = case.run(&["top", "runs/tiny"]);
    assert!(output.status.success() && stderr(&output).contains("unfinished: runs/tiny"), "{}", stderr(&output));
    assert_eq!(case.run(&["top"]).status.code(), Some(2), "no run is under way");
    let output = case.run(&["top", &address]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("--metrics-addr"), "{}", stderr(&output));
    let output = case.run(&["top", "no/such/run"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn a_finished_run_says_how_its_rounds_went() {
    let case = Case::new(24, &tiny_flow(2, ""));
    let first = case.command(&["flow.toml"]).env("FLOWRUN_LOG", "info").output().unwrap();
    assert!(first.status.success());
    let told = stderr(&first);
    assert!(told.contains("device thread") && !told.contains('\u{1b}'), "{told}");
    assert!(told.contains("round 1 of 2 took") && told.contains("round 2 of 2 took"), "{told}");
    let status = case.json("runs/tiny/status.json");
    assert_eq!((&status["ended"], &status["remaining_seconds"]), (&true.into(), &0.0.into()));
    let rounds = status["finished"].as_array().unwrap();
    assert_eq!(rounds.iter().map(|r| r["round"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for round in rounds {
        let latest = round["latest"].as_array().unwrap();
        assert!(
            latest.iter().any(|line| line["loss"].is_f64()) && latest.iter().any(|line| line["eval_loss"].is_f64())
        );
        assert_eq!(round["reused"], false);
    }
    let all_done = |stage: &Value| stage["state"] == "done" && stage["progress"] == 1.0;
    assert!(status["stages"].as_array().unwrap().iter().all(all_done), "{status}");
    case.done(&["flow.toml", "--recompute"]);
    let reused = case.json("runs/tiny/status.json");
    assert!(reused["finished"].as_array().unwrap().iter().all(|round| round["reused"] == true), "{reused}");
}

#[test]
fn json_logs_are_json_to_the_last_line_with_round_and_stage() {
    let case = Case::new(24, &tiny_flow(2, "").replace("order = \"both\"", "order = \"random\""));
    let output = case.done(&["--log-format", "json", "flow.toml", "--metrics-addr", "127.0.0.1:0"]);
    let lines = |output: &Output| -> Vec<Value> {
        stderr(output)
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    };
    let told = lines(&output);
    assert!(told.iter().any(|line| line["message"].as_str().is_some_and(|m| m.starts_with("metrics: http://"))));
    let ended = |line: &&Value| line["stage"] == "align" && line["state"] == "done" && line["round"] == 2;
    let progress = told.iter().find(ended).expect("the end of training is told");
    assert_eq!((&progress["target"], &progress["progress"]), (&"flowrun::progress".into(), &1.0.into()));

    let rounds = told.iter().filter(|line| line["message"] == "round over").count();
    assert_eq!(rounds, 2);
    // A filter for something else does not hide why the program ends.
    let wrong = ["flow.toml", "--log-format", "json", "--set", "stages.prompts.dataset='gone.jsonl'"];
    let output = case.command(&wrong).env("FLOWRUN_LOG", "flowrun::llm=debug").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = lines(&output);
    let last = told.last().unwrap();
    assert_eq!((&last["level"], &last["code"]), (&"ERROR".into(), &2.into()));
    assert!(last["message"].as_str().unwrap().contains("gone.jsonl"), "{last}");
}

/// Runs the program on a terminal of its own (util-linux' `script`) and presses each key once its text is there; what
/// was drawn. None where there is no `script`.
fn on_a_terminal(case: &Case, arguments: &str, keys: &[(&str, &str)]) -> Option<String> {
    let command = format!("stty rows 40 cols 120; exec {} {arguments}", env!("CARGO_BIN_EXE_flowrun"));
    let mut child = Command::new("script")
        .args(["-qfec", &command, "/dev/null"])
        .current_dir(case.dir.path())
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .inspect_err(|_| println!("skipped: there is no `script` here"))
        .ok()?;
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (mut drawn, mut bytes) = (String::new(), [0; 4096]);
    let mut keys = keys.iter().peekable();
    while let Ok(count @ 1..) = stdout.read(&mut bytes) {
        drawn.push_str(&String::from_utf8_lossy(&bytes[..count]));
        if let Some((_, key)) = keys.next_if(|(text, _)| drawn.contains(text)) {
            stdin.write_all(key.as_bytes()).unwrap();
        }
    }
    child.wait().unwrap();
    assert!(keys.next().is_none(), "{drawn}");
    Some(drawn)
}

#[test]
fn a_terminal_shows_a_line_a_stage_and_samples_when_asked() {
    let case = Case::new(3000, &long_flow());
    let keys = [("(s: samples)", "s"), ("tell me about", "\u{3}")];
    let Some(drawn) = on_a_terminal(&case, "flow.toml", &keys) else { return };
    for text in ["round 1 of 2", "sample", "running", "stopping at the next durable point", "prompt", "ended"] {
        assert!(drawn.contains(text), "{text} in {drawn}");
    }
    assert!(drawn.split("stopping at").nth(1).unwrap().contains("interrupted"), "{drawn}");
}

#[test]
fn a_look_at_a_run_of_another_process_can_be_left_and_the_run_goes_on() {
    let case = Case::new(3000, &long_flow());
    let mut run = UnderWay::start(&case);
    for of in [run.address.clone(), "runs/tiny".to_owned()] {
        let keys = [("running", "q")];
        let Some(drawn) = on_a_terminal(&case, &format!("top {of}"), &keys) else { return };
        assert!(drawn.contains("q: leave") && drawn.contains("round 1 of 2"), "{drawn}");
        assert_eq!(drawn.contains("s: samples"), of == "runs/tiny", "an address tells no texts");
    }
    assert!(run.child.try_wait().unwrap().is_none(), "the run goes on");
}
