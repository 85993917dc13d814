//! What a run takes over from an earlier one, and how a user sees that beforehand.

use std::path::Path;

use serde_json::Value;

use crate::support::{Case, stderr, tiny_flow};

const RUN: &str = "runs/tiny";

fn stdout(case: &Case, args: &[&str]) -> String {
    String::from_utf8(case.done(args).stdout).unwrap()
}

/// Rows in and rows reused of a stage, round by round.
fn reused(case: &Case, run: &str, stage: &str) -> Vec<(u64, u64)> {
    let summary = case.json(&format!("{run}/summary.json"));
    let rounds = summary["rounds"].as_array().unwrap();
    let counts = |r: &Value| {
        let of = |key: &str| r["stages"][stage][key].as_u64().unwrap();
        (of("rows_in"), of("reused_rows"))
    };
    rounds.iter().map(counts).collect()
}

/// The optimizer steps that were told, as round and step.
fn steps(case: &Case) -> Vec<(u64, u64)> {
    let told = case.events("step").into_iter().filter(|e| e["loss"].is_f64());
    told.map(|e| (e["round"].as_u64().unwrap(), e["step"].as_u64().unwrap())).collect()
}

/// Sampled rows come with two candidates each.
fn all(rows: u64) -> (u64, u64) {
    (rows, rows)
}

fn line<'a>(text: &'a str, round: u32, stage: &str) -> &'a str {
    let start = format!("round {round}  {stage} ");
    text.lines().find(|l| l.starts_with(&start)).unwrap_or_else(|| panic!("no line {start}in\n{text}"))
}

#[test]
fn a_round_more_reuses_all_rounds_before() {
    let flow = tiny_flow(3, "").replace("count = 3", "count = 4");
    let case = Case::new(32, &flow);
    case.done(&["flow.toml"]);
    let before = steps(&case);
    let told = stdout(&case, &["check", "flow.toml", "--set", "rounds=4", "--diff", RUN]);
    assert!(line(&told, 3, "align").ends_with("same (8 rows recorded)"), "{told}");
    assert!(line(&told, 4, "sample").contains(" new"), "{told}");
    case.done(&["flow.toml", "--set", "rounds=4"]);
    assert_eq!(reused(&case, RUN, "sample"), [all(8), all(8), all(8), (8, 0)]);
    let judged = reused(&case, RUN, "judge");
    assert!(judged[..3].iter().all(|(rows, reused)| *rows == 2 * reused) && judged[3].1 == 0, "{judged:?}");
    let after = steps(&case);
    assert_eq!(after[..before.len()], before, "no step of the rounds before was made again");
    assert!(after[before.len()..].iter().all(|(round, _)| *round == 4) && after.len() > before.len());
}

#[test]
fn a_stale_adapter_is_never_sampled_with() {
    let flow = tiny_flow(3, "\n[round.2.stages.align]\nepochs = 1\n");
    let case = Case::new(24, &flow);
    case.done(&["flow.toml"]);
    let edit = ["--set", "stages.align.epochs=2"];
    let told = stdout(&case, &[&["check", "flow.toml", "--diff", RUN], &edit[..]].concat());
    assert!(line(&told, 1, "sample").contains("same"), "{told}");
    assert!(line(&told, 1, "align").contains("recompute: epochs 1 -> 2"), "{told}");
    for (round, stage) in [(2, "sample"), (2, "judge"), (2, "align"), (3, "sample")] {
        let line = line(&told, round, stage);
        assert!(line.contains("recompute unless the retrained adapter is equal"), "{line}");
    }
    let refused = case.run(&[&["flow.toml"], &edit[..]].concat());
    let message = stderr(&refused);
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(message.contains("`align` changed: epochs 1 -> 2") && message.contains("check --diff"), "{message}");
    case.done(&[&["flow.toml", "--recompute"], &edit[..]].concat());
    assert_eq!(reused(&case, RUN, "sample"), [all(8), (8, 0), (8, 0)]);
    assert!(case.path("runs/tiny/superseded").exists());
}

#[test]
fn an_adapter_that_comes_out_the_same_keeps_the_rounds_after_it() {
    let case = Case::new(24, &format!("deterministic = true\n{}", tiny_flow(3, "")));
    case.done(&["flow.toml"]);
    std::fs::remove_dir_all(case.path("runs/tiny/round-1/align")).unwrap();
    case.done(&["flow.toml"]);
    assert_eq!(reused(&case, RUN, "sample"), [all(8); 3]);
}

#[test]
fn a_fork_takes_over_what_is_of_the_same_plan() {
    let case = Case::new(16, &tiny_flow(2, ""));
    case.done(&["flow.toml"]);
    let summary = std::fs::read(case.path("runs/tiny/summary.json")).unwrap();
    let fork = ["flow.toml", "--output", "runs/other", "--resume-from", RUN];
    let edit = ["--set", "stages.judge.min_gap=0.5", "--set", "max_dead_letters=1.0"];
    case.run(&[&fork[..], &edit[..]].concat());
    assert_eq!(reused(&case, "runs/other", "sample")[0], all(8));
    assert_eq!(reused(&case, "runs/other", "judge")[0].1, 0);
    assert_eq!(std::fs::read(case.path("runs/tiny/summary.json")).unwrap(), summary, "the first run stays as it is");
    case.done(&["flow.toml", "--output", "runs/third", "--resume-from", RUN]);
    assert_eq!(reused(&case, "runs/third", "sample"), [all(8), all(8)]);
    let adapter =
        |run: &str| std::fs::read(case.path(run).join("round-2/align/adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("runs/third"), adapter(RUN));
    let nowhere = case.run(&["flow.toml", "--output", "runs/fourth", "--resume-from", "runs/nowhere"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(stderr(&nowhere).contains("runs/nowhere"), "{}", stderr(&nowhere));
    assert!(!case.path("runs/nowhere").exists());
}

#[test]
fn runs_are_listed_and_their_garbage_is_collected() {
    let case = Case::new(8, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    case.done(&["flow.toml", "--fresh"]);
    case.write("runs/tiny/round-1/sample/rows.parquet.tmp", "half");
    let listed = stdout(&case, &["runs"]);
    assert!(listed.lines().any(|l| l.starts_with("tiny ") && l.contains("done") && l.contains("1/1")), "{listed}");
    let json: Value = serde_json::from_str(&stdout(&case, &["runs", "runs", "--json"])).unwrap();
    assert_eq!((json["status"].as_str(), json["rounds_done"].as_u64()), (Some("done"), Some(1)));

    let dry = stdout(&case, &["gc", "--dry-run", RUN]);
    assert!(dry.contains("would delete") && dry.contains("rows.parquet.tmp"), "{dry}");
    assert!(case.path("runs/tiny/superseded").exists());
    stdout(&case, &["gc", RUN]);
    assert!(!case.path("runs/tiny/superseded").exists());
    assert!(stdout(&case, &["gc", RUN]).contains("deleted 0 files"));
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(reused(&case, RUN, "sample"), [all(8)]);
}

#[test]
fn a_directory_that_is_no_run_is_told_by_every_verb() {
    let case = Case::new(8, &tiny_flow(1, ""));
    for args in [&["gc", "."][..], &["check", "flow.toml", "--diff", "."], &["runs", "nowhere"]] {
        let output = case.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let message = stderr(&output);
        assert!(message.starts_with("error: ") && message.lines().count() <= 2, "{message}");
    }
    assert!(Path::new(&case.path("prompts.jsonl")).exists());
}

#[test]
fn a_run_under_way_is_neither_forked_nor_cleaned() {
    // Long enough to be under way while other programs start, on a busy machine too.
    let flow = tiny_flow(1, "").replace("max_new_tokens = 12", "max_new_tokens = 64");
    let case = Case::new(1000, &flow);
    let mut child = case.start(&["flow.toml"]);
    let owner = format!("process {}", child.id());
    let began = std::time::Instant::now();
    while !case.path("runs/tiny/plan.json").exists() && began.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(stdout(&case, &["runs"]).contains("running"));
    for args in [&["gc", RUN][..], &["flow.toml", "--output", "runs/other", "--resume-from", RUN]] {
        let output = case.run(args);
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains(&owner), "{}", stderr(&output));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(stdout(&case, &["runs"]).contains("unfinished"));
}

#[test]
fn a_plan_that_cannot_be_read_stops_the_run() {
    let case = Case::new(8, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    let journal = case.path("runs/tiny/round-1/sample/journal");
    for damage in [Some("{ \"format\": "), Some("[]"), None] {
        match damage {
            Some(text) => case.write("runs/tiny/plan.json", text),
            None => std::fs::remove_file(case.path("runs/tiny/plan.json")).unwrap(),
        }
        let stopped = case.run(&["flow.toml"]);
        let message = stderr(&stopped);
        assert_eq!(stopped.status.code(), Some(2), "{message}");
        assert!(message.contains("plan.json can't be read") && message.contains("--recompute"), "{message}");
        assert!(journal.exists() && !case.path("runs/tiny/superseded").exists());
    }
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(reused(&case, RUN, "sample"), [all(8)], "the journals know what they are of");
    assert!(!case.path("runs/tiny/superseded").exists());
    case.write("runs/tiny/plan.json", "");
    case.done(&["flow.toml", "--fresh"]);
    assert_eq!(reused(&case, RUN, "sample"), [(8, 0)]);
}

#[test]
fn a_recompute_that_was_killed_is_gone_on_with() {
    let flow = |factor: u32| {
        format!(
            "name = \"tiny\"\n[stages.rows]\nkind = \"source\"\ndataset = \"prompts.jsonl\"\n[stages.m]\nkind = \"mapper\"\n\
             input = \"rows\"\nsql = \"SELECT n, n * {factor} AS z FROM input\"\n[stages.out]\nkind = \"sink\"\n\
             input = \"m\"\npath = \"out.jsonl\"\n"
        )
    };
    let out = |case: &Case| std::fs::read_to_string(case.path("runs/tiny/out.jsonl")).unwrap();
    for args in [&["flow.toml", "--recompute"][..], &["flow.toml", "--retry-dead"]] {
        let case = Case::new(200_000, &flow(1));
        case.done(&["flow.toml"]);
        if args[1] == "--recompute" {
            case.write("flow.toml", &flow(2));
        }
        // Killed once the run has its new plan, or has begun to change anything.
        let summary = case.path("runs/tiny/summary.json");
        let mut child = case.start(args);
        let factor = if args[1] == "--recompute" { 2 } else { 1 };
        let planned = || {
            let plan = std::fs::read_to_string(case.path("runs/tiny/plan.json")).unwrap();
            plan.contains(&format!("n * {factor}"))
        };
        while (summary.exists() || !planned()) && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        case.done(&["flow.toml"]);
        let last = out(&case).lines().last().unwrap().to_owned();
        assert!(last.contains(&format!("\"z\":{}", 199_999 * factor)), "{args:?}: {last}");
        assert_eq!(case.summary()["status"], "done");
    }
}

#[test]
fn a_fresh_start_that_was_killed_is_gone_on_with() {
    let sink = "\n[stages.kept]\nkind = \"sink\"\ninput = \"sample\"\npath = \"sampled.jsonl\"\n";
    let case = Case::new(8, &tiny_flow(1, sink));
    case.done(&["flow.toml"]);
    // What a kill after the first moves leaves.
    std::fs::create_dir_all(case.path("runs/tiny/superseded/then")).unwrap();
    for name in ["plan.json", "round-1"] {
        std::fs::rename(case.path("runs/tiny").join(name), case.path("runs/tiny/superseded/then").join(name)).unwrap();
    }
    case.write("runs/tiny/begun", "");
    case.done(&["flow.toml"]);
    assert_eq!(reused(&case, RUN, "sample"), [(8, 0)]);
    assert!(!case.path("runs/tiny/begun").exists());
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(reused(&case, RUN, "sample"), [all(8)]);
}

#[test]
fn a_run_of_an_older_format_is_read_and_not_gone_on_with() {
    let case = Case::new(8, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    let mut plan = case.json("runs/tiny/plan.json");
    assert!(plan["format"].as_u64().is_some());
    plan.as_object_mut().unwrap().remove("format");
    case.write("runs/tiny/plan.json", &plan.to_string());
    let fork = ["flow.toml", "--output", "runs/other", "--resume-from", RUN];
    for args in [&["flow.toml"][..], &["flow.toml", "--recompute"], &["check", "flow.toml", "--diff", RUN], &fork] {
        let refused = case.run(args);
        let message = stderr(&refused);
        assert_eq!(refused.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.contains("an older format") && message.contains("help: --output DIR"), "{message}");
    }
    assert!(!case.path("runs/tiny/superseded").exists());
    assert!(stdout(&case, &["runs"]).contains("tiny "), "runs lists it");
    case.done(&["report", RUN, "--out", "page.html"]);
    case.done(&["generate", RUN, "hello", "--max-new-tokens", "4"]);
    case.done(&["export", RUN, "--out", "exported"]);
    case.done(&["flow.toml", "--fresh"]);
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(reused(&case, RUN, "sample"), [all(8)]);
}

#[test]
fn a_run_has_one_date_and_a_fork_keeps_it() {
    let template = "chat_template = '''{{ strftime_now('%d %B %Y') }}: {{ messages[-1].content }}'''";
    let flow = tiny_flow(1, "").replace("dtype = \"f32\"", &format!("dtype = \"f32\"\n{template}"));
    let case = Case::new(8, &flow);
    let told = stderr(&case.done(&["flow.toml"]));
    let today = case.json("runs/tiny/plan.json")["date"].as_str().unwrap().to_owned();
    assert!(told.contains(&today), "{told}");
    // The day is another one at the other end of the world.
    let at = |zone: &str, args: &[&str]| {
        let output = case.command(args).env("TZ", zone).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        case.json("runs/tiny/plan.json")["date"].as_str().unwrap().to_owned()
    };
    let east = at("EAST-14", &["flow.toml", "--fresh"]);
    assert_eq!(at("WEST+12", &["flow.toml", "--recompute"]), east);
    assert_eq!(reused(&case, RUN, "sample"), [all(8)]);
    let today = at("WEST+12", &["flow.toml", "--fresh"]);
    assert!(today < east, "{today} is the local date, as {east} was");
    let earlier = ["flow.toml", "--set", "date=2026-01-31"];
    let refused = case.run(&earlier);
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains(&format!("date {today} -> 2026-01-31")), "{}", stderr(&refused));
    // As if the run had begun on another day.
    case.done(&[&earlier[..], &["--fresh"]].concat());
    let before = case.texts(1, "sample/rows", "generation");
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(case.json("runs/tiny/plan.json")["date"], "2026-01-31", "the day that it goes on is not asked");
    assert_eq!((reused(&case, RUN, "sample"), reused(&case, RUN, "judge")), (vec![all(8)], vec![(16, 8)]));
    assert_eq!(case.texts(1, "sample/rows", "generation"), before);
    case.done(&["flow.toml", "--output", "runs/other", "--resume-from", RUN]);
    assert_eq!(case.json("runs/other/plan.json")["date"], "2026-01-31");
    assert_eq!(reused(&case, "runs/other", "sample"), [all(8)]);
    assert!(std::fs::read_to_string(case.path("runs/other/flow.toml")).unwrap().contains("date = \"2026-01-31\""));
}

#[test]
fn a_trainer_trains_nothing_again_for_rows_that_were_given_up() {
    let process = "\n[stages.checked]\nkind = \"process\"\ninput = \"sample\"\ncommand = [\"sh\", \"check.sh\"]\n\
                   columns = { good = \"bool\" }\n";
    let flow = tiny_flow(1, process)
        .replace("kind = \"judge\"\ninput = \"sample\"", "kind = \"judge\"\ninput = \"checked\"")
        .replace("rounds = 1", "rounds = 1\nmax_dead_letters = 0.5");
    let case = Case::new(16, &flow);
    case.write(
        "check.sh",
        r#"while IFS= read -r line; do
    key=${line#*\"_key\":}; key=${key%%[!0-9]*}
    echo "$key" >> asked
    case "$line" in
        *"number 3\""*) [ -e mended ] || { echo "{\"_key\":$key,\"error\":\"none\"}"; continue; };;
    esac
    echo "{\"_key\":$key,\"good\":true}"
done
"#,
    );
    case.done(&["flow.toml"]);
    let asked = || std::fs::read_to_string(case.path("asked")).unwrap().lines().count();
    let (steps_before, asked_before) = (steps(&case), asked());
    case.write("mended", "");
    case.done(&["flow.toml"]);
    assert_eq!((steps(&case), asked()), (steps_before, asked_before));
    assert_eq!(case.texts(1, "../dead_letters", "reason").len(), 1);
    let said = stderr(&case.done(&["flow.toml", "--retry-dead"]));
    assert!(said.contains("1 of checked (round 1)") && said.contains("align (round 1)"), "{said}");
    assert!(case.texts(1, "../dead_letters", "reason").is_empty());
    assert!(asked() > asked_before);
}
