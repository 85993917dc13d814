//! The server on a tiny model, driven turn by turn.

use std::path::PathBuf;
use std::sync::Arc;

use tch::{Kind, Tensor};
use tokio::sync::oneshot;

use super::scheduler::Limits;
use super::server::ModelServer;
use super::*;
use crate::model::attention::Tree;
use crate::model::{Adapters, Transformer, tests as families};
use crate::observe::{Metrics, Trace};
use crate::torch::{GradGuard, Tenant, Turn, cpu};

const LIMITS: Limits = Limits { rows: 64, prefill_tokens: 512, cache_bytes: 64 << 20, graphs: false };

type Answer<T> = oneshot::Receiver<Result<T, LlmError>>;

fn server(limits: Limits) -> ModelServer {
    ModelServer::new(fixture::model(), "m", "cpu:0", limits, Arc::<Trace>::default(), &Metrics::default())
}

/// A prompt of its own for every row.
fn prompt(row: u64, tokens: usize) -> Vec<u32> {
    (0..tokens as u64).map(|i| ((row * 131 + i * 37 + 5) % 320) as u32).collect()
}

fn request(row: u64, candidates: u32, tokens: usize, sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt(row, tokens),
        streams: (0..candidates).map(|index| Stream { key: 7, row, index }).collect(),
        sampling,
        stop: vec![1],
        stop_strings: None,
        alone: false,
        adapter: None,
        stage: "test".into(),
    }
}

fn hot(tokens: usize) -> Sampling {
    Sampling { temperature: 1.0, ..Sampling::greedy(tokens) }
}

fn submit(server: &mut ModelServer, request: GenerateRequest) -> Answer<Generation> {
    let (reply, answer) = oneshot::channel();
    server.submit_generate(request, reply);
    answer
}

fn run(server: &mut ModelServer) {
    let _no_grad = GradGuard::set(false);
    for _ in 0..10_000 {
        if server.turn() == Turn::Idle {
            return;
        }
    }
    panic!("the server never rests");
}

fn all(server: &mut ModelServer, requests: &[GenerateRequest]) -> Vec<Generation> {
    let answers: Vec<_> = requests.iter().map(|r| submit(server, r.clone())).collect();
    run(server);
    answers.into_iter().map(|mut answer| answer.try_recv().unwrap().unwrap()).collect()
}

fn one_by_one(limits: Limits, requests: &[GenerateRequest]) -> Vec<Generation> {
    requests.iter().flat_map(|r| all(&mut server(limits), std::slice::from_ref(r))).collect()
}

fn tokens(generations: &[Generation]) -> Vec<Vec<(Vec<u32>, Finish)>> {
    let of = |g: &Generation| g.candidates.iter().map(|c| (c.ids.clone(), c.finish)).collect();
    generations.iter().map(of).collect()
}

/// Requests of all lengths, ways and both adapters.
fn mixture() -> Vec<GenerateRequest> {
    (0..12)
        .map(|row| {
            let sampling = match row % 4 {
                0 => Sampling::greedy(20),
                1 => Sampling { top_p: 0.8, temperature: 0.7, ..hot(11) },
                2 => Sampling { top_k: Some(20), min_p: Some(0.05), ..hot(30) },
                _ if row == 3 => Sampling { repetition_penalty: 1.3, presence_penalty: 0.5, ..hot(40) },
                _ => hot(70),
            };
            let adapter = (row % 3 == 1).then(fixture::adapter);
            GenerateRequest { adapter, ..request(row, 1 + row as u32 % 3, 3 + 17 * row as usize, sampling) }
        })
        .collect()
}

#[test]
fn the_likeliest_tokens_are_those_of_the_model_without_a_cache() {
    let _no_grad = GradGuard::set(false);
    let model = fixture::model();
    let ignoring = Sampling { ignore_eos: true, ..Sampling::greedy(24) };
    let generation = all(&mut server(LIMITS), &[request(3, 1, 40, ignoring)]).remove(0);
    let mut ids = prompt(3, 40);
    let mut logprob = 0.0;
    for token in &generation.candidates[0].ids {
        let logits = last_logits(&model, &ids);
        let found = logits.argmax(0, false).int64_value(&[]);
        assert_eq!(found, i64::from(*token), "token {} of the answer", ids.len() - 40);
        logprob += logits.log_softmax(0, Kind::Float).double_value(&[found]);
        ids.push(*token);
    }
    assert_eq!((generation.prompt_tokens, generation.candidates[0].finish), (40, Finish::Length));
    assert!((generation.candidates[0].logprob - logprob).abs() < 1e-3);
}

fn last_logits(model: &Transformer, ids: &[u32]) -> Tensor {
    let mut tree = Tree::new(ids, &[], model.heads()).unwrap();
    let (all, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&all, &positions, &mut tree, &Adapters::Base).unwrap();
    model.logits(&hidden.narrow(0, ids.len() as i64 - 1, 1)).unwrap().view([-1])
}

#[test]
fn company_changes_nothing() {
    let requests = mixture();
    let together = all(&mut server(LIMITS), &requests);
    assert_eq!(tokens(&together), tokens(&one_by_one(LIMITS, &requests)));
    assert!(together.iter().flat_map(|g| &g.candidates).any(|c| c.finish == Finish::Stop), "no answer ended itself");
    let few = Limits { rows: 5, ..LIMITS };
    assert_eq!(tokens(&together), tokens(&all(&mut server(few), &requests)));
}

#[test]
fn an_adapter_changes_its_own_rows() {
    let base = request(1, 1, 20, Sampling::greedy(12));
    let adapted = GenerateRequest { adapter: Some(fixture::adapter()), ..base.clone() };
    let both = tokens(&all(&mut server(LIMITS), &[base.clone(), adapted.clone()]));
    assert_ne!(both[0], both[1]);
}

#[test]
fn long_prompts_are_computed_in_parts() {
    let requests = mixture();
    let whole = all(&mut server(LIMITS), &requests);
    let parts = all(&mut server(Limits { prefill_tokens: 50, ..LIMITS }), &requests);
    assert_eq!(tokens(&whole), tokens(&parts));
}

#[test]
fn what_was_sent_back_goes_on_where_it_was() {
    let _no_grad = GradGuard::set(false);
    let requests = mixture();
    let undisturbed = all(&mut server(LIMITS), &requests);
    let mut disturbed = server(LIMITS);
    let answers: Vec<_> = requests.iter().map(|r| submit(&mut disturbed, r.clone())).collect();
    for turn in 0..40 {
        disturbed.turn();
        if turn % 13 == 12 {
            disturbed.halve();
        }
    }
    run(&mut disturbed);
    let generations: Vec<_> = answers.into_iter().map(|mut a| a.try_recv().unwrap().unwrap()).collect();
    assert_eq!(tokens(&undisturbed), tokens(&generations));
}

#[test]
fn more_candidates_than_rows_begin_in_parts() {
    let requests = [request(0, 7, 30, hot(15)), request(1, 2, 30, hot(15))];
    let few = all(&mut server(Limits { rows: 3, ..LIMITS }), &requests);
    assert_eq!(tokens(&few), tokens(&all(&mut server(LIMITS), &requests)));
}

#[test]
fn memory_bounds_what_runs_at_once() {
    let _no_grad = GradGuard::set(false);
    // 2 layers of 2 heads of 16, keys and values in float32: 32 KiB a slot of 64
    let limits = Limits { cache_bytes: 5 * 32 * 1024, ..LIMITS };
    let mut server = server(limits);
    let answers: Vec<_> = (0..9).map(|row| submit(&mut server, request(row, 1, 30, hot(30)))).collect();
    let mut too_large = submit(&mut server, request(9, 1, 300, hot(30)));
    assert!(matches!(too_large.try_recv().unwrap(), Err(LlmError::OutOfMemory { tokens: 330 })));
    for _ in 0..4 {
        server.turn();
        assert!(server.running() <= 5, "{} run", server.running());
    }
    run(&mut server);
    assert!(answers.into_iter().all(|mut a| a.try_recv().unwrap().is_ok()));
}

#[test]
fn ends_of_answers() {
    let mut server = server(LIMITS);
    let endless = Sampling { ignore_eos: true, ..hot(1000) };
    let long = submit(&mut server, request(0, 2, 400, endless));
    let nothing = GenerateRequest { streams: Vec::new(), ..request(0, 1, 4, hot(4)) };
    let [mut long, mut none, mut empty, mut too_long] = [
        long,
        submit(&mut server, nothing),
        submit(&mut server, request(0, 1, 0, hot(4))),
        submit(&mut server, request(0, 1, 512, hot(4))),
    ];
    run(&mut server);
    let generation = long.try_recv().unwrap().unwrap();
    // the last token needs no room in the context
    assert!(generation.candidates.iter().all(|c| c.ids.len() == 113 && c.finish == Finish::Context));
    assert!(none.try_recv().unwrap().unwrap().candidates.is_empty());
    assert!(matches!(empty.try_recv().unwrap(), Err(LlmError::Empty)));
    assert!(matches!(too_long.try_recv().unwrap(), Err(LlmError::TooLong { tokens: 512, limit: 512 })));
}

/// Log-probs are the model's own, and a cut answer has those of its own tokens only.
#[test]
fn stop_strings_cut_ids_and_log_probs() {
    let decode = |ids: &[u32]| ids.iter().map(|id| format!("{id} ")).collect::<String>();
    let sampling = Sampling { logprobs: true, ignore_eos: true, ..hot(20) };
    let free = request(5, 2, 20, sampling);
    let whole = all(&mut server(LIMITS), std::slice::from_ref(&free)).remove(0);
    let ids = &whole.candidates[0].ids;
    // Begins with the space that ends the text of a token.
    let stop = format!(" {} {} ", ids[8], ids[9]);
    let strings = Arc::new(StopStrings::new(vec![stop], decode));
    let stopped = GenerateRequest { stop_strings: Some(strings), ..free };
    let found = all(&mut server(LIMITS), &[stopped]).remove(0);
    let (cut, before) = (&found.candidates[0], &whole.candidates[0]);
    assert_eq!((&cut.ids[..], cut.finish), (&ids[..8], Finish::Stop));
    assert_eq!(cut.text_end, Some(decode(&ids[..8]).len() - 1));
    assert_eq!(cut.logprobs, before.logprobs[..8]);
    for candidate in whole.candidates.iter().chain(&found.candidates) {
        assert_eq!(candidate.logprobs.len(), candidate.ids.len());
        let sum: f64 = candidate.logprobs.iter().map(|p| f64::from(*p)).sum();
        assert!((sum - candidate.logprob).abs() < 1e-9);
    }
}

/// Greedy answers of a small model go round in circles; a heavy penalty says each token once.
#[test]
fn penalties_see_the_whole_answer() {
    let distinct = |sampling| {
        let generation = all(&mut server(LIMITS), &[request(3, 1, 40, Sampling { ignore_eos: true, ..sampling })]);
        let mut ids = generation[0].candidates[0].ids.clone();
        ids.sort_unstable();
        ids.dedup();
        ids.len()
    };
    let plain = distinct(Sampling::greedy(60));
    assert!(plain < 60, "nothing was said twice");
    assert_eq!(distinct(Sampling { presence_penalty: 1e4, ..Sampling::greedy(60) }), 60);
}

#[test]
fn clients_that_left_free_their_slots() {
    let _no_grad = GradGuard::set(false);
    let mut server = server(LIMITS);
    let gone = submit(&mut server, request(0, 4, 30, Sampling { ignore_eos: true, ..hot(400) }));
    let mut stays = submit(&mut server, request(1, 1, 30, Sampling { ignore_eos: true, ..hot(8) }));
    let queued = submit(&mut server, request(2, 1, 30, hot(8)));
    drop(queued);
    server.turn();
    server.turn();
    assert_eq!(server.running(), 5);
    drop(gone);
    server.turn();
    assert_eq!(server.running(), 1);
    run(&mut server);
    assert!(stays.try_recv().unwrap().is_ok());
}

#[test]
fn scores_do_not_wait_for_generation_nor_the_reverse() {
    let _no_grad = GradGuard::set(false);
    let mut server = server(LIMITS);
    let mut generations: Vec<_> = (0..8).map(|row| submit(&mut server, request(row, 2, 30, hot(20)))).collect();
    let mut scores: Vec<_> = (0..20)
        .map(|row| {
            let (reply, answer) = oneshot::channel();
            let answers = vec![prompt(row + 1, 5), prompt(row + 2, 9)];
            // of different stages, so that they share no pass
            let stage = format!("judge {row}");
            let request =
                ScoreRequest { prompt: prompt(row, 12), answers, adapter: None, company: Company::Indifferent, stage };
            server.submit_score(request, reply);
            answer
        })
        .collect();
    for _ in 0..12 {
        server.turn();
    }
    assert!(scores[5].try_recv().is_ok() && scores[15].try_recv().is_err());
    assert!(server.running() > 0);
    run(&mut server);
    assert!(generations.iter_mut().all(|g| g.try_recv().unwrap().is_ok()));
    let lengths = scores[19].try_recv().unwrap().unwrap().logprobs.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths, [5, 9]);
}

#[test]
fn scores_are_the_log_probs_of_what_was_sampled() {
    let mut server = server(LIMITS);
    let request = GenerateRequest { adapter: Some(fixture::adapter()), ..request(4, 3, 25, hot(12)) };
    let generation = all(&mut server, std::slice::from_ref(&request)).remove(0);
    let answers: Vec<_> = generation.candidates.iter().map(|c| c.ids.clone()).collect();
    let (reply, mut answer) = oneshot::channel();
    let (prompt, adapter, stage) = (request.prompt, request.adapter, request.stage);
    server.submit_score(ScoreRequest { prompt, answers, adapter, company: Company::Indifferent, stage }, reply);
    run(&mut server);
    for (candidate, scores) in generation.candidates.iter().zip(answer.try_recv().unwrap().unwrap().logprobs) {
        let sum: f64 = scores.iter().map(|p| f64::from(*p)).sum();
        assert!((sum - candidate.logprob).abs() < 1e-3, "{sum} and {}", candidate.logprob);
    }
}

/// Prompts in parts, the cache, sliding windows and shared passes, of every family.
#[test]
fn families_answer_and_score_as_transformers() {
    for dir in families::families() {
        let expected = families::Expected::read(&dir);
        let texts = expected.texts();
        let limits = Limits { prefill_tokens: 10, ..LIMITS };
        let model = families::load(&dir, Kind::Float);
        let mut server = ModelServer::new(model, "m", "cpu:0", limits, Arc::<Trace>::default(), &Metrics::default());
        let greedy = expected.ids("greedy");
        let sampling = Sampling { ignore_eos: true, ..Sampling::greedy(greedy.len()) };
        let adapters = ["one", "two"].map(|name| dir.join(name)).into_iter().filter(|dir| dir.exists());
        let adapters: Vec<_> =
            adapters.map(|dir| AdapterId { hash: dir.display().to_string(), dir }).map(Some).chain([None]).collect();
        // All adapters and the base in one batch.
        let ask = |adapter: &Option<AdapterId>| GenerateRequest {
            prompt: texts[0].clone(),
            adapter: adapter.clone(),
            ..request(0, 2, 1, sampling.clone())
        };
        let generations = all(&mut server, &adapters.iter().map(ask).collect::<Vec<_>>());
        for (adapter, generation) in adapters.iter().zip(&generations) {
            let name = adapter
                .as_ref()
                .and_then(|a| a.dir.file_name())
                .map_or("greedy".into(), |name| format!("greedy {}", name.display()));
            for candidate in &generation.candidates {
                assert_eq!(candidate.ids, expected.ids(&name), "{} {name}", dir.display());
            }
        }
        // The second half of each text after the first.
        let half = texts[0].len() / 2;
        let score = |text: &Vec<u32>| ScoreRequest {
            prompt: text[..half].to_vec(),
            answers: vec![text[half..].to_vec()],
            adapter: None,
            company: Company::Any,
            stage: "judge".into(),
        };
        let found = scores(&mut server, &texts.iter().map(score).collect::<Vec<_>>());
        for (row, (text, found)) in texts.iter().zip(&found).enumerate() {
            let log_probs = expected.get("logits").get(row as i64).log_softmax(-1, Kind::Float);
            for (i, found) in found.logprobs[0].iter().enumerate() {
                let wanted = log_probs.double_value(&[(half + i) as i64 - 1, i64::from(text[half + i])]);
                assert!((f64::from(*found) - wanted).abs() < 1e-4, "{} token {i}: {found}, {wanted}", dir.display());
            }
        }
    }
}

fn scores(server: &mut ModelServer, requests: &[ScoreRequest]) -> Vec<Scores> {
    let submit = |r: &ScoreRequest| {
        let (reply, answer) = oneshot::channel();
        server.submit_score(r.clone(), reply);
        answer
    };
    let answers: Vec<_> = requests.iter().map(submit).collect();
    run(server);
    answers.into_iter().map(|mut a| a.try_recv().unwrap().unwrap()).collect()
}

/// Passes are shared, and the beginning of one pass serves the next, as far as it goes.
#[test]
fn requests_that_share_a_pass_score_as_alone() {
    let judged = |row: u64, stage: &str, adapter: Option<AdapterId>, common: usize| {
        let answers = vec![prompt(row + 1, 1), prompt(row + 2, 4), Vec::new(), prompt(row + 1, 3)];
        let question = [prompt(99, common), prompt(row / 2, 9), prompt(row + 50, 12)].concat();
        ScoreRequest { prompt: question, answers, adapter, company: Company::Any, stage: stage.into() }
    };
    let mut requests: Vec<_> = (0..12).map(|row| judged(row, "judge", None, 30)).collect();
    requests.extend((0..6).map(|row| judged(row, "judge", Some(fixture::adapter()), 30)));
    requests.extend((0..6).map(|row| judged(row, "other", None, 0)));
    requests.extend((0..6).map(|row| judged(row, "judge", None, 25)));
    // nothing but what is kept
    requests.push(ScoreRequest { prompt: prompt(99, 25), ..judged(0, "judge", None, 25) });
    let alone: Vec<_> = requests.iter().map(|r| ScoreRequest { company: Company::Indifferent, ..r.clone() }).collect();
    let expected = scores(&mut server(LIMITS), &alone);
    let mut packing = server(Limits { prefill_tokens: 200, ..LIMITS });
    let found: Vec<_> = requests.chunks(8).flat_map(|r| scores(&mut packing, r)).collect();
    for (i, (expected, found)) in expected.iter().zip(&found).enumerate() {
        let differences = expected.logprobs.iter().zip(&found.logprobs).map(|(e, f)| {
            assert_eq!(e.len(), f.len());
            e.iter().zip(f).map(|(e, f)| (e - f).abs()).fold(0.0, f32::max)
        });
        let largest = differences.fold(0.0, f32::max);
        assert!(largest < 1e-4, "request {i} differs by {largest}");
    }
}

#[test]
fn a_broken_adapter_is_its_own_requests_error() {
    let mut server = server(LIMITS);
    let nowhere = AdapterId { dir: PathBuf::from("/nowhere"), hash: "x".into() };
    let mut broken = submit(&mut server, GenerateRequest { adapter: Some(nowhere), ..request(0, 1, 30, hot(8)) });
    let mut fine = submit(&mut server, request(1, 1, 30, hot(8)));
    run(&mut server);
    let message = broken.try_recv().unwrap().unwrap_err().to_string();
    assert!(message.contains("/nowhere/adapter_config.json"), "{message}");
    assert!(fine.try_recv().unwrap().is_ok());
}

/// Tokens and log-probs of `requests`, at most `at_once` of them in flight.
fn answered(kind: Kind, requests: &[GenerateRequest], at_once: usize) -> Vec<Candidate> {
    let mut server = ModelServer::new(
        fixture::model_in(kind),
        "m",
        "cpu:0",
        Limits { rows: 32, ..LIMITS },
        Arc::<Trace>::default(),
        &Metrics::default(),
    );
    let mut found = Vec::new();
    for some in requests.chunks(at_once) {
        let answers: Vec<_> = some.iter().map(|request| submit(&mut server, request.clone())).collect();
        run(&mut server);
        found.extend(answers.into_iter().flat_map(|mut a| a.try_recv().unwrap().unwrap().candidates));
    }
    found
}

/// Nothing of an answer depends on what else is asked, to the last bit.
#[test]
fn answers_do_not_depend_on_what_is_in_flight() {
    if !cpu::keeps_rows_apart() {
        return;
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        let ask = |row: u64| {
            let adapter = (row % 3 == 1).then(fixture::adapter);
            GenerateRequest { alone: true, adapter, ..request(row, 1, 3 + 9 * row as usize, hot(20)) }
        };
        let requests: Vec<_> = (0..32).map(ask).collect();
        let one = answered(kind, &requests, 1);
        assert_eq!(one.len(), 32);
        for at_once in [7, 32] {
            assert_eq!(answered(kind, &requests, at_once), one, "{kind:?}, {at_once} in flight");
        }
    }
}

/// The last client may go while its requests run.
#[test]
fn what_is_released_is_given_back_when_all_is_done() {
    let mut server = server(LIMITS);
    let request =
        |row| GenerateRequest { prompt: [prompt(9, 40), prompt(row, 4)].concat(), ..request(row, 1, 4, hot(4)) };
    for row in [0, 1] {
        all(&mut server, &[request(row)]);
    }
    assert_eq!(server.kept_tokens(), 40);
    let mut last = submit(&mut server, request(2));
    server.release();
    run(&mut server);
    assert!(last.try_recv().unwrap().is_ok(), "it is answered nevertheless");
    assert_eq!(server.kept_tokens(), 0);
}

#[test]
fn what_prompts_begin_with_is_computed_once() {
    let requests = |alone: bool| -> Vec<GenerateRequest> {
        let head: Vec<u32> = (0..40).map(|i| (i * 29 + 3) % 320).collect();
        let ask = |row: u64| {
            let mut request = request(row, 2, 9, hot(12));
            request.prompt = [head.as_slice(), &prompt(row, 9)].concat();
            request.adapter = (row % 2 == 1).then(fixture::adapter);
            GenerateRequest { alone, ..request }
        };
        // Rows of one adapter follow each other: another one's beginning is another.
        [0, 2, 4, 6, 1, 3, 5].map(ask).to_vec()
    };
    let mut sharing = server(LIMITS);
    let found: Vec<_> = requests(false).iter().flat_map(|r| all(&mut sharing, std::slice::from_ref(r))).collect();
    assert_eq!(sharing.kept_tokens(), 40);
    assert_eq!(tokens(&found), tokens(&one_by_one(LIMITS, &requests(true))));
}
