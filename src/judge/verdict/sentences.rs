//! Splits a plain text into sentences.

use std::sync::LazyLock;

use regex::Regex;

use super::pattern;

/// Largest length of a sentence that is examined, in bytes.
const LONGEST: usize = 600;

/// The marker of an item of a list.
static MARKER: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:[-–—>]\s+|\(?\d{1,2}[.)]\s+)+"));

/// Words that end with a full stop inside a sentence.
const SHORT: [&str; 13] = ["vs", "e.g", "i.e", "cf", "viz", "resp", "incl", "approx", "dr", "mr", "mrs", "st", "w.r.t"];

/// A sentence of a text.
#[derive(Debug, Clone, Copy)]
pub struct Sentence<'a> {
    /// The sentence without its marker and without what ends it.
    pub text: &'a str,
    /// The mark that ends it: one of `.!?:;`; `None` if there is none.
    pub end: Option<char>,
    /// The text before it.
    pub begin: Begin,
    /// True if it is a heading of Markdown.
    pub heading: bool,
    /// True if it is an item of a list.
    pub item: bool,
}

/// The text before a sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Another sentence of the same line.
    Sentence,
    /// The end of the line before.
    Line,
    /// The beginning of the text, or an empty line.
    Paragraph,
}

impl Sentence<'_> {
    /// Returns whether it is too long to be examined.
    pub fn is_long(&self) -> bool {
        self.text.len() > LONGEST
    }
}

/// Returns the sentences of `text`, in its order.
pub fn sentences(text: &str) -> Vec<Sentence<'_>> {
    let mut all = Vec::new();
    let mut begin = Begin::Paragraph;
    for line in text.lines() {
        let before = all.len();
        of_line(line.trim(), begin, &mut all);
        begin = if all.len() == before { Begin::Paragraph } else { Begin::Line };
    }
    all
}

/// Adds the sentences of a line.
fn of_line<'a>(line: &'a str, begin: Begin, all: &mut Vec<Sentence<'a>>) {
    let rest = line.trim_start_matches('#');
    let heading = rest.len() < line.len();
    let rest = rest.trim_start();
    let marker = MARKER.find(rest).map_or(0, |marker| marker.end());
    let item = marker > 0;
    let mut begin = begin;
    for part in parts(&rest[marker..]) {
        let text = part.trim_end_matches(|c: char| c.is_whitespace() || ".!?:;…。".contains(c)).trim();
        if text.is_empty() || !text.contains(|c: char| c.is_alphanumeric() || "★⭐☆".contains(c)) {
            continue;
        }
        let end = part.trim_end().chars().rev().take_while(|c| ".!?:;…".contains(*c) || c.is_whitespace());
        let end = end.filter(|c| !c.is_whitespace()).map(|c| if c == '…' { '.' } else { c });
        let end = end.reduce(|end, c| if c == '?' { c } else { end });
        all.push(Sentence { text, end, begin, heading, item });
        begin = Begin::Sentence;
    }
}

/// Splits a line after the marks that end a sentence.
fn parts(line: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let next = chars.peek().map(|(_, next)| *next);
        let ends = match c {
            '.' => !SHORT.contains(&last_word(&line[start..at]).to_ascii_lowercase().as_str()),
            '!' | '?' | ';' | '…' => true,
            _ => false,
        };
        let asked = c == '?' || c == ';';
        if ends && next.is_none_or(|next| next.is_whitespace() || (asked && next.is_alphanumeric())) {
            parts.push(&line[start..at + c.len_utf8()]);
            start = at + c.len_utf8();
        }
    }
    parts.push(&line[start..]);
    parts
}

fn last_word(text: &str) -> &str {
    text.rsplit(|c: char| c.is_whitespace() || c == '(').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_in_sentences() {
        let split = |text| sentences(text).iter().map(|s| (s.text, s.end)).collect::<Vec<_>>();
        assert_eq!(
            split("A vs. B. No?! Yes; so"),
            [("A vs. B", Some('.')), ("No", Some('?')), ("Yes", Some(';')), ("so", None)]
        );
        assert_eq!(split("## Verdict\n\nB"), [("Verdict", None), ("B", None)]);
        assert_eq!(split("Verdict:\n- B."), [("Verdict", Some(':')), ("B", Some('.'))]);
        assert_eq!(split("It is 4.5. Or 3..4"), [("It is 4.5", Some('.')), ("Or 3..4", None)]);
        assert_eq!(split("A... \n ---"), [("A", Some('.'))]);
        let all = sentences("One. Two\nthree\n\n1. Four");
        assert_eq!(
            all.iter().map(|s| s.begin).collect::<Vec<_>>(),
            [Begin::Paragraph, Begin::Sentence, Begin::Line, Begin::Paragraph]
        );
        assert!(all[3].item && !all[2].item);
    }
}
