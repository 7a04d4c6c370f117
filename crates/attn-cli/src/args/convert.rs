//! What can be typed for `attn convert`.

use std::{
    num::{NonZeroU16, NonZeroUsize},
    path::PathBuf,
};

use clap::ValueEnum;

use super::{Dtype, FlagsFile};

pub(super) const CONVERT_HELP: &str = "\
Fewer: old key/value heads become one, which all their query heads read; the numbers must divide.
More: each is copied, copies side by side, and the model computes what it did. --cache gives each
layer a number of its own: each of the divisors is tried in each layer alone, and those are taken
whose KL adds up to the least within the budget.

first, random and mean take neighbours as they are. The others read a text: similarity groups what is
near, aligned turns heads onto each other first, low-rank keeps the directions that a group's scores
and outputs need most and changes each head's queries and output to fit. latent keeps one code of all
keys and values, of as many channels as N heads' (the attention kind `latent`): nearest by far, not
where positions turn keys. --refit fits the output projection of each changed layer to the text, in
closed form.

The text is cut into blocks. Some are set apart, the same whatever the seed, and the model is compared
on them with what it was; of the rest the seed draws those that are read. --compare does so for every
method, with and without --refit. Each layer alone, unfitted, is tried on blocks that are read.

--as merging writes the model as it is, with a gate on each old head and the new heads, as --method
makes them, behind it. attn distill then closes the gates while the new heads learn to do for the old
ones (configs/gqa/learn.toml); --method learned ends that and leaves the new heads alone.

A Llama whose layers have one number is an ordinary folder, which transformers loads; so is any
model --as expanded, at its old size, a code read out. A GPT-2 with one key/value head is also written --as multi-query
(`gpt_bigcode`), which transformers loads and this program does not. Everything else is a folder of
this program alone. conversion.json in OUT says what was done and what a token's keys and values cost.

Examples:
  attn convert --model DIR --kv-heads 2 --out grouped
  attn convert --model DIR --kv-heads 2 --refit --calibration notes.txt --out refitted
  attn convert --model DIR --kv-heads 1 --method first --layers 1 --out one
  attn convert --model DIR --kv-heads 2 --method latent --calibration notes.txt --out coded
  attn convert --model DIR --cache 50% --calibration notes.txt --out half
  attn convert --model DIR --kv-heads 1 --calibration notes.txt --as merging --out merging
  attn convert --model merging --method learned --out ended    (once it was taught)
  attn convert --config configs/gqa/half.toml
  attn eval --model grouped --task notes.txt --split train --against DIR --out kl.json";

#[derive(Debug, clap::Args)]
#[command(
    override_usage = "attn convert --model <DIR|ID> <--kv-heads <N>|--cache <BYTES>> --out <DIR> [OPTIONS]"
)]
pub(crate) struct ConvertArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// Model folder or Hub id; an adapter is merged into its base model
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// Key/value heads of a layer
    #[arg(long, value_name = "N", conflicts_with = "cache")]
    pub(crate) kv_heads: Option<NonZeroU16>,

    /// The most bytes that keys and values of a token may take in all layers, or a share of what they take: 50%
    #[arg(long, value_name = "BYTES")]
    pub(crate) cache: Option<String>,

    /// The layers to change, counted from 0: 0,3-5. All where not given
    #[arg(long, value_name = "LAYERS")]
    pub(crate) layers: Option<String>,

    /// What a new head is made of the old ones of its group
    #[arg(long, value_enum, default_value_t)]
    pub(crate) method: MergeBy,

    /// Fit the output projections anew
    #[arg(long)]
    pub(crate) refit: bool,

    /// How strongly projections are drawn to what they were, relative to the mean square of a channel
    #[arg(long, value_name = "X", default_value_t = 1e-3, requires = "refit")]
    pub(crate) ridge: f64,

    /// The text: a name of `attn list`, a file, a folder or a Hub id; data/sample_text.txt where not given
    #[arg(long, value_name = "TASK")]
    pub(crate) calibration: Option<String>,

    /// Columns and splits of a text that is no known task: --set data.text=review. May be repeated
    #[arg(long, value_name = "TABLE.KEY=VALUE", requires = "calibration")]
    pub(crate) set: Vec<String>,

    /// Its split; the train split where not given
    #[arg(long, value_name = "NAME", requires = "calibration")]
    pub(crate) split: Option<String>,

    /// Read its first rows alone, so many: of running text lines
    #[arg(long, value_name = "N", requires = "calibration")]
    pub(crate) limit: Option<usize>,

    /// Most tokens of a text; the length of the blocks that text is cut into
    #[arg(long, value_name = "N")]
    pub(crate) max_len: Option<usize>,

    /// Tokens that are read
    #[arg(long, value_name = "N", default_value = "65536")]
    pub(crate) calibration_tokens: NonZeroUsize,

    /// Tokens, at most a quarter, that are set apart to compare models on; 0 for none
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub(crate) test_tokens: usize,

    /// Measure every method, with and without --refit, and each layer alone
    #[arg(long, conflicts_with = "cache")]
    pub(crate) compare: bool,

    /// Seed of the blocks that are read, and of --method random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Whose folder it is to be
    #[arg(long = "as", value_name = "FORM", value_enum, default_value_t)]
    pub(crate) form: Form,

    /// What the weights are stored in; rounded where they are wider
    #[arg(long, value_enum, default_value_t)]
    pub(crate) dtype: Dtype,

    /// Threads of one operation; all cores where not given
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroU16>,

    /// --as merging: what a layer whose heads are all open costs in training, in nats; 1 where not given
    #[arg(long, value_name = "X")]
    pub(crate) price: Option<f64>,

    /// Replace the model's folder that OUT is, with all that is in it, in one step
    #[arg(long)]
    pub(crate) force: bool,

    /// The folder, new or empty; folders that are missing above it are made
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// What a new key/value head is made of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum MergeBy {
    /// The first of neighbours
    First,
    /// One of the neighbours drawn, for each layer and group by itself
    Random,
    /// The mean of neighbours (Ainslie et al. 2023)
    Mean,
    /// The mean of heads that are near each other
    Similarity,
    /// Heads turned onto each other, weighted by what an error costs (Jin et al. 2024)
    Aligned,
    /// The directions that matter most together, read by each head through a matrix of its own
    #[default]
    #[value(alias = "low_rank")]
    LowRank,
    /// One code of all keys and values, read by each head through matrices of its own (multi-head latent attention); not where
    /// positions turn keys
    Latent,
    /// What a model written --as merging has learned since; nothing else is asked for
    Learned,
}

/// How a converted model is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// An ordinary folder where transformers has words for the layers, else one of this program's own
    #[default]
    Smallest,
    /// An ordinary folder with as many key/value heads as query heads: loads everywhere, saves nothing
    Expanded,
    /// transformers' `gpt_bigcode`, of a GPT-2 with one key/value head
    MultiQuery,
    /// The model as it is, its heads on their way: to be taught, then ended by --method learned
    Merging,
}
