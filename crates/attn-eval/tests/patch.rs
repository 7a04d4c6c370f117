//! Patching against whole passes, one head and position at a time.

mod common;

use attn_core::{Fill, ForwardOptions, Gate, Model, ModelInput};
use attn_eval::{Error, Patching, Prompts, patch};
use common::{classifier, language_model};
use tch::{Kind, Tensor};

const CLEAN: [u32; 7] = [5, 11, 30, 2, 8, 19, 4];
const CORRUPTED: [u32; 7] = [5, 12, 30, 2, 9, 19, 4];

fn input(ids: &[u32]) -> ModelInput {
    let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    ModelInput::new(Tensor::from_slice(&ids).view([1, -1]))
}

/// ln softmax[right] − ln softmax[wrong] at `at`, under gates.
fn measure(model: &Model, ids: &[u32], gates: &[Option<Gate>], at: i64) -> f64 {
    let options = ForwardOptions { gates, ..ForwardOptions::default() };
    let logits = tch::no_grad(|| model.forward(&input(ids), &options)).unwrap().logits;
    let log_p = logits.get(0).get(at).log_softmax(-1, Kind::Double);
    log_p.double_value(&[7]) - log_p.double_value(&[13])
}

fn z(model: &Model, ids: &[u32]) -> Vec<Tensor> {
    let options = ForwardOptions { z: true, ..ForwardOptions::default() };
    tch::no_grad(|| model.forward(&input(ids), &options)).unwrap().z
}

fn prompts(at: usize) -> Prompts<'static> {
    Prompts { clean: &CLEAN, corrupted: &CORRUPTED, at, right: 7, wrong: 13 }
}

#[test]
fn each_head_and_position_is_patched_by_itself() {
    tch::set_num_threads(1);
    for (base, at) in [("gpt2", 6), ("distilbert", 3)] {
        let model = language_model(base, Kind::Double);
        let [m_clean, m_corrupted] = [CLEAN, CORRUPTED].map(|ids| measure(&model, &ids, &[], at));
        for patching in [Patching::Heads, Patching::Positions] {
            let found = patch(&model, &prompts(at as usize), patching).unwrap();
            assert!((found.clean - m_clean).abs() < 1e-9);
            assert!((found.corrupted - m_corrupted).abs() < 1e-9);
            let n_positions = if patching == Patching::Heads { 1 } else { 7 };
            for layer in 0..2 {
                for head in 0..4 {
                    assert_eq!(found.denoising[layer][head].len(), n_positions);
                    for pos in 0..n_positions {
                        let patched = |base: &[u32], donor: &[u32]| {
                            let g = Tensor::ones([1, 4, 7, 1], (Kind::Double, tch::Device::Cpu));
                            let cell = g.get(0).get(head as i64);
                            let _ = match patching {
                                Patching::Heads => cell,
                                Patching::Positions => cell.narrow(0, pos as i64, 1),
                            }
                            .fill_(0.0);
                            let fill = Fill::Values(z(&model, donor)[layer].shallow_clone());
                            let mut gates = vec![None, None];
                            gates[layer] = Some(Gate { g, fill });
                            measure(&model, base, &gates, at)
                        };
                        let span = m_clean - m_corrupted;
                        let denoised = (patched(&CORRUPTED, &CLEAN) - m_corrupted) / span;
                        let noised = (m_clean - patched(&CLEAN, &CORRUPTED)) / span;
                        let at = format!("{base} {patching:?} {layer}-{head} at {pos}");
                        let (a, b) =
                            (found.denoising[layer][head][pos], found.noising[layer][head][pos]);
                        assert!((a - denoised).abs() < 1e-9, "{at}: {a} {denoised}");
                        assert!((b - noised).abs() < 1e-9, "{at}: {b} {noised}");
                    }
                }
            }
        }
    }
}

/// Position 0 is the same in both prompts and sees nothing else: in a decoder nothing can be carried there.
#[test]
fn what_is_the_same_in_both_prompts_carries_nothing() {
    let model = language_model("gpt2", Kind::Double);
    let found = patch(&model, &prompts(6), Patching::Positions).unwrap();
    let mut most = 0.0_f64;
    for head in found.denoising.iter().flatten().chain(found.noising.iter().flatten()) {
        assert!(head[0].abs() < 1e-12, "{head:?}"); // rows of a batch round alike, or nearly
        most = most.max(head.iter().fold(0.0, |most, share| most.max(share.abs())));
    }
    assert!(most > 1e-2, "{most}");
}

#[test]
fn prompts_that_cannot_be_compared_are_refused() {
    let model = language_model("gpt2", Kind::Double);
    let said =
        |prompts: &Prompts<'_>| patch(&model, prompts, Patching::Heads).unwrap_err().to_string();
    let short = Prompts { corrupted: &CORRUPTED[..6], ..prompts(3) };
    assert!(said(&short).contains("7 and 6 tokens"));
    assert!(said(&prompts(7)).contains("place 7"));
    assert!(said(&Prompts { right: 13, ..prompts(6) }).contains("one answer"));
    assert!(said(&Prompts { right: 99, ..prompts(6) }).contains("99"));
    assert!(said(&Prompts { corrupted: &CLEAN, ..prompts(6) }).contains("all the same"));
    let other = classifier("gpt2", 2);
    assert!(matches!(patch(&other, &prompts(6), Patching::Heads), Err(Error::Head { .. })));
}
