//! The verdict in what a judge wrote.
//!
//! | file | noun |
//! |---|---|
//! | `reasoning` | what a model thinks before it answers, which is no verdict |
//! | [`choice`] | which of two labels a text names as the better one |
//! | [`points`] | the score that a text gives |
//!
//! A text is read in tiers: a verdict in a form made for it (`[[A]]`, `Verdict: A`, JSON) counts before a sentence
//! (`A is better`), and a sentence before a bare mention. In a tier the last one counts, because reasons come before
//! a verdict. What fits no tier, or two verdicts at once, is unreadable.

pub mod choice;
pub mod points;
mod reasoning;

#[cfg(test)]
mod table;

pub use self::choice::Labels;
pub use self::points::Points;

/// What a judge wrote.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    pub text: &'a str,
    pub end: End,
}

/// How a judge's text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By the judge itself.
    Finished,
    /// By `max_new_tokens` or the context: the verdict may have been still to come.
    Cut,
}

impl<'a> Said<'a> {
    pub fn finished(text: &'a str) -> Self {
        Self { text, end: End::Finished }
    }

    /// The part behind the reasoning; none where the judge was still reasoning.
    pub fn conclusion(self) -> Option<Self> {
        Some(Self { text: reasoning::after(self.text)?, ..self })
    }
}

/// Bytes.
const LONGEST_SENTENCE: usize = 500;

/// Marks that may stand around a verdict: quotes, brackets, emphasis, LaTeX.
const OPEN: &str =
    r#"(?:[\s*_`~"'“”‘’(\[{<$#>]|\\(?:boxed|text|textbf|mathbf|mathrm|bf|\(|\[)|</?(?:b|strong|i|em)>)*"#;

/// The same behind it.
const CLOSE: &str = r#"(?:[\s*_`~"'“”‘’)\]}>$]|\\[)\]])*"#;

/// A text without the marks around it and the full stop at its end.
fn bare(text: &str) -> &str {
    let mark = |c: char| c.is_whitespace() || "*_`~\"'“”‘’()[]{}<>$#.,;:!=-".contains(c);
    text.trim_matches(mark)
}

/// The lines that hold more than marks.
fn lines(text: &str) -> impl DoubleEndedIterator<Item = &str> {
    let code = |line: &&str| line.trim_start().starts_with("```");
    text.lines().filter(move |line| !code(line)).filter(|line| !bare(line).is_empty())
}

/// What stands before `at`, as far back as a sentence may reach.
fn before(text: &str, at: usize) -> &str {
    let start = (at.saturating_sub(LONGEST_SENTENCE)..=at).find(|start| text.is_char_boundary(*start));
    &text[start.unwrap_or(at)..at]
}

/// The sentence of `text` that goes on at `at`, up to there.
fn sentence_before(text: &str, at: usize) -> &str {
    let before = before(text, at);
    let ends = ["\n", ". ", "! ", "? ", "; "].into_iter();
    let start = ends.filter_map(|end| before.rfind(end).map(|i| i + end.len())).max().unwrap_or(0);
    &before[start..]
}
