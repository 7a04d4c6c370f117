//! What the commands on heads take.

use std::path::PathBuf;

use attn_eval::{Method, Order, RetrievalScore, Scope};
use clap::{
    ArgGroup, ArgMatches, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
    error::ErrorKind,
};

use super::{ComputeArgs, DocumentArgs, Dtype, FlagsFile, RowArgs};

pub(super) const SCORE_HEADS_HELP: &str = "\
Methods, L the loss of a row, g the gate of a head's output before the output projection:
  michel                mean |dL/dg|: how much the loss moves with the head (Michel et al. 2019)
  taylor                mean -dL/dg: what the loss would rise by without it, to first order
  fisher                mean (dL/dg)^2 (Kwon et al. 2022)
  fisher_block          the same together with heads of its layer that would go before it
  plain_gradient        mean size of the gradient at its output, for comparison
  integrated_gradients  its share of what all heads are worth
  confidence            mean over tokens of its largest attention weight (Voita et al. 2019)
  open                  share of tokens that it runs for, where layers are `routed`
  leave_one_out         what the loss rises by without it: the truth that the others estimate
  hard_concrete         chance that a learned gate stays open, where open heads cost --gate-cost
                        (Voita et al. 2019)
  subset                learned weights of the --keep heads that stay (Li et al. 2021)
The loss is that of eval, averaged over a row's tokens and then over rows: of the right class, the
next token or hidden tokens, without prompts;
with --own-output, of the model's own predictions, so that no label is needed. OUT.json has scores
and 95 % intervals, layers x heads. Several methods go to OUT.METHOD.json each.

retrieval, retrieval_repeats and retrieval_mass hide needles in --haystack as `attn needle` does and
look where heads attend while the model answers (Wu et al. 2024, https://arxiv.org/abs/2404.15574);
query_focused looks where the question attends, less a question that asks nothing (Zhang et al.
2025, https://arxiv.org/abs/2506.09944), and needs no answer. They take --haystack in place of --task,
one method at a time; the first three need attention that keeps the keys of all tokens.

Examples:
  attn score-heads --model runs/sst2/model --task sst2 --out heads.json
  attn score-heads --model runs/mine/model --method retrieval --haystack wikitext-2 \\
                   --lengths 128,256 --out heads.json
  attn score-heads --config configs/heads/importance.toml
  attn score-heads --model DIR --task notes.txt --split train --limit 500 --out heads.json
  attn score-heads --model DIR --task notes.txt --split train --method michel,taylor --out s.json";

#[derive(Debug, clap::Args)]
pub(crate) struct ScoreHeadsArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    /// How to score: one or more, with commas between
    #[arg(long, value_name = "METHOD", value_delimiter = ',', value_parser = method(), default_value = "michel")]
    pub(crate) method: Vec<ScoreMethod>,

    /// What to divide by: nothing, or the l2 norm of each layer's scores, as Michel et al. do
    #[arg(long, value_enum, default_value_t)]
    pub(crate) normalize: ScoreNormalize,

    /// Go without labels: by how far predictions move from the model's own
    #[arg(long)]
    pub(crate) own_output: bool,

    /// Remove this share of all heads at a step, and score what is left anew: a head scores the step at which it goes
    #[arg(long, value_name = "SHARE")]
    pub(crate) iterative: Option<f64>,

    /// hard_concrete: what an open head costs, in nats
    #[arg(long, value_name = "NATS", default_value_t = 0.01)]
    pub(crate) gate_cost: f64,

    /// subset: heads that stay; half of them where not given
    #[arg(long, value_name = "K")]
    pub(crate) keep: Option<usize>,

    /// Steps that gates are learned in, a batch each
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub(crate) gate_steps: usize,

    /// Adam's rate for gates
    #[arg(long, value_name = "RATE", default_value_t = 0.05)]
    pub(crate) gate_lr: f64,

    /// Where to write the scores; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    /// Write them as a table, too: parquet, a row a head (results/SCHEMA.md)
    #[arg(long, value_name = "OUT.parquet")]
    pub(crate) table: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the weights that --init makes, of the tokens hidden from a masked language model, and of what is drawn for
    /// --own-output
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// What else `attn score-heads` takes where heads are scored by needles.
#[derive(Debug, clap::Args)]
pub(crate) struct ByNeedles {
    /// The text to hide needles in, for the retrieval methods and query_focused, in place of --task: as `attn needle` takes it
    #[arg(
        long,
        value_name = "DATA",
        help_heading = "Scores by needles",
        conflicts_with_all = ["task", "table", "limit", "max_len", "by_text", "normalize", "own_output", "iterative"]
    )]
    pub(crate) haystack: String,

    #[command(flatten, next_help_heading = "Scores by needles")]
    pub(crate) documents: DocumentArgs,

    /// A retrieval head is one with a score above this
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub(crate) threshold: f64,

    /// A trial counts where the answer has more than this share of the words expected (ROUGE-1 recall), in %
    #[arg(long, value_name = "PERCENT", default_value_t = 50.0)]
    pub(crate) min_recall: f64,

    /// Every trial counts, whatever was answered
    #[arg(long, conflicts_with = "min_recall")]
    pub(crate) keep_failures: bool,

    /// Draw how many heads have which score
    #[arg(long, value_name = "OUT.png")]
    pub(crate) picture: Option<PathBuf>,
}

/// `attn score-heads` by needles.
#[derive(Debug)]
pub(crate) struct RetrievalArgs {
    pub(crate) model: String,
    pub(crate) method: RetrievalScore,
    pub(crate) split: Option<String>,
    pub(crate) set: Vec<String>,
    pub(crate) out: PathBuf,
    pub(crate) needles: ByNeedles,
    pub(crate) compute: ComputeArgs,
    pub(crate) seed: u64,
}

/// `attn score-heads`: by the rows of a task, or by needles, as the method says.
#[derive(Debug)]
pub(crate) enum ScoreHeads {
    Rows(Box<ScoreHeadsArgs>),
    Needles(Box<RetrievalArgs>),
}

impl clap::FromArgMatches for ScoreHeads {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let methods: Vec<ScoreMethod> =
            matches.get_many("method").into_iter().flatten().copied().collect();
        let by_needles: Vec<RetrievalScore> =
            methods.iter().filter_map(|method| method.by_needles()).collect();
        let has_haystack = matches.value_source("haystack").is_some();
        let wrong = |kind, message: &str| Err(clap::Error::raw(kind, format!("{message}\n")));
        match (by_needles.as_slice(), has_haystack) {
            (&[method], true) if methods.len() == 1 => {
                let one = |name: &str| matches.get_one::<String>(name).cloned();
                Ok(Self::Needles(Box::new(RetrievalArgs {
                    model: one("model").unwrap_or_default(),
                    method,
                    split: one("split"),
                    set: matches.get_many("set").into_iter().flatten().cloned().collect(),
                    out: matches.get_one::<PathBuf>("out").cloned().unwrap_or_default(),
                    needles: ByNeedles::from_arg_matches(matches)?,
                    compute: ComputeArgs::from_arg_matches(matches)?,
                    seed: matches.get_one("seed").copied().unwrap_or_default(),
                })))
            }
            ([], false) if !matches.contains_id("task") => wrong(
                ErrorKind::MissingRequiredArgument,
                "this `--method` scores heads by the rows of a task\nhint: name it: --task TASK",
            ),
            ([], false) => Ok(Self::Rows(Box::new(ScoreHeadsArgs::from_arg_matches(matches)?))),
            ([], true) => wrong(
                ErrorKind::ArgumentConflict,
                "`--haystack` is for the methods that score heads by needles\nhint: give --method retrieval, \
                 retrieval_repeats, retrieval_mass or query_focused",
            ),
            ([_], false) => wrong(
                ErrorKind::MissingRequiredArgument,
                "this `--method` scores heads by needles in a text\nhint: name the text: --haystack DATA",
            ),
            _ => wrong(
                ErrorKind::ArgumentConflict,
                "methods that score heads by needles are given alone\nhint: one --method at a time",
            ),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for ScoreHeads {
    fn augment_args(command: clap::Command) -> clap::Command {
        // Which of the two is needed the method says.
        let optional = |arg: clap::Arg| arg.required(false);
        let command = ByNeedles::augment_args(ScoreHeadsArgs::augment_args(command));
        command.mut_arg("haystack", optional).mut_arg("task", optional)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// How heads are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScoreMethod {
    /// By the loss of rows.
    Rows(Method),
    /// By gates that are learned on rows.
    Learned(Gates),
    /// By needles in a text.
    Needles(RetrievalScore),
}

/// What gates are learned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gates {
    /// An open head costs something.
    HardConcrete,
    /// So many heads stay.
    Subset,
}

impl ScoreMethod {
    fn all() -> impl Iterator<Item = (&'static str, Self)> {
        let rows = Method::ALL.iter().map(|&method| (method.name(), Self::Rows(method)));
        let others = [
            ("hard_concrete", Self::Learned(Gates::HardConcrete)),
            ("subset", Self::Learned(Gates::Subset)),
            ("retrieval", Self::Needles(RetrievalScore::Retrieval)),
            ("retrieval_repeats", Self::Needles(RetrievalScore::RetrievalRepeats)),
            ("retrieval_mass", Self::Needles(RetrievalScore::RetrievalMass)),
            ("query_focused", Self::Needles(RetrievalScore::QueryFocused)),
        ];
        rows.chain(others)
    }

    /// The name in results.
    pub(crate) fn name(self) -> &'static str {
        Self::all().find(|(_, method)| *method == self).map_or("", |(name, _)| name)
    }

    fn by_needles(self) -> Option<RetrievalScore> {
        match self {
            Self::Needles(score) => Some(score),
            Self::Rows(_) | Self::Learned(_) => None,
        }
    }
}

/// The methods by name.
fn method() -> impl TypedValueParser<Value = ScoreMethod> {
    PossibleValuesParser::new(ScoreMethod::all().map(|(name, _)| name)).map(|name| {
        let found = ScoreMethod::all().find(|(known, _)| *known == name);
        found.expect("no other name is let through").1
    })
}

/// What scores are divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScoreNormalize {
    #[default]
    None,
    Layer,
}

impl From<ScoreNormalize> for attn_eval::Normalize {
    fn from(normalize: ScoreNormalize) -> Self {
        match normalize {
            ScoreNormalize::None => Self::None,
            ScoreNormalize::Layer => Self::Layer,
        }
    }
}

/// What takes the place of a head's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Replace {
    /// Zero: as if the head had been removed
    #[default]
    Zero,
    /// Its mean over tokens of the calibration rows
    Mean,
    /// Its output on another of the calibration rows
    Resample,
    /// What it makes of queries of zeros: the mean of the values in sight
    Uniform,
}

/// How heads are left out.
#[derive(Debug, clap::Args)]
pub(crate) struct ReplaceArgs {
    /// What takes the place of a head's output
    #[arg(long, value_enum, default_value_t)]
    pub(crate) replace: Replace,

    /// The split that means and other rows' outputs come from; the task's train split where not given
    #[arg(long, value_name = "NAME")]
    pub(crate) calibration_split: Option<String>,

    /// Its first rows, so many
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) calibration_limit: usize,
}

pub(super) const HEAD_ROLES_HELP: &str = "\
On the texts, without labels: the share of the tokens whose largest weight is on the previous
token, the next one, others near, the first token, separators, the rarest token of the text, and
the weight there; entropy, largest weight, distance. On random tokens said twice (decoders): the
earlier same token, and the one behind it (induction). Heads are query heads.

--treebank: for each dependency relation, how often the word that a head attends to most is the
right one, against the best fixed distance. Heads are chosen on `validation`, reported on `test`.
--blimp: accuracy by phenomenon with each head at zero, against the untouched model.
OUT.json has all heads with 95 % intervals, and how many were tried.

Examples:
  attn head-roles --model DIR --task notes.txt --split train --limit 200 --out roles.json
  attn head-roles --model results/models/wikitext-gpt2 --task wikitext-2 --limit 500 --blimp 20 \\
                  --treebank ud_english_ewt --out roles.json";

#[derive(Debug, clap::Args)]
pub(crate) struct HeadRolesArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// Model folder or Hub id; a classifier will do
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    /// A folder with a treebank, splits `validation` and `test`: parquet with lists `tokens`, `head`, `deprel`
    #[arg(long, value_name = "DIR")]
    pub(crate) treebank: Option<String>,

    /// Most sentences of each of its splits
    #[arg(long, value_name = "N", requires = "treebank")]
    pub(crate) treebank_limit: Option<usize>,

    /// Leave each head out on N pairs of sentences of each paradigm of BLiMP (decoders)
    #[arg(long, value_name = "N")]
    pub(crate) blimp: Option<usize>,

    /// Where these pairs are, if not on the Hub
    #[arg(long, value_name = "DIR|ID", requires = "blimp")]
    pub(crate) blimp_data: Option<String>,

    /// Where to write the result; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the repeated tokens, and of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

pub(super) const ATTENTION_SHIFT_HELP: &str = "\
For each head, means over the tokens of the texts: the Jensen-Shannon distance of its weights in
both models (the root of the divergence in nats, 0 to 0.833), and the change of entropy, of the
mean distance attended and of the weight on the first token, with 95 % intervals over texts. The
models may end in other heads: a language model before, a classifier after; where heads were
removed, those that all models have are compared. --control is the same tuning under another seed:
what differs between the two is the seed's.

Example:
  attn attention-shift --before DIR --after DIR2 --task notes.txt --split train --out shift.json";

#[derive(Debug, clap::Args)]
#[command(mut_arg("init", |arg| arg.hide(true)))]
pub(crate) struct AttentionShiftArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// The model as it was: folder or Hub id
    #[arg(long, value_name = "DIR")]
    pub(crate) before: String,

    /// What it was tuned to
    #[arg(long, value_name = "DIR")]
    pub(crate) after: String,

    /// The same, tuned with another seed
    #[arg(long, value_name = "DIR")]
    pub(crate) control: Option<String>,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    /// Where to write the result; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    /// A folder for heat maps of the heads that changed most, before and after, on the first text
    #[arg(long, value_name = "DIR")]
    pub(crate) plots: Option<PathBuf>,

    /// Heads to draw
    #[arg(long, value_name = "N", default_value_t = 3, requires = "plots")]
    pub(crate) drawn: usize,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

pub(super) const ABLATE_HELP: &str = "\
For each head: by how much loss and accuracy rise without it, and KL(untouched, without), with 95 %
intervals over rows. With --pairs N the N heads that cost most are left out two by two as well:
the interaction is what a pair costs beyond the sum of both.

Examples:
  attn ablate --model runs/sst2/model --task sst2 --out ablation.json
  attn ablate --model DIR --task notes.txt --split train --replace mean --pairs 3 --out pairs.json
  attn ablate --model DIR --task notes.txt --split train --groups --out groups.json";

#[derive(Debug, clap::Args)]
pub(crate) struct AblateArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    #[command(flatten)]
    pub(crate) replace: ReplaceArgs,

    /// Leave out key/value groups, with all query heads that read them, instead of query heads
    #[arg(long)]
    pub(crate) groups: bool,

    /// Leave out pairs, too, of the N heads (or groups) that raise the loss most
    #[arg(long, value_name = "N")]
    pub(crate) pairs: Option<usize>,

    /// Go without labels: the loss is KL(untouched, without)
    #[arg(long)]
    pub(crate) own_output: bool,

    /// Where to write what was found
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the weights that --init makes, of hidden tokens, and of the rows drawn by --replace resample
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

pub(super) const COMPARE_SCORES_HELP: &str = "\
Spearman's rank correlation and Kendall's tau of every two files, and the share of heads that the
best tenth of both have in common: of methods, seeds, tasks or checkpoints with the same heads.

Example:
  attn compare-scores s.michel.json s.taylor.json --out agreement.json";

#[derive(Debug, clap::Args)]
pub(crate) struct CompareScoresArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// OUT.json of `score-heads`, two at least
    #[arg(value_name = "SCORES.json", num_args = 2.., required = true)]
    pub(crate) scores: Vec<PathBuf>,

    /// Where to write the comparison
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,
}

pub(super) const PRUNE_CURVE_HELP: &str = "\
For every K the K heads with the highest scores are left out, then those with the lowest, and K
random heads, --draws times: of all heads, or K of each layer (--per layer), on equal terms. Nothing
is trained. The picture shows both against the band of random choices.

Examples:
  attn prune-curve --model runs/sst2/model --scores heads.json --task sst2 --out c.json --plot c.png
  attn prune-curve --model DIR --scores heads.json --task notes.txt --split train --out c.json";

#[derive(Debug, clap::Args)]
pub(crate) struct PruneCurveArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// OUT.json of `score-heads` of this model. May be repeated
    #[arg(long, value_name = "FILE", required = true)]
    pub(crate) scores: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    #[command(flatten)]
    pub(crate) replace: ReplaceArgs,

    /// K of all heads, or K of each layer
    #[arg(long, value_enum, default_value_t)]
    pub(crate) per: Per,

    /// The K, with commas between; every one where not given
    #[arg(long, value_name = "K", value_delimiter = ',')]
    pub(crate) remove: Vec<usize>,

    /// Random choices for each K: at least 20
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) draws: usize,

    /// Go without labels: the loss is KL(untouched, without)
    #[arg(long)]
    pub(crate) own_output: bool,

    /// Where to write the curve
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    /// Draw it, too
    #[arg(long, value_name = "OUT.png")]
    pub(crate) plot: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of random choices and ties, of hidden tokens, and of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// What heads are counted in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Per {
    /// Of all heads of the model
    #[default]
    Model,
    /// Of each layer
    Layer,
}

impl From<Per> for Scope {
    fn from(per: Per) -> Self {
        match per {
            Per::Model => Self::Global,
            Per::Layer => Self::Layer,
        }
    }
}

/// Which heads go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Which {
    /// Those with the lowest scores
    #[default]
    Bottom,
    /// Those with the highest scores
    Top,
    /// Any
    Random,
}

impl From<Which> for Order {
    fn from(which: Which) -> Self {
        match which {
            Which::Bottom => Self::Bottom,
            Which::Top => Self::Top,
            Which::Random => Self::Random,
        }
    }
}

pub(super) const PATCH_HELP: &str = "\
Activation patching, with m = ln p(answer) - ln p(wrong): a head's output in the corrupted prompt is
replaced by its output in the clean one (denoising), and the other way round (noising). A share of 1
is the whole difference between the prompts. Both have the same number of tokens. A decoder is asked
for the next token, an encoder for the prompt's one mask token; an answer is one token.

Example:
  attn patch \"a b\" \"b b\" --model DIR --answer a --wrong b --out patch.json";

#[derive(Debug, clap::Args)]
pub(crate) struct PatchArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// The prompt whose answer is --answer
    #[arg(value_name = "CLEAN")]
    pub(crate) clean: String,

    /// The prompt whose answer is --wrong, of as many tokens
    #[arg(value_name = "CORRUPTED")]
    pub(crate) corrupted: String,

    /// Model folder or Hub id
    #[arg(long, value_name = "DIR")]
    pub(crate) model: String,

    /// One token, its blank in front included
    #[arg(long, value_name = "A")]
    pub(crate) answer: String,

    /// The other one
    #[arg(long, value_name = "B")]
    pub(crate) wrong: String,

    /// What is replaced at a time: a head at all positions, or at one
    #[arg(long, value_enum, default_value_t)]
    pub(crate) by: PatchBy,

    /// Where to write what was found
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,

    /// Draw the shares of denoising, too, layers by heads
    #[arg(long, value_name = "OUT.png")]
    pub(crate) plot: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// What is patched at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PatchBy {
    #[default]
    Head,
    Position,
}

pub(super) const PRUNE_HELP: &str = "\
A head's slices of all matrices are cut away; a key/value head goes with its last query head. A
Llama that keeps as many heads in every layer, evenly grouped, is an ordinary folder that
transformers loads. Other models that have lost heads are folders of this program alone:
transformers has no words for them and refuses them. --full-shape writes the old shape with those
heads' columns of the output projection at zero: it loads anywhere, with the same logits, and saves
nothing.

--target cuts heads, in the order of --which, until the model has at most that share of its parameters, of the
attention's floating point operations, or of the measured time of a forward pass: params=0.8,
flops=0.5, latency=0.9. Time is taken of the whole and the cut model in turns, and what was chosen
is timed once more. --which random needs no scores. pruning.json in OUT says which heads went, and
what was measured.

--refit TASK fits the output projections of the layers anew, in closed form, to what they put out
before, on the task's train split: seconds, no training.

Examples:
  attn prune --model runs/sst2/model --scores heads.json --remove 6 --refit sst2 --out smaller
  attn prune --model DIR --heads 0-1,1-0 --out smaller
  attn prune --model DIR --which random --remove 1 --per layer --seed 3 --out drawn
  attn prune --model DIR --scores heads.json --remove 1 --per layer --refit notes.txt --out fitted";

#[derive(Debug, clap::Args)]
#[command(
    group = ArgGroup::new("going").required(true),
    override_usage = "attn prune [OPTIONS] --model <DIR|ID> --out <DIR> <--heads ...|--remove ...|--target ...>"
)]
pub(crate) struct PruneArgs {
    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// Model folder or Hub id; an adapter is merged into its base model
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// The heads that go: LAYER-HEAD, or LAYER-gGROUP for a key/value group with the query heads that read it
    #[arg(
        long,
        value_name = "HEADS",
        value_delimiter = ',',
        conflicts_with_all = ["scores", "remove", "target"],
        group = "going"
    )]
    pub(crate) heads: Vec<String>,

    /// OUT.json of `score-heads` of this model
    #[arg(long, value_name = "SCORES.json")]
    pub(crate) scores: Option<PathBuf>,

    /// Heads that go, by their scores or at random
    #[arg(long, value_name = "K", group = "going", conflicts_with_all = ["heads", "target"])]
    pub(crate) remove: Option<usize>,

    /// What the model may keep: params=SHARE, flops=SHARE or latency=SHARE
    #[arg(long, value_name = "WHAT=SHARE", group = "going", conflicts_with_all = ["heads", "remove"])]
    pub(crate) target: Option<String>,

    /// Which go first; random heads need no scores
    #[arg(long, value_enum, default_value_t, conflicts_with = "heads")]
    pub(crate) which: Which,

    /// K of all heads, or K of each layer
    #[arg(long, value_enum, default_value_t, conflicts_with = "heads")]
    pub(crate) per: Per,

    /// Write the old shape, the heads' columns of the output projection at zero
    #[arg(long, conflicts_with = "target")]
    pub(crate) full_shape: bool,

    /// Fit the output projections anew on this data set: a name of `attn list`, a file, a folder or a Hub id
    #[arg(long, value_name = "TASK")]
    pub(crate) refit: Option<String>,

    /// Columns and splits of data that is no known task: --set data.text=review. May be repeated
    #[arg(long, value_name = "TABLE.KEY=VALUE", requires = "refit")]
    pub(crate) set: Vec<String>,

    /// The split to fit on; the task's train split where not given
    #[arg(long, value_name = "NAME", requires = "refit")]
    pub(crate) split: Option<String>,

    /// Fit on its first rows, so many
    #[arg(long, value_name = "N", default_value_t = 2048, requires = "refit")]
    pub(crate) limit: usize,

    /// Most tokens of a text
    #[arg(long, value_name = "N", requires = "refit")]
    pub(crate) max_len: Option<usize>,

    /// How strongly projections are drawn to what they were, relative to the mean square of a channel
    #[arg(long, value_name = "X", default_value_t = 1e-3, requires = "refit")]
    pub(crate) ridge: f64,

    /// Rows and tokens of what --target counts or times: 16,64 where not given
    #[arg(long, value_name = "ROWS,TOKENS", value_delimiter = ',', requires = "target")]
    pub(crate) latency_of: Vec<usize>,

    /// What the weights are stored in; rounded where they are wider
    #[arg(long, value_enum, default_value_t)]
    pub(crate) dtype: Dtype,

    /// Threads of one operation; all cores where not given
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<std::num::NonZeroU16>,

    /// Seed of random heads and ties
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "heads")]
    pub(crate) seed: u64,

    /// The folder, new or empty; folders that are missing above it are made
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}
