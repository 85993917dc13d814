//! Refusals that are the same for every row.
//!
//! A server that doesn't know a parameter says so to each request. Where the first requests with the same settings
//! are refused in the same words, so would be all others.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Requests that are refused in the same words before the row is not to blame.
const ENOUGH: u32 = 3;

/// Words of a refusal that is about what a row says.
const OF_CONTENT: [&str; 4] = ["content_filter", "content filter", "content management", "content policy"];

/// What became of the requests with each settings.
#[derive(Default)]
pub struct Refusals(Mutex<HashMap<String, Outcome>>);

enum Outcome {
    /// One at least has an answer.
    Answered,
    /// None has one; the last of them were refused in these words.
    Refused { complaint: String, times: u32 },
}

impl Refusals {
    pub fn answered(&self, settings: &str) {
        self.known().insert(settings.to_owned(), Outcome::Answered);
    }

    /// Whether this refusal is one of every row.
    pub fn refused(&self, settings: &str, complaint: &str) -> bool {
        let about_content = complaint.to_lowercase();
        if OF_CONTENT.iter().any(|words| about_content.contains(words)) {
            return false;
        }
        let mut known = self.known();
        let first = || Outcome::Refused { complaint: complaint.to_owned(), times: 0 };
        match known.entry(settings.to_owned()).or_insert_with(first) {
            Outcome::Answered => false,
            Outcome::Refused { complaint: before, times } => {
                *times = if before == complaint { *times + 1 } else { 1 };
                complaint.clone_into(before);
                *times >= ENOUGH
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Outcome>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_words_to_requests_of_which_none_was_answered() {
        let all = Refusals::default();
        assert_eq!(["no", "no", "no"].map(|words| all.refused("a", words)), [false, false, true]);
        assert_eq!(["5 tokens", "6 tokens", "7 tokens"].map(|words| all.refused("b", words)), [false; 3]);
        all.answered("c");
        assert_eq!(["no"; 4].map(|words| all.refused("c", words)), [false; 4]);
        assert_eq!(["triggered the content management policy"; 4].map(|w| all.refused("d", w)), [false; 4]);
        assert_eq!(["no", "no"].map(|words| all.refused("e", words)), [false; 2], "of other settings");
    }
}
