//! Rewrites a text without its dress: emphasis, quotes, LaTeX, tags, and letters of full width.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::pattern;

static SPECIAL: LazyLock<Regex> = LazyLock::new(|| pattern(r"<\|[\w/]{1,40}\|>|</s>\s*$|<end_of_turn>|<eos>"));
/// A word in quotes, which may be meant as its opposite: the "better" one.
static SO_CALLED: LazyLock<Regex> =
    LazyLock::new(|| pattern(r#"["'“‘”](better|best|winner|winning|wins|preferred|superior)["'”’“](\s+[^\s:=])"#));
static FENCE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?m)^[ \t]*(?:```|~~~)[^\n]*$"));
static MATHS: LazyLock<Regex> = LazyLock::new(|| pattern(r"\\[()\[\]]|\$|\\(?:left|right)\b|\\[,;!]"));
static FONT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"\\(?:text|textbf|textit|textrm|texttt|mathbf|mathrm|mathsf|mathit|bf|emph|operatorname)\s*\{([^{}]*)\}")
});
static FRACTION: LazyLock<Regex> = LazyLock::new(|| pattern(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}"));
static BOXED: LazyLock<Regex> = LazyLock::new(|| pattern(r"\\f?boxed\s*\{([^{}]*)\}"));
/// An element without elements in it. Its name is the heading of its content.
static ELEMENT: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"<(?P<open>[a-z][\w-]{0,40})>(?P<content>[^<>]*)</(?P<close>[a-z][\w-]{0,40})>(?P<rest>[ \t]*[?%/~→–—-][^\n]*)?",
    )
});
static BREAK: LazyLock<Regex> = LazyLock::new(|| pattern(r"<br\s*/?>"));
static BULLET: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?m)^([ \t>]*)[*•+][ \t]+"));
static RULE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(?m)^[ \t]*(?:-{3,}|={3,}|\*{3,}|_{3,})[ \t]*$"));
static UNDERLINE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(^|[^\w])_+([^\s_])"));
static UNDERLINED: LazyLock<Regex> = LazyLock::new(|| pattern(r"([^\s_])_+([^\w]|$)"));
static QUOTE: LazyLock<Regex> = LazyLock::new(|| pattern(r"(^|[\s(\[{:=>])'+"));
static QUOTED: LazyLock<Regex> = LazyLock::new(|| pattern(r"'+($|[\s)\]}.,;:!?<])"));
/// A line that goes on in the next one.
static WRAPPED: LazyLock<Regex> = LazyLock::new(|| pattern(r"([^\s.!?:;])[ \t]*\n\s*((?-i:\p{Ll}))"));

/// Returns `text` without its dress. A box becomes `[[...]]`, and an element `<a>b</a>` the line `a: b`.
pub fn plain(text: &str) -> String {
    let text = FENCE.replace_all(text, "");
    let text: String = SO_CALLED.replace_all(&text, "~$1~$2").chars().filter_map(narrow).collect();
    let text = SPECIAL.replace_all(&text, "");
    let text = RULE.replace_all(&text, "");
    let text = latex(&text);
    let text = BREAK.replace_all(&text, "\n");
    let text = ELEMENT.replace_all(&text, element);
    let text = BULLET.replace_all(&text, "$1- ");
    let text = unstarred(&text);
    let text = UNDERLINE.replace_all(&text, "$1$2");
    let text = UNDERLINED.replace_all(&text, "$1$2");
    let text = QUOTE.replace_all(&text, "$1");
    let text = QUOTED.replace_all(&text, "$1");
    WRAPPED.replace_all(&text, "$1 $2").into_owned()
}

/// Returns the plain form of a character; `None` for one that is dress only.
fn narrow(c: char) -> Option<char> {
    match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0),
        '\u{3000}' | '\u{a0}' | '\u{202f}' | '\u{2009}' => Some(' '),
        '\u{200b}'..='\u{200d}' | '\u{feff}' | '\u{fe0f}' | '"' | '“' | '”' | '„' | '«' | '»' | '`' | '\r' => {
            None
        }
        '‘' | '’' | '′' => Some('\''),
        '−' => Some('-'),
        '。' => Some('.'),
        _ => Some(c),
    }
}

/// Removes asterisks, except one between two numbers.
fn unstarred(text: &str) -> String {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('*') {
        plain.push_str(&rest[..at]);
        let behind = rest[at..].trim_start_matches('*');
        let times = rest[at..].len() - behind.len() == 1
            && digit(plain.trim_end_matches(' ').chars().next_back())
            && digit(behind.trim_start_matches(' ').chars().next());
        if times {
            plain.push('*');
        }
        rest = behind;
    }
    plain + rest
}

/// Replaces LaTeX by what it shows.
fn latex(text: &str) -> Cow<'_, str> {
    if !text.contains(['\\', '$']) {
        return Cow::Borrowed(text);
    }
    let mut text = MATHS.replace_all(&text.replace("\\ ", " "), "").into_owned();
    for _ in 0..3 {
        text = FONT.replace_all(&text, "$1").into_owned();
    }
    let text = FRACTION.replace_all(&text, "$1/$2");
    Cow::Owned(BOXED.replace_all(&text, "[[$1]]").into_owned())
}

/// Writes an element as a line with a heading; one for emphasis as its content.
fn element(found: &Captures<'_>) -> String {
    let part = |name: &str| found.name(name).map_or("", |part| part.as_str());
    let (open, content) = (part("open"), part("content"));
    if open != part("close") {
        return format!("{content}</{}>{}", part("close"), part("rest"));
    }
    match open.to_ascii_lowercase().as_str() {
        "b" | "i" | "u" | "em" | "strong" | "code" | "span" | "p" => content.to_owned() + part("rest"),
        name => format!("\n{}: {}{}\n", name.replace(['_', '-'], " "), content.trim(), part("rest")),
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn a_text_without_its_dress() {
        for (text, is) in [
            ("**B**", "B"),
            ("__Response B__", "Response B"),
            ("**Final Verdict:** *B*", "Final Verdict: B"),
            ("response_b", "response_b"),
            ("Score: 2*2 = 4", "Score: 2*2 = 4"),
            ("Score: **4**/5", "Score: 4/5"),
            ("* one\n* two", "- one\n- two"),
            ("$\\boxed{\\text{B}}$", "[[B]]"),
            ("$\\boxed{\\mathrm{Response\\ B}}$", "[[Response B]]"),
            ("\\boxed{\\frac{4}{5}}", "[[4/5]]"),
            ("[[Ｂ]]", "[[B]]"),
            ("Ｓcore：４", "Score:4"),
            ("<verdict>B</verdict>", "\nverdict: B\n"),
            ("<B>", "<B>"),
            ("<b>B</b>", "B"),
            ("It's 'B'.", "It's B."),
            ("\"B\" it is", "B it is"),
            ("```json\nx\n```", "\nx\n"),
            ("Response A\nis short", "Response A is short"),
            ("Response A\n\nIt", "Response A\n\nIt"),
        ] {
            assert_eq!(plain(text), is, "{text}");
        }
    }
}
