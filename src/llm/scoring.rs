//! Scoring passes: log-probs of given answers.

use tch::{Device, Tensor};

use super::forest::Forest;
use super::prefixes::Prefixes;
use super::request::{ScoreRequest, Scores};
use crate::model::attention::Tree;
use crate::model::gradient::Keep;
use crate::model::pack::{Branches, Pack};
use crate::model::{Lora, Transformer};
use crate::torch::TorchError;

/// One request the way a trainer computes it: what comes out does not depend on anything else in flight.
pub fn alone(model: &Transformer, request: &ScoreRequest, lora: Option<&Lora>) -> Result<Scores, TorchError> {
    let answers: Vec<&[u32]> = request.answers.iter().map(Vec::as_slice).collect();
    let mut tree = Tree::new(&request.prompt, &answers, model.heads())?;
    let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&ids, &positions, &mut tree, &lora.into())?;
    let logprobs = log_probs(&hidden, &tree.predictors, &tree.targets, |rows, targets| model.log_probs(rows, targets))?;
    Ok(split(&logprobs, &mut 0, request))
}

/// Requests under one adapter the way a trainer computes them, in one pass where a row of a pass does not depend on
/// the others ([`Transformer::learns_by_hand`]).
pub fn apart(model: &Transformer, requests: &[&ScoreRequest], lora: Option<&Lora>) -> Result<Vec<Scores>, TorchError> {
    if !model.learns_by_hand() {
        return requests.iter().map(|request| alone(model, request, lora)).collect();
    }
    let trees: Vec<_> = requests.iter().map(|r| branches(r)).collect();
    let pack = Pack::new(&trees, model.heads())?;
    let stack: Vec<&Lora> = lora.into_iter().collect();
    let forward = model.forward(&pack, &stack, Keep::Nothing)?;
    let logprobs = model.score(&pack, &forward.hidden, false)?.log_probs;
    let mut at = 0;
    Ok(requests.iter().map(|request| split(&logprobs, &mut at, request)).collect())
}

fn branches(request: &ScoreRequest) -> Branches<'_> {
    Branches { prompt: &request.prompt, answers: request.answers.iter().map(Vec::as_slice).collect() }
}

/// Requests of one stage under one adapter in one pass. `adapter` is the adapter's key. Returns the
/// scores in the requests' order and how many tokens were computed.
pub fn together(
    model: &Transformer,
    prefixes: &mut Prefixes,
    requests: &[&ScoreRequest],
    adapter: u64,
    lora: Option<&Lora>,
) -> Result<(Vec<Scores>, usize), TorchError> {
    let Some(first) = requests.first() else { return Ok((Vec::new(), 0)) };
    let prompts = requests.iter().map(|r| r.prompt.as_slice());
    let past = prefixes.of_all(&first.stage, adapter, prompts)?;
    let known = past.map_or(0, |past| past.tokens() as usize);
    let mut forest = Forest::new(model.heads(), past);
    let sequences: Vec<_> = requests.iter().flat_map(|r| r.answers.iter().map(|a| sequence(r, a, known))).collect();
    sequences.iter().for_each(|s| forest.insert(s));
    let layout = forest.layout()?;
    let hidden = model.infer(&layout.ids, &layout.positions, &mut forest, &lora.into())?;

    let answers = requests.iter().flat_map(|r| r.answers.iter().map(|a| (r.prompt.len() - known, a)));
    let (mut predictors, mut targets) = (Vec::new(), Vec::new());
    for ((prompt, answer), sequence) in answers.zip(&sequences) {
        // The last token of the prompt predicts the first of the answer.
        predictors.extend(forest.rows(sequence).into_iter().skip(prompt - 1).take(answer.len()));
        targets.extend(answer.iter().map(|t| i64::from(*t)));
    }
    let index = |rows: &[i64]| Tensor::f_from_slice(rows)?.f_to_device(model.device());
    let (predictors, targets) = (index(&predictors)?, index(&targets)?);
    let logprobs = log_probs(&hidden, &predictors, &targets, |rows, targets| model.infer_log_probs(rows, targets))?;
    let mut at = 0;
    let scores = requests.iter().map(|r| split(&logprobs, &mut at, r)).collect();
    let computed = layout.ids.numel();
    if let Some((tokens, past)) = forest.into_trunk() {
        prefixes.keep(&first.stage, adapter, tokens, past);
    }
    Ok((scores, computed))
}

/// What goes through the model for an answer: all but its last token, which predicts nothing.
fn sequence(request: &ScoreRequest, answer: &[u32], known: usize) -> Vec<u32> {
    let read = answer.len().saturating_sub(1);
    request.prompt.iter().skip(known).chain(&answer[..read]).copied().collect()
}

/// Log-probs of `targets` after the rows `predictors` of `hidden`, some rows at a time.
fn log_probs(
    hidden: &Tensor,
    predictors: &Tensor,
    targets: &Tensor,
    head: impl Fn(&Tensor, &Tensor) -> Result<Tensor, TorchError>,
) -> Result<Vec<f32>, TorchError> {
    let rows = hidden.f_index_select(0, predictors)?.f_split(Transformer::HEAD_ROWS, 0)?;
    let targets = targets.f_split(Transformer::HEAD_ROWS, 0)?;
    let parts = rows.iter().zip(&targets).map(|(rows, targets)| head(rows, targets));
    let all = Tensor::f_cat(&parts.collect::<Result<Vec<_>, _>>()?, 0)?;
    Ok(Vec::try_from(all.f_to_device(Device::Cpu)?)?)
}

/// The scores of one request out of those of all, from `at` on.
fn split(logprobs: &[f32], at: &mut usize, request: &ScoreRequest) -> Scores {
    let mut next = |answer: &Vec<u32>| {
        let start = *at;
        *at += answer.len();
        logprobs.get(start..*at).unwrap_or_default().to_vec()
    };
    Scores { logprobs: request.answers.iter().map(&mut next).collect() }
}
