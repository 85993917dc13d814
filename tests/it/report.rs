//! The report, as a person opens it: a run's own page, read again from its directory, several side by side; drawn by a
//! real browser where there is one.

use std::path::Path;
use std::process::Command;

use crate::support::{Case, stderr, tiny_flow};

/// What the page's script made of it, and what it complained of; none where there is no browser.
fn drawn(page: &Path, view: &str) -> Option<String> {
    let browser = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success()));
    let Some(browser) = browser else {
        println!("skipped: there is no chromium here");
        return None;
    };
    let profile = tempfile::tempdir().unwrap();
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"])
        .args(["--v=0", "--virtual-time-budget=10000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("file://{}{view}", page.canonicalize().unwrap().display()))
        .output()
        .unwrap();
    let told = stderr(&output);
    let complaints: Vec<_> = told.lines().filter(|line| line.contains("CONSOLE")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(dom.contains("data-ready=\"true\""), "not drawn:\n{}\n{told}", &dom[..dom.len().min(2000)]);
    // What is left is what was drawn: the data and the script hold every word too.
    let start = dom.find("<main").unwrap();
    Some(dom[start..dom.find("</main>").unwrap()].to_owned())
}

/// `12 of 300 rows`.
fn counted(dom: &str) -> (u64, u64) {
    let text = dom.split("id=\"samples-count\"").nth(1).and_then(|rest| rest.split(['>', '<']).nth(1)).unwrap();
    let mut numbers = text.split_whitespace().filter_map(|word| word.replace(',', "").parse().ok());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn a_run_leaves_a_report_that_a_browser_draws() {
    let case = Case::new(24, &tiny_flow(2, ""));
    case.done(&["flow.toml"]);
    let page = case.path("runs/tiny/report.html");
    let text = std::fs::read_to_string(&page).unwrap();
    for far in ["http://", "https://"] {
        let links = text.matches(far).count()
            - text.matches("http://www.w3.org/2000/svg").count() * usize::from(far == "http://");
        assert_eq!(links, 0, "{far} in a page that needs no network");
    }
    let Some(dom) = drawn(&page, "") else { return };
    for chart in ["loss", "margin", "accuracy", "logps", "grad_norm", "learning_rate", "timeline", "histogram"] {
        assert!(dom.contains(&format!("data-chart=\"{chart}\"")), "{chart}");
    }
    let (shown, all) = counted(&dom);
    assert!(shown == all && all > 0, "{shown} of {all}");
    let rounds: Vec<u64> = ["#round=1", "#round=2"].map(|view| counted(&drawn(&page, view).unwrap()).0).into();
    assert!(rounds.iter().all(|rows| *rows > 0) && rounds.iter().sum::<u64>() == all, "{rounds:?} of {all}");
    assert_eq!(counted(&drawn(&page, "#search=no%20such%20words%20anywhere").unwrap()), (0, all));
}

#[test]
fn reports_are_made_again_from_directories_and_side_by_side() {
    let case = Case::new(24, &tiny_flow(1, ""));
    case.done(&["flow.toml"]);
    case.done(&["flow.toml", "--output", "runs/other", "--set", "stages.sample.temperature=0.5"]);
    std::fs::remove_file(case.path("runs/tiny/report.html")).unwrap();
    case.done(&["report", "runs/tiny"]);
    assert!(case.path("runs/tiny/report.html").exists());
    case.done(&["report", "runs/tiny", "runs/other", "--out", "both.html"]);
    let text = std::fs::read_to_string(case.path("both.html")).unwrap();
    assert!(text.contains("\"name\":\"tiny\"") && text.contains("\"name\":\"other\""));
    if let Some(dom) = drawn(&case.path("both.html"), "") {
        assert!(dom.contains("id=\"compare\"") && dom.contains("data-chart=\"loss\""));
    }
    let output = case.run(&["report", "runs"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is not a run directory"), "{}", stderr(&output));
}
