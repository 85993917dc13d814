//! Flows of strangers: what they may open, what their runs may use, what nobody is to see.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::time::Duration;

use flowrun::arrow::array::{ArrayRef, StringArray};
use flowrun::arrow::record_batch::RecordBatch;
use flowrun::embed::{Engine, Feeder, FlowBuilder, Policy, RunOptions, feed};
use flowrun::engine::{Domain, Ending, Quota, RunError, RunHandle};
use serde_json::json;
use tempfile::TempDir;

use crate::support::{Case, stderr, tiny_flow, tiny_model};

const PATIENCE: Duration = Duration::from_secs(60);

/// A folder that may be read, `data`, one that may be written, `out`, and what is nobody's business, with all ways from
/// the first to the last.
struct Ground {
    dir: TempDir,
    engine: Engine,
}

/// Ways out of `data`, each as it would stand in a flow.
const OUT: [&str; 14] = [
    "/etc/passwd",
    "../private/rows.jsonl",
    "../private",
    "good/../../private/rows.jsonl",
    "link.jsonl",
    "link",
    "link/rows.jsonl",
    "link/*.jsonl",
    "l*.jsonl",
    "**/*.jsonl",
    "mixed",
    "mixed/*",
    "mixed/**",
    "../*/rows.jsonl",
];

impl Ground {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        for folder in ["data/good", "data/mixed/deep", "private", "out"] {
            std::fs::create_dir_all(path(folder)).unwrap();
        }
        for file in ["private/rows.jsonl", "data/good/rows.jsonl", "data/mixed/rows.jsonl"] {
            std::fs::write(path(file), "{\"prompt\": \"a\"}\n").unwrap();
        }
        for (to, link) in
            [("private", "link"), ("private/rows.jsonl", "link.jsonl"), ("private/rows.jsonl", "mixed/deep/x.jsonl")]
        {
            symlink(path(to), path("data").join(link)).unwrap();
        }
        symlink(path("private/rows.jsonl"), path("data/mixed/y.jsonl")).unwrap();
        let policy = Policy::nothing().read(path("data")).write(path("out")).host("huggingface.co").command("good");
        Self { engine: Engine::new().with_policy(policy), dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The error of reading the flow; none if it is allowed.
    fn refused(&self, text: &str) -> Option<String> {
        self.engine.read(text, &self.path("data")).err().map(|e| e.to_string())
    }

    /// The error of starting it.
    async fn not_started(&self, text: &str) -> Option<String> {
        let flow = match self.engine.read(text, &self.path("data")) {
            Ok(flow) => flow,
            Err(error) => return Some(error.to_string()),
        };
        self.engine.start(&flow, RunOptions::new(self.path("runs/1"))).await.err().map(|e| e.to_string())
    }
}

const ROWS: &str = "[stages.rows]\nkind = \"source\"\ndataset = \"good/rows.jsonl\"\n";

/// A flow in which the key says `value`.
fn saying(key: &str, value: &str) -> String {
    let (table, name) = key.rsplit_once('.').unwrap();
    let kinds = [
        ("stages.judge", "kind = \"judge\"\ninput = \"rows\"\nmethod = \"rule\""),
        ("stages.gate", "kind = \"gate\"\ninput = \"rows\"\nmodel = \"m\""),
        ("stages.align", "kind = \"trainer\"\ntrain = \"rows\"\nmodel = \"m\""),
        ("stages.reward", "kind = \"process\"\ninput = \"rows\"\ncolumns = { score = \"f64\" }"),
        ("stages.out", "kind = \"sink\"\ninput = \"rows\""),
    ];
    let stage = table.trim_start_matches("round.2.");
    let head = kinds.iter().find(|(stage_table, _)| stage.starts_with(stage_table));
    let head = head.map(|(table, keys)| format!("[{table}]\n{keys}\n")).unwrap_or_default();
    let own = match table {
        "stages.rows" => return format!("[{table}]\nkind = \"source\"\n{name} = {value}\n"),
        _ if head.starts_with(&format!("[{table}]")) => format!("{name} = {value}\n"),
        _ => format!("[{table}]\n{name} = {value}\n"),
    };
    format!("rounds = 2\n{ROWS}{head}{own}")
}

#[test]
fn no_key_that_names_a_path_leads_out() {
    let ground = Ground::new();
    for key in [
        "stages.rows.dataset",
        "round.2.stages.rows.dataset",
        "models.m.source",
        "stages.judge.labelled",
        "stages.gate.judge.labelled",
        "round.2.stages.gate.judge.labelled",
        "stages.align.init_adapter",
        "stages.reward.files",
        "stages.reward.command",
    ] {
        let is_list = key.starts_with("stages.reward");
        let value = |path: &str| if is_list { format!("[\"good\", {path:?}]") } else { format!("{path:?}") };
        for path in ["good/rows.jsonl", "good", "good/*.jsonl", "mixed/rows.jsonl", "mixed/r*"] {
            assert_eq!(ground.refused(&saying(key, &value(path))), None, "{key} = {path}");
        }
        for path in OUT.into_iter().chain([ground.path("private").to_str().unwrap()]) {
            // A command is given patterns as they are written.
            if key.ends_with("command") && path.contains('*') && !path.starts_with("..") {
                continue;
            }
            let message = ground.refused(&saying(key, &value(path)));
            let message = message.unwrap_or_else(|| panic!("{key} = {path} is allowed"));
            let place = key.strip_prefix("round.2.").unwrap_or(key);
            assert!(message.contains(place) && message.contains(&format!("read {path}")), "{key} = {path}: {message}");
        }
    }
}

#[tokio::test]
async fn no_query_and_no_revision_leads_out() {
    let ground = Ground::new();
    let private = ground.path("private/rows.jsonl");
    for sql in [format!("SELECT * FROM '{}'", private.display()), format!("COPY dataset TO '{}'", private.display())] {
        let source = format!("{ROWS}sql = {sql:?}\n");
        assert!(ground.not_started(&source).await.is_some(), "{sql}");
        let mapper = format!("{ROWS}[stages.more]\nkind = \"mapper\"\ninput = \"rows\"\nsql = {sql:?}\n");
        assert!(ground.not_started(&mapper).await.is_some(), "{sql}");
    }
    // What would overflow the stack ends no service.
    for (times, word, last) in [(300, "1+", "1"), (3000, "CAST(", "1"), (2000, "1 = 1 OR ", "1 = 1")] {
        let deep =
            format!("{}{last}{}", word.repeat(times), " AS INT)".repeat(if word == "CAST(" { times } else { 0 }));
        for flow in [
            format!("{ROWS}sql = \"SELECT prompt, {deep} AS x FROM dataset\"\n"),
            format!("{ROWS}select = {{ prompt = \"prompt\", x = \"{deep}\" }}\n"),
            format!("{ROWS}[stages.m]\nkind = \"mapper\"\ninput = \"rows\"\nsql = \"SELECT {deep} AS x FROM input\"\n"),
            format!("{ROWS}[stages.j]\nkind = \"judge\"\ninput = \"rows\"\nmethod = \"rule\"\nrule = \"{deep}\"\n"),
        ] {
            let message = ground.not_started(&flow).await.unwrap_or_else(|| panic!("{word} {times}"));
            assert!(message.contains("deep") || message.contains("recursion"), "{word} {times}: {message}");
        }
    }
    for revision in ["/etc", "../../../..", &ground.path("private").display().to_string()] {
        for key in ["stages.rows.dataset", "models.m.source"] {
            let message = ground.not_started(&saying(key, &format!("\"hf://a/b@{revision}\""))).await;
            assert!(message.is_some_and(|m| m.contains("hf://owner/name")), "{key} of {revision}");
        }
    }
    assert_eq!(std::fs::read_to_string(private).unwrap(), "{\"prompt\": \"a\"}\n");
}

#[test]
fn no_key_that_names_a_host_or_a_command_leads_out() {
    let ground = Ground::new();
    for (key, value, what) in [
        ("models.m.endpoint", "\"http://169.254.169.254/v1\"\nname = \"x\"", "reach 169.254.169.254"),
        ("models.m.endpoint", "[\"https://huggingface.co/v1\", \"http://[::1]/v1\"]\nname = \"x\"", "reach [::1]"),
        ("models.m.endpoint", "\"https://huggingface.co.evil.com/v1\"\nname = \"x\"", "reach huggingface.co.evil.com"),
        ("stages.reward.command", "[\"sh\", \"-c\", \"id\"]", "start sh"),
        ("stages.reward.command", "[\"./good\"]", "start ./good"),
        ("round.2.stages.reward.command", "[\"sh\"]", "start sh"),
    ] {
        let message = ground.refused(&saying(key, value)).unwrap_or_else(|| panic!("{key} = {value} is allowed"));
        assert!(message.contains(what), "{key} = {value}: {message}");
    }
    assert_eq!(ground.refused(&saying("stages.reward.command", "[\"good\", \"-v\", \"http://a/b\"]")), None);
    assert_eq!(ground.refused(&saying("models.m.endpoint", "\"https://huggingface.co/v1\"\nname = \"x\"")), None);
}

#[tokio::test]
async fn a_sink_is_judged_where_its_file_will_lie() {
    let ground = Ground::new();
    std::fs::create_dir_all(ground.path("runs/1")).unwrap();
    symlink(ground.path("private"), ground.path("runs/1/round-9")).unwrap();
    let text = |path: &str| saying("stages.out.path", &format!("{path:?}")).replace("rounds = 2", "rounds = 1");
    for path in [
        "../x.jsonl",
        "../../private/x.jsonl",
        "../out/x.jsonl",
        "a/../../x.jsonl",
        "round-9/x.jsonl",
        "/tmp/x.jsonl",
        ground.path("data/x.jsonl").to_str().unwrap(),
        ground.path("out/../private/x.jsonl").to_str().unwrap(),
    ] {
        let message = ground.not_started(&text(path)).await.unwrap_or_else(|| panic!("{path} is allowed"));
        assert!(message.contains("stages.out.path") && message.contains(&format!("write {path}")), "{message}");
    }
    let (engine, outer) = (&ground.engine, ground.path("out/{round}/x.jsonl").display().to_string());
    for (run, path) in [("2", "x.jsonl"), ("3", "x-{round}.jsonl"), ("4", "../../out/x.jsonl"), ("5", outer.as_str())] {
        let flow = engine.read(&text(path), &ground.path("data")).unwrap();
        let run = engine.start(&flow, RunOptions::new(ground.path("runs").join(run))).await.unwrap();
        assert_eq!(run.wait().await.status, Ending::Done, "{path}");
    }
    assert!(ground.path("out/x.jsonl").exists() && ground.path("out/1/x.jsonl").exists());
}

fn feeding(engine: &Engine, dir: &Path) -> (flowrun::flow::Flow, RunOptions, Feeder) {
    let column: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let (feeder, rows) = feed(RecordBatch::try_from_iter([("prompt", column)]).unwrap().schema());
    let sink = json!({ "input": "rows", "path": "rows.jsonl" });
    let flow = FlowBuilder::new("open").stage("rows", "feed", json!({})).stage("out", "sink", sink);
    let flow = flow.build(".", engine).unwrap();
    (flow, RunOptions::new(dir).feed("rows", rows), feeder)
}

async fn ended(run: &RunHandle) -> flowrun::engine::Summary {
    tokio::time::timeout(PATIENCE, run.wait()).await.expect("the run stands still")
}

fn quota(error: Option<RunError>) -> Option<Quota> {
    match error?.domain {
        Domain::Quota(quota) => Some(quota),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_quota_ends_a_run_with_its_own_error() {
    let case = Case::new(8, "");
    let text = tiny_flow(1, "");
    for (number, (policy, expected)) in [
        (Policy::default().rows(20), Some(Quota::Rows)),
        (Policy::default().tokens(50), Some(Quota::Tokens)),
        (Policy::default().bytes(1000), Some(Quota::Bytes)),
        (Policy::default().rows(10_000).tokens(1 << 20).bytes(1 << 30).seconds(600).runs(1), None),
    ]
    .into_iter()
    .enumerate()
    {
        let engine = Engine::new().with_policy(policy);
        let flow = engine.read(&text, case.dir.path()).unwrap();
        let run = engine.start(&flow, RunOptions::new(case.path(&format!("run-{number}")))).await.unwrap();
        let summary = ended(&run).await;
        assert_eq!(summary.status, if expected.is_some() { Ending::Failed } else { Ending::Done }, "{expected:?}");
        let told = summary.json["error"].as_str().unwrap_or_default().to_owned();
        assert!(expected.is_none() || told.contains("all that"), "{told}");
        assert_eq!(quota(summary.error), expected, "{told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_have_their_time_and_their_number() {
    let dir = TempDir::new().unwrap();
    let engine = Engine::new().with_policy(Policy::default().seconds(1).runs(1));
    for turn in ["a", "b"] {
        let (flow, options, feeder) = feeding(&engine, &dir.path().join(turn));
        let run = engine.start(&flow, options).await.unwrap();
        let (more, options, _other) = feeding(&engine, &dir.path().join("more"));
        assert_eq!(quota(engine.clone().start(&more, options).await.err()), Some(Quota::Runs));
        // Nobody ends the feed.
        let summary = ended(&run).await;
        assert_eq!((summary.status, quota(summary.error)), (Ending::Failed, Some(Quota::Seconds)));
        drop(feeder);
    }
    assert!(!dir.path().join("more").exists());
}

/// Values of the environment that a flow uses, by the name of the variable.
struct Hidden(Vec<(&'static str, String)>);

impl Hidden {
    fn command(&self, case: &Case, args: &[&str]) -> Output {
        case.command(args).envs(self.0.iter().map(|(name, value)| (*name, value.as_str()))).output().unwrap()
    }

    fn assert_not_in(&self, bytes: &[u8], place: &str) {
        for (name, value) in &self.0 {
            let found = bytes.windows(value.len()).any(|window| window == value.as_bytes());
            assert!(!found, "the value of {name} is in {place}");
        }
    }

    fn assert_not_below(&self, dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            match entry.path().is_dir() {
                true => self.assert_not_below(&entry.path()),
                false => self.assert_not_in(&std::fs::read(entry.path()).unwrap(), &entry.path().display().to_string()),
            }
        }
    }
}

#[test]
fn values_of_the_environment_are_shown_nowhere() {
    let reward = r#"
[stages.reward]
kind = "process"
input = "prompts"
command = ["sh", "reward.sh", "${WORD}"]
columns = { score = "f64" }
retries = 0
"#;
    let flow = tiny_flow(1, reward).replace("name = \"tiny\"", "name = \"${TITLE}\"\nmax_dead_letters = 0.5");
    let flow = flow.replace(&format!("{:?}", tiny_model()), "\"${WEIGHTS}/model\"");
    let case = Case::new(8, &flow.replace("\"prompts.jsonl\"", "\"${PLACE}/prompts.jsonl\""));
    // A program that shows its word where it can: on stderr, and as the reason why a row is given up.
    case.write(
        "reward.sh",
        r#"while IFS= read -r line; do
        key=${line#*\"_key\":}; key=${key%%[!0-9]*}
        echo "working with $1" >&2
        case "$line" in
            *'number 3'*) echo "{\"_key\":$key,\"error\":\"no use for $1\"}";;
            *) echo "{\"_key\":$key,\"score\":1}";;
        esac
done
"#,
    );
    let place = case.path("customer-17");
    std::fs::create_dir_all(place.join("model")).unwrap();
    std::fs::copy(case.path("prompts.jsonl"), place.join("prompts.jsonl")).unwrap();
    for file in std::fs::read_dir(tiny_model()).unwrap().flatten().filter(|f| f.path().is_file()) {
        std::fs::copy(file.path(), place.join("model").join(file.file_name())).unwrap();
    }
    let place = place.display().to_string();
    let values = [("TITLE", "merger-talks"), ("WORD", "hunter2"), ("PLACE", &place), ("WEIGHTS", "customer-17")];
    let hidden = Hidden(values.map(|(name, value)| (name, value.to_owned())).to_vec());
    let run = |args: &[&str]| {
        let output = hidden.command(&case, args);
        hidden.assert_not_in(&output.stdout, &format!("stdout of {args:?}"));
        hidden.assert_not_in(&output.stderr, &format!("stderr of {args:?}"));
        output
    };
    assert!(run(&["check", "flow.toml"]).status.success());
    let args = ["flow.toml", "--output", "runs/1", "--log-format", "json"];
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    hidden.assert_not_below(&case.path("runs/1"));
    let written = std::fs::read_to_string(case.path("runs/1/flow.toml")).unwrap();
    assert!(written.contains("${WEIGHTS}/model") && written.contains("\"${WORD}\""), "{written}");
    assert!(std::fs::read_to_string(case.path("runs/1/report.html")).unwrap().contains("no use for ${WORD}"));

    // Those that read the run later need the variables, and say so.
    let asked = ["generate", "runs/1", "a prompt", "--max-new-tokens", "2", "--device", "cpu"];
    assert!(run(&asked).status.success());
    let without = stderr(&case.run(&asked));
    assert!(without.contains("the environment variable") && without.contains("is not set"), "{without}");

    // Another value is another key, and neither is told.
    let mut changed = case.command(&["flow.toml", "--output", "runs/1"]);
    changed.envs(hidden.0.iter().map(|(name, value)| (*name, value.as_str()))).env("WORD", "swordfish");
    let changed = changed.output().unwrap();
    assert_eq!(changed.status.code(), Some(2));
    assert!(stderr(&changed).contains("${WORD}#") && !stderr(&changed).contains("swordfish"), "{}", stderr(&changed));
    hidden.assert_not_in(&changed.stderr, "what changed");
    assert!(run(&args).status.success(), "the same values go on");
}

#[test]
fn values_of_the_environment_are_in_no_error() {
    for (line, value) in [
        ("name = \"${V}\"\n", "not/a name-42"),
        ("[models.m]\nendpoint = \"${V}\"\nname = \"x\"\n", "ftp://user-42.example"),
        (
            "[models.m]\nsource = \"${V}\"\n[stages.s]\nkind = \"sampler\"\ninput = \"rows\"\nmodel = \"m\"\n",
            "nowhere-42",
        ),
        (
            "[stages.p]\nkind = \"process\"\ninput = \"rows\"\ncommand = [\"./${V}\"]\ncolumns = { a = \"f64\" }\n",
            "prog-42",
        ),
        ("[stages.k]\nkind = \"sink\"\ninput = \"rows\"\npath = \"${V}\"\n", "file-42.txt"),
    ] {
        let source = "[stages.rows]\nkind = \"source\"\ndataset = \"prompts.jsonl\"\n";
        let case =
            Case::new(2, &if line.starts_with("name") { format!("{line}{source}") } else { format!("{source}{line}") });
        for args in [&["check", "flow.toml"][..], &["flow.toml"]] {
            let output = case.command(args).env("V", value).output().unwrap();
            let told = stderr(&output);
            // What a model needs may be told as not checked.
            let refused = args[0] == "check" || (!output.status.success() && told.contains("${V}"));
            assert!(refused && !told.contains("42"), "{line}: {told}");
            assert!(!String::from_utf8_lossy(&output.stdout).contains("-42"), "{line}");
        }
    }
}

#[test]
fn texts_of_others_are_printed_without_control_characters() {
    let hostile = "\u{1b}]0;owned\u{7}\u{1b}[2Jx\u{202e}y\u{9b}31m";
    let case = Case::new(1, "[stages.rows]\nkind = \"source\"\ndataset = \"odd.jsonl\"\n");
    let row = json!({ "prompt": hostile, hostile: 1 });
    case.write("odd.jsonl", &format!("{row}\n"));
    case.write("broken.jsonl", &format!("{row}\n{hostile}\n"));
    for args in [
        &["check", "flow.toml"][..],
        &["check", "flow.toml", "--set", "stages.rows.select={ prompt = 'nothing' }"],
        &["check", "flow.toml", "--set", "stages.rows.dataset='broken.jsonl'"],
        &["check", "flow.toml", "--set", &format!("stages.rows.dataset={:?}", "no\u{9b}31mthing")],
        &["flow.toml", "--output", "runs/1"],
        &["runs", "runs"],
        &["generate", "runs/1", hostile],
        &["inspect", hostile],
    ] {
        let output = case.run(args);
        for bytes in [&output.stdout, &output.stderr] {
            let text = String::from_utf8_lossy(bytes);
            let odd = text.chars().find(|c| (c.is_control() && !matches!(c, '\n' | '\t')) || *c == '\u{202e}');
            assert_eq!(odd, None, "{args:?}: {text:?}");
        }
    }
}
