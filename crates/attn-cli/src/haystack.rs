//! Documents with needles for `attn needle` and `attn score-heads`, and pictures of what came of them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use attn_data::{
    dataset::DatasetSpec,
    hub::Hub,
    needle::{Document, Haystack, NeedleKind, OwnNeedle, Recipe, read_needles, read_texts},
    tokenizer::TextTokenizer,
};
use attn_eval::Answering;
use attn_viz::{HeatMap, Picture, Shades, Size};
use serde::Serialize;

use crate::{
    args::DocumentArgs,
    generate::stop_ids,
    monitor::grouped,
    task::dataset,
    texts::{Folder, max_len, read_split},
};

/// Turns the seed of the documents into one that no training run draws its own with.
const DOCUMENTS: u64 = 0x0066_6f75_6e64;

/// A text to hide needles in, and the needles that the user wrote.
pub(crate) struct Hiding {
    /// Where the text is.
    pub(crate) data: DatasetSpec,
    /// The rows of it; `None` of plain texts, read whole.
    pub(crate) split: Option<String>,
    haystack: Haystack,
    own: Vec<OwnNeedle>,
}

/// Where the needle of a document stands.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Place {
    pub(crate) kind: NeedleKind,
    /// Which of the needles that the user wrote, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) own: Option<usize>,
    /// Most tokens of the document.
    pub(crate) length: usize,
    /// Where the needle was to stand.
    pub(crate) wanted_depth: f64,
    /// Where it stands, as it is put between sentences: tokens before it over those of the text around it.
    pub(crate) depth: f64,
    pub(crate) n_tokens: usize,
    /// First token of the needle, and the one behind its last.
    pub(crate) needle: [usize; 2],
    /// The same of each place in it that tells the answer.
    pub(crate) told: Vec<[usize; 2]>,
    /// The same of the answer.
    pub(crate) answer: [usize; 2],
    /// What is expected.
    pub(crate) expected: String,
}

impl Hiding {
    /// Reads the text and the needles, and checks the settings against the model.
    pub(crate) fn open(
        (haystack, split, set): (&str, Option<&str>, &[String]),
        documents: &DocumentArgs,
        folder: &Folder,
        hub: &Hub,
    ) -> Result<Self> {
        ensure!(documents.depths > 0, "`--depths` is 0, expected at least 1");
        ensure!(documents.trials > 0, "`--trials` is 0, expected at least 1");
        for &length in &documents.lengths {
            max_len(Some(length), &folder.config, &folder.tokenizer, "`--lengths`")?;
        }
        let own = match &documents.needles {
            Some(path) => read_needles(path).context("cannot use `--needles`")?,
            None => Vec::new(),
        };
        ensure!(
            own.is_empty() || documents.distractors < own.len(),
            "`--distractors` is {}, and `--needles` has {}, expected fewer than that",
            documents.distractors,
            own.len()
        );
        // Text alone is wanted, whatever else a data set has.
        let data = dataset(haystack, set)?;
        let data = DatasetSpec { label: None, text_pair: None, classes: None, ..data };
        let (texts, split): (Vec<String>, _) = match split {
            None if set.is_empty() && is_plain(Path::new(haystack)) => {
                (read_texts(Path::new(haystack)).context("cannot use `--haystack`")?, None)
            }
            split => {
                let split = split.unwrap_or(&data.validation_split).to_owned();
                let rows = read_split(&data, &split, None, hub)?.rows;
                (rows.into_iter().map(|row| row.text).collect(), Some(split))
            }
        };
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let of = if own.is_empty() { Haystack::new } else { Haystack::of_any };
        let haystack = of(&texts, &folder.tokenizer).with_context(|| match &split {
            Some(split) => format!("cannot hide needles in split `{split}` of `{}`", data.source),
            None => format!("cannot hide needles in `{}`", data.source),
        })?;
        Ok(Self { data, split, haystack, own })
    }

    /// The documents of every cell, one needle each that is asked for.
    pub(crate) fn documents(
        &self,
        args: &DocumentArgs,
        tokenizer: &TextTokenizer,
        seed: u64,
    ) -> Result<Vec<(Place, Document)>> {
        let seed = seed ^ DOCUMENTS;
        let kinds: Vec<(NeedleKind, Option<usize>)> = match self.own.len() {
            0 => args.kinds.iter().map(|&kind| (kind.into(), None)).collect(),
            n => (0..n).map(|own| (NeedleKind::Own, Some(own))).collect(),
        };
        let template = args.template.replace("\\n", "\n");
        let mut documents = Vec::new();
        for (kind, own) in kinds {
            for &length in &args.lengths {
                for step in 0..args.depths {
                    let wanted_depth = match args.depths {
                        1 => 0.5,
                        n => step as f64 / (n - 1) as f64,
                    };
                    for _ in 0..args.trials {
                        let index = documents.len() as u64;
                        let document = match own {
                            Some(own) => {
                                let others = (1..=args.distractors)
                                    .map(|next| &self.own[(own + next) % self.own.len()]);
                                self.haystack.hide(
                                    &self.own[own],
                                    &others.collect::<Vec<_>>(),
                                    &template,
                                    (wanted_depth, length),
                                    tokenizer,
                                    (seed, index),
                                )?
                            }
                            None => {
                                let recipe = Recipe {
                                    kinds: vec![kind],
                                    words: None,
                                    most_needles: 1,
                                    asks: 1,
                                    fill: 1.0,
                                    depth: Some(wanted_depth),
                                    distractors: args.distractors,
                                    max_len: length,
                                };
                                self.haystack.document(&recipe, tokenizer, seed, index)?
                            }
                        };
                        document.check_depth(0, wanted_depth, tokenizer)?;
                        let (needle, answer) = (&document.needles[0], &document.answers[0]);
                        let ids = &document.ids[answer.tokens.clone()];
                        let expected = tokenizer.decode(ids, false)?;
                        let place = Place {
                            kind,
                            own,
                            length,
                            wanted_depth,
                            depth: needle.depth,
                            n_tokens: document.ids.len(),
                            needle: [needle.tokens.start, needle.tokens.end],
                            told: needle.told.iter().map(|at| [at.start, at.end]).collect(),
                            answer: [answer.tokens.start, answer.tokens.end],
                            expected: expected.trim().trim_end_matches('.').to_owned(),
                        };
                        documents.push((place, document));
                    }
                }
            }
        }
        Ok(documents)
    }
}

/// Whether `--haystack` names plain texts, where no split is asked for.
fn is_plain(path: &Path) -> bool {
    let is_text = |path: &Path| path.extension().is_some_and(|ending| ending == "txt");
    let holds_one = || path.read_dir().ok()?.flatten().find(|entry| is_text(&entry.path()));
    (path.is_file() && is_text(path)) || (path.is_dir() && holds_one().is_some())
}

/// Calls `with` with how answers are written.
pub(crate) fn answering<T>(
    folder: &Folder,
    max_new_tokens: usize,
    with: impl FnOnce(&Answering<'_>) -> Result<T>,
) -> Result<T> {
    let stop_ids = stop_ids(&folder.path, &folder.tokenizer)?;
    let decode = |ids: &[i64]| {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect(); // of the vocabulary
        folder.tokenizer.decode(&ids, true)
    };
    with(&Answering { max_new_tokens, stop_ids: &stop_ids, decode: &decode })
}

/// The last part of a model's name, for names of files.
pub(crate) fn short_name(model: &str) -> &str {
    model.trim_end_matches('/').rsplit('/').next().unwrap_or(model)
}

/// Draws a grid of percentages: a column a length, a row a depth.
pub(crate) fn draw_grid(
    path: &Path,
    subtitle: String,
    lengths: &[usize],
    depths: &[f64],
    percent: impl Fn(usize, f64) -> f64,
) -> Result<()> {
    let map = HeatMap {
        title: "Fact Retrieval Across Context Lengths (\"Needle In A HayStack\")".into(),
        subtitle,
        x_label: "Token Limit".into(),
        y_label: "Depth Percent".into(),
        value_label: "Score".into(),
        columns: lengths.iter().map(|&length| grouped(length)).collect(),
        rows: depths.iter().map(|depth| format!("{:.0}", 100.0 * depth)).collect(),
        values: depths
            .iter()
            .map(|&depth| lengths.iter().map(|&length| percent(length, depth)).collect())
            .collect(),
        range: Some((0.0, 100.0)),
        shades: Shades::TrafficLight,
        size: Size { width: 1400, height: 640 },
        ..HeatMap::default()
    };
    map.png(path)?;
    tracing::info!("wrote `{}`", path.display());
    Ok(())
}
