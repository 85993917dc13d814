//! Texts that are put together from parts, so that what they mean is known.
//!
//! No reading is ever another than the meaning of the text.

use super::{labels, misread};
use crate::judge::Verdict::{self, A, B};
use crate::judge::verdict::{Points, Said};

const LABELS: [&str; 2] = ["Response A", "Response B"];

/// Ways to name the first of two answers, and the second in the same way.
const NAMES: [[&str; 2]; 3] = [["Response A", "Response B"], ["A", "B"], ["the first response", "the second response"]];

/// Sentences that prefer X to Y.
const CLAIMS: [&str; 22] = [
    "X is better",
    "X is better than Y",
    "X is clearly the better response",
    "X is more helpful than Y",
    "X wins",
    "X beats Y",
    "X outperforms Y",
    "X answers the question better than Y",
    "X does a better job than Y",
    "I prefer X",
    "I would choose X",
    "I'd go with X",
    "the winner is X",
    "the better response is X",
    "my choice is X",
    "Y is worse",
    "Y is worse than X",
    "Y loses",
    "Y is less helpful than X",
    "Y is outperformed by X",
    "Y falls short of X",
    "Y is not as good as X",
];

/// Verdicts for X that are no sentences.
const VERDICTS: [&str; 14] = [
    "X",
    "X.",
    "[[X]]",
    "\\boxed{X}",
    "Verdict: X",
    "Final verdict: X",
    "Answer: X",
    "Winner: X",
    "{\"winner\": \"X\"}",
    "<verdict>X</verdict>",
    "### Verdict\nX",
    "X > Y",
    "Rejected: Y",
    "{\"loser\": \"Y\"}",
];

/// Frames in which a claim is not made: denied, doubted, supposed, asked, quoted.
const NOT_CLAIMED: [&str; 84] = [
    "{}. I disagree.",
    "{}. False.",
    "{}. That is wrong.",
    "{}. As if.",
    "{}. Not so fast.",
    "{}. Or is it the other way round?",
    "{}. So says its author.",
    "{}. This was a test.",
    "{}. On closer look it loses.",
    "{}. In tone, that is.",
    "{} at best.",
    "{} on paper.",
    "{} to a fool.",
    "{}, though wrong.",
    "{} [citation needed].",
    "{} (false).",
    "{} = false.",
    "{} NOT.",
    "{} - said nobody.",
    "Hardly: {}.",
    "Far be it from me to say {}.",
    "Contrary to what it seems, {}.",
    "I do not think that {}.",
    "I don't believe {}.",
    "I doubt that {}.",
    "I would not say that {}.",
    "I can't say {}.",
    "I deny that {}.",
    "It is not true that {}.",
    "It is false that {}.",
    "It is wrong to say that {}.",
    "It can't be said that {}.",
    "It would be a stretch to say {}.",
    "Nobody thinks that {}.",
    "No one would claim {}.",
    "Far from it that {}.",
    "By no means {}.",
    "Never will I say {}.",
    "Hardly anyone thinks {}.",
    "I fail to see why {}.",
    "I refuse to say {}.",
    "I used to think {}.",
    "If {}, then I am a teapot.",
    "If you ask the author, {}.",
    "Unless facts matter, {}.",
    "Suppose {}.",
    "Assume that {}.",
    "Perhaps {}.",
    "Maybe {}.",
    "It may be that {}.",
    "One could argue that {}.",
    "Some say {}.",
    "The author claims that {}.",
    "It is said that {}.",
    "A careless reader thinks {}.",
    "At first sight {}.",
    "On style alone, {}.",
    "In terms of tone, {}.",
    "For a beginner, {}.",
    "Is it true that {}?",
    "Who says that {}?",
    "Do I think {}? No.",
    "{}? No.",
    "{}? I think not.",
    "{}, if you ask its author.",
    "{}, but only in tone.",
    "{} only if facts do not count.",
    "{} unless facts count.",
    "{} in tone.",
    "{} at first sight.",
    "{}, or so its author says.",
    "{}, they say.",
    "{}? Not at all.",
    "{}, not.",
    "{}: wrong.",
    "False: {}.",
    "Wrong: {}.",
    "Untrue:\n{}.",
    "I do not say this:\n{}.",
    "I can't say that\n{}.",
    "\"{}\" is a lie.",
    "\"{}\" is what a bad judge would say.",
    "Statement: \"{}\". Is it true? No.",
    "The other judge wrote: {}.",
];

/// Words that take a verdict for X back and give it to Y.
const TAKEN_BACK: [&str; 40] = [
    "Wait, no: Y.",
    "Wait, Y is better.",
    "Actually, Y.",
    "Actually, Y is better.",
    "No, Y.",
    "No.\n\nY",
    "On second thought, Y.",
    "On reflection, Y is better.",
    "Hmm, Y is better.",
    "Correction: Y.",
    "Scratch that. Y",
    "I take that back: Y.",
    "I was wrong. Y",
    "I meant Y.",
    "I mean Y.",
    "Sorry, Y.",
    "Or rather Y.",
    "But Y is better.",
    "However, Y is better.",
    "Still, Y is better.",
    "Then again, Y is better.",
    "Yet I choose Y.",
    "That is wrong; Y is right.",
    "That was the loser. Y wins.",
    "This is the loser. The winner is Y.",
    "It is the one that I reject.",
    "The other one is better.",
    "The other one, I mean.",
    "The other one it is.",
    "Y is right.",
    "Y is the right one.",
    "Y is correct, X is wrong.",
    "Y deserves the win.",
    "Y it should be.",
    "Y, that is.",
    "Make that Y.",
    "Let me change it to Y.",
    "After another look: Y.",
    "Overall, Y is better.",
    "Final verdict: Y",
];

/// Puts `values` in place of the words `names`.
fn put(text: &str, names: [&str; 2], values: [&str; 2]) -> String {
    let letter = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let mut filled = String::new();
    for (at, c) in text.char_indices() {
        let word = !letter(filled.chars().next_back()) && !letter(text[at + c.len_utf8()..].chars().next());
        match names.iter().position(|name| name.starts_with(c)).filter(|_| word) {
            Some(i) => filled.push_str(values[i]),
            None => filled.push(c),
        }
    }
    filled
}

fn fill(text: &str, names: [&str; 2]) -> String {
    put(text, ["X", "Y"], names)
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// Calls `check` with the names of the chosen and the other answer, for either answer.
fn for_names(mut check: impl FnMut([&str; 2], Verdict)) {
    for [a, b] in NAMES {
        check([a, b], A);
        check([b, a], B);
    }
}

/// Fails if a text is read as `never`.
fn never_read(texts: impl Iterator<Item = (String, Verdict)>) {
    let labels = labels(LABELS);
    let wrong: Vec<_> = texts.filter(|(text, never)| labels.read(Said::finished(text)) == Some(*never)).collect();
    assert!(wrong.is_empty(), "{} are read, as {:#?}", wrong.len(), &wrong[..wrong.len().min(40)]);
}

fn all(of: impl Fn([&str; 2], Verdict) -> Vec<(String, Verdict)>) -> impl Iterator<Item = (String, Verdict)> {
    let mut texts = Vec::new();
    for_names(|names, verdict| texts.extend(of(names, verdict)));
    texts.into_iter()
}

#[test]
fn a_claim_is_read_or_not_but_never_turned_around() {
    never_read(all(|names, verdict| {
        let claims = CLAIMS.iter().map(|claim| capital(&fill(claim, names)) + ".");
        claims.chain(VERDICTS.iter().map(|text| fill(text, names))).map(|text| (text, verdict.swapped())).collect()
    }));
    let labels = labels(LABELS);
    let plain = CLAIMS.iter().chain(&VERDICTS).map(|text| capital(&fill(text, NAMES[0])));
    let unread: Vec<_> = plain.filter(|text| labels.read(Said::finished(text)) != Some(A)).collect();
    assert!(unread.is_empty(), "{unread:?}");
}

#[test]
fn a_claim_in_a_frame_is_not_made() {
    never_read(all(|names, verdict| {
        let framed = |claim: &str| {
            let claim = fill(claim, names);
            NOT_CLAIMED.map(|frame| {
                let claim =
                    if frame.starts_with("{}") || frame.contains("\n{}") { capital(&claim) } else { claim.clone() };
                (frame.replace("{}", &claim), verdict)
            })
        };
        CLAIMS.iter().flat_map(|claim| framed(claim)).collect()
    }));
}

#[test]
fn a_verdict_that_is_taken_back_is_not_given() {
    never_read(all(|names, verdict| {
        let back = |first: &str| {
            let first = fill(first, names);
            let rest = TAKEN_BACK.map(|rest| fill(rest, names));
            let joined =
                |rest: &String| [". ", "\n", "\n\n"].map(|gap| (format!("{}{gap}{rest}", capital(&first)), verdict));
            rest.iter().flat_map(joined).collect::<Vec<_>>()
        };
        CLAIMS.iter().chain(&VERDICTS).flat_map(|first| back(first)).collect()
    }));
}

#[test]
fn a_frame_before_the_verdict_does_not_matter() {
    never_read(all(|names, verdict| {
        let [x, y] = names;
        let framed =
            |frame: &str, claim: &str| format!("{}\n\nVerdict: {y}", frame.replace("{}", &fill(claim, [x, y])));
        let texts = NOT_CLAIMED.iter().flat_map(|frame| CLAIMS.iter().map(move |claim| framed(frame, claim)));
        texts.map(|text| (text, verdict)).collect()
    }));
}

/// Ways to give the score N on a scale from 0 to 5.
const GIVEN: [&str; 16] = [
    "N",
    "Score: N",
    "**Score:** N",
    "Score: N/5",
    "Final score: N",
    "The score is N",
    "Rating: [[N]]",
    "[[N]]",
    "\\boxed{N}",
    "{\"score\": N}",
    "<score>N</score>",
    "### Score\nN",
    "I would give it a N",
    "This response earns N points",
    "It is a N out of 5",
    "Overall: N/5",
];

/// Words that take the score N back and give M.
const CHANGED: [&str; 30] = [
    "Wait, M.",
    "No, M.",
    "Actually, M.",
    "Make that M.",
    "Make it a M.",
    "I lower it to M.",
    "I change it to M.",
    "I settle on M.",
    "On reflection, M.",
    "Hmm, M.",
    "Correction: M",
    "Rather M.",
    "That is too high: M.",
    "It should be M.",
    "Minus errors: M",
    "After deductions: M",
    "Score: M",
    "Final score: M",
    "Revised score: M",
    "New score: M",
    "M, I mean.",
    "So M.",
    "M",
    "M/5",
    "I would say M.",
    "I'd say M.",
    "It is a M.",
    "Or M.",
    "But M is fairer.",
    "Then again, M.",
];

/// Texts in which the score N is not given.
const NOT_GIVEN: [&str; 62] = [
    "I doubt that it deserves a N.",
    "Score: N. I disagree.",
    "Score: N. False.",
    "Score: N. Not so fast.",
    "Score: N. So says its author.",
    "Score: N. Style-wise.",
    "Score: N. This was a test.",
    "Score: N - said nobody",
    "Score: N NOT",
    "Score: N at best",
    "Score: N for style, M for facts",
    "Score: N (style)",
    "Score: N + M - 1",
    "Score: N times M",
    "Score: N, M",
    "Score: N; M",
    "Score: N and below",
    "Score: N/7",
    "Score: N out of seven",
    "Score: N\nRevised: M",
    "Score: N\nout of 10",
    "I doubt {\"score\": N}",
    "I would not give it a N.",
    "I can't give it a N.",
    "I don't think it deserves a N.",
    "It never deserves a N.",
    "It does not earn N points.",
    "It is not a N out of 5.",
    "If it were right, I would give it a N.",
    "I would give it a N if it were right.",
    "It could have been a N out of 5.",
    "Is it a N out of 5? No.",
    "Score: N? No.",
    "Score: not N",
    "Score: N out of 10",
    "Score: N/10",
    "Score: N (out of 10)",
    "Score (0-10): N",
    "Score: N on a scale of 0 to 10",
    "Score: N%",
    "Score: less than N",
    "Score: more than N",
    "Score: at most N",
    "Score: <N",
    "Score: >N",
    "Score: N-M",
    "Score: N or M",
    "Score: N, M",
    "Score: N to M",
    "Score: N~M",
    "Score: between N and M",
    "Score: N and M",
    "It has N errors.",
    "It gets N facts wrong.",
    "It gets N out of 5 facts wrong.",
    "Errors: N",
    "Clarity: N/5\nFacts: M/5",
    "Clarity score: N\nFact score: M",
    "Score for clarity: N\nScore for facts: M",
    "The maximum score is N.",
    "A perfect answer gets a N.",
    "The reference has a score of N.",
];

fn numbers(text: &str, n: u8, m: u8) -> String {
    put(text, ["N", "M"], [&n.to_string(), &m.to_string()])
}

fn no_scores(texts: impl Iterator<Item = (String, u8)>) {
    let five = Points::new([0, 5]);
    let wrong: Vec<_> =
        texts.filter(|(text, never)| five.read(Said::finished(text)) == Some(f64::from(*never))).collect();
    assert!(wrong.is_empty(), "{} are read, as {:#?}", wrong.len(), &wrong[..wrong.len().min(40)]);
}

#[test]
fn a_score_is_given_as_it_stands() {
    let five = Points::new([0, 5]);
    for n in 0..=5 {
        let unread = GIVEN.iter().map(|text| numbers(text, n, 0));
        let unread: Vec<_> = unread.filter(|text| five.read(Said::finished(text)) != Some(f64::from(n))).collect();
        assert!(unread.is_empty(), "{unread:?}");
    }
}

#[test]
fn a_score_that_is_changed_is_not_given() {
    let pairs = [(5, 3), (4, 1), (2, 3), (1, 0), (3, 5)];
    let texts = pairs.iter().flat_map(|&(n, m)| {
        let joined = move |first: &str, rest: &str| {
            [". ", "\n", "\n\n"].map(|gap| (numbers(&format!("{first}{gap}{rest}"), n, m), n))
        };
        GIVEN.iter().flat_map(move |first| CHANGED.iter().flat_map(move |rest| joined(first, rest)))
    });
    no_scores(texts);
}

#[test]
fn a_score_that_is_not_given() {
    let pairs = [(5, 3), (4, 1), (2, 3), (1, 0), (3, 5)];
    no_scores(pairs.iter().flat_map(|&(n, m)| NOT_GIVEN.iter().map(move |text| (numbers(text, n, m), n))));
    no_scores(pairs.iter().flat_map(|&(n, m)| NOT_GIVEN.iter().map(move |text| (numbers(text, n, m), m))));
}

#[test]
fn a_tie_is_no_win() {
    misread(LABELS, &[("It's a tie.", Some(Verdict::Tie)), ("Neither.", Some(Verdict::Tie))]);
    let ties = [
        "Neither X nor Y is better.",
        "X and Y are equally good.",
        "Verdict: tie between X and Y",
        "X is as good as Y.",
        "X is no better than Y.",
        "X is just as helpful as Y.",
    ];
    never_read(all(|names, verdict| ties.iter().map(|text| (capital(&fill(text, names)), verdict)).collect()));
}
