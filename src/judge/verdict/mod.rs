//! Reads the verdict from a judge's text.
//!
//! | file | noun |
//! |---|---|
//! | `reasoning` | removes the reasoning before the answer |
//! | `plain` | removes the dress of a text: emphasis, LaTeX, tags |
//! | `object` | finds JSON objects |
//! | `sentences` | splits a text into sentences |
//! | `names` | matches the ways to write a label |
//! | `claims` | has the sentences that prefer an answer |
//! | `grammar` | reads a sentence that states a choice |
//! | `reasons` | knows the sentences that may stand around a choice |
//! | [`choice`] | reads a choice between two labels |
//! | `number` | reads a number with its sum, denominator and scale |
//! | [`points`] | reads a score |
//!
//! A sentence is read as a whole, by a closed grammar. A sentence with one word that the grammar does not have states
//! nothing, so a denial, a condition, a question or a quotation is never read as a verdict. The last statement of a
//! text counts, because reasons come before a verdict. A text is unreadable if an earlier statement contradicts it and
//! it is no conclusion, or if a later sentence is not known to leave it as it is.
//!
//! An unreadable text costs one answer. A text that is read as its opposite teaches the model the wrong thing. So a
//! doubt is always decided for unreadable.

pub mod choice;
mod claims;
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
