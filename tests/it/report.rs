//! The report, as a person opens it: a run's own page, read again from its directory, several side by side; in a real
//! browser where there is one.

use serde_json::Value;

use crate::browser::{Browser, Window};
use crate::support::{Case, gate, stderr, tiny_flow};

/// A judge that gives scores, beside the loop.
const SCORES: &str = r#"
[stages.score]
kind = "judge"
input = "sample"
method = "rule"
rule = "length(generation) % 7"

[stages.best]
kind = "pairs"
input = "score"
"#;

const BY_LENGTH: &str = "judge = { method = \"rule\", rule = \"length(generation) % 3\" }";

/// `12 of 300 rows`.
fn counted(browser: &Browser) -> (u64, u64) {
    let text = browser.text("#samples-count");
    let mut numbers = text.split_whitespace().filter_map(|word| word.replace(',', "").parse().ok());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn a_run_leaves_a_report_that_a_browser_draws() {
    let case = Case::new(24, &tiny_flow(2, &format!("{SCORES}{}", gate(0.0, BY_LENGTH))));
    case.done(&["flow.toml"]);
    let page = case.path("runs/tiny/report.html");
    let text = std::fs::read_to_string(&page).unwrap();
    for far in ["http://", "https://"] {
        let links = text.matches(far).count()
            - text.matches("http://www.w3.org/2000/svg").count() * usize::from(far == "http://");
        assert_eq!(links, 0, "{far} in a page that needs no network");
    }
    for window in [Window::Desktop, Window::Phone] {
        let Some(browser) = Browser::start(window) else { return };
        browser.show(&page, "");
        everything_is_there(&browser);
        nothing_is_without_a_name(&browser);
        answers_can_be_found(&browser);
        pictures_can_be_moved(&browser);
        assert_eq!(browser.complaints(), [] as [Value; 0]);
    }
}

fn everything_is_there(browser: &Browser) {
    let charts =
        ["loss", "margin", "accuracy", "logps", "grad_norm", "learning_rate", "timeline", "histogram", "gates"];
    for chart in charts.into_iter().chain(["judge-swap_consistency", "judge-score.mean"]) {
        // Something is drawn in it, and it is not a dot.
        let drawn = format!(
            "const chart = document.querySelector('[data-chart=\"{chart}\"]'); if (!chart) return false; \
             const box = chart.getBoundingClientRect(); \
             return box.width > 200 && box.height > 30 && chart.querySelectorAll('path, rect, circle').length > 0"
        );
        assert_eq!(browser.run(&drawn), true, "{chart}");
    }
    // Validation at the beginning and after each round's only epoch, as dots on the curve of the loss.
    assert!(browser.run("return document.querySelectorAll('[data-chart=\"loss\"] circle').length").as_u64() >= Some(2));
    assert_eq!(browser.run("return document.querySelectorAll('[data-chart=\"gates\"] circle').length"), 2);
    let wide = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth");
    assert_eq!(wide, 0, "the page itself does not scroll sideways");
}

/// What a person who can't see the page is told.
fn nothing_is_without_a_name(browser: &Browser) {
    let nameless = browser.run(
        "const named = (e) => e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label') || e.labels?.length; \
         return [...document.querySelectorAll('button, select, input, [role=img], section, table')] \
           .filter((e) => !(e.matches('section') ? e.getAttribute('aria-labelledby') : e.matches('table') ? e.caption : named(e))) \
           .map((e) => e.outerHTML.slice(0, 200))",
    );
    assert_eq!(nameless, Value::Array(Vec::new()));
}

fn answers_can_be_found(browser: &Browser) {
    let (shown, all) = counted(browser);
    assert!(shown == all && all > 0, "{shown} of {all}");
    let choose = |filter: &str, value: &str| {
        browser.run(&format!(
            "const select = document.querySelector('#filter-{filter}'); select.value = '{value}'; \
             select.dispatchEvent(new Event('change'))"
        ));
        counted(browser).0
    };
    let rounds = ["1", "2"].map(|round| choose("round", round));
    assert!(rounds.iter().all(|rows| *rows > 0) && rounds.iter().sum::<u64>() == all, "{rounds:?} of {all}");
    assert!(browser.run("return location.hash").as_str().unwrap().contains("round=2"), "a view can be passed on");
    choose("round", "");
    browser.press("input[type=search]", "thing number 7");
    let found = counted(browser).0;
    assert!(found > 0 && found < all, "{found} of {all}");
    // A row shows itself whole.
    let whole = "#samples-table button[aria-expanded]";
    browser.click(whole);
    assert_eq!(browser.run(&format!("return document.querySelector('{whole}').getAttribute('aria-expanded')")), "true");
    assert!(browser.text("#samples-table tr:not([hidden]) .text").contains("thing number 7"));
    browser.press("input[type=search]", " no such words");
    assert_eq!(counted(browser).0, 0);
}

fn pictures_can_be_moved(browser: &Browser) {
    let bars = || browser.run("return document.querySelectorAll('#timeline-lanes rect').length").as_u64().unwrap();
    let all = bars();
    (0..6).for_each(|_| browser.click("#timeline button[aria-label='Zoom in']"));
    assert!(bars() < all, "of {all} bars, {} are still to be seen", bars());
    browser.press("#timeline-lanes", "0");
    assert_eq!(bars(), all, "the key 0 shows the whole run again");
    let theme = || browser.run("return getComputedStyle(document.body).backgroundColor");
    let before = theme();
    browser.click("#theme");
    assert_ne!(theme(), before);
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
    if let Some(browser) = Browser::start(Window::Desktop) {
        browser.show(&case.path("both.html"), "");
        let heads = browser.text("#compare thead");
        assert!(heads.contains("tiny") && heads.contains("other"), "{heads}");
        assert_eq!(browser.run("return document.querySelectorAll('[data-chart=\"loss\"] path').length"), 2);
        assert_eq!(browser.complaints(), [] as [Value; 0]);
    }
    let output = case.run(&["report", "runs"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is not a run directory"), "{}", stderr(&output));
}
