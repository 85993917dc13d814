//! Texts that end an answer, found while its tokens come.
//!
//! A stop string may begin and end inside a token, and a character may need several tokens, so ids say
//! nothing and the text has to be looked at. Only its end is: the decoded text of the last few tokens,
//! which begins where a character begins, so that it is an end of the whole text whatever comes after.
//! What was found there is cut out of the whole text, once.

use std::fmt;

/// What the text of a tail may have lost in front: a decoder takes a space away, and a tail that had to
/// begin inside a character begins with replacement characters.
const SLACK: usize = 16;

/// A tail this many times as long as needed is cut wherever it may be.
const LONGEST: usize = 8;

/// What stands for bytes that are no UTF-8, or not yet.
const REPLACEMENT: char = '\u{FFFD}';

type Decode = dyn Fn(&[u32]) -> String + Send + Sync;

/// Texts that end an answer, with the decoder of its tokens.
pub struct StopStrings {
    strings: Vec<String>,
    decode: Box<Decode>,
    /// Bytes of text that a tail has at least.
    reach: usize,
}

impl fmt::Debug for StopStrings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.strings.fmt(f)
    }
}

/// How far a sequence has been looked at: its tail is what comes after.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tail {
    start: usize,
}

/// Where an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// The fewest first tokens that have all text in front of the stop string; the last of them may
    /// have the beginning of the stop string too.
    pub tokens: usize,
    /// Bytes of text in front of the stop string.
    pub bytes: usize,
}

impl StopStrings {
    /// `decode` gives the text of tokens, as the answer will have it.
    pub fn new(strings: Vec<String>, decode: impl Fn(&[u32]) -> String + Send + Sync + 'static) -> Self {
        let reach = strings.iter().map(String::len).max().unwrap_or(0) + SLACK;
        Self { strings, decode: Box::new(decode), reach }
    }

    /// The first stop string in the text of `ids`, which has grown by one token since it was last asked
    /// with this tail.
    pub fn find(&self, ids: &[u32], tail: &mut Tail) -> Option<Cut> {
        let text = (self.decode)(ids.get(tail.start..)?);
        if self.first(&text).is_some()
            && let Some(cut) = self.cut(ids, tail.start, &text)
        {
            return Some(cut);
        }
        if text.len() >= 2 * self.reach {
            tail.start = self.advance(ids, tail.start, &text);
        }
        None
    }

    /// Where the first stop string begins.
    fn first(&self, text: &str) -> Option<usize> {
        self.strings.iter().filter_map(|s| text.find(s.as_str())).min()
    }

    /// `tail` is the text of the tokens from `start`.
    fn cut(&self, ids: &[u32], start: usize, tail: &str) -> Option<Cut> {
        let text = (self.decode)(ids);
        let bytes = self.first(&text)?;
        let front = (tail.len() + bytes).checked_sub(text.len()).and_then(|front| tail.get(..front));
        let enough = |end: &usize| front.is_some_and(|front| (self.decode)(&ids[start..*end]).starts_with(front));
        Some(Cut { tokens: (start..ids.len()).find(enough).unwrap_or(ids.len()), bytes })
    }

    /// Where a shorter tail begins: at a character, so that no token to come changes what is in front.
    fn advance(&self, ids: &[u32], start: usize, text: &str) -> usize {
        let clean = |new: &usize| {
            let rest = (self.decode)(&ids[*new..]);
            rest.len() >= self.reach && !rest.starts_with(REPLACEMENT) && text.ends_with(&rest)
        };
        // Nothing but broken characters has no such place, and no stop string across it.
        let forced = if text.len() < LONGEST * self.reach { start } else { ids.len().saturating_sub(self.reach) };
        (start + 1..ids.len()).rev().find(clean).unwrap_or(forced.max(start))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::model::{Config, Tokenizer};

    /// Tokens that are texts, however they are split.
    fn pieces(pieces: Vec<Vec<u8>>) -> impl Fn(&[u32]) -> String + Send + Sync + 'static {
        move |ids| {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| pieces[*id as usize].clone()).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
    }

    /// The answer of tokens that come one after the other, and how many came.
    fn follow(stops: &StopStrings, ids: &[u32]) -> Option<(Cut, usize)> {
        let mut tail = Tail::default();
        (1..=ids.len()).find_map(|count| Some((stops.find(&ids[..count], &mut tail)?, count)))
    }

    /// The same, looking at the whole text every time.
    fn whole(stops: &StopStrings, ids: &[u32]) -> Option<(Cut, usize)> {
        (1..=ids.len()).find_map(|count| {
            let text = (stops.decode)(&ids[..count]);
            let bytes = stops.first(&text)?;
            let enough = |end: &usize| (stops.decode)(&ids[..*end]).starts_with(&text[..bytes]);
            Some((Cut { tokens: (0..=count).find(enough)?, bytes }, count))
        })
    }

    fn strings(strings: &[&str]) -> Vec<String> {
        strings.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn stop_strings_begin_and_end_inside_of_tokens() {
        let find = |texts: &[&str], stops: &[&str]| {
            let all: Vec<u32> = (0..texts.len() as u32).collect();
            let decode = pieces(texts.iter().map(|t| t.as_bytes().to_vec()).collect());
            follow(&StopStrings::new(strings(stops), decode), &all).map(|(cut, count)| (cut.tokens, cut.bytes, count))
        };
        assert_eq!(find(&["Yes.", "\n\n", "User"], &["\n\n"]), Some((1, 4, 2)));
        // the token that crosses stays, its text is cut
        assert_eq!(find(&["Yes", ".\n", "\nUs"], &["\n\n"]), Some((2, 4, 3)));
        assert_eq!(find(&["Yes.\n\nUser: no"], &["\n\n", "s."]), Some((1, 2, 1)));
        assert_eq!(find(&["Us", "er", ":"], &["User:"]), Some((0, 0, 3)));
        assert_eq!(find(&["Us", "er", " :"], &["User:"]), None);
    }

    #[test]
    fn the_work_a_token_does_not_grow() {
        let most = Arc::new(AtomicUsize::new(0));
        let seen = most.clone();
        let decode = move |ids: &[u32]| {
            seen.fetch_max(ids.len(), Ordering::Relaxed);
            "a".repeat(ids.len())
        };
        let stops = StopStrings::new(strings(&["end", "the end"]), decode);
        assert_eq!(follow(&stops, &[0; 3000]), None);
        assert!(most.load(Ordering::Relaxed) <= 2 * stops.reach);
        // broken characters are no place to begin at
        let broken = StopStrings::new(strings(&["end"]), pieces(vec![vec![0xFF]]));
        let mut tail = Tail::default();
        let longest = (1..500).map(|count| {
            assert_eq!(broken.find(&vec![0; count], &mut tail), None);
            count - tail.start
        });
        assert!(longest.max().unwrap() <= LONGEST * broken.reach);
    }

    fn tokenizer(kind: &str) -> Arc<Tokenizer> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let config = Config::from_json(&fixtures.join("tiny-llama/config.json")).unwrap();
        Arc::new(Tokenizer::from_dir(&fixtures.join("tokenizers").join(kind), &config).unwrap())
    }

    proptest! {
        /// Whatever the tokens are: halves of characters, long and short ones.
        #[test]
        fn tails_find_what_the_whole_text_has(
            texts in prop::collection::vec("[ab\n é€😀]{0,9}", 1..30),
            splits in prop::collection::vec(1..7_usize, 1..40),
            stops in prop::collection::vec("[ab\n é€]{1,4}", 1..3),
            broken in prop::option::of(any::<u8>()),
        ) {
            let mut bytes = texts.concat().into_bytes();
            bytes.extend(broken);
            bytes.extend(texts.concat().bytes());
            let (mut rest, mut tokens) = (bytes.as_slice(), Vec::new());
            for size in splits.iter().cycle() {
                let (token, after) = rest.split_at((*size).min(rest.len()));
                tokens.push(token.to_vec());
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let ids: Vec<u32> = (0..tokens.len() as u32).collect();
            let stops = StopStrings::new(stops, pieces(tokens));
            prop_assert_eq!(follow(&stops, &ids), whole(&stops, &ids));
        }

        /// Real tokenizers: byte-level, bytes as tokens of their own, spaces that a decoder takes away,
        /// special tokens without a text; what a model of no sense would say.
        #[test]
        fn tails_find_what_every_tokenizer_decodes(
            kind in prop::sample::select(vec!["llama2", "llama3", "gemma"]),
            draws in prop::collection::vec(any::<prop::sample::Index>(), 1..120),
            place in any::<prop::sample::Index>(),
            length in 1..5_usize,
        ) {
            let tokenizer = tokenizer(kind);
            let ids: Vec<u32> = draws.iter().map(|d| d.index(tokenizer.vocab_size()) as u32).collect();
            let decode = move |ids: &[u32]| tokenizer.decode(ids, true).unwrap();
            let text: Vec<char> = decode(&ids).chars().filter(|c| *c != REPLACEMENT).collect();
            prop_assume!(!text.is_empty());
            let start = place.index(text.len());
            let stop: String = text[start..text.len().min(start + length)].iter().collect();
            let stops = StopStrings::new(vec![stop], decode);
            prop_assert_eq!(follow(&stops, &ids), whole(&stops, &ids));
        }
    }
}
