//! The trainer against what TRL and PEFT compute (`tests/oracle/train.py`), on a tiny Llama.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::checkpoint::Progress;
use super::pass::Way;
use super::*;
use crate::model::attention::Tree;
use crate::model::gradient::Keep;
use crate::model::pack::{Branches, Pack};
use crate::model::{Adapters, Config, Lora, ModelOptions, Pretrained, Source, Transformer};
use crate::torch::GradGuard;

pub(super) fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama")
}

pub(super) fn model(kind: Kind) -> Transformer {
    let source = Source::Directory(fixture());
    let opened = Pretrained::open(&source, &ModelOptions::default()).unwrap();
    Transformer::load(opened.config, &opened.weights, kind, Device::Cpu).unwrap()
}

fn lora(dir: &str, config: &Config) -> Lora {
    Lora::load(&fixture().join(dir), config, Device::Cpu).unwrap()
}

fn expected() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture().join("expected/train.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Log-probabilities as the model server scores them, which no other pair has a part in.
fn score(model: &Transformer, adapter: Option<&Lora>, prompt: &[u32], answers: [&[u32]; 2]) -> Vec<f32> {
    let _no_grad = GradGuard::set(false);
    if model.learns_by_hand() {
        let pack = Pack::new(&[Branches { prompt, answers: answers.to_vec() }], model.heads()).unwrap();
        let stack: Vec<&Lora> = adapter.into_iter().collect();
        let forward = model.forward(&pack, &stack, Keep::Nothing).unwrap();
        return model.score(&pack, &forward.hidden, false).unwrap().log_probs;
    }
    score_alone(model, adapter, prompt, answers)
}

/// Log-probabilities from a pass of the pair's own, of which autograd could make the gradient.
fn score_alone(model: &Transformer, adapter: Option<&Lora>, prompt: &[u32], answers: [&[u32]; 2]) -> Vec<f32> {
    let mut tree = Tree::new(prompt, &answers, model.heads()).unwrap();
    let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&ids, &positions, &mut tree, &Adapters::from(adapter)).unwrap();
    let rows = hidden.index_select(0, &tree.predictors);
    Vec::try_from(model.log_probs(&rows, &tree.targets).unwrap()).unwrap()
}

/// The fixture's pairs with the reference log-probabilities of `adapter`.
pub(super) fn pairs(model: &Transformer, adapter: Option<&Lora>) -> Vec<Pair> {
    let file = expected();
    let rows = file["pairs"].as_array().unwrap().iter().zip(0..);
    let pair = |(row, number): (&Value, u64)| {
        let [prompt, chosen, rejected] = ["prompt", "chosen", "rejected"].map(|k| ids(&row["ids"][k]));
        let scores = score(model, adapter, &prompt, [&chosen, &rejected]);
        let reference = [&scores[..chosen.len()], &scores[chosen.len()..]]
            .map(|side| side.iter().map(|v| f64::from(*v)).sum::<f64>());
        Pair { row: number, ordinal: 0, prompt, chosen, rejected, reference, label: 1.0, weight: 1.0, offset: 0.0 }
    };
    rows.map(pair).collect()
}

fn objective(losses: &[Loss], label_smoothing: f64) -> Objective {
    let terms = losses.iter().map(|loss| (*loss, 1.0)).collect();
    Objective { terms, beta: 0.1, label_smoothing, gamma: 0.0, ld_alpha: 1.0 }
}

const OPTIMIZER: AdamW = AdamW { weight_decay: 0.01, max_grad_norm: 1.0 };

fn alone(lora: Lora) -> Subject {
    Subject::Adapter { lora, frozen: None }
}

pub(super) fn trainer(model: &Transformer, adapter: Lora, loss: Loss, smoothing: f64, checked: bool) -> Trainer {
    Trainer::new(model.share(), alone(adapter), objective(&[loss], smoothing), OPTIMIZER, checked).unwrap()
}

/// Of a run that has not begun.
fn start() -> Progress {
    Progress {
        key: "k".into(),
        epoch: 0,
        pairs: 0,
        chain: String::new(),
        steps: 0,
        updates: 0,
        skipped: 0,
        first: None,
        evaluation: None,
        evaluated: None,
        best: None,
        since_best: 0,
        told: 0,
    }
}

#[track_caller]
fn close(got: f64, want: f64, relative: f64, absolute: f64, what: &str) {
    assert!((got - want).abs() <= relative * want.abs() + absolute, "{what}: {got}, expected {want}");
}

#[test]
fn log_probs_loss_and_gradients_are_those_of_peft() {
    let model = model(Kind::Float);
    let file = expected();
    let first = &file["first_step"];
    let mut pairs = pairs(&model, None);
    pairs.truncate(2);
    for (pair, want) in pairs.iter().zip(first["pairs"].as_array().unwrap()) {
        for (side, reference) in pair.reference.iter().enumerate() {
            let sum: f64 = want["reference"][side].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).sum();
            close(*reference, sum, 0.0, 1e-4, "reference");
        }
        let adapter = lora("adapter", &model.config);
        let policy = score(&model, Some(&adapter), &pair.prompt, [&pair.chosen, &pair.rejected]);
        let want = want["policy"].as_array().unwrap().iter().flat_map(|side| side.as_array().unwrap());
        for (got, want) in policy.iter().zip(want) {
            close(f64::from(*got), want.as_f64().unwrap(), 0.0, 1e-4, "log-prob of a token");
        }
    }
    let mut trainer = trainer(&model, lora("adapter", &model.config), Loss::Sigmoid, 0.0, false);
    trainer.accumulate(std::slice::from_ref(&pairs), 1024).unwrap();
    let bytes = std::fs::read(fixture().join("expected/gradients.safetensors")).unwrap();
    let gradients = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut start = 0;
    for (name, tensor) in trainer.lora().named() {
        let count = tensor.numel() as i64;
        let want = gradients.tensor(&name).unwrap();
        let want = Tensor::from_data_size(want.data(), &[count], Kind::Float);
        let got = trainer.flat.gradient.narrow(0, start, count);
        let error = (got - &want).abs().max().double_value(&[]);
        assert!(error < 1e-5 + 1e-4 * want.abs().max().double_value(&[]), "{name}: {error}");
        start += count;
    }
    let step = trainer.step(0.0).unwrap().unwrap();
    close(step.stats.loss, first["loss"].as_f64().unwrap(), 1e-5, 0.0, "loss");
    close(step.grad_norm, first["grad_norm"].as_f64().unwrap(), 1e-4, 0.0, "gradient norm");
}

/// Runs the fixture's schedule and compares every step with TRL's.
fn follows_trl(losses: &[Loss]) -> Trainer {
    let model = model(Kind::Float);
    let file = expected();
    let name = losses.iter().map(|loss| loss.name()).collect::<Vec<_>>().join("+");
    let recorded = &file["trajectories"][&name];
    let smoothing = recorded["label_smoothing"].as_f64().unwrap();
    let fresh = alone(lora("fresh", &model.config));
    let trainer = Trainer::new(model.share(), fresh, objective(losses, smoothing), OPTIMIZER, true).unwrap();
    follows(trainer, pairs(&model, None), recorded, losses, 5e-3)
}

fn follows(mut trainer: Trainer, pairs: Vec<Pair>, recorded: &Value, losses: &[Loss], rate: f64) -> Trainer {
    let name = losses.iter().map(|loss| loss.name()).collect::<Vec<_>>().join("+");
    let steps = recorded["steps"].as_array().unwrap();
    let schedule = Schedule { decay: Decay::Linear, learning_rate: rate, warmup_steps: 0 };
    let groups = (0..2).flat_map(|_| pairs.chunks(4));
    for (s, (group, want)) in groups.zip(steps).enumerate() {
        for micro_batch in group.chunks(2) {
            trainer.accumulate(&[micro_batch.to_vec()], 1024).unwrap();
        }
        let rate = schedule.rate(Position { done: s as f64, total: steps.len() as f64 });
        let step = trainer.step(rate).unwrap().unwrap();
        let tolerance = if s < 5 { 1e-4 } else { 1e-2 };
        let want = |key: &str| want[key].as_f64().unwrap();
        assert_eq!(rate, want("learning_rate"), "step {s}");
        close(step.stats.loss, want("loss"), tolerance, 1e-6, &format!("{name} loss {s}"));
        close(step.grad_norm, want("grad_norm"), 10.0 * tolerance, 1e-5, &format!("{name} norm {s}"));
        if losses == [Loss::Sigmoid] {
            close(step.stats.margins, want("rewards/margins"), 10.0 * tolerance, 1e-4, "margins");
            close(step.stats.chosen, want("rewards/chosen"), 10.0 * tolerance, 1e-4, "chosen");
            close(step.stats.accuracies, want("rewards/accuracies"), 0.0, 1e-9, "accuracies");
            close(step.stats.logps_rejected, want("logps/rejected"), tolerance, 1e-3, "log-probs");
        }
    }
    assert_eq!(trainer.steps(), steps.len() as u64);
    trainer
}

/// Compares what training changed with what TRL changed, tensors of a kind together.
fn same_update(named: &[(String, Tensor)], before: &[(String, Tensor)], file: &str, kinds: &[&str]) {
    let bytes = std::fs::read(fixture().join("expected").join(file)).unwrap();
    let last = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for kind in kinds {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for ((name, tensor), (_, before)) in named.iter().zip(before).filter(|((name, _), _)| name.contains(kind)) {
            let want = Tensor::from_data_size(last.tensor(name).unwrap().data(), &tensor.size(), Kind::Float);
            ours.push((tensor.detach() - before).flatten(0, -1));
            theirs.push((want - before).flatten(0, -1));
        }
        let (ours, theirs) = (Tensor::cat(&ours, 0), Tensor::cat(&theirs, 0));
        let number = |t: Tensor| t.double_value(&[]);
        let (n, m) = (number(ours.norm()), number(theirs.norm()));
        let cosine = number(ours.dot(&theirs)) / (n * m);
        assert!(cosine > 0.9999 && (n / m - 1.0).abs() < 1e-3, "{kind}: cosine {cosine}, norms {n} and {m}");
    }
}

#[test]
fn sigmoid_follows_trl_to_the_same_adapter() {
    let trainer = follows_trl(&[Loss::Sigmoid]);
    let named = |lora: &Lora| lora.named().map(|(name, tensor)| (name, tensor.shallow_clone())).collect::<Vec<_>>();
    let start = lora("fresh", &trainer.model.config);
    same_update(&named(trainer.lora()), &named(&start), "final.safetensors", &["lora_A", "lora_B"]);
}

#[test]
fn a_whole_model_follows_trl_to_the_same_weights() {
    let model = model(Kind::Float);
    let recorded = &expected()["whole"];
    let optimizer = AdamW { weight_decay: recorded["weight_decay"].as_f64().unwrap(), ..OPTIMIZER };
    let objective = objective(&[Loss::Sigmoid], 0.0);
    let before: Vec<_> = model.stored().unwrap().into_iter().map(|(name, t)| (name, t.copy())).collect();
    let trainer = Trainer::new(model.share(), Subject::Model, objective, optimizer, true).unwrap();
    let rate = recorded["learning_rate"].as_f64().unwrap();
    let mut pairs = pairs(&model, None);
    for pair in &mut pairs {
        let _no_grad = GradGuard::set(false);
        let scores = score_alone(&model, None, &pair.prompt, [&pair.chosen, &pair.rejected]);
        pair.reference = pair.sums(&scores, 1.0);
    }
    let trainer = follows(trainer, pairs, recorded, &[Loss::Sigmoid], rate);
    let kinds = ["embed_tokens", "lm_head", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "norm"];
    same_update(&trainer.model.stored().unwrap(), &before, "final-model.safetensors", &kinds);
    for ((name, now), (_, before)) in model.stored().unwrap().iter().zip(&before) {
        assert_eq!(now, before, "{name}: the weights that others read have moved");
    }
}

/// What a GPU does, here in float32, with losses that look at a pair alone and at its neighbours.
#[test]
fn pairs_padded_to_one_length_have_the_gradient_of_pairs_alone() {
    let model = model(Kind::Float);
    let pairs = pairs(&model, None);
    assert!(pairs.iter().any(|pair| Tree::bucket(pair.tokens()) != Tree::bucket(pairs[0].tokens())));
    for (loss, tokens) in
        [(Loss::Sigmoid, 1 << 20), (Loss::Sigmoid, 200), (Loss::BcoPair, 1 << 20), (Loss::KtoPair, 200)]
    {
        let made = |way: Way| {
            let mut trainer = trainer(&model, lora("adapter", &model.config), loss, 0.0, false);
            trainer.way = way;
            let micro_batches: Vec<_> = pairs.chunks(4).map(<[_]>::to_vec).collect();
            trainer.accumulate(&micro_batches, tokens).unwrap();
            let evaluated = trainer.evaluate(&pairs, 4, tokens).unwrap().mean().unwrap();
            let gradient = trainer.flat.gradient.copy();
            let step = trainer.step(1e-3).unwrap().unwrap();
            (gradient, step.stats.loss, evaluated.loss, step.work)
        };
        let (alone, together) = (made(Way::Graph), made(Way::Padded));
        let off = (&alone.0 - &together.0).abs().max().double_value(&[]) / alone.0.abs().max().double_value(&[]);
        assert!(off < 1e-5, "{loss:?}: gradients differ by {off}");
        close(together.1, alone.1, 1e-5, 0.0, "loss");
        close(together.2, alone.2, 1e-5, 0.0, "evaluation");
        assert_eq!(together.3.tokens, alone.3.tokens);
        assert!(together.3.padding > 0, "{:?}", together.3);
    }
}

#[test]
fn a_whole_model_in_bf16_learns_in_float32_and_goes_on_from_its_checkpoint() {
    let model = model(Kind::BFloat16);
    let sft = objective(&[Loss::Sft], 0.0);
    let new = || Trainer::new(model.share(), Subject::Model, sft.clone(), OPTIMIZER, false).unwrap();
    let mut pairs = pairs(&model, None);
    pairs.truncate(4);
    let dir = tempfile::tempdir().unwrap();
    let (mut straight, mut cut) = (new(), new());
    let mut losses = Vec::new();
    for step in 0..6 {
        straight.accumulate(&[pairs.clone()], 1024).unwrap();
        // so small that in bf16 a step would be rounded away
        losses.push(straight.step(2e-4).unwrap().unwrap().stats.loss);
        if step == 3 {
            let progress = Progress { steps: 3, updates: 3, ..start() };
            cut.save_checkpoint(dir.path(), &progress).unwrap();
            cut = new();
            cut.load_checkpoint(dir.path()).unwrap();
        }
        cut.accumulate(&[pairs.clone()], 1024).unwrap();
        cut.step(2e-4).unwrap();
    }
    assert!(losses.is_sorted_by(|a, b| a > b) && losses[5] < losses[0] - 0.05, "{losses:?}");
    for ((name, a), (_, b)) in straight.model.stored().unwrap().iter().zip(cut.model.stored().unwrap()) {
        assert_eq!(*a, b, "{name}");
    }
}

#[test]
fn other_losses_follow_trl() {
    use Loss::{ApoDown, ApoZero, Discopop, ExoPair, Hinge, Ipo, NcaPair, Robust, SppoHard};
    for loss in [Hinge, Ipo, Robust, ExoPair, NcaPair, SppoHard, ApoZero, ApoDown, Discopop] {
        follows_trl(&[loss]);
    }
    follows_trl(&[Loss::Sigmoid, Loss::Sft]);
}

#[test]
fn the_first_step_starts_at_the_reference_in_bf16() {
    let model = model(Kind::BFloat16);
    let adapter = lora("adapter", &model.config);
    let (base, same) = (pairs(&model, None), pairs(&model, Some(&adapter)));
    let mut fresh = trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, true);
    let mut continued = trainer(&model, adapter, Loss::Sigmoid, 0.0, true);
    for (trainer, pairs) in [(&mut fresh, base), (&mut continued, same)] {
        trainer.accumulate(std::slice::from_ref(&pairs), 1024).unwrap();
        let step = trainer.step(1e-3).unwrap().unwrap();
        assert_eq!((step.stats.margins, step.stats.loss), (0.0, std::f64::consts::LN_2));
    }
}

#[test]
fn references_of_other_rows_adapters_or_tokens_stop_the_run() {
    let model = model(Kind::Float);
    let adapter = lora("adapter", &model.config);
    let right = pairs(&model, None);
    let mut shifted = right.clone();
    shifted.iter_mut().zip(right.iter().cycle().skip(1)).for_each(|(pair, next)| pair.reference = next.reference);
    let other = pairs(&model, Some(&adapter));
    let mut doubled = right.clone();
    for pair in &mut doubled {
        // scored once after one begin token, trained after two
        pair.prompt.insert(0, 0);
    }
    for (what, pairs) in [("shifted", shifted), ("other adapter", other), ("doubled begin", doubled)] {
        let mut trainer = trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, true);
        let told = trainer.accumulate(&[pairs[..1].to_vec()], 1024).unwrap_err();
        assert!(matches!(told, TrainError::NotTheStart { row: 0, .. }), "{what}: {told}");
        assert!(told.to_string().contains("the reference is not the policy's start"));
    }
}

#[test]
fn an_answer_longer_than_a_chunk_has_the_gradient_of_one_chunk() {
    let model = model(Kind::Float);
    let mut pair = pairs(&model, None).remove(0);
    pair.chosen = (0..Transformer::HEAD_ROWS as u32 + 9).map(|i| 5 + i % 300).collect();
    let mut trainer = trainer(&model, lora("adapter", &model.config), Loss::Sft, 0.0, false);
    trainer.accumulate(&[vec![pair.clone()]], 1024).unwrap();
    let chunked = trainer.flat.gradient.copy();
    let _grad = GradGuard::set(true);
    let adapter = trainer.lora();
    let leaves: Vec<&Tensor> = adapter.named().map(|(_, t)| t).collect();
    let sides: [&[u32]; 2] = [&pair.chosen, &pair.rejected];
    let mut tree = Tree::new(&pair.prompt, &sides, model.heads()).unwrap();
    let (ids, positions) = (tree.ids.shallow_clone(), tree.positions.shallow_clone());
    let hidden = model.hidden(&ids, &positions, &mut tree, &Adapters::All(adapter)).unwrap();
    let count = pair.chosen.len() as i64;
    let rows = hidden.index_select(0, &tree.predictors.narrow(0, 0, count));
    let loss = -model.log_probs(&rows, &tree.targets.narrow(0, 0, count)).unwrap().mean(Kind::Float);
    let whole = Tensor::run_backward(&[loss], &leaves, false, false);
    let whole = Tensor::cat(&whole.iter().map(|t| t.flatten(0, -1)).collect::<Vec<_>>(), 0);
    let error = (&whole - chunked).abs().max().double_value(&[]);
    assert!(error < 1e-5 * whole.abs().max().double_value(&[]).max(1.0), "{error}");
}

#[test]
fn steps_without_a_finite_loss_are_skipped_then_stop_the_run() {
    let model = model(Kind::Float);
    let mut pairs = pairs(&model, None);
    pairs[0].reference[0] = f64::NAN;
    let mut trainer = trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, false);
    let before = trainer.flat.parameters.copy();
    for _ in 0..3 {
        trainer.accumulate(&[pairs[..1].to_vec()], 1024).unwrap();
        assert!(trainer.step(1e-3).unwrap().unwrap().skipped);
    }
    assert_eq!(trainer.flat.parameters, before);
    trainer.accumulate(&[pairs[..1].to_vec()], 1024).unwrap();
    assert!(matches!(trainer.step(1e-3), Err(TrainError::Diverged { skipped: 4 })));
}

fn state(trainer: &Trainer) -> Vec<Vec<f32>> {
    let flat = &trainer.flat;
    [&flat.parameters, &flat.first_moment, &flat.second_moment].map(|t| Vec::try_from(t).unwrap()).to_vec()
}

#[test]
fn a_resumed_run_is_the_same_to_the_last_bit() {
    let model = model(Kind::BFloat16);
    let pairs = pairs(&model, None);
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("checkpoint");
    let fresh = || trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, true);
    let steps = |trainer: &mut Trainer, groups: &[Pair]| {
        for group in groups.chunks(4) {
            group.chunks(2).for_each(|batch| trainer.accumulate(&[batch.to_vec()], 1024).unwrap());
            trainer.step(5e-3).unwrap();
        }
    };
    let mut whole = fresh();
    steps(&mut whole, &pairs);
    let mut first = fresh();
    steps(&mut first, &pairs[..8]);
    let progress = Progress { pairs: 8, steps: 2, updates: 2, ..start() };
    for _ in 0..2 {
        first.save_checkpoint(&place, &progress).unwrap();
    }
    let mut resumed = fresh();
    assert_eq!(resumed.load_checkpoint(&place).unwrap(), progress);
    assert_eq!(checkpoint::progress(&place).unwrap(), Some(progress));
    steps(&mut resumed, &pairs[8..]);
    assert_eq!(state(&resumed), state(&whole));

    let adapter = dir.path().join("adapter");
    resumed.save_adapter(&adapter, "tiny-llama").unwrap();
    let loaded = Lora::load(&adapter, &model.config, Device::Cpu).unwrap();
    for ((name, saved), (_, live)) in loaded.named().zip(resumed.lora().named()) {
        assert_eq!(saved, &live.detach(), "{name}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_damaged_checkpoint_is_told_with_its_place() {
    let model = model(Kind::Float);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("state.safetensors"), b"cut").unwrap();
    let mut trainer = trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, true);
    let told = trainer.load_checkpoint(dir.path()).unwrap_err().to_string();
    assert!(told.contains("state.safetensors") && told.contains("delete it"), "{told}");
}

#[test]
fn rows_become_the_tokens_trl_trains() {
    use super::pair::{Answer, Encoded, Prompt, Tokens, Truncated};
    let opened = Pretrained::open(&Source::Directory(fixture()), &ModelOptions::default()).unwrap();
    let file = expected();
    let end = opened.tokenizer.eos_ids()[0];
    let tokens = |max_length| Tokens {
        tokenizer: &opened.tokenizer,
        template: None,
        end: opened.end_of_text(),
        stops: opened.stop_ids(),
        add_bos: None,
        truncated: Truncated::Keep,
        max_length,
    };
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let answer = |value: &Value| Answer { text: text(value), ..Answer::default() };
    for row in file["pairs"].as_array().unwrap() {
        let prompt = Prompt::Text(text(&row["prompt"]));
        let got = tokens(512).encode(&prompt, &answer(&row["chosen"]), &answer(&row["rejected"])).unwrap();
        let [prompt, chosen, rejected] = ["prompt", "chosen", "rejected"].map(|k| ids(&row["ids"][k]));
        assert_eq!(got, Encoded::Pair { prompt, chosen, rejected, cut: 0 });
    }
    let prompt = Prompt::Text("the cat".into());
    let sampled = |ids: &[u32], finish: &str| Answer {
        text: "not read".into(),
        ids: Some(ids.to_vec()),
        finish_reason: Some(finish.into()),
    };
    let encode = |length, a: &Answer, b: &Answer| tokens(length).encode(&prompt, a, b).unwrap();
    let Encoded::Pair { prompt: seen, chosen, rejected, cut } =
        encode(64, &sampled(&[9, 8, end], "stop"), &sampled(&[7, 6], "length"))
    else {
        panic!("no pair");
    };
    assert_eq!((chosen, rejected, cut), (vec![9, 8, end], vec![7, 6], 0));
    let tight = encode(seen.len() + 1, &sampled(&[9, 8], "stop"), &sampled(&[7], "length"));
    assert!(matches!(tight, Encoded::Pair { cut: 1, chosen, .. } if chosen == [9]));
    let full = encode(seen.len(), &sampled(&[9], "stop"), &sampled(&[7], "stop"));
    assert_eq!(full, Encoded::TooLong { prompt: seen.len() });
    assert!(matches!(encode(64, &sampled(&[], "stop"), &sampled(&[7], "stop")), Encoded::Dropped(_)));
    assert!(matches!(encode(64, &sampled(&[7, end], "stop"), &sampled(&[7], "stop")), Encoded::Dropped(_)));
    // What ends the template's turns is an end of an answer that was sampled, also where it is not all of it.
    let turns = Tokens { end: &[11, 12], stops: &[11, end], ..tokens(64) };
    let ended = |ids: &[u32]| {
        let (prompt, other) = (Prompt::Text("the cat".into()), sampled(&[7], "length"));
        match turns.encode(&prompt, &sampled(ids, "stop"), &other).unwrap() {
            Encoded::Pair { chosen, .. } => chosen,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(ended(&[9, 11]), [9, 11]);
    assert_eq!(ended(&[9, end]), [9, end]);
    assert_eq!(ended(&[9]), [9, 11, 12]);
    let chat = Tokens { template: Some(opened.chat().unwrap()), ..tokens(64) };
    let rendered = chat.encode(&Prompt::Text("the small cat".into()), &sampled(&[9], "stop"), &sampled(&[7], "stop"));
    assert!(matches!(rendered.unwrap(), Encoded::Pair { prompt, .. } if prompt == ids(&file["chat"]["ids"])));
}

/// With `ld_alpha` 0 the longer answer is cut to the length of the shorter one.
#[test]
fn tokens_beyond_the_shorter_answer_count_what_they_are_told_to() {
    let model = model(Kind::Float);
    let all = pairs(&model, None);
    let long = all.iter().find(|p| p.chosen.len().abs_diff(p.rejected.len()) > 2).unwrap();
    let mut short = long.clone();
    short.chosen.truncate(long.common());
    short.rejected.truncate(long.common());
    let gradient = |pair: &Pair, ld_alpha: f64| {
        let scores = score(&model, None, &pair.prompt, [&pair.chosen, &pair.rejected]);
        let pair = Pair { reference: pair.sums(&scores, ld_alpha), ..pair.clone() };
        let objective = Objective { ld_alpha, ..objective(&[Loss::Sigmoid], 0.0) };
        let adapter = lora("adapter", &model.config);
        let mut trainer = Trainer::new(model.share(), alone(adapter), objective, OPTIMIZER, false).unwrap();
        trainer.accumulate(&[vec![pair]], 1024).unwrap();
        trainer.flat.gradient.shallow_clone()
    };
    let apart = |a: Tensor, b: Tensor| (a - b).abs().max().double_value(&[]);
    assert!(apart(gradient(long, 0.0), gradient(&short, 1.0)) < 1e-6);
    assert!(apart(gradient(long, 1.0), gradient(&short, 1.0)) > 1e-4);
    let half = gradient(long, 0.5);
    assert!(apart(half.shallow_clone(), gradient(long, 1.0)) > 1e-5 && apart(half, gradient(long, 0.0)) > 1e-5);
}

#[test]
fn pairs_that_are_coupled_may_be_split_over_passes() {
    let model = model(Kind::Float);
    let pairs = pairs(&model, None);
    let gradient = |tokens: usize| {
        let adapter = lora("adapter", &model.config);
        let mut trainer = trainer(&model, adapter, Loss::KtoPair, 0.0, false);
        trainer.accumulate(&[pairs[..3].to_vec(), pairs[3..5].to_vec()], tokens).unwrap();
        let gradient = trainer.flat.gradient.shallow_clone();
        (gradient.copy(), trainer.step(0.0).unwrap().unwrap().stats)
    };
    let (whole, stats) = gradient(4096);
    let (split, same) = gradient(1);
    assert!((&whole - split).abs().max().double_value(&[]) < 1e-5 * whole.abs().max().double_value(&[]).max(1.0));
    close(same.loss, stats.loss, 1e-6, 0.0, "loss");
}

/// Answers to other prompts, by hand.
#[test]
fn kto_compares_with_answers_to_other_prompts() {
    let model = model(Kind::Float);
    let adapter = || lora("adapter", &model.config);
    let pairs = pairs(&model, None)[..3].to_vec();
    let mut sum = 0.0;
    for (pair, next) in pairs.iter().zip(pairs.iter().cycle().skip(1)) {
        let score = |lora: Option<&Lora>| score(&model, lora, &pair.prompt, [&next.chosen, &next.rejected]);
        sum += score(Some(&adapter())).iter().sum::<f32>() - score(None).iter().sum::<f32>();
    }
    let z = f64::from(sum / 6.0).max(0.0);
    let s = |x: f64| 1.0 / (1.0 + (-x).exp());
    let value = |pair: &Pair| {
        let policy = score(&model, Some(&adapter()), &pair.prompt, [&pair.chosen, &pair.rejected]);
        let [a, c] = pair.scores(pair.sums(&policy, 1.0)).ratios();
        0.5 * (1.0 - s(0.1 * (a - z)) + 1.0 - s(0.1 * (z - c)))
    };
    let expected = pairs.iter().map(value).sum::<f64>() / 3.0;
    let mut trainer = trainer(&model, adapter(), Loss::Kto, 0.0, false);
    close(trainer.evaluate(&pairs, pairs.len(), 1024).unwrap().mean().unwrap().loss, expected, 1e-5, 0.0, "evaluation");
    trainer.accumulate(&[pairs], 1024).unwrap();
    close(trainer.step(0.0).unwrap().unwrap().stats.loss, expected, 1e-5, 0.0, "loss");
}

#[test]
fn less_is_kept_for_the_same_gradient() {
    let model = model(Kind::BFloat16);
    let pairs = pairs(&model, None);
    let gradient = |streams_alone: bool| {
        let mut trainer = trainer(&model, lora("adapter", &model.config), Loss::Sigmoid, 0.0, false);
        if streams_alone {
            trainer.keep_streams_alone();
        }
        trainer.accumulate(std::slice::from_ref(&pairs), 1024).unwrap();
        trainer.flat.gradient.copy()
    };
    assert_eq!(gradient(true), gradient(false));
}

#[test]
fn the_best_adapter_survives_a_checkpoint() {
    let model = model(Kind::Float);
    let pairs = pairs(&model, None);
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("checkpoint");
    let step = |trainer: &mut Trainer| {
        trainer.accumulate(&[pairs[..4].to_vec()], 1024).unwrap();
        trainer.step(5e-3).unwrap();
    };
    let mut first = trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, true);
    step(&mut first);
    first.keep_as_best().unwrap();
    let best = first.flat.parameters.copy();
    step(&mut first);
    assert_ne!(first.flat.parameters, best);
    let best_stats = Some(Stats::default());
    let progress =
        Progress { epoch: 1, steps: 2, updates: 2, evaluated: Some(1), best: best_stats, since_best: 1, ..start() };
    first.save_checkpoint(&place, &progress).unwrap();
    let mut resumed = trainer(&model, lora("fresh", &model.config), Loss::Sigmoid, 0.0, true);
    assert_eq!(resumed.load_checkpoint(&place).unwrap(), progress);
    assert_eq!(resumed.flat.parameters, first.flat.parameters);
    resumed.back_to_best().unwrap();
    assert_eq!(resumed.flat.parameters, best);
}

#[test]
fn a_fresh_adapter_on_a_frozen_one_starts_as_the_frozen_one_and_ends_as_both() {
    let model = model(Kind::BFloat16);
    let below = || lora("adapter", &model.config);
    let pairs = pairs(&model, Some(&below()));
    let objective = objective(&[Loss::Sigmoid], 0.0);
    let fresh = lora("fresh", &model.config);
    let mut trainer = Trainer::new(
        model.share(),
        Subject::Adapter { lora: fresh, frozen: Some(below()) },
        objective.clone(),
        OPTIMIZER,
        true,
    )
    .unwrap();
    for _ in 0..3 {
        trainer.accumulate(std::slice::from_ref(&pairs), 1024).unwrap();
        trainer.step(5e-3).unwrap();
    }
    let both = trainer.result().unwrap();
    assert_eq!(both.config.r, below().config.r + trainer.lora().config.r);
    for module in crate::model::lora::modules(&model.config) {
        let parts = [&below(), trainer.lora()].map(|lora| lora.change(&module).unwrap());
        let sum = parts.into_iter().flatten().reduce(|a, b| a + b);
        match (both.change(&module).unwrap(), sum) {
            (Some(both), Some(sum)) => assert!((both - sum).abs().max().double_value(&[]) < 1e-5, "{module}"),
            (both, sum) => assert!(both.is_none() && sum.is_none(), "{module}"),
        }
    }
    // On disk it is an adapter as any other, and the average of the two lies between them.
    let dir = tempfile::tempdir().unwrap();
    let [adapter, average] = ["adapter", "average"].map(|name| dir.path().join(name));
    trainer.save_adapter(&adapter, "tiny").unwrap();
    trainer.save_average(&average, Some(&fixture().join("adapter")), 0.25, "tiny").unwrap();
    let load = |dir: &Path| Lora::load(dir, &model.config, Device::Cpu).unwrap();
    let module = "model.layers.1.mlp.down_proj";
    let change = |lora: &Lora| lora.change(module).unwrap().unwrap();
    let expected = change(&below()) * 0.75 + change(&load(&adapter)) * 0.25;
    assert!((change(&load(&average)) - expected).abs().max().double_value(&[]) < 1e-5);
}
