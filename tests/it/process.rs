//! Columns that a program computes: programs of the shell, with every fault that one can have.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flowrun::arrow::array::{ArrayRef, AsArray, Float64Array, UInt64Array};
use flowrun::arrow::datatypes::UInt64Type;
use flowrun::arrow::ipc::reader::StreamReader;
use flowrun::arrow::ipc::writer::StreamWriter;
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::embed::{Engine, Policy};

use crate::support::{Case, stderr};

/// Rows with a number `n`, a program's columns and what is left as a file. `keys` are the program's.
fn flow(keys: &str) -> String {
    format!(
        r#"
name = "tiny"
max_dead_letters = 0.5
[stages.rows]
kind = "source"
dataset = "prompts.jsonl"
select = {{ prompt = "prompt", n = "n" }}
[stages.reward]
kind = "process"
input = "rows"
command = ["sh", "reward.sh"]
columns = {{ score = "f64", reason = "string" }}
{keys}
[stages.good]
kind = "mapper"
input = "reward"
sql = "SELECT prompt, score, reason FROM input WHERE score >= 3"
"#
    )
}

/// A program that reads a line at a time; `body` knows its key as `$key` and its number as `$n`.
fn script(body: &str) -> String {
    format!(
        r#"echo started >> starts
answer() {{ echo "{{\"_key\":$1,\"score\":$2,\"reason\":\"number $2\"}}"; }}
while IFS= read -r line; do
    key=${{line#*\"_key\":}}; key=${{key%%[!0-9]*}}
    n=${{line#*\"n\":}}; n=${{n%%[!0-9]*}}
    {body}
done
"#
    )
}

const GOOD: &str = "answer $key $n";

fn case(rows: usize, keys: &str, body: &str) -> Case {
    let case = Case::new(rows, &flow(keys));
    case.write("reward.sh", &script(body));
    case
}

fn starts(case: &Case) -> usize {
    std::fs::read_to_string(case.path("starts")).unwrap_or_default().lines().count()
}

fn scores(case: &Case) -> Vec<String> {
    case.texts(1, "reward/rows", "score")
}

fn expected(rows: impl Iterator<Item = usize>) -> Vec<String> {
    rows.map(|n| format!("{n}.0")).collect()
}

/// The reasons why rows were given up.
fn dead(case: &Case) -> Vec<String> {
    case.texts(1, "../dead_letters", "reason")
}

/// Whether some process was started with this argument.
fn is_running(argument: &str) -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .any(|line| line.split(|byte| *byte == 0).any(|word| word == argument.as_bytes()))
}

/// Until it is no more: what is killed goes in its own time.
fn wait_until_gone(argument: &str) {
    let began = Instant::now();
    while is_running(argument) {
        assert!(began.elapsed() < Duration::from_secs(20), "sleep {argument} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn rows_go_through_a_program_once() {
    let case = case(20, "workers = 2", GOOD);
    case.done(&["flow.toml"]);
    assert_eq!(scores(&case), expected(0..20));
    // Rows go on to the mapper as they are answered.
    let mut good = case.texts(1, "good/rows", "reason");
    good.sort();
    assert_eq!((good.len(), good[0].as_str(), good[16].as_str()), (17, "number 10", "number 9"));
    assert_eq!(starts(&case), 2);
    case.done(&["flow.toml"]);
    assert_eq!(starts(&case), 2, "a finished run started the program");

    // The program's text is what decides the rows.
    case.write("reward.sh", &script("answer $key $((n + 1))"));
    let output = case.run(&["flow.toml"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    case.done(&["flow.toml", "--recompute"]);
    assert_eq!(scores(&case), expected(1..21));
}

#[test]
fn answers_come_in_any_order_and_a_program_sees_what_it_needs() {
    let body = r#"echo "$line" >> seen
    if [ -z "$before" ]; then before="$key $n"; else answer $key $n; answer $before; before=; fi"#;
    let case = case(10, "", body);
    case.done(&["flow.toml"]);
    assert_eq!(scores(&case), expected(0..10));
    let seen = std::fs::read_to_string(case.path("seen")).unwrap();
    let first: serde_json::Value = serde_json::from_str(seen.lines().next().unwrap()).unwrap();
    let columns: Vec<&str> = first.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!((columns[0], columns.len()), ("_key", 4), "{columns:?}");
    assert!(["_row", "n", "prompt"].iter().all(|column| columns.contains(column)), "{columns:?}");
}

#[test]
fn a_row_that_ends_the_program_is_found_and_the_others_are_answered() {
    let body = r#"if [ "$n" = 5 ]; then echo "can't count to five" >&2; exit 3; fi; answer $key $n"#;
    let case = case(12, "", body);
    case.done(&["flow.toml"]);
    assert_eq!(scores(&case), expected((0..12).filter(|n| *n != 5)));
    let dead = dead(&case);
    assert_eq!(dead.len(), 1);
    assert!(dead[0].contains("exit status: 3") && dead[0].contains("its last words: can't count to five"), "{dead:?}");
}

#[test]
fn a_program_that_ends_once_is_started_again() {
    let case = case(12, "", r#"if [ "$n" = 5 ] && mkdir once 2>/dev/null; then exit 1; fi; answer $key $n"#);
    case.done(&["flow.toml"]);
    assert_eq!(scores(&case), expected(0..12));
    assert!(!case.path("runs/tiny/dead_letters.parquet").exists() || dead(&case).is_empty());
    assert!(starts(&case) >= 2);
}

#[test]
fn a_program_that_hangs_is_ended_with_what_it_started() {
    let body = r#"if [ "$n" = 5 ]; then sleep 7361.5; fi; answer $key $n"#;
    let case = case(8, "timeout = 0.5\nretries = 1", body);
    let began = Instant::now();
    case.done(&["flow.toml"]);
    assert!(began.elapsed() < Duration::from_secs(60));
    assert_eq!(scores(&case), expected((0..8).filter(|n| *n != 5)));
    assert!(dead(&case)[0].contains("gave no answer for 0.5 s"), "{:?}", dead(&case));
    wait_until_gone("7361.5");
}

#[test]
fn a_run_that_is_interrupted_leaves_no_program_behind() {
    let case = case(4, "", "sleep 7362.5");
    let mut run = case.start(&["flow.toml"]);
    let began = Instant::now();
    while !is_running("7362.5") {
        assert!(began.elapsed() < Duration::from_secs(60) && run.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }
    let signal = std::process::Command::new("sh").args(["-c", &format!("kill -INT {}", run.id())]).status().unwrap();
    assert!(signal.success());
    assert_eq!(run.wait().unwrap().code(), Some(130));
    wait_until_gone("7362.5");
}

#[test]
fn answers_that_are_none() {
    for (said, reason, starts_again) in [
        (r#"echo "{\"_key\":$key,\"error\":\"no verdict\"}""#, "gives the row up: no verdict", false),
        (
            r#"echo "{\"_key\":$key,\"score\":\"high\",\"reason\":\"\"}""#,
            "\"score\" is \"high\", not of type f64",
            false,
        ),
        (r#"echo "{\"_key\":$key,\"score\":1}""#, "has no \"reason\"", false),
        (r#"answer 99999 $n"#, "answered a row 99999 that it was not asked", true),
        (r#"echo hello"#, "wrote a line that is not a JSON object: hello", true),
        (r#"echo "{\"score\":1}""#, "wrote a line without the `_key`", true),
        (r#"head -c 17000000 /dev/zero | tr '\0' a"#, "wrote a line of more than 16 MiB", true),
        (r#"exec >&-; sleep 7363.5"#, "the program ended", true),
    ] {
        let body = format!("if [ \"$n\" = 1 ]; then {said}; else answer $key $n; fi");
        let case = case(4, "retries = 1", &body);
        case.done(&["flow.toml"]);
        assert_eq!(scores(&case), expected([0, 2, 3].into_iter()), "{said}");
        let dead = dead(&case);
        assert!(dead.len() == 1 && dead[0].contains(reason), "{said}: {dead:?}");
        assert_eq!(starts(&case) > 1, starts_again, "{said}");
    }
    wait_until_gone("7363.5");
}

#[test]
fn null_is_an_answer() {
    let case = case(2, "", r#"echo "{\"_key\":$key,\"score\":null,\"reason\":\"é\"}""#);
    case.done(&["flow.toml"]);
    assert_eq!((scores(&case), case.texts(1, "reward/rows", "reason")), (vec![String::new(); 2], vec!["é".into(); 2]));
}

#[test]
fn rows_travel_as_an_arrow_stream_too() {
    let keys: ArrayRef = Arc::new(UInt64Array::from(vec![2, 0, 1]));
    let values: ArrayRef = Arc::new(Float64Array::from(vec![0.2, 0.0, 0.1]));
    let answers = RecordBatch::try_from_iter([("_key", keys), ("score", values)]).unwrap();
    let case = Case::new(
        3,
        &flow("format = \"arrow\"").replace(", reason = \"string\"", "").replace("score, reason", "score"),
    );
    // The rows have arrived when the answers are given.
    case.write("reward.sh", "sleep 2; cat answers.arrow; cat > rows.arrow\n");
    let mut stream =
        StreamWriter::try_new(std::fs::File::create(case.path("answers.arrow")).unwrap(), &answers.schema()).unwrap();
    stream.write(&answers).unwrap();
    stream.finish().unwrap();
    case.done(&["flow.toml"]);
    assert_eq!(scores(&case), ["0.0", "0.1", "0.2"]);
    let sent = StreamReader::try_new(std::fs::File::open(case.path("rows.arrow")).unwrap(), None).unwrap();
    let sent: Vec<RecordBatch> = sent.map(Result::unwrap).collect();
    let keys: Vec<u64> = sent.iter().map(|b| b.column(0).as_primitive::<UInt64Type>().value(0)).collect();
    assert_eq!(keys, [0, 1, 2]);
    assert!(sent[0].schema().column_with_name("prompt").is_some());
}

#[test]
fn a_program_that_never_answers_ends_the_run_soon() {
    let case = Case::new(500, &flow(""));
    case.write("reward.sh", "echo 'no such module' >&2; exit 7\n");
    let began = Instant::now();
    refused(&case, "run", &["no row was answered", "exit status: 7", "its last words: no such module"]);
    assert!(began.elapsed() < Duration::from_secs(20));
}

fn refused(case: &Case, verb: &str, words: &[&str]) {
    let output: Output = case.run(&[verb, "flow.toml"]);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in:\n{message}");
    }
}

#[test]
fn mistakes_are_told_with_place_and_remedy() {
    let good = flow("");
    let wrong = |from: &str, to: &str, words: &[&str]| {
        assert!(good.contains(from), "{from}");
        let case = Case::new(2, &good.replace(from, to));
        case.write("reward.sh", &script(GOOD));
        refused(&case, "check", words);
        assert_eq!(starts(&case), 0);
    };
    let command = "[\"sh\", \"reward.sh\"]";
    wrong(
        command,
        "[\"./none.sh\"]",
        &["flow.toml:11: stages.reward.command: there is no file", "starts at the flow file's folder"],
    );
    wrong(command, "[]", &["stages.reward.command: is empty"]);
    wrong(command, "\"sh reward.sh\"", &["stages.reward.command: expected a list"]);
    wrong(
        "score = \"f64\"",
        "score = \"float\"",
        &["stages.reward.columns.score: is not a type", "f64, i64, bool and string"],
    );
    wrong("score = \"f64\"", "_score = \"f64\"", &["stages.reward.columns._score"]);
    wrong("score = \"f64\"", "prompt = \"f64\"", &["stages.reward.columns.prompt: the input already has"]);
    wrong("{ score = \"f64\", reason = \"string\" }", "{}", &["stages.reward.columns: is empty"]);
    wrong(command, "[\"sh\"]\nfiles = [\"none.txt\"]", &["stages.reward.files", "there is no file"]);
    wrong(command, "[\"sh\"]\ntimeout = 0", &["stages.reward.timeout"]);
    wrong(command, "[\"sh\"]\nworkers = 0", &["stages.reward.workers"]);
    wrong(command, "[\"sh\"]\nformat = \"json\"", &["stages.reward.format", "did you mean `jsonl`?"]);

    let case = Case::new(2, &good.replace("\"sh\"", "\"flowrun-no-such-program\""));
    case.write("reward.sh", "");
    refused(
        &case,
        "check",
        &["stages.reward.command: no folder of PATH has a program `flowrun-no-such-program`", "install it"],
    );
}

#[tokio::test]
async fn a_policy_limits_programs_and_hosts() {
    let case = case(2, "", GOOD);
    let model = "[models.gpt]\nendpoint = [\"https://api.example/v1\"]\nname = \"big\"\n";
    let text = flow("") + model;
    let policy = Policy::nothing().read(case.dir.path());
    let refused = |policy: &Policy, words: &str| {
        let engine = Engine::new().with_policy(policy.clone());
        let error = engine.read(&text, case.dir.path()).expect_err("allowed").to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(&policy, "models.gpt.endpoint: this service does not allow a flow to reach api.example");
    let policy = policy.host("api.example");
    refused(&policy, "stages.reward.command: this service does not allow a flow to start sh");
    let policy = policy.command("sh");
    let engine = Engine::new().with_policy(policy.clone());
    engine.read(&text, Path::new(case.dir.path())).unwrap();
    // The environment is the service's.
    for key in ["env", "secrets"] {
        let text = flow(&format!("{key} = [\"PATH\"]"));
        let error =
            Engine::new().with_policy(policy.clone()).read(&text, case.dir.path()).expect_err("allowed").to_string();
        assert!(error.contains(&format!("stages.reward.{key}: this service does not allow")), "{error}");
        Engine::new().with_policy(policy.clone().variable("PATH")).read(&text, case.dir.path()).expect("allowed");
    }
}

#[test]
fn a_row_that_was_given_up_stays_so_until_it_is_asked_for_again() {
    // The program fails on row 5 until the file `mended` is there.
    let body = r#"if [ "$n" = 5 ] && ! [ -e mended ]; then echo "{\"_key\":$key,\"error\":\"no verdict\"}"; else answer $key $n; fi"#;
    let case = case(12, "", body);
    case.done(&["flow.toml"]);
    let (without, all) = (expected((0..12).filter(|n| *n != 5)), expected(0..12));
    assert_eq!((starts(&case), scores(&case)), (1, without.clone()));
    case.write("mended", "");
    case.done(&["flow.toml"]);
    assert_eq!((starts(&case), scores(&case)), (1, without), "a finished run asked its program again");
    let told = dead(&case);
    assert!(told.len() == 1 && told[0].contains("no verdict"), "{told:?}");

    let retried = case.done(&["flow.toml", "--retry-dead"]);
    let said = stderr(&retried);
    assert!(said.contains("1 of reward (round 1)") && said.contains("good (round 1)"), "{said}");
    assert_eq!((starts(&case), scores(&case), dead(&case).len()), (2, all, 0));
    let said = stderr(&case.done(&["flow.toml", "--retry-dead"]));
    assert!(said.contains("no row that was given up"), "{said}");
    assert_eq!(starts(&case), 2);
}

#[test]
fn a_program_that_could_do_nothing_gave_up_nothing_for_good() {
    let case = Case::new(6, &flow(""));
    case.write("reward.sh", "if ! [ -e mended ]; then exit 7; fi\n. ./good.sh\n");
    case.write("good.sh", &script(GOOD));
    refused(&case, "run", &["no row was answered"]);
    case.write("mended", "");
    case.done(&["flow.toml"]);
    assert_eq!(scores(&case), expected(0..6));
}

#[test]
fn a_program_that_path_finds_decides_its_rows() {
    let case = Case::new(6, &flow("").replace("[\"sh\", \"reward.sh\"]", "[\"reward\"]"));
    std::fs::create_dir(case.path("bin")).unwrap();
    let program = |body: &str| {
        case.write("bin/reward", &format!("#!/bin/sh\n{}", script(body)));
        std::fs::set_permissions(case.path("bin/reward"), Permissions::from_mode(0o755)).unwrap();
    };
    let run = |args: &[&str]| {
        let path = std::env::join_paths([case.path("bin"), "/usr/bin".into(), "/bin".into()]).unwrap();
        case.command(args).env("PATH", path).output().unwrap()
    };
    program(GOOD);
    let first = run(&["flow.toml"]);
    assert!(first.status.success(), "{}", stderr(&first));
    assert_eq!(scores(&case), expected(0..6));
    program("answer $key $((n + 1))");
    let changed = run(&["flow.toml"]);
    assert_eq!(changed.status.code(), Some(2));
    assert!(stderr(&changed).contains("`reward` changed: files"), "{}", stderr(&changed));
    assert!(run(&["flow.toml", "--recompute"]).status.success());
    assert_eq!(scores(&case), expected(1..7));
}

#[test]
fn a_program_sees_what_the_flow_names_and_what_it_needs() {
    let keys = "env = [\"FLOWRUN_TEST_SHIFT\", \"FLOWRUN_TEST_UNSET\"]\nsecrets = [\"FLOWRUN_TEST_TOKEN\"]";
    // Of row 9 it tells a secret, where it can.
    let body = r#"env | sed 's/=.*//' | sort > names; echo "with $FLOWRUN_TEST_TOKEN" >&2
    if [ "$n" = 9 ]; then echo "{\"_key\":$key,\"error\":\"no use for $FLOWRUN_TEST_TOKEN\"}"; continue; fi
    answer $key $((n + FLOWRUN_TEST_SHIFT))"#;
    let case = case(10, keys, body);
    let run = |shift: &str, token: Option<&str>, args: &[&str]| {
        let mut command = case.command(args);
        command.env("FLOWRUN_TEST_SHIFT", shift).env("FLOWRUN_TEST_OTHER", "x").env("HOME", "/nowhere");
        token.map(|token| command.env("FLOWRUN_TEST_TOKEN", token));
        command.output().unwrap()
    };
    let done = |output: Output| assert!(output.status.success(), "{}", stderr(&output));
    done(run("1", Some("hunter2"), &["flow.toml"]));
    assert_eq!(scores(&case), expected(1..10));
    assert!(dead(&case)[0].contains("no use for ${FLOWRUN_TEST_TOKEN}"), "{:?}", dead(&case));
    let names = std::fs::read_to_string(case.path("names")).unwrap();
    let names: Vec<&str> = names.lines().collect();
    // The shell brings some of its own.
    assert!(
        ["FLOWRUN_TEST_SHIFT", "FLOWRUN_TEST_TOKEN", "HOME", "PATH"].iter().all(|n| names.contains(n)),
        "{names:?}"
    );
    assert!(
        !names.iter().any(|name| name.contains("OTHER") || name.contains("UNSET") || name.contains("HF_HUB")),
        "{names:?}"
    );

    done(run("1", Some("hunter3"), &["flow.toml"]));
    assert_eq!(starts(&case), 1, "a secret is in no key");
    let changed = run("2", Some("hunter3"), &["flow.toml"]);
    assert_eq!(changed.status.code(), Some(2));
    assert!(stderr(&changed).contains("`reward` changed: env"), "{}", stderr(&changed));
    done(run("2", Some("hunter3"), &["flow.toml", "--recompute"]));
    assert_eq!(scores(&case), expected(2..11));
    let shown =
        |file: &str| String::from_utf8_lossy(&std::fs::read(case.path("runs/tiny").join(file)).unwrap()).into_owned();
    for file in ["plan.json", "flow.toml", "metrics.jsonl", "report.html", "round-1/reward/journal"] {
        let text = shown(file);
        assert!(!text.contains("hunter2") && !text.contains("hunter3"), "{file}");
    }

    let unset = run("2", None, &["check", "flow.toml"]);
    assert_eq!(unset.status.code(), Some(2));
    let message = stderr(&unset);
    assert!(
        message.contains("stages.reward.secrets: the environment variable FLOWRUN_TEST_TOKEN is not set"),
        "{message}"
    );
    let both = flow("env = [\"PATH\"]\nsecrets = [\"PATH\"]");
    case.write("flow.toml", &both);
    refused(&case, "check", &["stages.reward.secrets: `PATH` is in `env` too"]);
    case.write("flow.toml", &flow("env = [\"A=B\"]"));
    refused(&case, "check", &["stages.reward.env: is a list of the names"]);
}
