//! Tests: texts of judges and the verdicts they hold. Add a new form here first.

use super::{End, Labels, Points, Said};
use crate::judge::Verdict::{self, A, B, Tie};

mod claims;
mod generated;
mod headings;
mod losses;
mod score_traps;
mod traps;
mod unclear;

fn labels(names: [&str; 2]) -> Labels {
    Labels::new(names.map(str::to_owned)).unwrap()
}

/// Reads a text that was cut off.
fn cut(names: [&str; 2], text: &str) -> Option<Verdict> {
    labels(names).read(Said { text, end: End::Cut })
}

/// Fails for each text whose reading is neither none nor what a human reads.
fn misread(names: [&str; 2], table: &[(&str, Option<Verdict>)]) {
    let labels = labels(names);
    let read = table.iter().map(|(text, is)| (text, labels.read(Said::finished(text)), is));
    let wrong = read.filter(|(_, read, is)| read.is_some() && read != *is);
    let wrong: Vec<_> = wrong.map(|(text, read, is)| format!("{text:?}: {read:?}, not {is:?}")).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_pairwise_verdict_as_judges_write_it() {
    let labels = labels(["Response A", "Response B"]);
    let table: &[(&str, Option<Verdict>)] = &[
        // The label alone, in any case and any dress.
        ("Response A", Some(A)),
        ("response b", Some(B)),
        ("RESPONSE A", Some(A)),
        ("Response  B.", Some(B)),
        ("A", Some(A)),
        ("b", Some(B)),
        ("B.", Some(B)),
        ("**B**", Some(B)),
        ("**Response B**", Some(B)),
        ("(A)", Some(A)),
        ("\"Response A\"", Some(A)),
        ("`B`", Some(B)),
        ("<B>", Some(B)),
        ("$\\boxed{\\text{B}}$", Some(B)),
        ("\\boxed{Response A}", Some(A)),
        ("Assistant A's response", Some(A)),
        ("Output (b)", Some(B)),
        ("Output (B)", Some(B)),
        ("Response A\n\nResponse B is wordy and wrong.", Some(A)),
        ("Response A. Response B lacks an example.", Some(A)),
        ("Response A, because Response B is wrong.", Some(A)),
        ("B\n\nThe other one is too long.", Some(B)),
        ("The second one has examples, so it convinces more.\n\nB", Some(B)),
        ("Response A is short.\nResponse B has examples.\n\n**Response B**", Some(B)),
        // Forms made for it.
        ("[[A]]", Some(A)),
        ("Response A is good. My final verdict is: [[B]]", Some(B)),
        ("First [[A]], on second thought [[B]].", Some(B)),
        ("My verdict: [[A>>B]]", Some(A)),
        ("[[B>A]]", Some(B)),
        ("[[A<B]]", Some(B)),
        ("[[A=B]]", Some(Tie)),
        ("[[C]]", Some(Tie)),
        ("Response B > Response A", Some(B)),
        ("Verdict: Response B is better", Some(B)),
        ("Verdict: B", Some(B)),
        ("Output: B", Some(B)),
        ("Verdict：B", Some(B)),
        ("The verdict is: B", Some(B)),
        ("Verdict: Response B (because A is too short)", Some(B)),
        ("### Analysis\n**Response A:** good\n**Response B:** bad\n\n### Final Verdict: Response A", Some(A)),
        ("**Response A**\n- good\n**Response B**\n- bad\n\n**Winner: Response A**", Some(A)),
        ("Response A: 7/10\nResponse B: 8/10\n\nVerdict: Response B", Some(B)),
        ("Verdict - B", Some(B)),
        ("### Verdict\nResponse B", Some(B)),
        ("**Final Verdict:** **Response A**", Some(A)),
        ("Final answer: A", Some(A)),
        ("Answer: B", Some(B)),
        ("**Answer:** B", Some(B)),
        ("**Answer**: (A)", Some(A)),
        ("Both have merits. Answer: a", Some(A)),
        ("Response A is concise, Response B rambles.\nWinner: Assistant A", Some(A)),
        ("Better response: B", Some(B)),
        ("Preferred: Output A", Some(A)),
        ("{\"winner\": \"B\"}", Some(B)),
        ("```json\n{\"reason\": \"Response A is short\", \"verdict\": \"Response B\"}\n```", Some(B)),
        ("{\"better_response\": \"A\", \"confidence\": 0.9}", Some(A)),
        ("{'winner': 'tie'}", Some(Tie)),
        ("{\"choice\": \"response_b\"}", Some(B)),
        ("{\"winner\":\"model_a\"}", Some(A)),
        ("Response A is more helpful than Response B.", Some(A)),
        ("<answer>B</answer>", Some(B)),
        ("<verdict>Response A</verdict>", Some(A)),
        ("Verdict: tie", Some(Tie)),
        ("Tie", Some(Tie)),
        ("It's a tie.", Some(Tie)),
        ("Verdict: Response A is worse than Response B.", Some(B)),
        // Sentences.
        ("Response B is better than Response A.", Some(B)),
        ("A is better than B", Some(A)),
        ("B is clearly the better response, as A is off topic.", Some(B)),
        ("**Response A** is better.", Some(A)),
        ("I prefer Response B.", Some(B)),
        ("I choose Output B", Some(B)),
        ("I'd go with B, since A makes things up.", Some(B)),
        ("I would pick A.", Some(A)),
        ("I say Response A.", Some(A)),
        ("The better response is B.", Some(B)),
        ("The winner is Response A, not Response B.", Some(A)),
        ("My choice is therefore B.", Some(B)),
        ("Response A's explanation is much clearer, but Response B wins.", Some(B)),
        ("Response A's explanation is better than that of Response B.", Some(A)),
        ("Response B outperforms Response A in every way.", Some(B)),
        ("Response A is worse than Response B.", Some(B)),
        ("Response A loses.", Some(B)),
        ("Although Response A is better written, Response B is better.", Some(B)),
        ("Response A is better in tone. Overall, Response B is better.", Some(B)),
        ("Both responses are equally good.", Some(Tie)),
        ("Overall **B** answers it best.", Some(B)),
        ("Based on these criteria, the better response is:\n\n**Response A**", Some(A)),
        ("Therefore, the answer is: B", Some(B)),
        ("The answer is B.", Some(B)),
        ("Response A answers the prompt better than Response B.", Some(A)),
        ("Response B does a better job of it than Response A.", Some(B)),
        ("Response B over Response A.", Some(B)),
        ("Response B is better. It is clearer. Response A is not as detailed.", Some(B)),
        ("Neither is better.", Some(Tie)),
        ("As an AI I can't judge. Response A", Some(A)),
        ("Response A is less helpful than Response B.", Some(B)),
        ("Response A is not as good as Response B.", Some(B)),
        ("Response A is outperformed by Response B.", Some(B)),
        ("Response A falls short of Response B.", Some(B)),
        ("Response A is good but Response B is better.", Some(B)),
        ("I'd pick the second one", Some(B)),
        ("The first response is better.", Some(A)),
        ("Response 2", Some(B)),
        ("Antwort B", Some(B)),
        ("Neither.", Some(Tie)),
        ("They are tied.", Some(Tie)),
        ("Verdict: A and B are equally good", Some(Tie)),
        ("Rejected: Response A", Some(B)),
        ("{\"loser\": \"A\"}", Some(B)),
        ("$\\boxed{\\mathrm{Response\\ B}}$", Some(B)),
        ("[[Ｂ]]", Some(B)),
        ("[[A]] (not [[B]])", Some(A)),
        ("Response B is better. It directly answers it, while Response A is vague.", Some(B)),
        ("Response A\n\nExplanation: It names the capital. Response B gives a wrong answer.", Some(A)),
        ("Overall, Response B is more helpful.", Some(B)),
        // Reasoning is no verdict.
        ("<think>Response A is short. Response B is wrong.</think>\nResponse A", Some(A)),
        ("<think>Response B it is.</think>\n\n**Response A**", Some(A)),
        ("Hm, Response B? No.\n</think>\nResponse A", Some(A)),
        ("<think>Response A is better. So", None),
        ("<think>The answer is B</think>", None),
        // Nothing to go by.
        ("", None),
        ("...", None),
        ("I'd rather not grade these two.", None),
        ("Response A and Response B", None),
        ("Response A or Response B?", None),
        ("Response A or B? That depends.", None),
        ("The correct answer is B, which neither response says.", None),
        ("Whether Response A is better is hard to say.", None),
        ("Response A is better than nothing, Response B is best.", None),
        ("A good response would have named one.", None),
        ("Response A is short. Response B is wordy but wrong.", None),
        ("Response A is better in tone. Response B is better in facts.", None),
        ("Response A is wrong.", None),
        ("I don't think Response A is better.", None),
        ("Response A is not better.", None),
        ("**Response A**: short.\n**Response B**: wordy.", None),
        ("Neither Response A nor Response B answers it.", None),
        ("Die erste Antwort ist besser.", None),
        ("{\"winner\": 1}", None),
        ("Response AB", None),
        ("Verdict: none", None),
    ];
    let wrong: Vec<_> = table.iter().filter(|(text, is)| labels.read(Said::finished(text)) != *is).collect();
    let read = wrong.iter().map(|(text, is)| format!("{text:?}: {:?}, not {is:?}", labels.read(Said::finished(text))));
    assert!(wrong.is_empty(), "{:#?}", read.collect::<Vec<_>>());
}

#[test]
fn other_labels_are_read_alike() {
    for (names, text, is) in [
        (["Judgement A", "Judgement B"], "Judgement B", Some(B)),
        (["Judgement A", "Judgement B"], "Answer: A", Some(A)),
        (["A", "B"], "B", Some(B)),
        (["A", "B"], "The answer is A.", Some(A)),
        (["A", "B"], "Verdict: A", Some(A)),
        (["A", "B"], "A is better than B", Some(A)),
        (["A", "B"], "A good answer is concise.", None),
        (["Output (a)", "Output (b)"], "Output (b)", Some(B)),
        (["Output (a)", "Output (b)"], "**Output (a)** is better", Some(A)),
        (["Response 1", "Response 2"], "2", Some(B)),
        (["Response 1", "Response 2"], "1. Response 1 is short.\n2. Response 2 is long.", None),
        (["Response 1", "Response 10"], "Response 10", Some(B)),
        (["1", "10"], "Verdict: 10", Some(B)),
        (["first", "second"], "The second is better.", Some(B)),
        (["甲", "乙"], "乙", Some(B)),
        (["yes", "no"], "No.", Some(B)),
    ] {
        assert_eq!(labels(names).read(Said::finished(text)), is, "{names:?} {text:?}");
    }
    for same in [["A", " "], ["", "B"], ["A", "a"], ["good", "not good"], ["Response A", "response  a"]] {
        assert!(Labels::new(same.map(str::to_owned)).is_err(), "{same:?}");
    }
}

#[test]
fn a_pairwise_answer_that_was_cut_off_needs_its_verdict_first() {
    let labels = labels(["Response A", "Response B"]);
    for (text, is) in [
        ("Response A", Some(A)),
        ("Response B is better because it", Some(B)),
        ("**Response B", Some(B)),
        ("Verdict: B. The other one", Some(B)),
        ("Response A provides a detailed", None),
        ("Both answers name the sea, but Response A", None),
        ("<think>Response A", None),
        ("", None),
    ] {
        assert_eq!(labels.read(Said { text, end: End::Cut }), is, "{text:?}");
    }
}

#[test]
fn datadreamers_reading_is_letter_by_letter() {
    let labels = labels(["Response A", "Response B"]);
    for (text, is) in [
        ("Response A", Some(A)),
        ("Response Because", Some(B)),
        ("<think>Response A", Some(A)),
        ("response a", None),
        ("Response B is better than Response A", None),
    ] {
        assert_eq!(labels.occurring(text), is, "{text:?}");
    }
}

#[test]
fn a_score_as_judges_write_it() {
    let five = Points::new([0, 5]);
    let table: &[(&str, Option<f64>)] = &[
        ("Score: 4", Some(4.0)),
        ("score:4", Some(4.0)),
        ("It is fine. Score: 3", Some(3.0)),
        ("First I thought score: 1.\n**Score:** 4", Some(4.0)),
        ("**Score**: 4", Some(4.0)),
        ("**Score: 4**", Some(4.0)),
        ("Score: **4**", Some(4.0)),
        ("Score: <4>", Some(4.0)),
        ("Score: <4 points>", Some(4.0)),
        ("Score: [4]", Some(4.0)),
        ("Score: \"4\"", Some(4.0)),
        ("Score: \\boxed{4}", Some(4.0)),
        ("$\\boxed{4}$", Some(4.0)),
        ("Final score is 4", Some(4.0)),
        ("The score is therefore 4.", Some(4.0)),
        ("Score is 4", Some(4.0)),
        ("Score = 4", Some(4.0)),
        ("Score - 4", Some(4.0)),
        ("Score → 4", Some(4.0)),
        ("Score (0 to 5): 4", Some(4.0)),
        ("Score (out of 5): 4", Some(4.0)),
        ("Score from 0 to 5: 4", Some(4.0)),
        ("Score for this response: 4", Some(4.0)),
        ("## Score\n\n4", Some(4.0)),
        ("Score: 4/5", Some(4.0)),
        ("Score: 4 / 5.", Some(4.0)),
        ("Score: **4**/5", Some(4.0)),
        ("Score: 4 out of 5", Some(4.0)),
        ("Score: 4 points", Some(4.0)),
        ("Score: 4.5", Some(4.5)),
        ("Punkte: 3\nScore: 4,5", Some(4.5)),
        ("score 2.5", Some(2.5)),
        ("Score: 1 + 1 + 1 + 0 + 0 = 3", Some(3.0)),
        ("Rating: [[4]]", Some(4.0)),
        ("[[4]]", Some(4.0)),
        ("Overall: 4/5", Some(4.0)),
        ("Total points: 4", Some(4.0)),
        ("Grade: 4", Some(4.0)),
        ("Points: 4", Some(4.0)),
        ("Answer: 4", Some(4.0)),
        ("Final answer: \\boxed{4}", Some(4.0)),
        ("Total: 1+1+1+1+0 = 4", Some(4.0)),
        ("So the total is 4 points.", Some(4.0)),
        ("{\"score\": 4}", Some(4.0)),
        ("{\"reason\": \"good\", \"score\": 4}", Some(4.0)),
        ("```json\n{\n  \"overall_score\": \"4\"\n}\n```", Some(4.0)),
        ("<score>4</score>", Some(4.0)),
        ("4", Some(4.0)),
        ("4.", Some(4.0)),
        ("**4**", Some(4.0)),
        ("4/5", Some(4.0)),
        ("4 points", Some(4.0)),
        ("4\n\nIt names one example of three.", Some(4.0)),
        ("It names one example of three.\n\n4", Some(4.0)),
        ("I would give this response a score of 4.", Some(4.0)),
        ("I'd rate it a 4 out of 5.", Some(4.0)),
        ("This response earns 4 points.", Some(4.0)),
        ("It is a solid 4 out of 5, with room for more.", Some(4.0)),
        ("The response scores a 4.", Some(4.0)),
        ("The final score would be 4.", Some(4.0)),
        ("Relevance: 5/5\nClarity: 3/5\nScore: 4", Some(4.0)),
        ("Score: 4 - good", Some(4.0)),
        ("Score: 1 (relevance) + 1 (coverage) + 1 (useful) = 3", Some(3.0)),
        ("Score: 1+1+1", Some(3.0)),
        ("Score: 5 - 1 = 4", Some(4.0)),
        ("Score: 3½", Some(3.5)),
        ("Score: about 4", Some(4.0)),
        ("Score: ４", Some(4.0)),
        ("★★★★☆", Some(4.0)),
        ("\\boxed{\\frac{4}{5}}", Some(4.0)),
        ("{\"score\": {\"value\": 4}}", Some(4.0)),
        ("{\"points\": 4}", Some(4.0)),
        ("{\"overall_score\": 2, \"clarity_score\": 5}", Some(2.0)),
        ("Score: 3\nConfidence score: 5", Some(3.0)),
        ("Overall score: 3\nRelevance score: 5\nClarity score: 1", Some(3.0)),
        ("1. Relevant: 1 point\n2. Useful: 1 point\n\nScore: 2", Some(2.0)),
        ("Score: 3\n\nThe response is useful. However, it lacks depth.", Some(3.0)),
        // What is supposed is not given.
        ("Score: 3. It would score 5 with one example more.", Some(3.0)),
        ("Score: 3. With an example the score would be 5.", Some(3.0)),
        ("Score: 3. The maximum score is 5.", Some(3.0)),
        ("Score: 3. The correct answer is 4.", Some(3.0)),
        ("Score: 3\nThe total is 12, as it should be.", Some(3.0)),
        ("Score: 3\n\nThe points: 1 relevant, 2 useful, 3 direct.", Some(3.0)),
        ("Score: 4\nThe answer covers points 1-3.", Some(4.0)),
        ("Score: 3 (could be 5 with examples)", Some(3.0)),
        ("{\"score\": 4, \"reason\": \"would score 5 with an example\"}", Some(4.0)),
        ("Score: 4, as one example lacks; with it it'd be a 5.", Some(4.0)),
        ("Score: 4.\n\nNote: a score of 5 would need more.", Some(4.0)),
        ("I give it a 3. A perfect answer would get a score of 5.", Some(3.0)),
        // Reasoning is no verdict.
        ("<think>Score: 1 so far</think>\nScore: 4", Some(4.0)),
        ("<think>Start low: Score: 1 so far. Now the", None),
        ("Score: 1, no, more.\n</think>\n4", Some(4.0)),
        // Off the scale, on another one, or none.
        ("Score: 7", None),
        ("Score: -1", None),
        ("Score: 8/10", None),
        ("Score: 4/10", None),
        ("Score: 80%", None),
        ("Score: 3-4", None),
        ("Score: 3 or 4", None),
        ("Score: <points from 0 to 5>", None),
        ("score: five", Some(5.0)),
        ("Оценка: 3", None),
        ("Fine.", None),
        ("good", None),
        ("", None),
        ("It has 3 examples.", None),
        ("1. It is about what was asked.\n2. It covers a part.", None),
    ];
    let wrong: Vec<_> = table.iter().filter(|(text, is)| five.read(Said::finished(text)) != *is).collect();
    let read = wrong.iter().map(|(text, is)| format!("{text:?}: {:?}, not {is:?}", five.read(Said::finished(text))));
    assert!(wrong.is_empty(), "{:#?}", read.collect::<Vec<_>>());
}

#[test]
fn scores_on_other_scales() {
    for (scale, text, is) in [
        ([1, 10], "Rating: [[8]]", Some(8.0)),
        ([1, 10], "Score: 10/10", Some(10.0)),
        ([1, 10], "Score: 4/5", None),
        ([0, 100], "Score: 85", Some(85.0)),
        ([0, 100], "Score: 85/100", Some(85.0)),
        ([-2, 2], "Score: -1", Some(-1.0)),
        ([-2, 2], "Score: −1", Some(-1.0)),
        ([-2, 2], "-2", Some(-2.0)),
    ] {
        assert_eq!(Points::new(scale).read(Said::finished(text)), is, "{scale:?} {text:?}");
    }
}

#[test]
fn a_score_that_was_cut_off_is_read_where_it_is_whole() {
    let cut = |scale, text| Points::new(scale).read(Said { text, end: End::Cut });
    for (scale, text, is) in [
        ([0, 5], "Score: 4. It names", Some(4.0)),
        ([0, 5], "Score: 4", Some(4.0)),
        ([0, 5], "4", Some(4.0)),
        ([0, 10], "Score: 1", None),
        ([0, 10], "Score: 1.", Some(1.0)),
        ([0, 10], "1", None),
        ([0, 5], "It is a 4 out of 5 in tone, and", None),
        ([0, 5], "It covers what was asked.\n4", None),
        ([0, 5], "<think>A first look says Score: 0, yet", None),
        ([0, 5], "It covers", None),
    ] {
        assert_eq!(cut(scale, text), is, "{scale:?} {text:?}");
    }
}

#[test]
fn long_texts_are_read_in_no_time() {
    let labels = labels(["Response A", "Response B"]);
    let began = std::time::Instant::now();
    let text = format!("{}.\nResponse B", "x".repeat(2_000_000));
    assert_eq!(labels.read(Said::finished(&text)), Some(B));
    let text = "Score: 4\n".repeat(100_000);
    assert_eq!(Points::new([0, 5]).read(Said::finished(&text)), Some(4.0));
    assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
}
