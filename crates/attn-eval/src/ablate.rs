//! What a model loses without some of its heads, for any number of choices of heads: the true effect.
//!
//! ```text
//! ΔL(S) = E_x [L(x; without S) − L(x)]
//! ```
//!
//! A head in layer l changes nothing before l, nor the attention of l: for each batch every layer runs once on the untouched
//! model, and the choices whose first head is in l go on from its attention together, as many as fit into a pass.

use std::ops::ControlFlow;

use attn_core::{Fill, ForwardOptions, Gate, Model};
use attn_data::batch::{Batch, Encoded, Side, collate};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    language::N_RESAMPLES,
    row_loss::{Asked, RowLoss, of_row},
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, below, bootstrap_means},
};

/// A query head: its layer, and its place among the heads that the layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Head {
    /// From 0.
    pub layer: usize,
    /// From 0; not its number in the pretrained layer, where others were removed.
    pub place: usize,
}

impl Head {
    /// What `values`, layers × heads, holds for it.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn of<T>(self, values: &[Vec<T>]) -> &T {
        &values[self.layer][self.place]
    }
}

/// What takes the place of a head's output.
#[derive(Debug, Clone, Copy)]
pub enum Replacement<'a> {
    /// Zero, as if the head had been removed.
    Zero,
    /// Its mean over the real tokens of these rows.
    Mean(&'a [Encoded]),
    /// Its output on another of these rows, drawn by the seed for each row: at the same position, begun again where the other row
    /// is shorter. Interchange intervention, Geiger et al. 2021, <https://arxiv.org/abs/2106.02997>.
    Resample {
        /// Rows to draw from: at least two.
        from: &'a [Encoded],
        /// A row's draw depends on it and on [`Encoded::index`].
        seed: u64,
    },
    /// What it makes of queries of zeros: of softmax attention the mean of the values in sight.
    Uniform,
}

impl Replacement<'_> {
    /// The name in results.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Mean(_) => "mean",
            Self::Resample { .. } => "resample",
            Self::Uniform => "uniform",
        }
    }
}

/// What a model makes of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Its loss, in nats; KL(untouched ‖ this) where the loss is [`RowLoss::Own`].
    pub loss: f64,
    /// Share of its predictions that are right: of those that agree with the untouched model where the loss is [`RowLoss::Own`].
    pub accuracy: f64,
    /// Mean KL(untouched ‖ this) of its predictions, in nats.
    pub kl: f64,
}

/// What [`ablate`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Ablated {
    /// Places in the rows given of those that have a loss: what stands below is of these.
    pub rows: Vec<usize>,
    /// The model as it is.
    pub untouched: Vec<Outcome>,
    /// Without each choice of heads.
    pub without: Vec<Vec<Outcome>>,
}

/// A mean over rows, and how far it can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Where it may lie on other rows of the kind: rows drawn again with replacement (bootstrap, percentiles, 1,000 draws of seed 0, the
    /// same for all choices of heads). `None` of a single row.
    pub interval_95: Option<Interval>,
}

/// What leaving heads out does: differences to the model as it is on the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Effect {
    /// Rise of the loss, in nats.
    pub loss: Estimate,
    /// Rise of the share of right predictions: negative where the heads are needed.
    pub accuracy: Estimate,
    /// KL(untouched ‖ without), in nats.
    pub kl: Estimate,
}

/// Most positions of the choices that share a pass, where [`Batching::max_tokens`] does not say.
const MAX_TOKENS: usize = 4096;

/// Leaves each of `choices` out of `model` in turn, and scores it on `rows` by `loss`.
///
/// Heads of one choice go together; an empty one is the model as it is.
///
/// # Errors
///
/// [`Error::NoHead`] for a head that is not there, [`Error::Donors`] where too few rows are to draw from, [`Error::Nothing`] where no row
/// has a loss; as [`score_heads`](crate::score_heads).
pub fn ablate(
    model: &Model,
    rows: &[Encoded],
    choices: &[Vec<Head>],
    replacement: Replacement<'_>,
    loss: &RowLoss<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Ablated> {
    loss.check(model, rows, "the effect of heads")?;
    let n_heads: Vec<usize> =
        model.layers().iter().map(|layer| layer.dims().n_heads as usize).collect();
    for head in choices.iter().flatten() {
        let n = n_heads.get(head.layer).copied();
        if n.is_none_or(|n| head.place >= n) {
            let Head { layer, place } = *head;
            return Err(Error::NoHead { layer, place, n_layers: n_heads.len(), n_heads: n });
        }
    }
    let stand_in = StandIn::new(model, replacement, batching)?;
    let first = |choice: &Vec<Head>| choice.iter().map(|head| head.layer).min().unwrap_or(0);
    let mut by_first: Vec<Vec<usize>> = vec![Vec::new(); n_heads.len()];
    for (at, choice) in choices.iter().enumerate() {
        by_first[first(choice)].push(at);
    }
    let mut untouched: Vec<Option<Outcome>> = vec![None; rows.len()];
    let mut without: Vec<Vec<Option<Outcome>>> = vec![vec![None; rows.len()]; choices.len()];
    for_each_batch(model, rows, batching, progress, |positions, batch| {
        let size = batch.rows * batch.cols;
        let donors = stand_in.of_batch(model, &batch)?;
        let Some(asked) = loss.ask(model, batch)? else { return Ok(()) };
        let pass = Pass { model, asked: &asked, donors, n_heads: &n_heads };
        let options =
            ForwardOptions { before_vocabulary: model.vocabulary().is_some(), ..asked.options() };
        let mut running = model.begin(&asked.input, &options)?;
        let mut before = Vec::with_capacity(n_heads.len());
        for _ in 0..n_heads.len() {
            before.push(running.fork());
            running.advance(None)?;
        }
        let own = Own::new(model, &asked, running.finish()?);
        let put = |into: &mut [Option<Outcome>], found: Vec<Option<Outcome>>| -> Result<()> {
            for (found, &at) in found.into_iter().zip(positions) {
                let finite = |it: &Outcome| it.loss.is_finite() && it.kl.is_finite();
                if found.as_ref().is_some_and(|it| !finite(it)) {
                    return Err(Error::NotFinite { index: rows[at].index });
                }
                into[at] = found;
            }
            Ok(())
        };
        put(&mut untouched, own.outcomes(&asked, &own.predicted)?)?;
        let most = batching.max_tokens.unwrap_or(MAX_TOKENS).max(1);
        let fan = (most / size).max(1);
        for (first, of_first) in by_first.iter().enumerate() {
            for some in of_first.chunks(fan) {
                let sets: Vec<&[Head]> = some.iter().map(|&at| choices[at].as_slice()).collect();
                let predicted = pass.without(&before[first], first, &sets)?;
                let n = own.predicted.size()[0];
                for (copy, &choice) in (0..).zip(some) {
                    let found = own.outcomes(&asked, &predicted.narrow(0, copy * n, n))?;
                    put(&mut without[choice], found)?;
                }
            }
        }
        Ok(())
    })?;
    let kept: Vec<usize> = (0..rows.len()).filter(|&at| untouched[at].is_some()).collect();
    if kept.is_empty() {
        return Err(Error::Nothing("no row has a label, or a token to predict"));
    }
    let of = |all: &[Option<Outcome>]| -> Vec<Outcome> {
        kept.iter().map(|&at| all[at].expect("a row that counts has all outcomes")).collect()
    };
    Ok(Ablated {
        untouched: of(&untouched),
        without: without.iter().map(|all| of(all)).collect(),
        rows: kept,
    })
}

impl Ablated {
    /// Of each choice what it does, on average over the rows.
    pub fn effects(&self) -> Vec<Effect> {
        let difference = |of: fn(&Outcome) -> f64| -> Vec<Estimate> {
            let row = |at: usize| -> Vec<f64> {
                self.without.iter().map(|all| of(&all[at]) - of(&self.untouched[at])).collect()
            };
            estimates(&(0..self.rows.len()).map(row).collect::<Vec<_>>())
        };
        let loss = difference(|it| it.loss);
        let accuracy = difference(|it| it.accuracy);
        let kl = difference(|it| it.kl);
        let all = loss.into_iter().zip(accuracy).zip(kl);
        all.map(|((loss, accuracy), kl)| Effect { loss, accuracy, kl }).collect()
    }

    /// What the loss rises by without both of each of `pairs` beyond the sum of both alone: `self` is without each alone, `pairs` are of its
    /// choices, and `together` is without both, pair by pair, on the same rows.
    ///
    /// # Panics
    ///
    /// If `together` is of other rows or fewer pairs, or a pair is of no choice.
    pub fn interactions(&self, pairs: &[[usize; 2]], together: &Self) -> Vec<Estimate> {
        assert_eq!(self.rows, together.rows, "both are of the same rows");
        let of_row = |row: usize| -> Vec<f64> {
            let rise = |all: &[Outcome]| all[row].loss - self.untouched[row].loss;
            let beyond = |(&[a, b], both): (&[usize; 2], &Vec<Outcome>)| {
                rise(both) - rise(&self.without[a]) - rise(&self.without[b])
            };
            pairs.iter().zip(&together.without).map(beyond).collect()
        };
        estimates(&(0..self.rows.len()).map(of_row).collect::<Vec<_>>())
    }

    /// Mean loss and share of right predictions of the model as it is.
    pub fn baseline(&self) -> [Estimate; 2] {
        let both: Vec<Vec<f64>> =
            self.untouched.iter().map(|it| vec![it.loss, it.accuracy]).collect();
        let all = estimates(&both);
        [all[0], all[1]]
    }
}

/// The mean of each column of `rows[row][column]`.
pub(crate) fn estimates(rows: &[Vec<f64>]) -> Vec<Estimate> {
    if rows[0].is_empty() {
        return Vec::new();
    }
    let intervals = (rows.len() > 1).then(|| {
        bootstrap_means(rows, 0.95, N_RESAMPLES, 0)
            .expect("there are rows, and their values are finite")
    });
    let mean = |at: usize| rows.iter().map(|row| row[at]).sum::<f64>() / rows.len() as f64;
    let interval_95 = |at: usize| intervals.as_ref().map(|all| all[at]);
    (0..rows[0].len())
        .map(|at| Estimate { value: mean(at), interval_95: interval_95(at) })
        .collect()
}

/// All heads of `model`, layer after layer.
pub fn all_heads(model: &Model) -> Vec<Head> {
    let layers = model.layers();
    let of = |(layer, n): (usize, i64)| (0..n as usize).map(move |place| Head { layer, place });
    layers.iter().map(|layer| layer.dims().n_heads).enumerate().flat_map(of).collect()
}

/// The query heads of each key/value group of `model`, layer after layer: of each layer as many as it has key/value heads, of a layer
/// whose heads read a code each by itself.
pub fn all_groups(model: &Model) -> Vec<Vec<Head>> {
    let mut groups = Vec::new();
    for (layer, it) in model.layers().iter().enumerate() {
        let readers = it.spec().kv_readers();
        let n_groups = readers.iter().max().map_or(0, |kv| kv + 1);
        for kv in 0..n_groups {
            let places = (0..readers.len()).filter(|&place| readers[place] == kv);
            groups.push(places.map(|place| Head { layer, place }).collect());
        }
    }
    groups
}

/// What replaces heads, ready for any batch.
enum StandIn<'a> {
    Zero,
    Uniform,
    /// `[1, n_heads, 1, head_dim]` a layer.
    Mean(Vec<Tensor>),
    Resample {
        from: &'a [Encoded],
        seed: u64,
        pad_id: u32,
    },
}

/// What replaces them in a batch, layer by layer.
enum Donors {
    Zero,
    Uniform,
    /// Broadcasting to `[batch, n_heads, seq_len, head_dim]`.
    Values(Vec<Tensor>),
}

impl<'a> StandIn<'a> {
    fn new(model: &Model, replacement: Replacement<'a>, batching: &Batching) -> Result<Self> {
        Ok(match replacement {
            Replacement::Zero => Self::Zero,
            Replacement::Uniform => Self::Uniform,
            Replacement::Mean(rows) => Self::Mean(mean_z(model, rows, batching)?),
            Replacement::Resample { from, seed } => {
                if from.iter().all(|row| row.index == from[0].index) {
                    return Err(Error::Donors { n: from.len() });
                }
                Self::Resample { from, seed, pad_id: batching.pad_id }
            }
        })
    }

    fn of_batch(&self, model: &Model, batch: &Batch) -> Result<Donors> {
        let (from, seed, pad_id) = match self {
            Self::Zero => return Ok(Donors::Zero),
            Self::Uniform => return Ok(Donors::Uniform),
            Self::Mean(means) => {
                return Ok(Donors::Values(means.iter().map(Tensor::shallow_clone).collect()));
            }
            Self::Resample { from, seed, pad_id } => (*from, *seed, *pad_id),
        };
        let donors: Vec<&Encoded> =
            batch.indices.iter().map(|&index| donor(from, seed, index)).collect();
        let lengths: Vec<i64> = donors.iter().map(|row| row.ids.len() as i64).collect();
        let options = ForwardOptions { z: true, ..ForwardOptions::default() };
        let input = to_input(&collate(&donors, pad_id, Side::Right), model);
        let z = model.forward(&input, &options)?.z;
        // Begun again where the other row is shorter.
        let positions =
            Tensor::arange(batch.cols as i64, (Kind::Int64, model.device())).unsqueeze(0);
        let lengths = Tensor::from_slice(&lengths).to_device(model.device()).unsqueeze(1);
        let place = positions.remainder_tensor(&lengths); // [batch, seq_len]
        let take = |z: Tensor| {
            let [b, n_heads, _, d] = z.size()[..] else { unreachable!("z has four axes") };
            let index = place.view([b, 1, -1, 1]).expand([b, n_heads, place.size()[1], d], false);
            z.gather(2, &index, false)
        };
        Ok(Donors::Values(z.into_iter().map(take).collect()))
    }
}

/// The row whose heads stand in for those of row `index`: any but itself.
fn donor(from: &[Encoded], seed: u64, index: usize) -> &Encoded {
    let mut rng = of_row(seed ^ 0x0064_6f6e_6f72, index);
    loop {
        let drawn = &from[below(from.len(), &mut rng)];
        if drawn.index != index {
            return drawn;
        }
    }
}

impl Donors {
    fn fill(&self, layer: usize, fan: i64) -> Fill {
        match self {
            Self::Zero => Fill::Zero,
            Self::Uniform => Fill::ZeroQuery,
            Self::Values(layers) => {
                let values = &layers[layer];
                let times = if values.size()[0] == 1 { 1 } else { fan };
                Fill::Values(values.repeat([times, 1, 1, 1]))
            }
        }
    }
}

/// The mean of every head's output over the real tokens of `rows`: `[1, n_heads, 1, head_dim]` a layer.
///
/// # Errors
///
/// [`Error::Nothing`] without rows, and what the model refuses.
pub fn mean_z(model: &Model, rows: &[Encoded], batching: &Batching) -> Result<Vec<Tensor>> {
    let mut sums: Vec<Tensor> = Vec::new();
    let mut n_tokens = 0_i64;
    let mut go_on = |_| ControlFlow::Continue(());
    for_each_batch(model, rows, batching, &mut go_on, |_, batch| {
        let size = [batch.rows as i64, 1, batch.cols as i64, 1];
        let real = Tensor::from_slice(&batch.mask).view(size).to_device(model.device());
        let options = ForwardOptions { z: true, ..ForwardOptions::default() };
        let z = model.forward(&to_input(&batch, model), &options)?.z;
        let sum = |z: &Tensor| {
            (z.to_kind(Kind::Double) * &real).sum_dim_intlist(
                [0i64, 2].as_slice(),
                true,
                Kind::Double,
            )
        };
        let of_batch: Vec<Tensor> = z.iter().map(sum).collect();
        n_tokens += batch.n_tokens() as i64;
        sums = match sums.is_empty() {
            true => of_batch,
            false => sums.iter().zip(of_batch).map(|(sum, more)| sum + more).collect(),
        };
        Ok(())
    })?;
    Ok(sums.into_iter().map(|sum| (sum / n_tokens).to_kind(model.kind())).collect())
}

/// One batch on its way.
struct Pass<'a> {
    model: &'a Model,
    asked: &'a Asked,
    donors: Donors,
    n_heads: &'a [usize],
}

impl Pass<'_> {
    /// What the model gives without each of `sets`, whose first heads are in layer `first`: as [`Own::predicted`], set after set.
    fn without(
        &self,
        before: &attn_core::Running<'_>,
        first: usize,
        sets: &[&[Head]],
    ) -> Result<Tensor> {
        let fan = sets.len() as i64;
        let mut branch = before.branch(fan, &self.gate(first, sets))?;
        for layer in first + 1..self.n_heads.len() {
            let is_touched = sets.iter().any(|set| set.iter().any(|head| head.layer == layer));
            let gate = is_touched.then(|| self.gate(layer, sets));
            branch.advance(gate.as_ref())?;
        }
        Ok(branch.finish()?)
    }

    /// The gate of `layer`, a row for every row of every set.
    fn gate(&self, layer: usize, sets: &[&[Head]]) -> Gate {
        let (n_rows, n) = (self.asked.counts.len() as i64, self.n_heads[layer]);
        let mut open = vec![1.0_f32; sets.len() * n];
        for (set, of_set) in sets.iter().enumerate() {
            for head in of_set.iter().filter(|head| head.layer == layer) {
                open[set * n + head.place] = 0.0;
            }
        }
        let g = Tensor::from_slice(&open).view([sets.len() as i64, 1, n as i64]);
        let g = g.expand([-1, n_rows, -1], false).reshape([-1, n as i64, 1, 1]);
        let g = g.to_device(self.model.device());
        Gate { g, fill: self.donors.fill(layer, sets.len() as i64) }
    }
}

/// Bytes that the logits of one chunk of places may take: few chunks, as each reads the whole last matrix.
const CHUNK_BYTES: i64 = 128 << 20;

/// What the untouched model predicts of a batch.
struct Own {
    /// Features of a language model before its vocabulary, logits of a classifier: `[n, ..]`.
    predicted: Tensor,
    vocabulary: Option<attn_core::Vocabulary>,
    /// Places of a chunk.
    chunk: i64,
    chunks: Vec<Chunk>,
}

/// The untouched model's predictions at a few places.
struct Chunk {
    start: i64,
    /// Probabilities, `[places, classes]`.
    p: Tensor,
    /// Σ p ln p of each.
    neg_entropy: Vec<f64>,
    /// The likeliest class of each.
    top: Vec<i64>,
    /// What is to be predicted; absent where that is the likeliest.
    targets: Option<Tensor>,
}

impl Own {
    fn new(model: &Model, asked: &Asked, predicted: Tensor) -> Self {
        let vocabulary = model.vocabulary();
        let n = asked.rows.len() as i64;
        let most =
            |vocabulary: &attn_core::Vocabulary| CHUNK_BYTES / (4 * vocabulary.weight.size()[0]);
        let chunk = vocabulary.as_ref().map_or(n, most).clamp(1, n);
        let mut own = Self { predicted, vocabulary, chunk, chunks: Vec::new() };
        let of = |start: i64| {
            let logits = own.logits(asked, &own.predicted, start);
            let log_p = logits.log_softmax(-1, wide(&logits));
            let p = log_p.exp();
            let numbers = (&p * &log_p).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
            Chunk {
                start,
                neg_entropy: Vec::try_from(numbers).expect("one axis of f64"),
                top: Vec::try_from(log_p.argmax(-1, false)).expect("one axis of i64"),
                targets: asked.targets.as_ref().map(|all| all.narrow(0, start, p.size()[0])),
                p,
            }
        };
        own.chunks = (0..n).step_by(chunk as usize).map(of).collect();
        own
    }

    /// Logits at the places from `start` on, as many as make a chunk.
    fn logits(&self, asked: &Asked, predicted: &Tensor, start: i64) -> Tensor {
        let len = self.chunk.min(asked.rows.len() as i64 - start);
        match &self.vocabulary {
            Some(vocabulary) => {
                let features = predicted.narrow(0, start, len);
                features.linear(&vocabulary.weight, vocabulary.bias.as_ref())
            }
            None => asked.pick(predicted).narrow(0, start, len).contiguous(),
        }
    }

    /// What `predicted` comes to for each row of the batch; `None` for rows without a loss.
    fn outcomes(&self, asked: &Asked, predicted: &Tensor) -> Result<Vec<Option<Outcome>>> {
        let mut places = Vec::with_capacity(asked.rows.len());
        for chunk in &self.chunks {
            let logits = self.logits(asked, predicted, chunk.start);
            places.extend(chunk.outcomes(&logits)?);
        }
        let mut sums = vec![[0.0; 3]; asked.counts.len()];
        for (&row, place) in asked.rows.iter().zip(places) {
            sums[row].iter_mut().zip(place).for_each(|(sum, value)| *sum += value);
        }
        let outcome = |(&count, sum): (&usize, [f64; 3])| {
            let [loss, accuracy, kl] = sum.map(|sum| sum / count as f64);
            (count > 0).then_some(Outcome { loss, accuracy, kl })
        };
        Ok(asked.counts.iter().zip(sums).map(outcome).collect())
    }
}

impl Chunk {
    /// Loss, 1 where right, KL at each place.
    fn outcomes(&self, logits: &Tensor) -> Result<Vec<[f64; 3]>> {
        let read = attn_torch::read_logits(logits, Some(&self.p), self.targets.as_ref());
        let (loss, top, kl) = match read.map_err(attn_core::Error::from)? {
            Some(read) => {
                let kl = read.iter().zip(&self.neg_entropy).map(|(it, &own)| it.kl(own)).collect();
                let loss: Vec<f64> = read.iter().map(attn_torch::Reading::loss).collect();
                (loss, read.iter().map(|it| it.top).collect::<Vec<i64>>(), kl)
            }
            None => self.outcomes_by_libtorch(logits),
        };
        let targets: Option<Vec<i64>> =
            self.targets.as_ref().map(|targets| Vec::try_from(targets).expect("one axis of i64"));
        let place = |at: usize| -> [f64; 3] {
            let (loss, wanted) = match &targets {
                Some(targets) => (loss[at], targets[at]),
                None => (kl[at], self.top[at]),
            };
            [loss, f64::from(u8::from(top[at] == wanted)), kl[at]]
        };
        Ok((0..top.len()).map(place).collect())
    }

    /// Loss, likeliest class and KL of each place, of any kind and on any device.
    fn outcomes_by_libtorch(&self, logits: &Tensor) -> (Vec<f64>, Vec<i64>, Vec<f64>) {
        let log_q = logits.log_softmax(-1, wide(logits));
        let numbers = |x: Tensor| -> Vec<f64> {
            Vec::try_from(x.to_kind(Kind::Double).view([-1])).expect("one axis of f64")
        };
        let cross =
            numbers((&self.p * &log_q).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double));
        let loss = self.targets.as_ref().map_or_else(Vec::new, |targets| {
            numbers(-log_q.gather(-1, &targets.unsqueeze(-1), false))
        });
        let top = Vec::try_from(log_q.argmax(-1, false)).expect("one axis of i64");
        let kl = self.neg_entropy.iter().zip(cross).map(|(own, cross)| own - cross).collect();
        (loss, top, kl)
    }
}

fn wide(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}
