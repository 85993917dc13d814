//! Removes a model's reasoning from its text.

use std::sync::LazyLock;

use regex::Regex;

/// The marks around the reasoning, by model: DeepSeek, Qwen and others; Mistral; Kimi; Sky-T1.
static MARKS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(concat!(
        r"(?i)<(?P<close>/)?(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis|seed:think)>",
        r"|\[(?P<close2>/)?THINK\]",
        r"|(?P<close3>◁/think▷)|◁think▷",
        r"|(?P<close4><\|end_of_thought\|>)|<\|begin_of_thought\|>",
    ))
    .expect("a pattern of this module")
});

/// Returns the text after the reasoning. A closing mark alone is enough, because a chat template may write the
/// opening one. Returns `None` if the last opening mark is not closed.
pub fn after(text: &str) -> Option<&str> {
    let closes = |found: &regex::Captures<'_>| {
        ["close", "close2", "close3", "close4"].into_iter().any(|name| found.name(name).is_some())
    };
    let last = MARKS.captures_iter(text).last();
    let Some((found, mark)) = last.and_then(|found| Some((closes(&found), found.get(0)?))) else { return Some(text) };
    found.then(|| &text[mark.end()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_behind_the_reasoning_counts() {
        for (text, rest) in [
            ("Score: 4", Some("Score: 4")),
            ("<think>Score: 1</think>Score: 4", Some("Score: 4")),
            ("Score: 1, no</think>\n\nScore: 4", Some("\n\nScore: 4")),
            ("<think>a</think><think>b</think>c", Some("c")),
            ("<THINKING>\nScore: 1\n</THINKING>\nScore: 4", Some("\nScore: 4")),
            ("[THINK]Score: 1[/THINK]4", Some("4")),
            ("◁think▷1◁/think▷4", Some("4")),
            ("<think>Score: 1 so far", None),
            ("<think>a</think>Score: 4 <think>Score: 1", None),
            ("<think></think>", Some("")),
            ("a < think > b", Some("a < think > b")),
        ] {
            assert_eq!(after(text), rest, "{text}");
        }
    }
}
