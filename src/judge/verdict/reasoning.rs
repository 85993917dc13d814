//! Removes a model's reasoning from its text.

use std::sync::LazyLock;

use regex::Regex;

use super::pattern;

/// Words for reasoning in the name of a mark.
const WORDS: &str = "think|thinking|thought|thoughts|reason|reasons|reasoning|reflect|reflection|scratchpad|analysis|monologue|deliberation|ponder";

/// The marks around the reasoning: tags such as `<think>`, `<seed:think>` and `[THINK]`; special tokens such as
/// `<|begin_of_thought|>` (Sky-T1), `<|START_THINKING|>` (Cohere), `◁think▷` (Kimi), `<unused94>` (MedGemma) and
/// `<|channel>` (Gemma).
static MARKS: LazyLock<Regex> = LazyLock::new(|| {
    let tag = format!(r"(?:\w+[:_-])*(?:{WORDS})(?:[:_-]\w+)*");
    let marks = [
        format!(r"(?P<tag></{tag}\s*>)|<{tag}(?:\s[^<>]{{0,200}})?/?>"),
        format!(r"(?P<square>\[/(?:{WORDS})\])|\[(?:{WORDS})\]"),
        format!(r"(?P<kimi>◁/(?:{WORDS})▷)|◁(?:{WORDS})▷"),
        format!(r"(?P<token><[|｜](?:/|[\w▁]*(?:end|close|stop)[\w▁]*)(?:{WORDS})\w*[|｜]>)"),
        format!(r"<[|｜][\w▁]*(?:{WORDS})\w*[|｜]>"),
        r"(?P<unused><unused95>)|<unused94>|(?P<channel><channel\|>)|<\|channel>".to_owned(),
    ];
    pattern(&marks.join("|"))
});

/// The channel of a text in the harmony format of gpt-oss.
static CHANNEL: LazyLock<Regex> = LazyLock::new(|| {
    pattern(r"<\|channel\|>\s*(?:(?P<last>final)\b)?[^<]{0,100}(?:<\|constrain\|>[^<]{0,40})?(?:<\|message\|>)?")
});

/// The beginning of a text of gpt-oss whose special tokens were removed.
static BARE_CHANNEL: LazyLock<Regex> =
    LazyLock::new(|| pattern(r#"^\s*(?-i:(?:assistant)?(?:analysis|commentary))[\w"'(<\[]"#));

/// The mark that then stands before the final channel.
const BARE_FINAL: &str = "assistantfinal";

/// Reasoning under a heading, as models write it that have no marks for it.
static HEADED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^[\s*_#>]*(?:my\s+)?(?:chain[ -]of[ -]thought|(?:thinking|thought|reasoning)(?:\s+process)?|thoughts|scratchpad|inner\s+monologue)[*_\s]*(?::|\n)",
    )
});

/// The heading of a verdict or score that ends such reasoning.
static HEADING: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"\n[\s*_#>]*(?:(?:my|the|final|overall)\s+)*(?:answer|verdict|response|output|conclusion|decision|score|rating|winner)[*_\s]*(?:[:：]|\n)",
    )
});

/// Returns the text after the reasoning. A closing mark alone is enough, because a chat template may write the
/// opening one. Returns `None` if the last opening mark is not closed.
pub fn after(text: &str) -> Option<&str> {
    let text = in_final_channel(text)?;
    let closes = |found: &regex::Captures<'_>| found.iter().skip(1).any(|group| group.is_some());
    let last = MARKS.captures_iter(text).last();
    let rest = match last.and_then(|found| Some((closes(&found), found.get(0)?))) {
        Some((true, mark)) => &text[mark.end()..],
        Some((false, _)) => return None,
        None => text,
    };
    if HEADED.is_match(rest) {
        return HEADING.find_iter(rest).last().map(|heading| &rest[heading.start()..]);
    }
    Some(rest)
}

/// Returns the message of the last channel; `None` if that is not the final one.
fn in_final_channel(text: &str) -> Option<&str> {
    if let Some(channel) = CHANNEL.captures_iter(text).last() {
        channel.name("last")?;
        return channel.get(0).map(|mark| &text[mark.end()..]);
    }
    if BARE_CHANNEL.is_match(text) {
        return text.rfind(BARE_FINAL).map(|at| &text[at + BARE_FINAL.len()..]);
    }
    Some(text)
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
            ("<think >a", None),
            ("<think type='x'>a</think>b", Some("b")),
            ("<think type=\"x\">a", None),
            ("<reason>a", None),
            ("<inner_monologue>a", None),
            ("<inner_monologue>a</inner_monologue>b", Some("b")),
            ("<seed:think>a</seed:think>b", Some("b")),
            ("<|begin_of_thought|>a<|end_of_thought|>b", Some("b")),
            ("<|begin_of_thought|>a", None),
            ("<|START_THINKING|>a<|END_THINKING|>b", Some("b")),
            ("<|START_THINKING|>a", None),
            ("<|think|>a<|/think|>b", Some("b")),
            ("<unused94>thought\na<unused95>b", Some("b")),
            ("<unused94>thought\na", None),
            ("<|channel>thought\na<channel|>b", Some("b")),
            ("<|channel>thought\na", None),
            ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", Some("b")),
            ("<|channel|>analysis<|message|>a", None),
            ("<|channel|>final<|message|>b<|return|>", Some("b<|return|>")),
            ("<|channel|>final <|constrain|>json<|message|>b", Some("b")),
            ("analysisWe see a.assistantfinalb", Some("b")),
            ("analysisWe see a.", None),
            ("assistantanalysiswe see a.assistantfinalb", Some("b")),
            ("analysis: a", Some("analysis: a")),
            ("Analysis\na", Some("Analysis\na")),
            ("**Thinking:** a", None),
            ("**Thinking:** a\n**Answer:** b", Some("\n**Answer:** b")),
            ("Thought process:\na\n\nVerdict: b", Some("\n\nVerdict: b")),
        ] {
            assert_eq!(after(text), rest, "{text}");
        }
    }
}
