//! What can be typed.

mod convert;
mod heads;

use std::{num::NonZeroU16, path::PathBuf};

use attn_data::needle::NeedleKind;
use attn_eval::MaskFill;
use clap::{ArgAction, Parser, Subcommand, ValueEnum};
use tch::{Device, Kind};

pub(crate) use convert::*;
pub(crate) use heads::*;

const EXAMPLES: &str = "\
Examples:
  attn finetune                                   a first run: a minute, no network
  attn finetune configs/finetune/sst2.toml        the same on a real data set
  attn finetune --set train.lr=1e-4 --seed 2      one setting changed
  attn eval --model runs/2026-01-31-default/model --task sst2 --out eval.json
  attn doctor                                     what to fix where something fails

A model is a Hugging Face folder (config.json, model.safetensors, tokenizer.json) or a Hub
id such as `distilbert/distilbert-base-uncased`. HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
HF_TOKEN and HF_ENDPOINT mean what they mean to the Hub's own tools.";

/// Attention surgery on pretrained transformers: load one, change its attention, fine-tune it, measure it.
#[derive(Debug, Parser)]
#[command(
    name = "attn",
    version,
    about = "Change the attention of a pretrained transformer, and know exactly what that did.",
    after_help = EXAMPLES,
    arg_required_else_help = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Say more on stderr; twice for everything. RUST_LOG=attn_core=debug chooses in detail
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = "Everywhere")]
    pub(crate) verbose: u8,

    /// Begin even where more memory is foreseen than is free: mostly less is taken
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) despite_memory: bool,

    /// Say nothing on stderr but errors
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Everywhere")]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune a pretrained model on labelled text, and report before and after
    #[command(after_long_help = FINETUNE_HELP)]
    Finetune(RunArgs),

    /// Train a causal or masked language model, from random weights or from one that is there
    #[command(after_long_help = PRETRAIN_HELP)]
    Pretrain(RunArgs),

    /// Change a language model's attention, and teach it to predict what it did before
    #[command(after_long_help = DISTILL_HELP)]
    Distill(RunArgs),

    /// Fine-tune or distil once per setting and seed of a grid, and compare the settings
    #[command(after_long_help = SWEEP_HELP)]
    Sweep(SweepArgs),

    /// Score a model on a task: accuracy of a classifier, perplexity of a language model
    #[command(after_long_help = EVAL_HELP)]
    Eval(EvalArgs),

    /// Test a changed language model against the one it was made of, and let both write
    #[command(after_long_help = EXPLAIN_HELP)]
    Explain(ExplainArgs),

    /// Measure every distilled student of a folder of runs beside its teacher, as one table
    #[command(after_long_help = LEADERBOARD_HELP)]
    Leaderboard(LeaderboardArgs),

    /// Score the heads of a model by what they do for a task
    #[command(after_long_help = SCORE_HEADS_HELP)]
    ScoreHeads(ScoreHeads),

    /// Leave heads out one by one, alone or in pairs, and say what each was worth
    #[command(after_long_help = ABLATE_HELP)]
    Ablate(AblateArgs),

    /// Say how far scores of heads agree
    #[command(after_long_help = COMPARE_SCORES_HELP)]
    CompareScores(CompareScoresArgs),

    /// Leave out more and more heads, best first, worst first and at random
    #[command(after_long_help = PRUNE_CURVE_HELP)]
    PruneCurve(PruneCurveArgs),

    /// Say which heads carry what tells two prompts apart
    #[command(after_long_help = PATCH_HELP)]
    Patch(PatchArgs),

    /// Remove heads, and write the smaller model
    #[command(after_long_help = PRUNE_HELP)]
    Prune(PruneArgs),

    /// Say what each head does: where it looks, along which syntactic relations, for which phenomena
    #[command(after_long_help = HEAD_ROLES_HELP)]
    HeadRoles(HeadRolesArgs),

    /// Compare the attention of each head before and after tuning, or any other change of the weights
    #[command(after_long_help = ATTENTION_SHIFT_HELP)]
    AttentionShift(AttentionShiftArgs),

    /// Hide facts in long texts, and see which of them a language model finds, by length and depth
    #[command(after_long_help = NEEDLE_HELP)]
    Needle(NeedleArgs),

    /// Run a model once on given token ids and write logits, attentions and hidden states
    #[command(after_long_help = FORWARD_FORMATS)]
    Forward(ForwardArgs),

    /// Turn texts into the token ids that `forward` reads, as JSON on stdout
    #[command(after_long_help = TOKENIZE_HELP)]
    Tokenize(TokenizeArgs),

    /// Write on from a prompt, token by token
    #[command(after_long_help = GENERATE_HELP)]
    Generate(GenerateArgs),

    /// Draw who attends to whom in a text, a picture a layer
    #[command(after_long_help = HEATMAP_HELP)]
    Heatmap(HeatmapArgs),

    /// What runs came to, side by side, and whether they differ by more than the rows that were drawn
    #[command(after_long_help = COMPARE_HELP)]
    Compare(CompareArgs),

    /// Runs and results as one HTML page that opens from disk: figures, pictures, attention to look into
    #[command(after_long_help = REPORT_HELP)]
    Report(ReportArgs),

    /// Draw result files and runs: maps of heads, grids of needles, curves of runs
    #[command(after_long_help = PLOT_HELP)]
    Plot(PlotArgs),

    /// Change the attention of a model, its weights as they are, and write it as a folder of its own
    #[command(after_long_help = SWAP_HELP)]
    Swap(SwapArgs),

    /// Give layers fewer key/value heads, grouped queries, or more, and write the model as a folder of its own
    #[command(after_long_help = CONVERT_HELP)]
    Convert(ConvertArgs),

    /// Choose the attention of each layer by what it costs and what the model loses, within a budget
    #[command(after_long_help = CHOOSE_HELP)]
    Choose(ChooseArgs),

    /// Write a model as a folder of its own: in another precision, in smaller files, an adapter merged
    #[command(after_long_help = SAVE_HELP)]
    Save(SaveArgs),

    /// Try on a model what every model owes its users: no future seen, padding ignored, heads where they belong
    #[command(after_long_help = VERIFY_HELP)]
    Verify(VerifyArgs),

    /// Check LibTorch, devices and folders, and say what to fix
    Doctor,

    /// List the attention kinds with their settings, and the data sets known by name
    List,

    /// Print a completion script: `attn completions bash > ~/.local/share/bash-completion/completions/attn`
    Completions {
        /// The shell it is for
        shell: clap_complete::Shell,
    },
}

const FORWARD_FORMATS: &str = "\
Formats:
  IDS.json   {\"input_ids\": [[5, 6, 7], [8, 9, 0]],
              \"attention_mask\": [[1, 1, 1], [1, 1, 0]],
              \"position_ids\": [[0, 1, 2], [0, 1, 1]],
              \"token_type_ids\": [[0, 0, 1], [0, 1, 0]]}
             All but the first are optional, the last is for BERT alone. All rows have one length: pad shorter ones, and
             set their attention_mask to 0 there. For a model with `cross` layers, \"source\": {\"input_ids\": ...}
             holds the sequences that they attend to, of a length of their own.
  MASK.json  {\"mask\": [[1, 0, 1, 1], [1, 1, 1, 1]]}
             Layers x heads, by rising number; 1 keeps a head, 0 removes it.
  OUT        `logits`, `attentions.{layer}` [batch, n_heads, queries, keys], heads by rising number,
             `hidden_states.{i}` [batch, seq_len, hidden_size] for i from 0 (what enters the
             first block) to n_layers; all in f32.

Example:
  attn tokenize --model results/models/tiny-mlm \"i hated the soup\" \"great\" > ids.json
  attn forward --model results/models/tiny-mlm --input-ids ids.json --out out.safetensors";

const TOKENIZE_HELP: &str = "\
Writes {\"input_ids\": [[...], ...], \"attention_mask\": [[...], ...]}, a row a text, special
tokens as the model takes them, shorter rows padded on the right.

Example:
  attn tokenize --model results/models/tiny-mlm --tokens \"i hated the soup\" > ids.json";

#[derive(Debug, clap::Args)]
pub(crate) struct TokenizeArgs {
    /// Model folder or Hub id; its weights are not needed
    #[arg(long, value_name = "DIR")]
    pub(crate) model: String,

    /// The texts
    #[arg(value_name = "TEXT", required_unless_present = "file")]
    pub(crate) texts: Vec<String>,

    /// A file with a text a line, after those typed
    #[arg(long, value_name = "F")]
    pub(crate) file: Option<PathBuf>,

    /// Show the tokens of each text on stderr, as the vocabulary has them; so does -v
    #[arg(long)]
    pub(crate) tokens: bool,
}

const GENERATE_HELP: &str = "\
Greedy unless --temperature is set; then draws, after --top-k and --top-p. The new text goes
to stdout as it comes, everything else to stderr. A text ends with the model's end-of-text
token, before the first --stop, or after --max-new-tokens.

Examples:
  attn generate --model openai-community/gpt2 \"Once upon a time\"
  attn generate --model DIR --temperature 0.8 --top-p 0.95 --seed 3 \"Once upon a time\"
  attn generate --model DIR --stop . --echo < prompt.txt";

#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR")]
    pub(crate) model: String,

    /// The text to go on from; read from stdin where not given, and the start of a text where empty
    #[arg(value_name = "PROMPT")]
    pub(crate) prompt: Option<String>,

    /// Most tokens to write; 64 where not given, or what the model has positions for
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,

    /// What logits are divided by before a token is drawn; 0 takes the likeliest one
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) temperature: f64,

    /// Draw from the K likeliest tokens alone
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,

    /// Draw from the likeliest tokens that together have this share of the probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f64,

    /// Make tokens that have occurred less likely: above 1, as transformers has it
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub(crate) repetition_penalty: f64,

    /// End before this text. May be repeated
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,

    /// Write the prompt, too
    #[arg(long)]
    pub(crate) echo: bool,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the draws, and of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ForwardArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR")]
    pub(crate) model: String,

    /// Token ids, as JSON (see Formats in --help)
    #[arg(long, value_name = "IDS.json")]
    pub(crate) input_ids: PathBuf,

    /// Where to write the tensors, as safetensors; folders that are missing are made
    #[arg(long, value_name = "OUT.safetensors")]
    pub(crate) out: PathBuf,

    /// Write the attention weights of every layer, before any head mask
    #[arg(long)]
    pub(crate) attentions: bool,

    /// Write the attention weights as a table: Arrow IPC, a row a query (results/SCHEMA.md)
    #[arg(long, value_name = "OUT.arrow")]
    pub(crate) attention_table: Option<PathBuf>,

    /// Write the hidden states: what enters the first block, then what leaves each
    #[arg(long)]
    pub(crate) hidden_states: bool,

    /// Heads to remove, as JSON (see Formats in --help)
    #[arg(long, value_name = "MASK.json")]
    pub(crate) head_mask: Option<PathBuf>,

    /// Positions where IDS.json gives none
    #[arg(long, value_enum, default_value_t)]
    pub(crate) positions: Positions,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0, requires = "init")]
    pub(crate) seed: u64,
}

const FINETUNE_HELP: &str = "\
CONFIG is a TOML file; those in configs/finetune/ say what they show and what they cost.
Without one, configs/finetune/default.toml runs. Its tables:
  model, head      the pretrained model, and whether it gets a new classifier
  [prompt]         name, template, answers, chat: a language model answers in its own words
  [data]           source (a name of `attn list`, a file, a folder, a Hub id), columns, splits
  [examples]       max_len, limit, few_shot, hold_out, hold_out_by
  [attention]      kind and its settings; [surgery] layers says where
  [train]          lr, epochs, batch_size, schedule, freeze, seed, ...
configs/README.md has every setting with its default, unit and meaning.

--set TABLE.KEY=VALUE puts VALUE on top of CONFIG. A table that names another `kind` or
`source` replaces the whole, as the other keys described that one. Nothing behind `=`
leaves the setting away: --set examples.hold_out= ; two quotes are the empty text.

The run's folder holds config.toml (complete: feeding it back repeats the run),
metrics.jsonl, summary.json, predictions.jsonl, env.json, plots/ and model/; checkpoints/ until
the run has finished. Ctrl-C saves a checkpoint and exits with code 130; --resume goes on.

Examples:
  attn finetune
  attn finetune configs/finetune/sst2.toml --out runs/sst2
  attn finetune --out runs/sst2 --resume
  attn finetune --set attention.kind=window --set 'surgery.layers=[0, 1]'
  attn finetune --set data.source=reviews.csv --set data.text=review --set data.label=stars \\
                --set examples.report_hold_out=0.2
  attn finetune configs/finetune/kshot.toml --set examples.few_shot=8";

const PRETRAIN_HELP: &str = "\
CONFIG is a TOML file, needed but for --resume; those in configs/pretrain/ say what they
show and what they cost. Its tables:
  objective        causal (decoders) or masked (encoders)
  [init]           the fields of the model's config.json
  [tokenizer]      style and vocab_size to train one, or from = \"folder or Hub id\"
  model            in place of both: a folder or Hub id to go on from
  [needles]        documents with hidden facts beside the text
  [data]           source and columns of the text
  [examples]       max_len, limit, hold_out
  [train]          lr, epochs, batch_size, schedule, seed, ...
configs/README.md has every setting with its default, unit and meaning.

--set TABLE.KEY=VALUE puts VALUE on top of CONFIG. A table that names another `kind` or
`source` replaces the whole, as the other keys described that one. Nothing behind `=`
leaves the setting away: --set train.select= ; two quotes are the empty text.

Examples:
  attn pretrain configs/pretrain/tiny-mlm.toml --out runs/tiny-mlm
  attn pretrain configs/pretrain/tiny-mlm.toml --set data.source=notes.txt --set train.epochs=3";

const DISTILL_HELP: &str = "\
CONFIG is a TOML file, needed but for --resume; those in configs/distill/ say what they show and
what they cost. The teacher is `model` as it is, the student `model` with its attention changed.
  model            a language model: a folder or Hub id
  teacher          who teaches in its place, where the attention of `model` was changed before
  [attention]      kind and its settings; [surgery] layers says where
  [data]           source and columns of the text
  [examples]       max_len, limit, hold_out
  [transfer]       trains what the attention kind adds, each layer on what the teacher's gets
  [tune]           then trains the whole, or adapters ([tune.lora])
A stage has a `loss`, weights of losses (forward_kl, reverse_kl, cross_entropy, hidden_mse, ...), and
a `train` table as for `attn finetune`. configs/README.md has every setting with its default.

summary.json holds the distance to the teacher after the swap and after each stage: KL both ways,
agreement, loss, by position.

Examples:
  attn distill configs/distill/sample.toml --out runs/taught
  attn distill configs/distill/window.toml --set attention.size=4
  attn distill --out runs/taught --resume";

const SWAP_HELP: &str = "\
KIND is one of `attn list`. The pretrained projections of queries, keys, values and output stay; what
the kind adds starts from them. Layers that are not named keep what they have, so that a second
`swap` mixes kinds. Everything else takes the folder as any other model.

Examples:
  attn swap --model openai-community/gpt2 --attention window --set size=128 --out gpt2-window
  attn swap --model DIR --attention gated --layers 0-1 --out DIR2
  attn eval --model gpt2-window --task wikitext-2 --against openai-community/gpt2 --out kl.json";

const CHOOSE_HELP: &str = "\
CANDIDATES is a TOML file of [[candidate]] tables with `attention.kind` and its settings, such as
configs/attention/choose.toml. Each is put into each layer, the others untouched, and the model's
predictions are compared: KL(model, changed), nats per token. Within --budget each layer gets a
candidate, or stays as it is, so that the KL adds up to the least there is: exactly, by the sum.
Without --budget each layer gets its nearest candidate, and none stays. `single_head` with
from = \"best\" and no `head` stands for every head: so the best one is found.

DIR/model is the changed model, for every command; DIR/choice.json has what was measured
(results/SCHEMA.md), the chosen mixture itself, too.

Examples:
  attn choose configs/attention/choose.toml --model DIR --task notes.txt --split train \\
              --limit 40 --budget state_bytes=50% --out mixed
  attn eval --model mixed/model --task notes.txt --split train --against DIR --out kl.json";

const COMPARE_HELP: &str = "\
A line a run: accuracy, KL, loss and perplexity as its summary.json has them, with their intervals. Runs and
evaluations that kept their predictions on the same rows are tested against the first: the difference of
accuracies with its paired bootstrap interval, and McNemar's exact p. Evaluations of language models on the
same text: the difference of losses per token with its interval. Where there is no test, a note says why.

Examples:
  attn compare results/2026-11-23-sample-default results/2026-11-22-sample-default
  attn compare results/2026-11-21-needle-llama/9 results/2026-11-21-needle-llama/10 --format csv";

#[derive(Debug, clap::Args)]
pub(crate) struct CompareArgs {
    /// Folders of runs, or results of `attn eval`; the first is what others are held against
    #[arg(value_name = "RUN", required = true, num_args = 2..)]
    pub(crate) runs: Vec<PathBuf>,

    /// The form of the table
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: TableFormat,

    /// Where to write it; standard output where not given
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
}

/// Forms of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TableFormat {
    /// For a terminal
    #[default]
    Text,
    /// With commas
    Csv,
    /// All figures, unrounded
    Json,
    /// For GitHub
    Markdown,
    /// For papers, with booktabs
    Latex,
}

const REPORT_HELP: &str = "\
The page has a table of all figures, the pictures of each run and result with their numbers behind them, the
configs, where the runs took place, and attention to look into: each attention.json (attn heatmap --grid) by
layer, head and token, those of one text side by side. Of a folder that is no run it takes every run and result
in it. It asks the network for nothing.

Examples:
  attn report results/2026-11-23-sample-default results/2026-11-21-score-heads/gpt2.json \\
              --out report.html
  attn report results/2026-11-22-patch --out patch.html
  attn report results/2026-11-22-dynamic-heads/gpt2-05.json --title Dynamic --out dynamic.html";

#[derive(Debug, clap::Args)]
pub(crate) struct ReportArgs {
    /// Folders of runs, result files and attention.json, or folders with any of these
    #[arg(value_name = "RUN|FILE|DIR", required = true)]
    pub(crate) results: Vec<PathBuf>,

    /// The heading; the names of what is reported where not given
    #[arg(long, value_name = "TEXT")]
    pub(crate) title: Option<String>,

    /// Where to write the page
    #[arg(long, value_name = "OUT.html")]
    pub(crate) out: PathBuf,
}

const PLOT_HELP: &str = "\
Draws what a command wrote as --out: a result file (.json), the folder of a run or its metrics.jsonl, or a
table of timings (.csv). The kind follows from what the file holds; several files of one kind share a
picture: two files of scores with their difference, runs with a curve each. The pictures go beside the
first file, under its name, and their paths are printed. --text prints heat maps in place of that, as
coloured blocks where stdout is a terminal.

Examples:
  attn plot results/2026-11-21-score-heads/gpt2.json --out heads.png
  attn plot results/2026-11-21-score-heads/gpt2.json --text
  attn plot results/2026-11-21-needle-llama/9 results/2026-11-21-needle-llama/10 --out curves
  attn plot results/2026-11-23-gqa/retrieval/whole.scores.json \\
            results/2026-11-23-gqa/retrieval/low-rank-2.scores.json --theme dark --out change.svg";

#[derive(Debug, clap::Args)]
pub(crate) struct PlotArgs {
    /// Result files, or folders of runs
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,

    /// What to draw of them; what their content says where not given
    #[arg(long, value_name = "KIND", value_parser = clap::builder::PossibleValuesParser::new(crate::plot::kinds()))]
    pub(crate) kind: Option<String>,

    /// The picture, or a folder for several
    #[arg(long, value_name = "OUT.png|OUT.svg|DIR")]
    pub(crate) out: Option<PathBuf>,

    /// The ground
    #[arg(long, value_enum, default_value_t)]
    pub(crate) theme: ThemeChoice,

    /// Vectors in place of pixels, where --out does not say
    #[arg(long)]
    pub(crate) svg: bool,

    /// Print heat maps as text
    #[arg(long, conflicts_with_all = ["out", "svg"])]
    pub(crate) text: bool,
}

/// What pictures are drawn on.
#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
pub(crate) enum ThemeChoice {
    /// Dark on white
    #[default]
    Light,
    /// Light on near-black
    Dark,
}

const HEATMAP_HELP: &str = "\
Writes layer-L.png, or layer-L-head-H.png where heads are named, and prints the paths. A row is a token that
attends, a column one that is attended to: in layers of the kind `cross` a token of the first text. Of kinds
without weights of their own these are the coefficients of the values, which need not sum to 1.

Weights alone mislead: a head may look at a token and take nothing from it. --measure norm draws how much
it takes (Kobayashi et al. 2020, https://aclanthology.org/2020.emnlp-main.574), rollout where it came from
through all layers below (Abnar and Zuidema 2020, https://aclanthology.org/2020.acl-main.385).
DIR/attention.json has the numbers: attn plot draws it again, or the difference of two models.

Examples:
  attn heatmap --model results/models/tiny-mlm --text \"i hated the soup\" --out maps
  attn heatmap --model results/models/tiny-mlm --text \"i hated the soup\" --measure norm --grid \\
               --out maps-2
  attn heatmap --model runs/mine/model --text \"hated it\" --text-pair \"good\" --layers 0 --out maps";

#[derive(Debug, clap::Args)]
pub(crate) struct HeatmapArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// The text, or the first of two
    #[arg(long, value_name = "TEXT")]
    pub(crate) text: String,

    /// The second text of models that read pairs
    #[arg(long, value_name = "TEXT")]
    pub(crate) text_pair: Option<String>,

    /// The layers to draw, counted from 0: 0,3-5. All where not given
    #[arg(long, value_name = "LAYERS")]
    pub(crate) layers: Option<String>,

    /// The heads to draw, each by itself, counted from 0: 0,2. The mean over all where not given
    #[arg(long, value_name = "HEADS", value_delimiter = ',')]
    pub(crate) heads: Vec<i64>,

    /// What to draw
    #[arg(long, value_enum, default_value_t)]
    pub(crate) measure: HeatmapMeasure,

    /// One picture of all heads, or of those named, in place of one each
    #[arg(long)]
    pub(crate) grid: bool,

    /// Vectors in place of pixels
    #[arg(long)]
    pub(crate) svg: bool,

    /// The ground
    #[arg(long, value_enum, default_value_t)]
    pub(crate) theme: ThemeChoice,

    /// The folder of the pictures; made where it is missing
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// What `attn heatmap` draws.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HeatmapMeasure {
    /// What values are weighed by
    #[default]
    Weights,
    /// The length of what a head takes from each token, the weight times its value through the output projection
    Norm,
    /// How much of each token is in each position behind each layer, if heads count alike
    Rollout,
    /// How spread the weights of each head are: a map of layers and heads
    Entropy,
    /// mask_mixture: what each mask counts, and the mask that they make
    Masks,
}

impl HeatmapMeasure {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Norm => "norm",
            Self::Rollout => "rollout",
            Self::Entropy => "entropy",
            Self::Masks => "masks",
        }
    }

    /// Above a picture of several maps.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Weights => "Attention",
            Self::Norm => "Lengths of what heads take from tokens",
            Self::Rollout => "Attention rolled out",
            Self::Entropy => "Entropy",
            Self::Masks => "Masks",
        }
    }

    /// Beside the colours.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::Weights => "weight",
            Self::Norm => "\u{2016}\u{3B1} v W_O\u{2016}",
            Self::Rollout => "share",
            Self::Entropy => "nats",
            Self::Masks => "coefficient",
        }
    }

    /// The name of a file; that of weights is plain.
    pub(crate) fn file(self, name: &str) -> String {
        match self {
            Self::Weights => name.to_owned(),
            other => format!("{}-{name}", other.name()),
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct ChooseArgs {
    /// The candidates, as TOML
    #[arg(value_name = "CANDIDATES")]
    pub(crate) config: PathBuf,

    /// Model folder or Hub id: a language model
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    /// The most that all layers may cost: state_bytes=N or flops=N, or a share of dense attention, state_bytes=25%
    #[arg(long, value_name = "COST=N")]
    pub(crate) budget: Option<String>,

    /// The length in tokens at which cost is counted; the most that a row has where not given
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<u32>,

    /// The folder, new or empty; folders that are missing above it are made
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of what kinds add and draw, of the weights that --init makes, and of the tokens hidden from a masked language
    /// model
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SwapArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// The attention to put in its place: a name of `attn list`
    #[arg(long, value_name = "KIND")]
    pub(crate) attention: String,

    /// A setting of the kind: --set size=128. May be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// The layers to change, counted from 0: 0,3-5. All where not given
    #[arg(long, value_name = "LAYERS")]
    pub(crate) layers: Option<String>,

    /// What the weights are stored in; rounded where they are wider
    #[arg(long, value_enum, default_value_t)]
    pub(crate) dtype: Dtype,

    /// Seed of what the kind adds and draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// The folder, new or empty; folders that are missing above it are made
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

const EVAL_HELP: &str = "\
OUT.json holds the accuracy with its 95 % interval, counts per class and every prediction;
of a language model the loss in nats per token and the perplexity, with what was counted; with
a prompt the log-likelihood of each answer, as lm-evaluation-harness counts it, and accuracy by
it (acc), and by it per byte of the answer (acc_norm where answers are ASCII).
Data that `attn list` does not name is described as in the [data] table of a config
(configs/README.md). A file without a `split_column` is one split, `train`.

--task blimp asks which of two sentences is likelier, as a sum over its tokens: the share of pairs
of which that is the good one, all, by field, phenomenon and paradigm, of the first --limit pairs
of each paradigm; --set data.source=DIR where the data stands elsewhere, a folder a paradigm.

Examples:
  attn eval --model runs/sst2/model --task sst2 --out eval.json
  attn eval --model openai-community/gpt2 --task wikitext-2-raw --out gpt2.json
  attn eval --model openai-community/gpt2 --task sst2 --prompt sst2 --out prompt.json
  attn eval --model openai-community/gpt2 --task blimp --limit 100 --out blimp.json
  attn eval --model DIR --task notes.txt --split train --conventions --out perplexity.json
  attn eval --model runs/mine/model --task reviews.csv --split train \\
            --set data.text=review --set data.label=stars --out eval.json";

const SWEEP_HELP: &str = "\
FILE is a TOML file:
  base = \"default.toml\"            a config of `attn finetune` or `attn distill`, beside FILE
  seeds = [0, 1, 2]                 the base's own where not given
  [grid]                            each setting with its values; every combination is run
  train.lr = [2.5e-4, 5e-4]
  train.epochs = [4]
  [[run]]                           a setting that the grid is run under, as often as wanted
  name = \"window\"
  attention.kind = \"window\"

One folder a run, DIR/SETTING,seed=N, as the base's command leaves it. The same command goes on
where it was stopped: runs that have finished are kept, one that was begun goes on from its
last checkpoint. Ctrl-C stops with a checkpoint and exits with code 130. Where a run fails the
others go on, and the exit code is 1. The table at the end stands in DIR/sweep.json and, a line a
run, in DIR/sweep.csv (results/SCHEMA.md).

Examples:
  attn sweep configs/sweep/sample.toml --dry-run
  attn sweep configs/sweep/sample.toml --out runs/rates
  attn sweep configs/sweep/sample.toml --out runs/short --set train.max_steps=20";

#[derive(Debug, clap::Args)]
pub(crate) struct SweepArgs {
    /// The base config, the settings and the seeds, as TOML (see below)
    pub(crate) file: PathBuf,

    /// Change one setting of every run: --set train.epochs=2. May be repeated
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// The folder of all runs, new, empty, or that of the sweep to go on with. Where not given: runs/NAME, by FILE's name
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// cpu, cuda, cuda:N, or auto (a GPU where there is one)
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,

    /// List the runs, and how long they may take, and run none
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RunArgs {
    /// The run's settings, as TOML
    pub(crate) config: Option<PathBuf>,

    /// Change one setting of CONFIG: --set train.lr=1e-4. May be repeated, in any order
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// The run's folder, new or empty; folders that are missing are made. Where not given: runs/DATE-NAME, with the
    /// attention kind behind it where the config sets one and no name was chosen
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// cpu, cuda, cuda:N, or auto (a GPU where there is one)
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,

    /// The run's seed: short for --set train.seed=N
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,

    /// Go on with the run in --out from its last checkpoint, with the settings it began with
    #[arg(long, requires = "out")]
    pub(crate) resume: bool,

    /// The process without which the run ends, too: the sweep that started it
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) parent: Option<i32>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EvalArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    /// Where to write the result; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    /// The model that this one was made of: say how far their predictions of the text are apart
    #[arg(long, value_name = "DIR|ID", conflicts_with = "prompt")]
    pub(crate) against: Option<String>,

    /// Tell the perplexity of running text by every convention: windows by context, by half of it, by page as
    /// lm-evaluation-harness; raw and detokenised; per token, word and byte
    #[arg(long)]
    pub(crate) conventions: bool,

    /// Put each row as a prompt, and take the answer that is likeliest: sst2, mnli, mnli_chat, or what
    /// --set prompt.template=TEXT says (configs/README.md)
    #[arg(long, value_name = "NAME")]
    pub(crate) prompt: Option<String>,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the weights that --init makes, and of the tokens hidden from a masked language model
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

const EXPLAIN_HELP: &str = "\
A low KL on given text does not say that a model writes like the other. The tests, each with its
value, the values that pass, and a verdict:
  future_leak                       outputs move when a later token changes
  best_shift                        the other's predictions fit best 1 or 2 places away
  free_running_over_teacher_forced  KL on text it drew itself over KL on the rows: at most 2
  rep_4                             repeated 4-grams of its greedy texts: at most twice the other's
                                    (not run where the other's are half or more)
  entropy_ratio                     entropy of its predictions over the other's: 0.7 to 1.4
The bounds are rules of thumb, and none judges sense: a model that sees no token but its own can
pass all. Of a masked language model the last alone is run; the others say
why not. Behind them stand the figures of what both write, greedy and drawn by their
probabilities: rep-4, distinct-n, perplexity by the untouched model, and the share of the prompt's
names and numbers that come up again; and samples side by side. OUT.json has all of it.

The exit code is 0 where no test failed, 1 where one did (OUT.json is written all the same).

Examples:
  attn explain --model runs/mine/model --against runs/mine/model --task wikitext-2 --out e.json
  attn explain --model DIR --against DIR --task notes.txt --split train --limit 200 --out e.json";

#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// The model that it was made of
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) against: String,

    #[command(flatten)]
    pub(crate) rows: RowArgs,

    /// Where to write the result; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    /// Texts that each model writes, greedy and drawn
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) prompts: usize,

    /// Tokens of a prompt, the first of a row; 32 where not given, of short rows a quarter
    #[arg(long, value_name = "N")]
    pub(crate) prompt_len: Option<usize>,

    /// Most tokens to write; 64 where not given, or what the model has positions for
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,

    /// Texts of each way to print
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) samples: usize,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of what is drawn, of hidden tokens, and of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

const VERIFY_HELP: &str = "\
A line a law: whether it held, the largest error with what is allowed, and where it was. Of the folder: config,
tokenizer and embedding fit, every tensor used, tied weights one, values finite, layers of their own, tokens that
come back, saved and loaded again to the bit. Of the model: no future seen, by the model and by each layer;
predictions of the next token; padding in front and behind, batches and gates of one change nothing; decoding is a
full pass. Of heads: one that is removed is one that is masked, its columns of the output projection are its own,
values may be turned, queries and keys together, shared heads repeated, heads that are alike merged. Of training:
gradients of its loss are those of finite differences, a step moves what is trained alone. Of each attention kind
its own laws, in f64.

--quick reads 32 tokens a row, and leaves out heads, training, decoding, kinds, and all that needs a second model in
memory; --full tries every head, more parameters, and texts of up to 512 tokens: of a large model an hour. With
--against: whether predictions fit best where they are aligned, whether the loss of distillation is the KL from the
other model to this one, whether key/value heads that are copies compute the same; and which fields of
config.json and which tensors differ, and in which block hidden states first leave the other model's,
which breaks no law and is no reason for an exit code. The text is the bundled one unless --text names another.

The exit code is 0 where no law is broken, 1 where one is (OUT.json is written all the same), or where the folder
cannot be loaded: OUT.json then holds the law that it breaks, and the error says why. What a broken law mostly
means, and what to do, stands in docs/Methodology.md, section 2.

Examples:
  attn verify --model results/models/wikitext-gpt2
  attn verify --model results/models/needle-llama --quick --out verify.json
  attn verify --model results/models/wikitext-gpt2 --against results/models/wikitext-gpt2 --full";

#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    /// Model folder or Hub id
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// The model that it was made of
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) against: Option<String>,

    /// What is cheap alone: weights, tokens, the future, padding, batches, gates
    #[arg(long, conflicts_with = "full")]
    pub(crate) quick: bool,

    /// Every head, more parameters, longer texts
    #[arg(long)]
    pub(crate) full: bool,

    /// A text of the kind that the model is used on
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,

    /// Where to write the result; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

impl VerifyArgs {
    /// 0 for quick, 1 as it is, 2 for full.
    pub(crate) fn size(&self) -> usize {
        match (self.quick, self.full) {
            (true, _) => 0,
            (_, false) => 1,
            (_, true) => 2,
        }
    }
}

const LEADERBOARD_HELP: &str = "\
DIR holds runs of `attn distill`, such as a sweep of them. OUT.csv has a line for the teacher and
one a run (results/SCHEMA.md): from the run's summary KL at the swap, after transfer and after
tuning; measured here, on the same rows for all, KL, perplexity and agreement, what `attn explain`
tells of its texts, BLiMP, the tokens that it decodes in a second, and the bytes that it keeps
between tokens after 1,024 and 16,384 of them, each layer fed by itself, as a table of positions
would end before. A run that another model taught is refused. OUT.csv is written anew, whole,
after each run.

Examples:
  attn leaderboard runs/attention --against DIR --task wikitext-2 --out table.csv";

#[derive(Debug, clap::Args)]
#[command(mut_arg("init", |arg| arg.hide(true)))]
pub(crate) struct LeaderboardArgs {
    /// The folder of runs
    pub(crate) dir: PathBuf,

    /// The teacher of all of them
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) against: String,

    /// The text to test on and to write on from: a name of `attn list`, a file, a folder or a Hub id
    #[arg(long, value_name = "TASK")]
    pub(crate) task: String,

    /// The split of it; its validation split where not given
    #[arg(long, value_name = "NAME")]
    pub(crate) split: Option<String>,

    /// Where to write the table; folders that are missing are made
    #[arg(long, value_name = "OUT.csv")]
    pub(crate) out: PathBuf,

    /// Blocks of text to test on
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) rows: usize,

    /// Length of a block in tokens; 512 where not given, or what the model has positions for
    #[arg(long, value_name = "N")]
    pub(crate) max_len: Option<usize>,

    /// Texts that each model writes, greedy and drawn
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) prompts: usize,

    /// Most tokens of a text
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) max_new_tokens: usize,

    /// Pairs of each paradigm of BLiMP; 0 leaves it out, and its columns empty
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) blimp_pairs: usize,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
}

/// Where a model runs, and with which weights.
#[derive(Debug, clap::Args)]
pub(crate) struct ComputeArgs {
    /// Threads of one operation; all cores where not given. Small models are faster with 1, above all on a busy machine
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroU16>,

    /// What to compute in, whatever the weights are stored in
    #[arg(long, value_enum, default_value_t)]
    pub(crate) dtype: Dtype,

    /// cpu, cuda, cuda:N, or auto (a GPU where there is one)
    #[arg(long, default_value = "auto")]
    pub(crate) device: String,

    /// Make the weights anew from the config alone: what a result is to be compared with
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) init: Option<Init>,
}

impl ComputeArgs {
    /// The device, once the threads are set.
    pub(crate) fn device(&self) -> anyhow::Result<Device> {
        if let Some(threads) = self.threads {
            tch::set_num_threads(threads.get().into());
        }
        Ok(attn_torch::device(&self.device)?)
    }
}

/// Rows that a model is scored on.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RowArgs {
    /// A data set: a name of `attn list`, a file, a folder or a Hub id
    #[arg(long, value_name = "TASK")]
    pub(crate) task: String,

    /// The split to score; the task's validation split where not given
    #[arg(long, value_name = "NAME")]
    pub(crate) split: Option<String>,

    /// Score the first N rows of the data alone: of running text lines, of which blocks are then made
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,

    /// Columns and splits of data that is no known task: --set data.label=stars. May be repeated
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Most tokens of a text; the length of the blocks that running text is cut into for language models
    #[arg(long, value_name = "N")]
    pub(crate) max_len: Option<usize>,

    /// Score each text by itself, cut to --max-len, instead of texts joined and cut into blocks
    #[arg(long)]
    pub(crate) by_text: bool,

    /// Rows that share a forward pass: changes speed and memory alone
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) batch_size: usize,
}

const SAVE_HELP: &str = "\
The folder holds config.json, the weights and the tokenizer, as other tools load them.

Example:
  attn save --model runs/mine/model --dtype f16 --out mine-f16";

#[derive(Debug, clap::Args)]
pub(crate) struct SaveArgs {
    /// Model folder or Hub id; an adapter is merged into its base model
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// What the weights are stored in; rounded where they are wider
    #[arg(long, value_enum, default_value_t)]
    pub(crate) dtype: Dtype,

    /// Most MiB of weights in one file; a tensor that is larger gets a file of its own
    #[arg(long, value_name = "N")]
    pub(crate) max_shard_mib: Option<u64>,

    /// The folder, new or empty; folders that are missing above it are made
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

const NEEDLE_HELP: &str = "\
Each document is text of the data set with one needle between two of its sentences, and the
question for it at the end; keys and answers are drawn at random by --seed. An answer counts
where greedy decoding gives it word for word. Kinds of needles:
  repeat     a list of words that is begun once more
  passkey    a number of five digits
  sentence   a statement that ends in 3 to 6 words
The model also writes its answers, greedily, which count by ROUGE-1 recall and word for word.
OUT.json holds the share of each length and depth with its 95 % interval, and every trial.

With --mask-heads the best K heads of a score are masked, then random sets of as many others. p is
the share of random sets, this one counted, that leave as little: 1/21 is the least that 20 can give.

Examples:
  attn needle --model runs/mine/model --haystack wikitext-2 --lengths 128,256 --out needle.json
  attn needle --model DIR --haystack notes.txt --split train --lengths 128 --out needle.json
  attn needle --model DIR --haystack notes.txt --split train --needles needles.jsonl \\
              --lengths 128 --out needle.json
  attn needle --model runs/mine/model --haystack wikitext-2 --lengths 128,256 \\
              --mask-heads heads.json --top 2 --out masked.json";

#[derive(Debug, clap::Args)]
pub(crate) struct NeedleArgs {
    /// Model folder or Hub id, of a decoder with its language-model head
    #[arg(long, value_name = "DIR|ID")]
    pub(crate) model: String,

    /// The text to hide needles in: a name of `attn list`, a file, a folder or a Hub id. A text file, or a folder of them, is
    /// read whole where no --split is given
    #[arg(long, value_name = "DATA")]
    pub(crate) haystack: String,

    #[command(flatten)]
    pub(crate) flags_file: FlagsFile,

    /// The split of it; its validation split where not given
    #[arg(long, value_name = "NAME")]
    pub(crate) split: Option<String>,

    #[command(flatten)]
    pub(crate) documents: DocumentArgs,

    /// Mask the best heads of a score (`attn score-heads`) and random others, and count again
    #[arg(long, value_name = "SCORES.json", requires = "top")]
    pub(crate) mask_heads: Option<PathBuf>,

    /// Heads to mask at once
    #[arg(long, value_name = "K", requires = "mask_heads")]
    pub(crate) top: Option<usize>,

    /// Sets of as many heads to mask instead, drawn among all others
    #[arg(long, value_name = "N", default_value_t = 20, requires = "mask_heads")]
    pub(crate) random_draws: usize,

    /// What a masked head is left with: no output, or a query of zeros, with which it attends to all tokens alike
    #[arg(long, value_enum, default_value_t, requires = "mask_heads")]
    pub(crate) mask: HeadMask,

    /// Draw the grid: MODEL_block0.png and, with --mask-heads, MODEL_block_topK.png and MODEL_block_randomK.png, of answers'
    /// ROUGE-1 recall in %
    #[arg(long, value_name = "DIR")]
    pub(crate) pictures: Option<PathBuf>,

    /// Where to write the result; folders that are missing are made
    #[arg(long, value_name = "OUT.json")]
    pub(crate) out: PathBuf,

    /// Columns and splits of data that is no known task: --set data.text=story. May be repeated
    #[arg(long, value_name = "TABLE.KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Documents that share a forward pass: changes speed and memory alone
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) batch_size: usize,

    #[command(flatten)]
    pub(crate) compute: ComputeArgs,

    /// Seed of the documents, and of the weights that --init makes
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Flags that a file holds.
#[derive(Debug, clap::Args)]
pub(crate) struct FlagsFile {
    /// Take flags from a file of `flag = value`, as those in configs/heads/; what is typed goes before
    /// it, and takes away flags that cannot stand beside it
    #[arg(long = "config", value_name = "FLAGS.toml")]
    pub(crate) flags_file: Option<PathBuf>,
}

/// Which documents with needles are made, and how their questions are answered.
#[derive(Debug, clap::Args)]
pub(crate) struct DocumentArgs {
    /// What is hidden
    #[arg(long, value_enum, value_delimiter = ',', default_value = "passkey,sentence")]
    pub(crate) kinds: Vec<Needle>,

    /// Hide the needles of this file instead, each in turn: a JSON object a line with `needle`, `question` and `real_needle`,
    /// the answer in the words of the needle
    #[arg(long, value_name = "NEEDLES.jsonl", conflicts_with = "kinds")]
    pub(crate) needles: Option<PathBuf>,

    /// How the questions of --needles are asked: {} is the question, \n a line break
    #[arg(
        long,
        value_name = "TEXT",
        requires = "needles",
        default_value = "Based on the content of the book, Question: {}\\nAnswer:"
    )]
    pub(crate) template: String,

    /// Needles beside the one that is asked for, anywhere in the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) distractors: usize,

    /// Most tokens of a document; one is shorter by less than a sentence
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "128,256,512,1024")]
    pub(crate) lengths: Vec<usize>,

    /// Depths of the needle, evenly from the start of the text to its end
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) depths: usize,

    /// Documents of each kind (or needle of --needles), length and depth
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) trials: usize,

    /// Most tokens of a written answer, which ends with its line; 0 writes none
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) max_new_tokens: usize,
}

/// What masked heads are left with.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum HeadMask {
    #[default]
    Zero,
    Uniform,
}

impl From<HeadMask> for MaskFill {
    fn from(mask: HeadMask) -> Self {
        match mask {
            HeadMask::Zero => Self::Zero,
            HeadMask::Uniform => Self::Uniform,
        }
    }
}

/// What is hidden in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Needle {
    Repeat,
    Passkey,
    Sentence,
}

impl From<Needle> for NeedleKind {
    fn from(needle: Needle) -> Self {
        match needle {
            Needle::Repeat => Self::Repeat,
            Needle::Passkey => Self::Passkey,
            Needle::Sentence => Self::Sentence,
        }
    }
}

/// Positions where none are given.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum Positions {
    /// Count real tokens: padding then changes nothing
    #[default]
    Count,
    /// 0, 1, 2, ... padding or not, as transformers' bare forward
    Arange,
}

impl From<Positions> for attn_core::Positions {
    fn from(positions: Positions) -> Self {
        match positions {
            Positions::Count => Self::Count,
            Positions::Arange => Self::Arange,
        }
    }
}

/// Where weights come from, if not from the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Init {
    /// Normally distributed, as the architecture starts its training
    Random,
}

/// What to compute in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    /// 32 bits: the fast one on most CPUs
    #[default]
    F32,
    /// 16 bits with a narrow range
    F16,
    /// 16 bits with the range of f32
    Bf16,
    /// 64 bits: to tell rounding from mistakes
    F64,
}

impl From<Dtype> for Kind {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::Float,
            Dtype::F16 => Self::Half,
            Dtype::Bf16 => Self::BFloat16,
            Dtype::F64 => Self::Double,
        }
    }
}

/// The name of a kind as `--dtype` has it.
pub(crate) fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "f16",
        Kind::BFloat16 => "bf16",
        Kind::Double => "f64",
        _ => "f32",
    }
}
