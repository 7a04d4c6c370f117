//! The tables of a config. `configs/README.md` is the user's reference; a test holds it to the fields here.

use std::{
    num::{NonZeroU16, NonZeroUsize},
    path::PathBuf,
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{Lora, Variant};
use attn_data::{
    dataset::DatasetSpec,
    needle::{NeedleKind, Recipe},
    prompt::PromptSpec,
    select::Part,
    tokenizer::Style,
};
use attn_train::{Losses, OnPolicy, TrainConfig};
use serde::{Deserialize, Serialize};
use toml::Table;

/// The share of the train split that chooses the model where the config says nothing.
const DEFAULT_HOLD_OUT: Part = Part::Fraction(0.1);

/// Tokens of a vocabulary to train where the config says nothing.
const DEFAULT_VOCAB_SIZE: usize = 8000;

/// A fine-tuning run: what `attn finetune` reads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Finetune {
    /// Names the run's folder, `runs/<date>-<name>`; the config's file name where absent.
    pub(crate) name: String,
    /// The pretrained model: a folder, or a Hub id such as `distilbert/distilbert-base-uncased`.
    pub(crate) model: String,
    /// Branch, tag or commit of a model from the Hub; `main` where absent.
    pub(crate) revision: Option<String>,
    /// `saved`: those of the folder. `random`: made from its config.json alone, by the seed, to compare with.
    pub(crate) weights: WeightsChoice,
    /// `new`: a new, random classifier in place of the model's head. `saved`: the classifier that the model ends in,
    /// to train it further.
    pub(crate) head: HeadChoice,
    /// Where the labelled rows are; the fields of a data set.
    pub(crate) data: DatasetSpec,
    /// Puts each row as a prompt, and keeps the language model's head to answer it, in place of a classifier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt: Option<PromptSpec>,
    /// Which rows are used, and how much of them.
    pub(crate) examples: Examples,
    /// Where the attention is changed.
    pub(crate) surgery: Surgery,
    /// What it is changed to, `kind` and the settings of that kind (`attn list` shows them); unchanged where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attention: Option<Variant>,
    /// Trains low-rank adapters beside the matrices, and the classifier, in place of everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lora: Option<LoraChoice>,
    /// Processor threads that one operation may use; LibTorch's choice, usually one a core, where absent. A small model
    /// is faster on one, above all where the machine has other work. Runs repeat bit for bit on as many threads alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) threads: Option<NonZeroU16>,
    /// How to train. `seed` is the run's one seed: it also draws the new head, the few shots and the rows held out.
    pub(crate) train: TrainConfig,
}

/// Which weights to begin with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WeightsChoice {
    #[default]
    Saved,
    Random,
}

/// Which classifier to train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HeadChoice {
    #[default]
    New,
    Saved,
}

/// Which rows are used, and how much of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Examples {
    /// Most tokens of a text, special tokens included; longer ones are cut, and counted. Where absent: what model and
    /// tokenizer allow, at most 512.
    pub(crate) max_len: Option<usize>,
    /// Most rows read of the train split, the first ones; all where absent.
    pub(crate) limit: Option<usize>,
    /// Most rows reported on, the first ones; all where absent.
    pub(crate) report_limit: Option<usize>,
    /// Examples per class, drawn from the train split by the seed. There is then no data to choose a model by: the
    /// last one is taken.
    pub(crate) few_shot: Option<usize>,
    /// The part of the train split that is not trained on but chooses the model: a count, or a share such as 0.1.
    /// 0 for none: the last model is taken. Where absent, 0.1, and 0 for few shots.
    pub(crate) hold_out: Option<Part>,
    /// The part of the train split to report on, for data without a validation split.
    pub(crate) report_hold_out: Option<Part>,
    /// What is held out. `row`: any row. `containment`: rows that are part of no other row, for data such as SST-2,
    /// whose rows are phrases of each other; parts are then counted in such sentences, and what remains of theirs in
    /// the train split, phrases of three words and more, is left out.
    pub(crate) hold_out_by: HoldOutBy,
}

/// What is held out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HoldOutBy {
    #[default]
    Row,
    Containment,
}

/// Low-rank adapters: the fields of [`attn_core::Lora`], and what is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LoraChoice {
    pub(crate) rank: NonZeroUsize,
    pub(crate) alpha: f64,
    pub(crate) dropout: f64,
    pub(crate) targets: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) qkv_ranks: Option<[usize; 3]>,
    pub(crate) save: SaveAs,
}

/// What a run with adapters leaves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SaveAs {
    /// An ordinary model, the adapters added to their matrices.
    #[default]
    Merged,
    /// The adapters alone, in PEFT's format.
    Adapter,
}

impl Default for LoraChoice {
    fn default() -> Self {
        let Lora { rank, alpha, dropout, targets, qkv_ranks } = Lora::default();
        Self { rank, alpha, dropout, targets, qkv_ranks, save: SaveAs::default() }
    }
}

impl LoraChoice {
    pub(crate) fn lora(&self) -> Lora {
        let Self { rank, alpha, dropout, targets, qkv_ranks, .. } = self.clone();
        Lora { rank, alpha, dropout, targets, qkv_ranks }
    }
}

/// Where the attention is changed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Surgery {
    /// The layers that get the attention of `[attention]`, counted from 0; all where absent.
    pub(crate) layers: Option<Vec<usize>>,
}

impl Finetune {
    /// What rows held out are scored by.
    const METRICS: [&str; 2] = ["accuracy", "loss"];

    /// Checks what needs neither the model nor the data, and fills in what follows from the rest.
    pub(crate) fn complete(mut self, name: &str) -> Result<Self> {
        set_name(&mut self.name, name)?;
        ensure!(
            !self.model.is_empty(),
            "`model` is not set\nhint: give a model folder or a Hub id: model = \"distilbert/distilbert-base-uncased\""
        );
        if let Some(prompt) = &self.prompt {
            prompt.resolved()?;
            self.head = HeadChoice::Saved;
        }
        ensure!(
            self.weights == WeightsChoice::Saved
                || self.head == HeadChoice::New
                || self.prompt.is_some(),
            "`weights` is `random` and `head` is `saved`: a head of random weights is a new one"
        );
        self.train.validate()?;
        check_select(self.train.select.as_deref(), &Self::METRICS)?;
        self.data = self.data.resolved();
        ensure!(
            self.data.label.is_some(),
            "`data.label` is not set\nhint: name the column of the classes: --set data.label=COLUMN"
        );
        self.surgery.check(self.attention.as_ref())?;
        ensure!(
            !matches!(self.attention, Some(Variant::Cross(_))) || self.data.text_pair.is_some(),
            "`attention.kind` is `cross`, whose layers attend to the first of two texts, and `data.text_pair` is not \
             set\nhint: name the column of the second text: --set data.text_pair=COLUMN"
        );
        if let Some(lora) = &self.lora {
            lora.lora().validate()?;
            ensure!(
                lora.save == SaveAs::Merged || self.attention.is_none(),
                "`lora.save` is `adapter`, and `[attention]` changes the model beside it: whoever loads the adapter \
                 would put it beside the old attention\nhint: set `lora.save` to `merged`"
            );
            ensure!(
                lora.save == SaveAs::Merged || self.weights == WeightsChoice::Saved,
                "`lora.save` is `adapter`, and `weights` is `random`: there is no base model to load it beside\nhint: \
                 set `lora.save` to `merged`"
            );
        }
        let few = self.examples.few_shot.is_some();
        let hold_out =
            self.examples.hold_out.unwrap_or(if few { Part::Count(0) } else { DEFAULT_HOLD_OUT });
        let holds_out = !is_nothing(hold_out);
        let by_containment = self.examples.hold_out_by == HoldOutBy::Containment;
        if few && holds_out {
            let by = if by_containment { " --set examples.hold_out_by=" } else { "" };
            bail!(
                "`examples.few_shot` and `examples.hold_out` are both set, and rows held out would be more than the few \
                 shots\nhint: leave them away and take the last model: --set examples.hold_out={by} --set \
                 train.max_steps=100"
            );
        }
        if by_containment {
            ensure!(
                holds_out || self.examples.report_hold_out.is_some(),
                "`examples.hold_out_by` is `containment`, and nothing is held out\nhint: set `examples.hold_out`, or \
                 leave both away: --set examples.hold_out_by="
            );
            ensure!(
                self.data.text_pair.is_none(),
                "`examples.hold_out_by` is `containment`, which is for rows of one text, and `data.text_pair` is \
                 set\nhint: --set examples.hold_out_by=row"
            );
        }
        match (&self.train.select, holds_out) {
            (None, true) => self.train.select = Some("accuracy".into()),
            (Some(metric), false) => bail!(
                "`train.select` is `{metric}`, and no rows are held out to choose by\nhint: set `examples.hold_out`, \
                 or take the last model: --set train.select="
            ),
            _ => {}
        }
        self.examples.hold_out = Some(hold_out);
        Ok(self)
    }
}

/// A pre-training run: what `attn pretrain` reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Pretrain {
    /// Names the run's folder, `runs/<date>-<name>`; the config's file name where absent.
    pub(crate) name: String,
    /// What is predicted: `causal` (the next token, for decoders) or `masked` (hidden tokens, for encoders).
    pub(crate) objective: ObjectiveChoice,
    /// The share of the tokens that `masked` hides.
    pub(crate) mask_rate: f64,
    /// The model to make: the fields of its `config.json`. `vocab_size` and the ids of special tokens are the
    /// tokenizer's and need not be given.
    #[serde(skip_serializing_if = "Table::is_empty")]
    pub(crate) init: Table,
    /// A language model to go on from, in place of `init` and `tokenizer`: a folder or a Hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// The tokenizer: trained on the text, or taken from elsewhere.
    pub(crate) tokenizer: TokenizerChoice,
    /// Where the text is; the fields of a data set.
    pub(crate) data: DatasetSpec,
    /// Which rows are used, and how much of them. For `causal`, `max_len` is the length of the blocks that the text is
    /// cut into.
    pub(crate) examples: Examples,
    /// Puts documents with hidden facts, generated from the text, beside its blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) needles: Option<NeedleChoice>,
    /// Where the attention is changed.
    pub(crate) surgery: Surgery,
    /// What it is changed to, as for fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attention: Option<Variant>,
    /// Processor threads that one operation may use; LibTorch's choice, usually one a core, where absent. A small model
    /// is faster on one, above all where the machine has other work. Runs repeat bit for bit on as many threads alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) threads: Option<NonZeroU16>,
    /// How to train. `seed` is the run's one seed: it also draws the weights, the masks and the rows held out.
    pub(crate) train: TrainConfig,
}

impl Default for Pretrain {
    fn default() -> Self {
        Self {
            name: String::new(),
            objective: ObjectiveChoice::Masked,
            mask_rate: 0.15,
            init: Table::new(),
            model: None,
            tokenizer: TokenizerChoice::default(),
            data: DatasetSpec::default(),
            examples: Examples::default(),
            needles: None,
            surgery: Surgery::default(),
            attention: None,
            threads: None,
            train: TrainConfig::default(),
        }
    }
}

/// Documents of `examples.max_len` tokens: facts hidden in the text, and questions for them at its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct NeedleChoice {
    /// What the facts are; one kind a document.
    pub(crate) kinds: Vec<NeedleKind>,
    /// The share of the rows of an epoch that are such documents, new ones each epoch; the others are blocks of text.
    pub(crate) share: f64,
    /// Facts are made of as many words, the most frequent ones of the text; of all where absent. Heads that copy form
    /// sooner on few.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) words: Option<usize>,
    /// A document has 1 to as many facts, and asks for each.
    pub(crate) per_document: usize,
    /// Each fact is asked for as often.
    pub(crate) asks: usize,
    /// The share of a document that facts and questions may take; beyond it there are fewer, but one.
    pub(crate) fill: f64,
    /// As how many tokens one of an answer counts in the loss.
    pub(crate) answer_weight: NonZeroU16,
    /// Documents of each kind, of one fact, made from the text held out, that the model is scored on.
    pub(crate) hold_out: NonZeroUsize,
}

impl Default for NeedleChoice {
    fn default() -> Self {
        Self {
            kinds: vec![NeedleKind::Passkey, NeedleKind::Sentence],
            share: 0.5,
            words: None,
            per_document: 4,
            asks: 1,
            fill: 0.5,
            answer_weight: NonZeroU16::MIN,
            hold_out: NonZeroUsize::new(100).expect("not 0"),
        }
    }
}

impl NeedleChoice {
    fn check(&self, objective: ObjectiveChoice, max_len: Option<usize>) -> Result<()> {
        let Self { kinds, share, words, per_document, asks, fill, .. } = self;
        ensure!(
            objective == ObjectiveChoice::Causal,
            "`[needles]` is for `objective` = \"causal\": answers are predicted from what stands before them"
        );
        ensure!(
            !kinds.is_empty(),
            "`needles.kinds` is empty, expected at least one of `repeat`, `passkey`, `sentence`"
        );
        ensure!(
            *share > 0.0 && *share < 1.0,
            "`needles.share` is {share}, expected a share between 0 and 1"
        );
        ensure!(*per_document > 0, "`needles.per_document` is 0, expected at least 1");
        ensure!(
            words.is_none_or(|words| words >= 10),
            "`needles.words` is {}, expected at least 10",
            words.unwrap_or(0)
        );
        ensure!(*asks > 0, "`needles.asks` is 0, expected at least 1");
        ensure!(
            (0.0..=1.0).contains(fill),
            "`needles.fill` is {fill}, expected a share from 0 to 1"
        );
        ensure!(
            max_len.is_some(),
            "`examples.max_len` is not set, and `[needles]` makes documents of that length\nhint: set it: 512"
        );
        Ok(())
    }

    /// What is drawn for training.
    pub(crate) fn recipe(&self, max_len: usize) -> Recipe {
        Recipe {
            kinds: self.kinds.clone(),
            words: self.words,
            most_needles: self.per_document,
            asks: self.asks,
            fill: self.fill,
            depth: None,
            distractors: 0,
            max_len,
        }
    }

    /// Documents beside `n_blocks` blocks.
    pub(crate) fn n_documents(&self, n_blocks: usize) -> usize {
        ((n_blocks as f64 * self.share / (1.0 - self.share)).round() as usize).max(1)
    }
}

/// What a language model learns to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ObjectiveChoice {
    Causal,
    Masked,
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct TokenizerChoice {
    /// A folder or Hub id to take it from. Where absent, one is trained on the train split.
    pub(crate) from: Option<String>,
    /// What to train: `byte_level` as GPT-2's, `word_piece` as BERT's. Where absent, what goes with the objective:
    /// `byte_level` with `causal`, `word_piece` with `masked`.
    pub(crate) style: Option<Style>,
    /// Tokens of the vocabulary to train; 8000 where absent.
    pub(crate) vocab_size: Option<usize>,
}

impl Pretrain {
    /// What rows held out are scored by.
    const METRICS: [&str; 3] = ["loss", "perplexity", "top1_accuracy"];

    /// Checks what needs no data, and fills in what follows from the rest.
    pub(crate) fn complete(mut self, name: &str) -> Result<Self> {
        set_name(&mut self.name, name)?;
        if let Some(model) = &self.model {
            ensure!(
                self.init.is_empty() && self.tokenizer == TokenizerChoice::default(),
                "`model` is `{model}`, to go on from, and `[init]` or `[tokenizer]` is for a new model\nhint: leave one \
                 of them away"
            );
        } else {
            ensure!(
                self.init.contains_key("model_type"),
                "`init.model_type` is not set\nhint: `[init]` holds the model's config.json as TOML: model_type = \
                 \"distilbert\", dim = 128, ...; or name a model to go on from: model = \"DIR\""
            );
        }
        self.train.validate()?;
        check_select(self.train.select.as_deref(), &Self::METRICS)?;
        if let Some(needles) = &self.needles {
            needles.check(self.objective, self.examples.max_len)?;
        }
        self.data = self.data.resolved();
        self.data.label = None; // Labels of a data set that is used as text may be of any kind.
        self.data.text_pair = None;
        self.surgery.check(self.attention.as_ref())?;
        let mask_rate = self.mask_rate;
        ensure!(
            mask_rate > 0.0 && mask_rate < 1.0,
            "`mask_rate` is {mask_rate}, expected a share between 0 and 1"
        );
        if let (Some(metric), None) = (&self.train.select, self.examples.hold_out) {
            bail!(
                "`train.select` is `{metric}`, and no rows are held out to choose by: the validation split is for the \
                 report\nhint: set `examples.hold_out`, or take the last model: --set train.select="
            );
        }
        let Examples { few_shot, report_hold_out, .. } = &self.examples;
        ensure!(few_shot.is_none(), "`examples.few_shot` is for fine-tuning: text has no classes");
        ensure!(
            report_hold_out.is_none(),
            "`examples.report_hold_out` is for fine-tuning\nhint: `examples.hold_out` cuts off what pre-training is \
             measured on"
        );
        ensure!(
            self.examples.hold_out_by == HoldOutBy::Row,
            "`examples.hold_out_by` is `containment`, which is for fine-tuning"
        );
        let tokenizer = &mut self.tokenizer;
        if self.model.is_some() {
            // The model's own.
        } else if tokenizer.from.is_some() {
            ensure!(
                tokenizer.style.is_none() && tokenizer.vocab_size.is_none(),
                "`tokenizer.from` takes a tokenizer as it is: `style` and `vocab_size` are for training one"
            );
        } else {
            let (style, vocab_size) = tokenizer.trained(self.objective);
            (tokenizer.style, tokenizer.vocab_size) = (Some(style), Some(vocab_size));
        }
        Ok(self)
    }
}

/// A distillation run: what `attn distill` reads. The teacher is `model` as it is; the student is `model` with its
/// attention changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Distill {
    /// Names the run's folder, `runs/<date>-<name>`; the config's file name where absent.
    pub(crate) name: String,
    /// The language model whose attention is changed, and who teaches where `teacher` is absent: a folder or a Hub id.
    pub(crate) model: String,
    /// Branch, tag or commit of a model from the Hub; `main` where absent.
    pub(crate) revision: Option<String>,
    /// Who teaches, in place of `model` as it is: the model that `model` was made of, where its attention was changed
    /// before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) teacher: Option<String>,
    /// The share of the tokens that is hidden from masked language models.
    pub(crate) mask_rate: f64,
    /// Where the text is; the fields of a data set.
    pub(crate) data: DatasetSpec,
    /// Which rows are used, and how much of them. `max_len` is the length of the blocks that text is cut into.
    pub(crate) examples: Examples,
    /// Where the attention is changed.
    pub(crate) surgery: Surgery,
    /// What it is changed to, as for fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attention: Option<Variant>,
    /// Trains what the attention kind adds, each layer on what the teacher's gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) transfer: Option<Stage>,
    /// Then trains the model, whole or by adapters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tune: Option<Stage>,
    /// Processor threads that one operation may use; LibTorch's choice, usually one a core, where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) threads: Option<NonZeroU16>,
    /// The run's one seed, in place of the stages' `train.seed`.
    pub(crate) seed: u64,
}

/// A part of a distillation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Stage {
    /// What is minimized: weights of losses.
    pub(crate) loss: Losses,
    /// A folder that holds the teacher's predictions on the rows to train on, so that it does not run in training: made
    /// where it is not there, for `loss.top_k` tokens a position. The losses are then `top_k_kl` and `cross_entropy`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) teacher_cache: Option<PathBuf>,
    /// Lets the student go on with some of the rows by itself, and compares what both predict of its words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_policy: Option<OnPolicy>,
    /// Trains low-rank adapters beside the matrices, and what the attention kind adds; they are merged at the stage's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lora: Option<LoraChoice>,
    /// How to train.
    pub(crate) train: TrainConfig,
}

impl Default for Distill {
    fn default() -> Self {
        Self {
            name: String::new(),
            model: String::new(),
            revision: None,
            teacher: None,
            mask_rate: 0.15,
            data: DatasetSpec::default(),
            examples: Examples::default(),
            surgery: Surgery::default(),
            attention: None,
            transfer: None,
            tune: None,
            threads: None,
            seed: 0,
        }
    }
}

/// The parameters that an attention kind adds, as `freeze` names them.
pub(crate) const KIND_PARAMETERS: &str = "*.kind.*";

impl Distill {
    /// The stages with their names, in their order.
    pub(crate) fn stages(&self) -> impl Iterator<Item = (&'static str, &Stage)> {
        let all = [("transfer", &self.transfer), ("tune", &self.tune)];
        all.into_iter().filter_map(|(name, stage)| Some((name, stage.as_ref()?)))
    }

    /// What rows held out are scored by.
    pub(crate) const METRICS: [&str; 5] = ["kl", "reverse_kl", "agreement", "loss", "perplexity"];

    /// Checks what needs neither the model nor the data, and fills in what follows from the rest.
    pub(crate) fn complete(mut self, name: &str) -> Result<Self> {
        set_name(&mut self.name, name)?;
        ensure!(
            !self.model.is_empty(),
            "`model` is not set\nhint: give the teacher's folder or Hub id: model = \"openai-community/gpt2\""
        );
        ensure!(
            self.transfer.is_some() || self.tune.is_some(),
            "there is neither `[transfer]` nor `[tune]`, so nothing is trained\nhint: `attn swap` changes the \
             attention alone; `[tune]` with nothing in it trains the whole model"
        );
        let transfer = Losses { attention_output: 1.0, teacher_forced: true, ..Losses::default() };
        let tune = Losses { forward_kl: 1.0, ..Losses::default() };
        let holds_out = self.examples.hold_out.is_some_and(|part| !is_nothing(part));
        let stages =
            [("transfer", self.transfer.as_mut(), transfer), ("tune", self.tune.as_mut(), tune)];
        for (name, stage, usual) in stages {
            let Some(stage) = stage else { continue };
            if stage.loss == Losses::default() {
                stage.loss = match stage.teacher_cache {
                    Some(_) => Losses { top_k_kl: 1.0, ..Losses::default() },
                    None => usual,
                };
            }
            if stage.teacher_cache.is_some() {
                stage
                    .loss
                    .fit_cache()
                    .with_context(|| format!("cannot use `{name}.teacher_cache`"))?;
                ensure!(
                    stage.on_policy.is_none(),
                    "`{name}.on_policy` is set beside `{name}.teacher_cache`, which holds the data's rows and not what \
                     the student makes of them\nhint: leave one of them away"
                );
            }
            if let Some(on_policy) = &stage.on_policy {
                on_policy.validate().with_context(|| format!("cannot use `{name}.on_policy`"))?;
            }
            if name == "transfer" && stage.train.freeze.is_empty() && stage.lora.is_none() {
                stage.train.freeze = vec!["*".into(), format!("!{KIND_PARAMETERS}")];
            }
            ensure!(
                [0, self.seed].contains(&stage.train.seed),
                "`{name}.train.seed` is {}, and a run has one seed\nhint: set `seed`, or --seed",
                stage.train.seed
            );
            stage.train.seed = self.seed;
            stage.loss.validate().with_context(|| format!("`{name}.loss`"))?;
            if stage.train.gradient_checkpointing {
                stage
                    .loss
                    .fit_gradient_checkpointing()
                    .with_context(|| format!("cannot use `{name}.train`"))?;
            }
            stage.train.validate().with_context(|| format!("`{name}.train`"))?;
            check_select(stage.train.select.as_deref(), &Self::METRICS)?;
            ensure!(
                holds_out || stage.train.select.is_none(),
                "`{name}.train.select` is `{}`, and no rows are held out to choose by\nhint: set `examples.hold_out`",
                stage.train.select.as_deref().unwrap_or_default()
            );
            if let Some(lora) = &stage.lora {
                lora.lora().validate()?;
                ensure!(
                    lora.save == SaveAs::Merged,
                    "`{name}.lora.save` is `adapter`, and the attention is changed beside it\nhint: leave it away: \
                     adapters are merged"
                );
            }
        }
        let mask_rate = self.mask_rate;
        ensure!(
            mask_rate > 0.0 && mask_rate < 1.0,
            "`mask_rate` is {mask_rate}, expected a share between 0 and 1"
        );
        self.data = self.data.resolved();
        self.data.label = None; // Labels of a data set that is used as text may be of any kind.
        self.data.text_pair = None;
        self.surgery.check(self.attention.as_ref())?;
        let Examples { few_shot, hold_out_by, .. } = &self.examples;
        ensure!(few_shot.is_none(), "`examples.few_shot` is for fine-tuning: text has no classes");
        ensure!(
            *hold_out_by == HoldOutBy::Row,
            "`examples.hold_out_by` is `containment`, which is for fine-tuning"
        );
        Ok(self)
    }
}

impl TokenizerChoice {
    /// Style and size of the vocabulary to train.
    pub(crate) fn trained(&self, objective: ObjectiveChoice) -> (Style, usize) {
        let style = match objective {
            ObjectiveChoice::Causal => Style::ByteLevel,
            ObjectiveChoice::Masked => Style::WordPiece,
        };
        (self.style.unwrap_or(style), self.vocab_size.unwrap_or(DEFAULT_VOCAB_SIZE))
    }
}

impl Surgery {
    fn check(&self, attention: Option<&Variant>) -> Result<()> {
        match (&self.layers, attention) {
            (Some(layers), None) => bail!(
                "`surgery.layers` is {layers:?}, and nothing says what to put there\nhint: set `attention.kind` \
                 (`attn list` shows the kinds)"
            ),
            (Some(layers), _) if layers.is_empty() => {
                bail!("`surgery.layers` names no layer\nhint: leave it away for all layers")
            }
            _ => Ok(()),
        }
    }

    /// The layers of a model of `n_layers`.
    pub(crate) fn layers(&self, n_layers: usize) -> Vec<usize> {
        self.layers.clone().unwrap_or_else(|| (0..n_layers).collect())
    }
}

/// Whether nothing is held out.
pub(crate) fn is_nothing(part: Part) -> bool {
    matches!(part, Part::Count(0)) || part == Part::Fraction(0.0)
}

/// Refuses to choose the model by a metric that no evaluation gives.
fn check_select(select: Option<&str>, metrics: &[&str]) -> Result<()> {
    match select {
        Some(metric) if !metrics.contains(&metric) => {
            bail!("`train.select` is `{metric}`, expected one of `{}`", metrics.join("`, `"))
        }
        _ => Ok(()),
    }
}

fn set_name(name: &mut String, default: &str) -> Result<()> {
    if name.is_empty() {
        default.clone_into(name);
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    ensure!(
        name.chars().all(is_plain) && !name.starts_with('.'),
        "`name` is `{name}`, expected letters, digits, `-`, `_` and `.`: it becomes part of a folder's name"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::config::{Written, keys_of};

    /// Every file below `configs/<command>`.
    fn configs(command: &str) -> Vec<std::path::PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(command);
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn every_config_says_what_it_shows_and_costs_and_is_complete() {
        let mut n_files = 0;
        for command in ["finetune", "pretrain", "distill"] {
            for path in configs(command) {
                let shown = path.display();
                let text = fs::read_to_string(&path).unwrap();
                let comment: String =
                    text.lines().take_while(|line| line.starts_with('#')).collect();
                assert!(comment.contains("Costs "), "{shown}");
                let file = path.file_name().unwrap().to_string_lossy().into_owned();
                let usual = format!("-- {command} configs/{command}/{file}");
                let is_default =
                    file == "default.toml" && comment.contains(&format!("-- {command}"));
                assert!(
                    comment.contains("#   cargo run") && (comment.contains(&usual) || is_default),
                    "{shown}"
                );

                let written = Written::read(&path, &[]).unwrap();
                match command {
                    "finetune" => drop(written.parse::<Finetune>().unwrap().complete("x").unwrap()),
                    "distill" => drop(written.parse::<Distill>().unwrap().complete("x").unwrap()),
                    _ => drop(written.parse::<Pretrain>().unwrap().complete("x").unwrap()),
                }
                n_files += 1;
            }
        }
        assert!(n_files >= 7, "{n_files}");
    }

    #[test]
    fn every_config_about_heads_is_what_its_command_reads() {
        let mut n_files = 0;
        for path in [configs("heads"), configs("gqa")].concat() {
            let shown = path.display().to_string();
            let folder = path.parent().unwrap().file_name().unwrap().to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).unwrap();
            let comment: String = text.lines().take_while(|line| line.starts_with('#')).collect();
            assert!(comment.contains("Costs "), "{shown}");
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            let (_, command) = comment.split_once("cargo run -p attn-cli -- ").unwrap();
            let command = command.split_whitespace().next().unwrap();
            match command {
                "finetune" => {
                    let written = Written::read(&path, &[]).unwrap();
                    drop(written.parse::<Finetune>().unwrap().complete("x").unwrap());
                }
                "distill" => {
                    let written = Written::read(&path, &[]).unwrap();
                    drop(written.parse::<Distill>().unwrap().complete("x").unwrap());
                }
                "sweep" => assert!(crate::sweep::understand(&path).unwrap().exists()),
                flags => {
                    let typed = ["attn", flags, "--config", &shown].map(Into::into).to_vec();
                    let program = <crate::args::Args as clap::CommandFactory>::command;
                    let words = crate::flags_file::with_flags(typed, program).unwrap();
                    assert!(words.len() > 8, "{shown}: {words:?}");
                    program()
                        .try_get_matches_from(words)
                        .unwrap_or_else(|error| panic!("{shown}: {error}"));
                }
            }
            assert!(comment.contains(&format!("configs/{folder}/{file}")), "{shown}");
            n_files += 1;
        }
        assert_eq!(n_files, 13);
    }

    #[test]
    fn few_shots_can_be_drawn_from_every_bundled_data_set() {
        for path in configs("finetune") {
            let pairs = ["examples.few_shot=8", "examples.hold_out=", "examples.hold_out_by="];
            let pairs = pairs.map(Into::into);
            let written = Written::read(&path, &pairs).unwrap();
            let few = written.complete(|config: Finetune| config.complete("x")).unwrap();
            assert_eq!((few.examples.hold_out, few.train.select), (Some(Part::Count(0)), None));
        }
    }

    #[test]
    fn a_bundled_config_takes_other_data_and_fewer_steps() {
        for path in configs("finetune") {
            let pairs = [
                "data.source=mnli",
                "data.label=stars",
                "train.max_steps=1",
                "examples.hold_out_by=",
            ]
            .map(Into::into);
            let written = Written::read(&path, &pairs).unwrap();
            let other = written.complete(|config: Finetune| config.complete("x")).unwrap();
            assert_eq!(other.data.classes.unwrap().len(), 3, "{}", path.display());
            assert_eq!(
                (other.data.split_column, other.data.label.unwrap()),
                (None, "stars".into())
            );
        }
        for path in configs("pretrain") {
            let written = Written::read(&path, &["train.max_steps=50".into()]).unwrap();
            written.complete(|config: Pretrain| config.complete("x")).unwrap();
        }
    }

    #[test]
    fn a_complete_config_is_written_in_full_and_reads_the_same() {
        for path in configs("finetune") {
            let first: Finetune = Written::read(&path, &[])
                .unwrap()
                .parse::<Finetune>()
                .unwrap()
                .complete("x")
                .unwrap();
            let text = toml::to_string(&first).unwrap();
            let again = toml::from_str::<Finetune>(&text).unwrap().complete("y").unwrap();
            assert_eq!(first, again);
        }
        for path in configs("distill") {
            let first: Distill = Written::read(&path, &[])
                .unwrap()
                .parse::<Distill>()
                .unwrap()
                .complete("x")
                .unwrap();
            let text = toml::to_string(&first).unwrap();
            let again = toml::from_str::<Distill>(&text).unwrap().complete("y").unwrap();
            assert_eq!(first, again);
        }
        for path in configs("pretrain") {
            let first: Pretrain = Written::read(&path, &[])
                .unwrap()
                .parse::<Pretrain>()
                .unwrap()
                .complete("x")
                .unwrap();
            let text = toml::to_string(&first).unwrap();
            let again = toml::from_str::<Pretrain>(&text).unwrap().complete("y").unwrap();
            assert_eq!(first, again);
        }
    }

    #[test]
    fn a_model_is_chosen_by_a_metric_that_there_is() {
        let refused = |text: &str| {
            let text = format!("model = 'm'\ndata.source = 'sst2'\n{text}");
            toml::from_str::<Finetune>(&text).unwrap().complete("name").unwrap_err().to_string()
        };
        let error = refused("train.select = 'f1'");
        assert_eq!(error, "`train.select` is `f1`, expected one of `accuracy`, `loss`");
        let pretrain = "init.model_type = 'gpt2'\ntrain.select = 'accuracy'";
        let error = toml::from_str::<Pretrain>(pretrain).unwrap().complete("name").unwrap_err();
        assert!(error.to_string().contains("`perplexity`, `top1_accuracy`"), "{error}");
        let pretrain = "init.model_type = 'gpt2'\ntrain.select = 'loss'";
        let error = toml::from_str::<Pretrain>(pretrain).unwrap().complete("name").unwrap_err();
        assert!(error.to_string().contains("no rows are held out to choose by"), "{error}");
        let pretrain = format!("{pretrain}\nexamples.hold_out = 3");
        toml::from_str::<Pretrain>(&pretrain).unwrap().complete("name").unwrap();
        let error = refused("examples = { few_shot = 2, hold_out = 3 }");
        assert!(error.contains("--set examples.hold_out= "), "{error}");
    }

    /// The README of `configs/`, as rows of its tables: setting, default, meaning.
    fn reference() -> Vec<[String; 3]> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/README.md");
        let text = fs::read_to_string(path).unwrap();
        let rows = text.lines().filter(|line| line.starts_with("| `"));
        rows.map(|row| {
            let cells: Vec<String> =
                row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect();
            cells.try_into().unwrap_or_else(|cells| panic!("{cells:?}"))
        })
        .collect()
    }

    #[test]
    fn the_reference_names_every_setting_with_its_default_and_no_other() {
        use std::collections::{BTreeMap, BTreeSet};

        let mut expected: BTreeMap<String, Option<toml::Value>> = BTreeMap::new();
        let defaults = [
            // Tables that may be left away, there with their own defaults.
            Table::try_from(Finetune {
                lora: Some(LoraChoice::default()),
                prompt: Some(PromptSpec::default()),
                ..Finetune::default()
            })
            .unwrap(),
            Table::try_from(Pretrain {
                needles: Some(NeedleChoice::default()),
                ..Pretrain::default()
            })
            .unwrap(),
            Table::try_from(Distill::default()).unwrap(),
            Table::from_iter([(
                "loss".to_owned(),
                Table::try_from(Losses::default()).unwrap().into(),
            )]),
        ];
        let losses = keys_of::<Losses>().into_iter().map(|key| format!("loss.{key}"));
        let keys =
            [keys_of::<Finetune>(), keys_of::<Pretrain>(), keys_of::<Distill>(), losses.collect()];
        for key in keys.concat() {
            let default = defaults.iter().find_map(|table| {
                key.split('.')
                    .try_fold(&toml::Value::Table(table.clone()), |at, key| at.get(key))
                    .filter(|value| !value.is_table())
                    .cloned()
            });
            // An empty text is a setting that has to be given, or follows from the rest.
            expected.insert(key, default.filter(|value| value.as_str() != Some("")));
        }
        expected.remove("attention");
        expected.insert("attention.kind".into(), None);

        let rows = reference();
        let named: BTreeSet<String> =
            rows.iter().map(|[key, ..]| key.trim_matches('`').into()).collect();
        assert_eq!(named, expected.keys().cloned().collect());
        assert_eq!(named.len(), rows.len(), "one row a setting");
        for [key, default, meaning] in rows {
            assert!(meaning.len() > 10, "{key}");
            match &expected[key.trim_matches('`')] {
                Some(value) => {
                    let written = format!("default = {}", default.trim_matches('`'));
                    let written: Table =
                        written.parse().unwrap_or_else(|_| panic!("{key}: {default}"));
                    assert_eq!(written["default"], *value, "{key}");
                }
                None => assert!(!default.starts_with('`'), "{key}: {default}"),
            }
        }
    }

    #[test]
    fn the_reference_names_every_metric_that_selects() {
        let row = reference().into_iter().find(|[key, ..]| key == "`train.select`").unwrap();
        for metric in Finetune::METRICS.iter().chain(&Pretrain::METRICS).chain(&Distill::METRICS) {
            assert!(row[2].contains(&format!("`{metric}`")), "{metric}");
        }
    }

    #[test]
    fn what_follows_from_the_rest_is_filled_in() {
        let parse = |text: &str| {
            let text = format!("model = 'm'\n{text}");
            toml::from_str::<Finetune>(&text).unwrap().complete("name").unwrap()
        };
        let usual = parse("data.source = 'sst2'");
        assert_eq!(usual.examples.hold_out, Some(DEFAULT_HOLD_OUT));
        assert_eq!(usual.train.select.as_deref(), Some("accuracy"));
        assert_eq!((usual.name.as_str(), usual.data.source.as_str()), ("name", "stanfordnlp/sst2"));
        let few = parse("data.source = 'sst2'\nexamples.few_shot = 8");
        assert_eq!((few.examples.hold_out, few.train.select), (Some(Part::Count(0)), None));
        let none = parse("data.source = 'sst2'\nexamples.hold_out = 0.0");
        assert_eq!(none.train.select, None);
    }

    #[test]
    fn holding_out_by_containment_is_refused_where_it_would_change_nothing() {
        let refusal = |text: &str| {
            let text = format!("model = 'm'\nexamples.hold_out_by = 'containment'\n{text}");
            toml::from_str::<Finetune>(&text).unwrap().complete("name").unwrap_err().to_string()
        };

        let few = refusal("data.source = 'sst2'\nexamples.few_shot = 8");
        assert!(few.contains("nothing is held out\nhint: "), "{few}");
        let pairs = refusal("data.source = 'mnli'");
        assert!(pairs.contains("`data.text_pair` is set"), "{pairs}");
        let text = "init.model_type = 'gpt2'\nexamples.hold_out_by = 'containment'";
        let text = toml::from_str::<Pretrain>(text).unwrap().complete("name").unwrap_err();
        assert!(text.to_string().contains("is for fine-tuning"), "{text}");
    }
}
