//! The laws of whole models, over every architecture and kind, and proof that each can be broken.

mod common;
#[path = "common/small.rs"]
mod small;

use std::{
    path::Path,
    sync::{
        Once,
        atomic::{AtomicI64, Ordering},
    },
};

use attn_core::{
    Error, ForwardOptions, LoadOptions, Merge, Model, ModelInput, Variant, WantedHead,
    attention::{Attention, AttnInput, Dims, Nature, Own, Projections},
    external::{self, Settings},
    laws::{self, Verdict},
    mask::Mask,
    merge_kv,
    nn::Visitor,
    testing::random_ids,
};
use serde_json::{Value, json};
use small::{BASES, ending_in, model, shake};
use tch::{Kind, Tensor};

/// Softmax attention with one thing wrong.
#[derive(Debug)]
struct Faulty {
    fault: String,
    softmax: Box<dyn Attention>,
    dims: Dims,
}

/// What a kind that forgets its settings takes in their place.
static LOADED: AtomicI64 = AtomicI64::new(0);

impl Attention for Faulty {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let run = |input: &AttnInput| self.softmax.forward(input);
        match &self.fault[..] {
            "sees_everything" => run(&AttnInput { mask: &Mask::new(false), ..*input }),
            // Sees what is hidden, and nothing else; where nothing is hidden, all alike.
            "reverses_the_mask" => {
                let [q_len, k_len] = [input.q, input.k].map(|x| x.size()[2]);
                let hidden = input.mask.allowed(q_len, k_len, input.q.device()).logical_not();
                let bias = attn_core::mask::to_bias(&hidden, input.q.kind());
                let [k, v] = [input.k, input.v].map(|x| self.dims.expand_kv(x));
                let scores = input.q.matmul(&k.transpose(-2, -1)) * self.dims.scale + bias;
                scores.softmax(-1, input.q.kind()).matmul(&v)
            }
            "looks_at_coordinates" => run(&AttnInput { q: &input.q.tanh(), ..*input }),
            "bends_values" => run(input).tanh(),
            "keeps_no_slope" => run(&AttnInput { k: &input.k.detach(), ..*input }),
            // Heads by the numbers that they once had.
            "counts_old_heads" => {
                let n_heads = input.q.size()[1];
                let by = Tensor::arange(n_heads, (input.q.kind(), input.q.device())) + 1.0;
                run(input) * by.view([1, n_heads, 1, 1])
            }
            "is_never_the_same" => run(input) * LOADED.fetch_add(1, Ordering::Relaxed),
            "tells_key_heads_apart" => {
                let by = Tensor::from_slice(&self.dims.kv_of_head).to_kind(input.q.kind()) + 1.0;
                run(input) * by.view([1, -1, 1, 1])
            }
            fault => unreachable!("{fault}"),
        }
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.softmax.weights(input, rows)
    }

    fn flops(&self, n_tokens: i64) -> i64 {
        self.softmax.flops(n_tokens)
    }

    fn nature(&self) -> Nature {
        self.softmax.nature()
    }

    fn visit(&self, _: &mut Visitor<'_>) {}

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone();
        self.softmax.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone();
        self.softmax.regroup_kv(groups, dims)
    }
}

fn build(
    settings: &Settings,
    dims: &Dims,
    projections: &Projections,
    own: &mut Own<'_, '_>,
) -> Result<Box<dyn Attention>, Error> {
    let fault = settings.get("fault").and_then(Value::as_str).unwrap_or_default().to_owned();
    let softmax = Variant::default().build(dims, projections, own)?;
    Ok(Box::new(Faulty { fault, softmax, dims: dims.clone() }))
}

/// `base` with a fault in its second layer.
fn faulty(base: &str, fault: &str) -> Model {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let defaults = || Settings::from_iter([("fault".to_owned(), json!(""))]);
        external::register(external::Kind { name: "faulty", defaults, build }).unwrap();
    });
    let mut model = model(base);
    let variant = serde_json::from_value(json!({"kind": "faulty", "fault": fault})).unwrap();
    model.swap(&[1], &variant, 0).unwrap();
    model
}

/// All of them.
const LAWS: [&str; 18] = [
    "every_parameter_is_finite",
    "every_layer_has_an_attention_of_its_own",
    "tied_weights_are_one",
    "no_layer_sees_the_future",
    "padding_changes_nothing",
    "a_batch_equals_its_rows",
    "open_gates_change_no_bit",
    "a_removed_head_is_a_masked_one",
    "the_output_columns_of_a_head_are_its_own",
    "turned_values_change_nothing",
    "turned_queries_and_keys_change_nothing",
    "repeated_key_value_heads_change_nothing",
    "heads_that_are_alike_merge_into_one",
    "what_is_saved_is_loaded_again",
    "gradients_are_those_of_finite_differences",
    "a_causal_model_ignores_the_future",
    "steps_equal_a_full_pass",
    "a_beginning_and_steps_equal_a_full_pass",
];

const HEADS: [(usize, i64); 2] = [(0, 3), (1, 1)];

fn mean(model: &mut Model, wanted: &[(usize, i64)]) -> Result<(), Error> {
    merge_kv(model, wanted, Merge::Mean, None).map(drop)
}

/// A loss that every output has a part in.
fn loss(model: &Model, ids: &Tensor) -> Result<Tensor, Error> {
    let input = laws::with_source(model, ModelInput::new(ids.shallow_clone()));
    let logits = model.forward(&input, &ForwardOptions::default())?.logits;
    Ok(logits.logsumexp([-1i64].as_slice(), false).mean(Kind::Double))
}

/// All laws of a model in `f64` that say something of it.
fn verdicts(model: &Model, ids: &Tensor, dir: &Path) -> Vec<Verdict> {
    let found: Vec<Result<Verdict, Error>> = tch::no_grad(|| {
        let closed = laws::closed_heads(model, ids, &HEADS).unwrap();
        let again = laws::saved(model, dir).unwrap();
        vec![
            Ok(laws::finite_parameters(model)),
            Ok(laws::layers_of_their_own(model)),
            laws::layer_causality(model, ids),
            laws::model_padding(model, ids),
            laws::model_batch(model, ids),
            laws::open_gates(model, ids),
            laws::removed_heads(model, ids, &HEADS, &closed),
            laws::head_slices(model, ids, &HEADS, &closed),
            laws::turned_values(model, ids, &[0, 1]),
            laws::turned_queries_and_keys(model, ids, &[0, 1]),
            laws::repeated_kv_heads(model, ids, &[0, 1]),
            laws::merged_twins(model, ids, &[0, 1], &mean),
            laws::saved_and_loaded(model, &again, ids),
            laws::tied_weights(&[("in memory", model), ("as loaded", &again)]),
            laws::model_gradients(model, ids, 12, |model| loss(model, ids)),
        ]
    });
    let is_causal = model.config().is_causal();
    let causal = tch::no_grad(|| {
        [laws::model_causality, laws::model_decoding, laws::model_prefill]
            .map(|law| is_causal.then(|| law(model, ids)))
    });
    found
        .into_iter()
        .chain(causal.into_iter().flatten())
        .filter_map(|found| match found {
            Err(Error::Refused { .. }) => None,
            found => Some(found.unwrap()),
        })
        .collect()
}

#[test]
fn models_keep_every_law_plain_and_swapped() {
    let dir = tempfile::tempdir().unwrap();
    let mut tried = std::collections::BTreeMap::<&str, usize>::new();
    for base in BASES {
        for (i, variant) in attn_core::testing::kinds().iter().enumerate() {
            let mut model = model(base);
            if model.swap(&[1], variant, 1).is_err() {
                continue;
            }
            shake(&mut model);
            let before: Vec<Tensor> = model.parameters().iter().map(|it| it.1.copy()).collect();
            let ids = random_ids(5, [3, 17], 50);
            for verdict in verdicts(&model, &ids, &dir.path().join(format!("{base}-{i}"))) {
                assert!(verdict.held(), "{base} with {variant:?}: {verdict}");
                *tried.entry(verdict.law).or_default() += 1;
            }
            // Whoever tries a law keeps the model.
            for ((name, now), before) in model.parameters().iter().zip(&before) {
                assert!(now.equal(before) && !now.requires_grad(), "{base}: {name}");
            }
        }
    }
    assert_eq!(tried.len(), LAWS.len(), "{tried:?}");
    assert!(tried.keys().all(|law| LAWS.contains(law)), "{tried:?}");
    assert!(tried.values().all(|&n| n >= 10), "{tried:?}");
}

#[test]
fn every_law_has_a_fault_that_breaks_it() {
    let dir = tempfile::tempdir().unwrap();
    let broken = |model: &Model| -> Vec<&'static str> {
        let ids = random_ids(5, [3, 17], 50);
        let place = tempfile::tempdir_in(dir.path()).unwrap();
        let all = verdicts(model, &ids, &place.path().join("saved"));
        all.iter().filter(|it| !it.held()).map(|it| it.law).collect()
    };
    for (base, fault, law) in [
        ("gpt2", "sees_everything", "no_layer_sees_the_future"),
        ("gpt2", "sees_everything", "a_causal_model_ignores_the_future"),
        ("gpt2", "sees_everything", "steps_equal_a_full_pass"),
        ("gpt2", "sees_everything", "a_beginning_and_steps_equal_a_full_pass"),
        ("distilbert", "sees_everything", "a_batch_equals_its_rows"),
        ("bert", "sees_everything", "padding_changes_nothing"),
        ("llama", "is_never_the_same", "open_gates_change_no_bit"),
        ("distilbert", "reverses_the_mask", "padding_changes_nothing"),
        ("bert", "reverses_the_mask", "a_batch_equals_its_rows"),
        ("gpt2", "reverses_the_mask", "no_layer_sees_the_future"),
        ("bert", "bends_values", "turned_values_change_nothing"),
        ("gpt2", "looks_at_coordinates", "turned_queries_and_keys_change_nothing"),
        ("llama", "looks_at_coordinates", "turned_queries_and_keys_change_nothing"),
        ("gpt2", "keeps_no_slope", "gradients_are_those_of_finite_differences"),
        ("llama", "counts_old_heads", "a_removed_head_is_a_masked_one"),
        ("llama", "tells_key_heads_apart", "repeated_key_value_heads_change_nothing"),
    ] {
        assert!(broken(&faulty(base, fault)).contains(&law), "{base}, {fault}");
    }
    assert!(
        broken(&faulty("gpt2", "is_never_the_same")).contains(&"what_is_saved_is_loaded_again")
    );

    let spoiled = model("gpt2");
    let (name, tensor) = &spoiled.parameters()[5];
    let _ = tch::no_grad(|| tensor.view([-1]).get(2).fill_(f64::NAN));
    let verdict = laws::finite_parameters(&spoiled);
    assert!(!verdict.held() && verdict.place.contains(name), "{verdict}");

    let one = model("llama");
    let queries = |layer: usize| one.layers()[layer].projections().q.0;
    tch::no_grad(|| queries(1).copy_(&queries(0)));
    let verdict = laws::layers_of_their_own(&one);
    assert_eq!((verdict.held(), &verdict.place[..]), (false, "layers 0 and 1 are one"));
}

/// The last hidden states with `change` made to the parameter of the first layer whose name holds `part`, laid out `[out, in]`.
fn with_changed(base: &str, part: &str, ids: &Tensor, change: impl Fn(&Tensor)) -> Tensor {
    let model = model(base);
    let (_, tensor) = model.parameters().into_iter().find(|it| it.0.contains(part)).unwrap();
    let is_in_out = base == "gpt2" && tensor.dim() == 2;
    tch::no_grad(|| change(&if is_in_out { tensor.tr() } else { tensor }));
    let options = ForwardOptions { hidden_states: true, ..ForwardOptions::default() };
    let input = ModelInput::new(ids.shallow_clone());
    model.forward(&input, &options).unwrap().hidden_states.pop().unwrap()
}

/// How notebooks left heads out, each in its own wrong way.
#[test]
fn a_head_that_is_left_out_wrongly_is_named() {
    let ids = random_ids(5, [3, 17], 50);
    let (d, head) = (6, 2); // 24 channels by 4 heads
    let model = model("gpt2");
    let broken = |left_out: Tensor| -> Vec<&'static str> {
        let (heads, left_out) = ([(0, head)], [left_out]);
        let all = tch::no_grad(|| {
            [laws::removed_heads, laws::head_slices]
                .map(|law| law(&model, &ids, &heads, &left_out).unwrap())
        });
        all.iter().filter(|it| !it.held()).map(|it| it.law).collect()
    };
    let zero = |x: Tensor| drop(x.shallow_clone().zero_());
    let both = ["a_removed_head_is_a_masked_one", "the_output_columns_of_a_head_are_its_own"];

    let right = with_changed("gpt2", "h.0.attn.c_proj.weight", &ids, |out| {
        zero(out.narrow(1, head * d, d));
    });
    assert!(broken(right).is_empty());
    // Rows of the output projection in place of its columns: what comes out behind it, cut into as many slices as there are heads.
    let behind = with_changed("gpt2", "h.0.attn.c_proj.weight", &ids, |out| {
        zero(out.narrow(0, head * d, d));
    });
    assert_eq!(broken(behind), both, "slices after the output projection");
    // The values' matrix read as if it were laid out the other way.
    let rows = with_changed("gpt2", "h.0.attn.c_attn.weight", &ids, |qkv| {
        zero(qkv.narrow(0, 48, 24).narrow(1, head * d, d));
    });
    assert_eq!(broken(rows), both, "rows instead of heads");
    // Queries of zeros: the head then looks everywhere alike.
    let uniform = with_changed("gpt2", "h.0.attn.c_attn.weight", &ids, |qkv| {
        zero(qkv.narrow(0, head * d, d));
    });
    assert_eq!(broken(uniform), both, "uniform attention in place of none");
    let beside = tch::no_grad(|| laws::closed_heads(&model, &ids, &[(0, head + 1)])).unwrap();
    assert_eq!(broken(beside.into_iter().next().unwrap()), both, "the gate of the head beside");
}

/// Every second row of a projection, where every second head was meant.
#[test]
fn rows_taken_for_heads_are_named_where_heads_are_merged() {
    let ids = random_ids(5, [3, 17], 50);
    let every_second_row = |model: &mut Model, wanted: &[(usize, i64)]| -> Result<(), Error> {
        for &(layer, n) in wanted {
            let of = model.layers()[layer];
            let second = |(weight, bias): (Tensor, Option<Tensor>)| {
                (weight.slice(0, 0, None, 2), bias.map(|bias| bias.slice(0, 0, None, 2)))
            };
            let Projections { q, k, v } = of.projections();
            let new = Projections { q, k: second(k), v: second(v) };
            let groups: Vec<Vec<i64>> = (0..n).map(|g| vec![2 * g, 2 * g + 1]).collect();
            let out = of.out().out_in();
            model.regroup_kv(layer, &groups, new, &out)?;
        }
        Ok(())
    };
    for base in ["gpt2", "llama"] {
        let model = model(base);
        let found = tch::no_grad(|| {
            let merged = |merge| laws::merged_twins(&model, &ids, &[0, 1], merge).unwrap();
            [merged(&mean), merged(&every_second_row)]
        });
        assert!(found[0].held() && !found[1].held(), "{base}: {found:?}");
    }
}

#[test]
fn two_models_part_in_the_block_that_differs() {
    let ids = random_ids(5, [2, 9], 50);
    let (model, other) = (model("gpt2"), model("gpt2"));
    let apart = || tch::no_grad(|| laws::apart_by_layer(&model, &other, &ids)).unwrap();
    assert_eq!(apart(), [0.0; 3]);
    let out = model.layers()[1].out().out_in();
    tch::no_grad(|| out.shallow_clone().copy_(&out.roll([6], [1])));
    let found = apart();
    assert!(found[..2] == [0.0, 0.0] && found[2] > 1e-3, "{found:?}");
}

#[test]
fn a_model_in_f32_is_what_it_is_in_f64_and_no_other() {
    let ids = random_ids(5, [2, 17], 50);
    for base in BASES {
        let wide = model(base);
        let mut narrow = model(base);
        narrow.to_kind(Kind::Float);
        let verdict = tch::no_grad(|| laws::model_precision(&narrow, &wide, &ids)).unwrap();
        assert!(verdict.held() && verdict.error > 0.0, "{base}: {verdict}");
        let (_, tensor) = &wide.parameters()[3];
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor * 1.01)));
        let verdict = tch::no_grad(|| laws::model_precision(&narrow, &wide, &ids)).unwrap();
        assert!(!verdict.held(), "{base}: {verdict}");
        let refused = laws::model_gradients(&narrow, &ids, 1, |model| loss(model, &ids));
        assert!(matches!(refused, Err(Error::Refused { .. })));
    }
}

/// The bundled model was trained on WikiText; ids that it has seen follow each other in its merges.
#[test]
fn a_trained_model_predicts_the_next_token_and_a_copying_one_does_not() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models/wikitext-gpt2");
    let (trained, _) = Model::load(&folder, &LoadOptions::default()).unwrap();
    // What it writes itself is text to it.
    let prompt = Tensor::from_slice(&[11i64, 205, 340, 12]).view([1, 4]);
    let ids = tch::no_grad(|| {
        (0..24).fold(prompt, |ids, _| {
            let input = attn_core::ModelInput::new(ids.shallow_clone());
            let logits = small::logits(&trained, &input);
            let next = logits.select(1, ids.size()[1] - 1).argmax(-1, true);
            Tensor::cat(&[ids, next], 1)
        })
    });
    let verdict = tch::no_grad(|| laws::next_token(&trained, &ids)).unwrap();
    assert!(verdict.held() && verdict.error < -1.0, "{verdict}");

    let chance = tch::no_grad(|| laws::better_than_chance(&trained, &ids, None)).unwrap();
    assert!(chance.held() && chance.error < -1.0, "{chance}");

    // Attention that adds nothing, and an output matrix that is the embedding: the likeliest token is the one read.
    let copying = ending_in(WantedHead::LanguageModel, "gpt2");
    for (name, tensor) in copying.parameters() {
        if name.contains("c_proj") || name.contains("wpe") {
            let _ = tch::no_grad(|| tensor.shallow_clone().zero_());
        }
    }
    let ids = random_ids(5, [2, 17], 50);
    let verdict = tch::no_grad(|| laws::next_token(&copying, &ids)).unwrap();
    assert!(!verdict.held(), "{verdict}");
    let chance = tch::no_grad(|| laws::better_than_chance(&copying, &ids, None)).unwrap();
    assert!(!chance.held(), "{chance}");
    let short = ids.narrow(1, 0, 2);
    assert!(matches!(laws::next_token(&copying, &short), Err(Error::Input { .. })));
}
