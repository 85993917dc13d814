//! A full disk, a directory that can't be written, a directory in use: one message that says where
//! and what to do, and nothing that a later run would miss.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Case, stderr};
use crate::whole::{Found, Size};

/// The program's error, without its progress: its first line and the help below it.
fn error(output: &Output) -> String {
    let told = stderr(output);
    let errors: Vec<&str> = told.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "one message: {told}");
    told[told.find("error:").unwrap()..].into()
}

/// Runs with no file longer than `blocks` of 512 or 1,024 bytes, as the shell counts: writes beyond fail.
fn with_short_files(case: &Case, blocks: u32) -> Output {
    let program = case.command(&["flow.toml"]);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"")).arg(program.get_program());
    shell.args(program.get_args()).current_dir(case.dir.path()).stdin(Stdio::null());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell.output().unwrap()
}

#[test]
fn a_full_disk_ends_a_run_that_goes_on_when_there_is_room() {
    let (whole, case) = (Size::SHORT.case(), Size::SHORT.case());
    whole.done(&["flow.toml"]);
    // First hardly anything fits, then a journal up to its middle, then all but the longest files.
    for blocks in [8, 200, 500] {
        let full = with_short_files(&case, blocks);
        assert_eq!(full.status.code(), Some(1), "{}", stderr(&full));
        let told = error(&full);
        assert!(told.contains("runs/tiny") && told.contains("File too large"), "{told}");
        assert!(told.contains("help: "), "{told}");
        println!("{told}");
    }
    case.done(&["flow.toml"]);
    Found::of(&case.path("runs/tiny")).assert_equals(&Found::of(&whole.path("runs/tiny")), "after a full disk");
}

#[test]
fn a_directory_that_can_t_be_written_is_named_and_left_as_it_is() {
    let case = Size::TINY.case();
    let place = case.path("locked");
    std::fs::create_dir(&place).unwrap();
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o555)).unwrap();
    std::fs::set_permissions(case.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = case.command(&["flow.toml", "--output", "locked/run"]);
    if std::fs::write(place.join("probe"), "").is_ok() {
        // Nothing is locked for root; nobody else has to be able to read the program.
        std::fs::remove_file(place.join("probe")).unwrap();
        command.uid(65534).gid(65534);
    }
    let refused = match command.output() {
        Ok(output) if output.status.code() != Some(127) => output,
        other => return println!("skipped: another user can't start the program here: {other:?}"),
    };
    if stderr(&refused).contains("tiny-llama") {
        return println!("skipped: another user can't read the model here: {}", stderr(&refused));
    }
    assert_eq!(refused.status.code(), Some(1), "{}", stderr(&refused));
    let told = error(&refused);
    assert!(told.contains("locked/run: Permission denied") && told.contains("--output"), "{told}");
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0);
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).unwrap();
    case.done(&["flow.toml", "--output", "locked/run"]);
}

#[test]
fn a_second_run_in_a_directory_is_told_whose_it_is_and_the_first_goes_on() {
    let (whole, case) = (Size::SHORT.case(), Size::SHORT.case());
    whole.done(&["flow.toml"]);
    let mut first = case.start(&["flow.toml"]);
    let (began, lock) = (Instant::now(), case.path("runs/tiny/lock"));
    while !std::fs::read_to_string(&lock).is_ok_and(|owner| owner.ends_with('\n')) {
        assert!(began.elapsed() < Duration::from_secs(60) && first.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    for args in [&["flow.toml"][..], &["flow.toml", "--fresh"]] {
        let second = case.run(args);
        assert!(first.try_wait().unwrap().is_none(), "the first was over before the second began");
        assert_eq!(second.status.code(), Some(2), "{}", stderr(&second));
        let told = error(&second);
        assert!(
            told.contains("runs/tiny is in use by another run\n  help: process")
                && told.contains(&first.id().to_string()),
            "{told}"
        );
        assert!(told.contains("help: ") && told.contains("--output"), "{told}");
    }
    assert!(first.wait().unwrap().success());
    Found::of(&case.path("runs/tiny")).assert_equals(&Found::of(&whole.path("runs/tiny")), "beside a second");
}

#[test]
fn a_sink_that_would_write_a_file_of_the_run_or_of_another_sink_is_refused_before_anything_is_made() {
    let flow = |first: &str, second: &str| {
        format!(
            r#"
name = "tiny"
stages.prompts = {{ kind = "source", dataset = "prompts.jsonl" }}
stages.first = {{ kind = "sink", input = "prompts", path = {first:?} }}
stages.second = {{ kind = "sink", input = "prompts", path = {second:?} }}
"#
        )
    };
    let case = Case::new(3, "");
    std::os::unix::fs::symlink(case.dir.path(), case.path("link")).unwrap();
    let own = case.path("runs/tiny/round-1/x.jsonl").display().to_string();
    let free = case.path("runs/tiny/x.jsonl").display().to_string();
    for (first, second, words) in [
        ("a.jsonl", own.as_str(), "stages.second.path: "),
        ("../tiny/metrics.jsonl", "b.jsonl", "`metrics.jsonl` of the run directory"),
        ("../../link/runs/tiny/dead_letters.parquet", "b.jsonl", "`dead_letters.parquet` of the run directory"),
        ("x.jsonl", &free, "is written by `first` too"),
        ("../../x.jsonl", "../../link/x.jsonl", "is written by `first` too"),
        ("a.jsonl", "a.jsonl/b.jsonl", "can't lie beside"),
        ("a.jsonl", "../../prompts.jsonl", "is read by `prompts`"),
    ] {
        case.write("flow.toml", &flow(first, second));
        let refused = case.run(&["flow.toml"]);
        assert_eq!(refused.status.code(), Some(2), "{first} {second}: {}", stderr(&refused));
        assert!(stderr(&refused).contains(words), "{first} {second}: {}", stderr(&refused));
        assert!(!case.path("runs").exists(), "{first} {second}");
    }
    case.write("flow.toml", &flow("x.jsonl", "../../link/x.jsonl"));
    case.done(&["flow.toml"]);
    assert!(case.path("runs/tiny/x.jsonl").exists() && case.path("x.jsonl").exists());
}
