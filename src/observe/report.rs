//! `report.html`: a run, or several side by side, as one page that needs no network.
//!
//! The page is three files beside this one and the figures as JSON in it; its script draws them. What a model wrote is
//! only ever JSON here and text there, so no answer can become part of the page.

use serde_json::{Value, json};

const PAGE: &str = include_str!("report/page.html");
const STYLE: &str = include_str!("report/style.css");
const SCRIPT: &str = include_str!("report/view.js");

/// The page of one run or of several; each value as `engine::report` makes it.
pub fn page(runs: &[Value]) -> String {
    // Only within strings can JSON hold a `<`, and without one no text ends the element that it is in.
    let data = json!({ "runs": runs }).to_string().replace('<', "\\u003c");
    let mut page = String::with_capacity(PAGE.len() + STYLE.len() + SCRIPT.len() + data.len());
    let mut rest = PAGE;
    // Each marker is replaced once, in the page itself: what is filled in is not looked at again.
    while let Some(start) = rest.find("/*") {
        let (before, marked) = rest.split_at(start);
        page.push_str(before);
        let end = marked.find("*/").map_or(marked.len(), |end| end + 2);
        let (marker, after) = marked.split_at(end);
        page.push_str(match marker {
            "/*STYLE*/" => STYLE,
            "/*SCRIPT*/" => SCRIPT,
            "/*DATA*/" => &data,
            other => other,
        });
        rest = after;
    }
    page.push_str(rest);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_stays_data() {
        let hostile = "</script><script>alert(1)</script> /*STYLE*/ <!--";
        let page = page(&[json!({ "name": hostile })]);
        assert_eq!(page.matches("alert(1)").count(), 1);
        assert!(page.contains("\\u003c/script>\\u003cscript>alert(1)\\u003c/script> /*STYLE*/ \\u003c!--"));
        assert!(page.contains(STYLE) && page.contains(SCRIPT));
        assert_eq!(page.matches(STYLE).count(), 1);
    }
}
