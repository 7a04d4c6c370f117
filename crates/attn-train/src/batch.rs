//! What a step is computed from, and where it comes from.

use std::ops::Range;

use attn_core::{Model, ModelInput, attention::Stream};
use attn_data::{
    batch::{BatchPlan, Encoded, IGNORED, Masked, Masking, Side, collate, mask_tokens},
    needle::{Haystack, Recipe},
    tokenizer::TextTokenizer,
};
use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{BoxError, Error};

/// Examples that go through the model together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Ids, mask, the class of each row, and which examples they are.
    pub rows: attn_data::batch::Batch,
    /// What each position is to predict, [`IGNORED`] where nothing, `[rows, cols]`: for masked language modelling and for
    /// answers to prompts.
    pub token_labels: Option<Vec<i64>>,
    /// As how many targets each position counts in the loss, `[rows, cols]`; each as one where absent. Only the next
    /// token ([`CausalLm`](crate::CausalLm)) is weighted.
    pub weights: Option<Vec<u32>>,
    /// After how many of its tokens a student goes on with each row by itself, 0 where it is taken as it is; as it is, too,
    /// where absent. For [`Distillation`](crate::Distillation) alone.
    pub prompts: Option<Vec<usize>>,
}

impl From<attn_data::batch::Batch> for Batch {
    fn from(rows: attn_data::batch::Batch) -> Self {
        Self { rows, token_labels: None, weights: None, prompts: None }
    }
}

impl Batch {
    /// A batch with tokens hidden.
    pub fn masked(mut rows: attn_data::batch::Batch, masked: Masked) -> Self {
        rows.ids = masked.ids;
        Self { token_labels: Some(masked.labels), ..rows.into() }
    }

    /// A batch of prompts with their answers, whose tokens stand at `answers[row]` of each row without its padding: the
    /// position before each is to predict it.
    ///
    /// # Panics
    ///
    /// Where an answer reaches beyond its row, or begins at its first token, before which nothing stands.
    pub fn answered(rows: attn_data::batch::Batch, answers: &[Range<usize>]) -> Self {
        let mut labels = vec![IGNORED; rows.ids.len()];
        for (row, answer) in answers.iter().enumerate() {
            let cells = row * rows.cols..(row + 1) * rows.cols;
            let first = cells.clone().find(|&cell| rows.mask[cell] == 1).unwrap_or(cells.start);
            let tokens = first + answer.start..first + answer.end;
            assert!(answer.start > 0 && tokens.end <= cells.end, "{answer:?} of row {row}");
            tokens.for_each(|cell| labels[cell - 1] = rows.ids[cell]);
        }
        Self { token_labels: Some(labels), ..rows.into() }
    }

    /// Ids, mask and segments for `model`, on the CPU; no mask where nothing is padded. Where the model attends to another
    /// sequence, that is the first text of each row, and the ids are the second's.
    pub fn input(&self, model: &Model) -> ModelInput {
        // What is to be predicted where is counted in the whole row.
        let apart = (model.needs_source() && self.token_labels.is_none())
            .then(|| self.rows.apart())
            .flatten();
        match apart {
            Some([source, own]) => input_of(&own, model).attending_to(input_of(&source, model)),
            None => input_of(&self.rows, model),
        }
    }

    /// For each position the id of the next one, [`IGNORED`] where either is padding, `[rows, cols]`: the last column
    /// predicts nothing, and under left padding nor does the position before the first token.
    pub fn next_tokens(&self) -> Vec<i64> {
        let attn_data::batch::Batch { ids, mask, cols, .. } = &self.rows;
        let is_token = |cell: usize| mask[cell] == 1;
        (0..ids.len())
            .map(|cell| {
                let is_last = (cell + 1) % cols == 0;
                if !is_last && is_token(cell) && is_token(cell + 1) {
                    ids[cell + 1]
                } else {
                    IGNORED
                }
            })
            .collect()
    }
}

/// Rows as `model` takes them.
fn input_of(rows: &attn_data::batch::Batch, model: &Model) -> ModelInput {
    let tensor =
        |values: &[i64]| Tensor::from_slice(values).view([rows.rows as i64, rows.cols as i64]);
    let is_padded = rows.mask.contains(&0);
    let segments = rows.segments.as_deref().filter(|_| model.config().has_segments());
    ModelInput {
        attention_mask: is_padded.then(|| tensor(&rows.mask)),
        token_type_ids: segments.map(tensor),
        ..ModelInput::new(tensor(&rows.ids))
    }
}

/// Where batches come from. Both functions depend on their arguments alone, so that a resumed run sees what an
/// unbroken one would.
pub trait Batches: Sync {
    /// The batches of one epoch (from 0), each a list of rows that [`Self::batch`] understands.
    fn plan(&self, epoch: u64) -> Vec<Vec<usize>>;

    /// One batch of the plan. Called on another thread than the one that trains.
    ///
    /// # Errors
    ///
    /// Any; the run ends with it.
    fn batch(&self, epoch: u64, rows: &[usize]) -> Result<Batch, BoxError>;
}

/// Documents with hidden facts, new ones each epoch, beside the examples of [`Examples`].
#[derive(Debug, Clone)]
pub struct Needles {
    /// What they are hidden in.
    pub haystack: Haystack,
    /// What is hidden.
    pub recipe: Recipe,
    /// What makes ids of it.
    pub tokenizer: TextTokenizer,
    /// Documents an epoch.
    pub n: usize,
    /// As how many tokens one of an answer counts in the loss.
    pub answer_weight: u32,
}

/// Rows that a student goes on with by itself, to be corrected on what it writes (GKD, Agarwal et al. 2024,
/// <https://arxiv.org/abs/2306.13649>, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OnPolicy {
    /// The share of the rows, drawn anew each epoch: λ of the paper.
    pub share: f64,
    /// How many tokens of such a row are kept; the student writes as many as the row had beyond. Rows that have no more
    /// tokens than this are taken as they are.
    pub prompt_tokens: usize,
}

impl Default for OnPolicy {
    /// Half of the rows, after a first glance at each.
    fn default() -> Self {
        Self { share: 0.5, prompt_tokens: 16 }
    }
}

impl OnPolicy {
    /// Checks both fields.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] with the one that is out of range.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |field, value, expected| Err(Error::Setting { field, value, expected });
        if !(self.share > 0.0 && self.share <= 1.0) {
            return refuse("share", self.share.to_string(), "a share above 0, at most 1");
        }
        if self.prompt_tokens == 0 {
            return refuse("prompt_tokens", "0".into(), "at least 1: a text begins somewhere");
        }
        Ok(())
    }
}

/// Tokenized examples in memory: bucketed by length, padded on the right, and masked if asked to.
#[derive(Debug, Clone)]
pub struct Examples {
    examples: Vec<Encoded>,
    lengths: Vec<usize>,
    plan: BatchPlan,
    pad_id: u32,
    seed: u64,
    masking: Option<Masking>,
    answers: Option<Vec<Range<usize>>>,
    needles: Option<Needles>,
    on_policy: Option<OnPolicy>,
}

impl Examples {
    /// Batches of `examples` by `plan` (see [`TrainConfig::plan`](crate::TrainConfig::plan)), shuffled by `seed` and
    /// the epoch. `pad_id` fills short rows; where the tokenizer has no padding token any id will do, as it is masked.
    pub fn new(examples: Vec<Encoded>, plan: BatchPlan, pad_id: u32, seed: u64) -> Self {
        let lengths = examples.iter().map(|example| example.ids.len()).collect();
        Self {
            examples,
            lengths,
            plan,
            pad_id,
            seed,
            masking: None,
            answers: None,
            needles: None,
            on_policy: None,
        }
    }

    /// Lets the student go on with some of the rows. Without [`Self::with_masking`], [`Self::with_answers`] and
    /// [`Self::with_needles`].
    pub fn with_on_policy(self, on_policy: OnPolicy) -> Self {
        Self { on_policy: Some(on_policy), ..self }
    }

    /// After how many tokens the student goes on with each row of a batch. Depends on seed, epoch and row alone.
    fn prompts(&self, on_policy: OnPolicy, epoch: u64, rows: &[usize]) -> Vec<usize> {
        let OnPolicy { share, prompt_tokens } = on_policy;
        let of_row = |&row: &usize| {
            // Another sequence than those of attention kinds, which have the same seed.
            let stream = Stream { seed: self.seed ^ 0x676b_6421, step: epoch, layer: row as u64 };
            let is_chosen = stream.rng().random::<f64>() < share;
            if is_chosen && self.lengths[row] > prompt_tokens { prompt_tokens } else { 0 }
        };
        rows.iter().map(of_row).collect()
    }

    /// Hides tokens, other ones each epoch.
    pub fn with_masking(self, masking: Masking) -> Self {
        Self { masking: Some(masking), ..self }
    }

    /// Says which tokens of each example are its answer, to train on these alone.
    ///
    /// # Panics
    ///
    /// Unless there is one an example; and, when a batch is made, as [`Batch::answered`].
    pub fn with_answers(self, answers: Vec<Range<usize>>) -> Self {
        assert_eq!(answers.len(), self.examples.len(), "one answer an example");
        Self { answers: Some(answers), ..self }
    }

    /// Puts generated documents among the examples, for [`CausalLm`](crate::CausalLm).
    ///
    /// # Panics
    ///
    /// Beside [`Self::with_masking`] or [`Self::with_answers`].
    pub fn with_needles(mut self, needles: Needles) -> Self {
        assert!(
            self.masking.is_none() && self.answers.is_none(),
            "documents are for the next token"
        );
        self.lengths.extend(std::iter::repeat_n(needles.recipe.max_len, needles.n));
        Self { needles: Some(needles), ..self }
    }

    /// Examples and documents, and as how many tokens each of theirs counts.
    fn with_documents(
        &self,
        needles: &Needles,
        epoch: u64,
        rows: &[usize],
    ) -> Result<Batch, BoxError> {
        let Needles { haystack, recipe, tokenizer, n, answer_weight } = needles;
        let mut chosen = Vec::with_capacity(rows.len());
        let mut answers = Vec::with_capacity(rows.len());
        for &row in rows {
            let Some(document) = row.checked_sub(self.examples.len()) else {
                chosen.push(self.examples[row].clone());
                answers.push(Vec::new());
                continue;
            };
            let index = epoch * *n as u64 + document as u64;
            let document = haystack.document(recipe, tokenizer, self.seed, index)?;
            chosen.push(Encoded { ids: document.ids, label: None, index: row, second_from: None });
            answers.push(document.answers);
        }
        let collated = collate(&chosen.iter().collect::<Vec<_>>(), self.pad_id, Side::Right);
        let mut weights = vec![1; collated.ids.len()];
        for (row, answers) in answers.iter().enumerate() {
            for token in answers.iter().flat_map(|answer| answer.tokens.clone()) {
                weights[row * collated.cols + token - 1] = *answer_weight;
            }
        }
        Ok(Batch { weights: Some(weights), ..collated.into() })
    }

    /// The examples.
    pub fn examples(&self) -> &[Encoded] {
        &self.examples
    }
}

impl Batches for Examples {
    fn plan(&self, epoch: u64) -> Vec<Vec<usize>> {
        self.plan.bucketed(&self.lengths, self.seed, epoch)
    }

    fn batch(&self, epoch: u64, rows: &[usize]) -> Result<Batch, BoxError> {
        if let Some(needles) = &self.needles {
            return self.with_documents(needles, epoch, rows);
        }
        let chosen: Vec<&Encoded> = rows.iter().map(|&row| &self.examples[row]).collect();
        let collated = collate(&chosen, self.pad_id, Side::Right);
        if let Some(answers) = &self.answers {
            let answers: Vec<Range<usize>> = rows.iter().map(|&row| answers[row].clone()).collect();
            return Ok(Batch::answered(collated, &answers));
        }
        match &self.masking {
            None => {
                let prompts = self.on_policy.map(|policy| self.prompts(policy, epoch, rows));
                Ok(Batch { prompts, ..collated.into() })
            }
            Some(masking) => {
                let masked = mask_tokens(&collated, masking, self.seed, epoch)?;
                Ok(Batch::masked(collated, masked))
            }
        }
    }
}

/// A hash of the order of the examples and of the first batch: 64-bit FNV-1a over their numbers.
pub(crate) fn fingerprint(plan: &[Vec<usize>], first: &Batch) -> String {
    let order =
        plan.iter().flat_map(|batch| [batch.len()].into_iter().chain(batch.iter().copied()));
    let labels = first.rows.labels.iter().chain(first.token_labels.iter().flatten());
    let content = first.rows.ids.iter().chain(labels).map(|&n| n as u64);
    let weights = first.weights.iter().flatten().map(|&n| n.into());
    let prompts = first.prompts.iter().flatten().map(|&n| n as u64);
    let numbers = order.map(|n| n as u64).chain(content).chain(weights).chain(prompts);
    let hash = numbers.flat_map(u64::to_le_bytes).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use attn_core::{Config, LoadOptions};
    use serde_json::{Value, json};

    use super::*;

    fn encoded(ids: &[u32], index: usize) -> Encoded {
        Encoded { ids: ids.to_vec(), label: None, index, second_from: None }
    }

    #[test]
    fn a_position_predicts_the_next_token_and_never_padding() {
        let (a, b) = (encoded(&[5, 6, 7], 0), encoded(&[8, 9], 1));
        let on = |side| Batch::from(collate(&[&a, &b], 3, side)).next_tokens();

        assert_eq!(on(Side::Right), [6, 7, IGNORED, 9, IGNORED, IGNORED]);
        assert_eq!(on(Side::Left), [6, 7, IGNORED, IGNORED, 9, IGNORED]);
    }

    #[test]
    fn the_position_before_each_token_of_an_answer_predicts_it() {
        let (a, b) = (encoded(&[5, 6, 7, 8], 0), encoded(&[9, 4], 1));
        let on = |side| Batch::answered(collate(&[&a, &b], 3, side), &[2..4, 1..2]).token_labels;

        let none = IGNORED;
        assert_eq!(on(Side::Right).unwrap(), [none, 7, 8, none, 4, none, none, none]);
        assert_eq!(on(Side::Left).unwrap(), [none, 7, 8, none, none, none, 4, none]);
    }

    #[test]
    #[should_panic(expected = "0..1 of row 1")]
    fn an_answer_to_nothing_is_a_mistake_of_the_caller() {
        let rows = [encoded(&[5, 6], 0), encoded(&[5], 1)];
        Batch::answered(collate(&[&rows[0], &rows[1]], 0, Side::Right), &[1..2, 0..1]);
    }

    #[test]
    fn masks_and_segments_are_sent_only_where_there_are_any() {
        let gpt2 = json!({
            "model_type": "gpt2", "vocab_size": 9, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 8,
        });
        let bert = json!({
            "model_type": "bert", "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 8,
        });
        let [gpt2, bert] = [gpt2, bert].map(|config| {
            let Value::Object(config) = config else { unreachable!("an object") };
            Model::init(Config::from_json(config).unwrap(), &LoadOptions::default()).unwrap()
        });
        let even = Batch::from(collate(&[&encoded(&[1, 2], 0)], 0, Side::Right)).input(&gpt2);
        assert!(even.attention_mask.is_none());

        let rows = [encoded(&[1, 2], 0), encoded(&[3], 1)];
        let uneven = Batch::from(collate(&[&rows[0], &rows[1]], 0, Side::Right)).input(&bert);
        assert_eq!(
            Vec::<i64>::try_from(uneven.attention_mask.unwrap().view([-1])).unwrap(),
            [1, 1, 1, 0]
        );
        assert_eq!(uneven.input_ids.size(), [2, 2]);
        assert!(uneven.token_type_ids.is_none(), "no row is a pair");

        let pair = Encoded { second_from: Some(1), ..encoded(&[1, 2], 0) };
        let batch = Batch::from(collate(&[&pair, &rows[1]], 0, Side::Right));
        let types = batch.input(&bert).token_type_ids.unwrap();
        assert_eq!(Vec::<i64>::try_from(types.view([-1])).unwrap(), [0, 1, 0, 0]);
        assert!(batch.input(&gpt2).token_type_ids.is_none(), "a GPT-2 has no segments");
    }

    #[test]
    fn batches_repeat_by_epoch_and_seed() {
        let examples: Vec<Encoded> = (0..40).map(|i| encoded(&vec![7; 3 + i % 5], i)).collect();
        let masking = Masking { mask_id: 4, vocab_size: 50, special: vec![4], rate: 0.5 };
        let data = Examples::new(examples, BatchPlan::new(8).unwrap(), 0, 3).with_masking(masking);

        let (first, second) = (data.plan(0), data.plan(1));

        assert_ne!(first, second);
        assert_eq!(first, data.plan(0));
        let rows = &first[2];
        assert_eq!(data.batch(0, rows).unwrap(), data.batch(0, rows).unwrap());
        assert_ne!(data.batch(0, rows).unwrap(), data.batch(1, rows).unwrap());
    }
}
