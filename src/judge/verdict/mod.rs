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
mod grammar;
mod names;
mod number;
mod object;
mod plain;
pub mod points;
mod reasoning;
mod reasons;
mod sentences;

#[cfg(test)]
mod table;

use regex::Regex;

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

    /// Returns a part of the text, with the text's end if it may be the last part.
    pub fn part<'b>(self, text: &'b str) -> Said<'b> {
        let last = self.text.trim_end().ends_with(text);
        Said { text, end: if last { self.end } else { End::Finished } }
    }

    /// Returns the text after the reasoning; `None` if the reasoning did not end.
    pub fn conclusion(self) -> Option<Self> {
        Some(Self { text: reasoning::after(self.text)?, ..self })
    }
}

/// Compiles a pattern that ignores case.
fn pattern(text: &str) -> Regex {
    Regex::new(&format!("(?i){text}")).expect("a pattern of this module")
}
