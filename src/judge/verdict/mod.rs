//! Reads the verdict from a judge's text.
//!
//! | file | noun |
//! |---|---|
//! | `reasoning` | removes the reasoning before the answer |
//! | [`choice`] | reads a choice between two labels |
//! | [`points`] | reads a score |
//!
//! A text is read in tiers: first a verdict in a fixed form (`[[A]]`, `Verdict: A`, JSON), then a line that is only a
//! verdict, then a sentence (`A is better`), then a bare mention. The first tier with a match decides. Among fixed
//! forms the last match counts, because reasons come before the verdict. A text without a match, or with
//! contradicting sentences and no conclusion, is unreadable.

pub mod choice;
pub mod points;
mod reasoning;

#[cfg(test)]
mod table;

pub use self::choice::Labels;
pub use self::points::Points;

/// A judge's text and how it ended.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    pub text: &'a str,
    pub end: End,
}

/// How a judge's text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The judge ended the text.
    Finished,
    /// `max_new_tokens` or the context length ended it; the verdict may be missing.
    Cut,
}

impl<'a> Said<'a> {
    pub fn finished(text: &'a str) -> Self {
        Self { text, end: End::Finished }
    }

    /// Returns the text after the reasoning; `None` if the reasoning did not end.
    pub fn conclusion(self) -> Option<Self> {
        Some(Self { text: reasoning::after(self.text)?, ..self })
    }
}

/// Largest length of a sentence, in bytes.
const LONGEST_SENTENCE: usize = 500;

/// Marks allowed before a verdict: quotes, brackets, emphasis, LaTeX.
const OPEN: &str =
    r#"(?:[\s*_`~"'“”‘’(\[{<$#>]|\\(?:boxed|text|textbf|mathbf|mathrm|bf|\(|\[)|</?(?:b|strong|i|em)>)*"#;

/// Marks allowed after a verdict.
const CLOSE: &str = r#"(?:[\s*_`~"'“”‘’)\]}>$]|\\[)\]])*"#;

/// Returns the text without surrounding marks and punctuation.
fn bare(text: &str) -> &str {
    let mark = |c: char| c.is_whitespace() || "*_`~\"'“”‘’()[]{}<>$#.,;:!=-".contains(c);
    text.trim_matches(mark)
}

/// Returns the lines that contain more than marks, without the fences of code blocks.
fn lines(text: &str) -> impl DoubleEndedIterator<Item = &str> {
    let code = |line: &&str| line.trim_start().starts_with("```");
    text.lines().filter(move |line| !code(line)).filter(|line| !bare(line).is_empty())
}

/// Returns at most [`LONGEST_SENTENCE`] bytes before `at`.
fn before(text: &str, at: usize) -> &str {
    let start = (at.saturating_sub(LONGEST_SENTENCE)..=at).find(|start| text.is_char_boundary(*start));
    &text[start.unwrap_or(at)..at]
}

/// Returns the part before `at` of the sentence that contains `at`.
fn sentence_before(text: &str, at: usize) -> &str {
    let before = before(text, at);
    let ends = ["\n", ". ", "! ", "? ", "; "].into_iter();
    let start = ends.filter_map(|end| before.rfind(end).map(|i| i + end.len())).max().unwrap_or(0);
    &before[start..]
}
