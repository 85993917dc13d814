//! Verdicts that are taken back, blame, labels that are words, thoughts and cut texts, and what a human reads.

use super::{cut, labels, misread};
use crate::judge::Verdict::{A, B, Tie};
use crate::judge::verdict::Said;

const LABELS: [&str; 2] = ["Response A", "Response B"];

#[test]
fn a_verdict_that_is_taken_back() {
    misread(
        LABELS,
        &[
            ("Response A. Wait, no. Response B.", Some(B)),
            ("Response A. Actually, Response B.", Some(B)),
            ("Response A\n\nWait, actually Response B is better.", Some(B)),
            ("A\n\nHmm, on reflection B is better.", Some(B)),
            ("Response A. On second thought, Response B.", Some(B)),
            ("Response A.\n\nCorrection: Response B.", Some(B)),
            ("Response A... no, Response B.", Some(B)),
            ("Response A, no wait, Response B.", Some(B)),
            ("Response A — no, Response B", Some(B)),
            ("Response A or, better, Response B", Some(B)),
            ("Response A. That is what I would say if facts did not count.", None),
            ("Response A. Just kidding.", None),
            ("Response A. Response B is right, though.", None),
            ("Response A. Response B is better.", None),
            ("Response A. The other one is better.", None),
            ("Response A. The other one is more helpful.", None),
            ("Response A. I mean the other one.", Some(B)),
            ("Response A\n\nResponse B is not too short.", None),
            ("Response A\n\nResponse B does not lack anything.", None),
            ("Response A\n\nResponse B has no errors.", None),
            ("Response A\n\nResponse B is too good to be rejected.", None),
            ("Response A\n\nIt is wrong.", None),
            ("Response A\n\nThis is the one to reject.", Some(B)),
            ("Response A\n\nThis response is the loser.", Some(B)),
            ("Response A\n\nIt is the less helpful one.", Some(B)),
            ("Response A is better. It is not, in fact.", None),
            ("Response A is better. That is false.", Some(B)),
            ("Response A is better. So the author claims.", None),
            ("Response A is better. Or is it?", None),
            ("Response A is better. Let me look again. Response B is right.", Some(B)),
            ("Response A is better. Response B wins.", None),
            ("Response A is better. Overall, Response B.", Some(B)),
            ("I prefer Response A. My final choice is Response B.", Some(B)),
            ("I prefer Response A. On reflection I prefer Response B.", Some(B)),
            ("I pick A. I was wrong: B.", Some(B)),
            ("I pick A; strike that, B", Some(B)),
            ("**Response A** is better.\n\n**Edit:** Response B is better.", Some(B)),
            ("It's a tie. Though B is a bit better.", Some(B)),
            ("It's a tie, but Response B is slightly better.", Some(B)),
            ("Tie. Response B wins by a hair.", Some(B)),
            ("Both responses are equally good. Response B is a bit shorter, so it wins.", Some(B)),
            ("Overall, Response A is better. Overall, Response B is better.", None),
        ],
    );
}

#[test]
fn blame_is_no_win() {
    misread(
        LABELS,
        &[
            ("Response A hallucinates.", Some(B)),
            ("Response A contains errors.", Some(B)),
            ("Response A misses the point.", Some(B)),
            ("Response A is off-topic.", Some(B)),
            ("Response A is flawed.", Some(B)),
            ("Response A should be rejected.", Some(B)),
            ("Response A is the loser.", Some(B)),
            ("Response A is beaten.", Some(B)),
            ("Response A ❌", Some(B)),
            ("❌ Response A", Some(B)),
            ("Response A: ❌", Some(B)),
            ("Response A 👎", Some(B)),
            ("I reject Response A.", Some(B)),
            ("I eliminate Response A.", Some(B)),
            ("Discard Response A.", Some(B)),
            ("I decided against Response A.", Some(B)),
            ("Against Response A.", Some(B)),
            ("Remove Response A.", Some(B)),
            ("Response A is out.", Some(B)),
            ("Response A is nonsense.", Some(B)),
            ("Response A is a mess.", Some(B)),
            ("Response A rambles.", Some(B)),
            ("Response A invents a source.", Some(B)),
            ("Response A goes on and on.", Some(B)),
            ("Response A ignores the question.", Some(B)),
            ("Response A repeats itself", Some(B)),
            ("Response A disappoints.", Some(B)),
            ("Response A comes in last.", Some(B)),
            ("Response A is last.", Some(B)),
            ("Response A needs work.", Some(B)),
            ("Response A could have been written by a child.", Some(B)),
            ("Response A has **errors**.", Some(B)),
            ("**A** hallucinates.", Some(B)),
            ("The errors of **A** are many.", Some(B)),
            ("Down with Response A!", Some(B)),
            ("Shame on Response A.", Some(B)),
            ("Too bad for Response A.", Some(B)),
            ("No to Response A.", Some(B)),
            ("Sorry, Response A.", Some(B)),
            ("So long, Response A.", Some(B)),
            ("Response A is the weaker one.", Some(B)),
            ("Response A is clearly the worst.", Some(B)),
            ("Response A is inferior to Response B.", Some(B)),
            ("Response A is less helpful than Response B.", Some(B)),
            ("Response A is not as good as Response B.", Some(B)),
            ("Response A is outperformed by Response B.", Some(B)),
            ("Response A is beaten by Response B.", Some(B)),
            ("Response A falls short of Response B.", Some(B)),
            ("Response A pales beside Response B.", Some(B)),
            ("Response A can't keep up with Response B.", Some(B)),
            ("Response A trails Response B.", Some(B)),
            ("Response A could learn from Response B.", Some(B)),
        ],
    );
}

#[test]
fn labels_that_are_words_or_numbers() {
    misread(
        ["1", "2"],
        &[
            ("Answer 2 has 1 error.", None),
            ("Response 2 has 2 errors.", Some(A)),
            ("2 errors in 1", Some(B)),
            ("There are 2 options. 1", Some(A)),
            ("1 of 2", None),
            ("1. Good. 2. Bad.", None),
            ("Verdict: 1 error each", None),
        ],
    );
    misread(
        ["yes", "no"],
        &[("There is no verdict.", None), ("Yes and no.", None), ("No, yes.", Some(A)), ("Verdict: no verdict", None)],
    );
    misread(
        ["first", "second"],
        &[
            ("First, let me see. Then the second is better.", Some(B)),
            ("The first is not better.", None),
            ("At first, I liked the first.", None),
        ],
    );
    misread(
        ["A", "B"],
        &[
            ("A better answer would be B.", Some(B)),
            ("A is for apple.", None),
            ("A tie.", Some(Tie)),
            ("I prefer a better one.", None),
            ("Answer: a better one", None),
            ("I give B a B.", None),
        ],
    );
}

#[test]
fn thoughts_are_no_verdict() {
    misread(
        LABELS,
        &[
            (
                "<|channel|>analysis<|message|>Response A is better at first.<|end|><|start|>assistant<|channel|>final<|message|>Response B",
                Some(B),
            ),
            ("<|START_THINKING|>Response A is better.<|END_THINKING|>Response B", Some(B)),
            (
                "<|START_THINKING|>Response A is better.<|END_THINKING|><|START_RESPONSE|>Response B<|END_RESPONSE|>",
                Some(B),
            ),
            ("analysisResponse A is better.assistantfinalResponse B", Some(B)),
            ("<unused94>thought\nResponse A is better.\n<unused95>Response B", Some(B)),
            ("<ponder>Response A is better.</ponder>Response B", Some(B)),
            ("[reasoning]Response A is better.[/reasoning]Response B", Some(B)),
            ("<think>\nResponse A is better.\n</think >\nResponse B", Some(B)),
            ("<Think>Response A</Think>\n\nResponse B", Some(B)),
            ("<｜begin▁of▁thinking｜>Response A<｜end▁of▁thinking｜>Response B", Some(B)),
        ],
    );
    for text in [
        "<|START_THINKING|>Response A is better because it",
        "<think >Response A is better because it",
        "<think type='x'>Response A is better because it",
        "<reason>Response A is better because it",
        "<inner_monologue>Response A is better because it",
        "**Thinking:** Response A is better because it",
        "**Thinking:**\n\nResponse A",
        "<|channel|>analysis<|message|>Response A is better because it",
        "<|channel|>commentary<|message|>Response A",
        "analysisResponse A is better because it",
        "<unused94>thought\nResponse A",
        "<thinking\n>Response A",
        "<|thinking|>Response A",
        "[THINK]Response A",
    ] {
        assert_eq!(cut(LABELS, text), None, "{text}");
    }
}

#[test]
fn what_was_cut_off_may_go_on() {
    for text in [
        "Response A is better written but",
        "Response A. It is concise, but",
        "Response A\nis concise. Response B is",
        "Response A is better",
        "Response A is better in",
        "I prefer Response A",
        "The winner is Response A",
        "Overall, Response A",
        "Verdict: Response A is",
        "Verdict: A and",
        "Verdict: A.\n\nWait",
        "It's a tie",
        "It is short.\nResponse A",
        "{\"winner\": \"A",
        "{\"winner\": \"A\", \"second_thought\": \"B",
        "Response A\n\nIt is concise and",
        "Response A\n\nResponse B is wordy",
        "Verdict: A. Response B is",
        "Verdict: A. No",
        "Verdict: A or",
        "Verdict: A, ",
        "Response A is better than",
        "Winner: A\nLoser:",
        "[[A]] or",
        "Overall, A is better",
        "{\"winner\": \"A\"",
        "{\"winner",
        "[[A",
        "\\boxed{A",
        "Response A is better because it is short. Still, Response B",
    ] {
        assert_eq!(cut(LABELS, text), None, "{text}");
    }
    assert_eq!(cut(LABELS, "{\"winner\": \"A\", \"reason\": \"It"), Some(A));
    for (labels, text) in [
        (["1", "10"], "Verdict: 1"),
        (["1", "10"], "1"),
        (["Response 1", "Response 10"], "Response 1"),
        (["Response 1", "Response 10"], "Verdict: Response 1"),
    ] {
        assert_eq!(cut(labels, text), None, "{text}");
    }
    assert_eq!(labels(["1", "10"]).read(Said::finished("Verdict: 1")), Some(A));
    assert_eq!(cut(["1", "10"], "Verdict: 10"), Some(B));
}
