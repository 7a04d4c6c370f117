//! The seam that every attention variant plugs into.
//!
//! A layer projects its input to q, k, v and hands them to an [`Attention`], which returns `z`, the mixed values of
//! each head, always **before** the output projection: gates, replacement and W_O belong to the layer, so that head
//! masks, scores and refits work on every kind.

use std::any::Any;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::{
    Error,
    mask::{Mask, Padding},
    variants::Variant,
    weights::{Init, Weights},
};

/// The extents of one attention layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Dims {
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Query heads.
    pub n_heads: i64,
    /// Key/value heads.
    pub n_kv_heads: i64,
    /// Channels of a head; not always `hidden_size / n_heads`.
    pub head_dim: i64,
    /// The key/value head that each query head reads, `[n_heads]`.
    pub kv_of_head: Vec<i64>,
    /// What q·k is multiplied by, usually 1/√head_dim.
    pub scale: f64,
    /// Whether the layer may not see the future.
    pub causal: bool,
    /// Whether queries and keys are turned by their positions (rotary embeddings).
    pub rotary: bool,
    /// Tokens of the longest text that the model was made for; `None` outside of models.
    pub max_len: Option<i64>,
}

impl Dims {
    /// Whether query head h reads key/value head ⌊h·n_kv_heads/n_heads⌋, as grouped-query kernels expect.
    pub fn is_evenly_grouped(&self) -> bool {
        self.n_kv_heads > 0
            && self.n_heads % self.n_kv_heads == 0
            && self
                .kv_of_head
                .iter()
                .zip(0..)
                .all(|(&kv, head)| kv == head * self.n_kv_heads / self.n_heads)
    }

    /// The key/value heads that the query heads `heads` read, ascending.
    pub fn kv_heads_of(&self, heads: &[i64]) -> Vec<i64> {
        let mut read: Vec<i64> = heads.iter().map(|&head| self.kv_of_head[head as usize]).collect();
        read.sort_unstable();
        read.dedup();
        read
    }

    /// The extents of a layer of the query heads `heads` alone, in that order, and of the key/value heads that they read.
    pub(crate) fn of_heads(&self, heads: &[i64]) -> Self {
        let kv_heads = self.kv_heads_of(heads);
        let new_kv = |&head: &i64| {
            let old = self.kv_of_head[head as usize];
            kv_heads.iter().position(|&kv| kv == old).expect("it is among those read") as i64
        };
        Self {
            n_heads: heads.len() as i64,
            n_kv_heads: kv_heads.len() as i64,
            kv_of_head: heads.iter().map(new_kv).collect(),
            ..self.clone()
        }
    }

    /// The extents once key/value head g is made of the old heads `groups[g]`. Query heads that read an old head read the new one that
    /// it went into; of several, those with lower numbers first, in runs as even as they can be.
    ///
    /// # Errors
    /// [`Error::Input`] for groups that leave a head out, name one that is not there or hold none, and where fewer query heads read an
    /// old head than new ones came of it.
    pub(crate) fn regrouped(&self, groups: &[Vec<i64>]) -> Result<Self, Error> {
        let refuse = |problem: String| Error::Input { name: "groups", problem };
        if let Some(head) = groups.iter().flatten().find(|&&it| !(0..self.n_kv_heads).contains(&it))
        {
            return Err(refuse(format!(
                "hold key/value head {head}, and there are {}",
                self.n_kv_heads
            )));
        }
        if let Some(g) = groups.iter().position(Vec::is_empty) {
            return Err(refuse(format!("are made of nothing at {g}")));
        }
        let mut kv_of_head = vec![0; self.kv_of_head.len()];
        for old in 0..self.n_kv_heads {
            let made: Vec<i64> =
                (0..).zip(groups).filter(|(_, of)| of.contains(&old)).map(|(g, _)| g).collect();
            let readers: Vec<usize> =
                (0..kv_of_head.len()).filter(|&head| self.kv_of_head[head] == old).collect();
            if made.is_empty() {
                return Err(refuse(format!("leave key/value head {old} out")));
            }
            if readers.len() < made.len() {
                return Err(refuse(format!(
                    "make {} heads of key/value head {old}, and {} query heads read it",
                    made.len(),
                    readers.len()
                )));
            }
            for (at, &head) in readers.iter().enumerate() {
                kv_of_head[head] = made[at * made.len() / readers.len()];
            }
        }
        Ok(Self { n_kv_heads: groups.len() as i64, kv_of_head, ..self.clone() })
    }

    /// Refuses to choose more than there is: the kind would be softmax attention at a higher price. `most` are the choices
    /// (`what`) of a text of n tokens, and `wanted` is what setting `field` of kind `kind` asks for.
    pub(crate) fn check_choices(
        &self,
        kind: &'static str,
        (field, wanted): (&'static str, u32),
        what: &str,
        most: impl Fn(i64) -> i64,
    ) -> Result<(), Error> {
        let Some(n) = self.max_len.filter(|&n| i64::from(wanted) > most(n)) else { return Ok(()) };
        let problem = format!(
            "expected at most {}, as the model's longest text, {n} tokens, has {what}\nhint: choose fewer, or smaller ones",
            most(n)
        );
        Err(Error::Setting { kind, field, value: wanted.to_string(), problem })
    }

    /// Repeats each key/value head for the query heads that read it:
    /// `[batch, n_kv_heads, k_len, head_dim] -> [batch, n_heads, k_len, head_dim]`.
    pub fn expand_kv(&self, x: &Tensor) -> Tensor {
        if self.n_heads == self.n_kv_heads && self.is_evenly_grouped() {
            return x.shallow_clone();
        }
        if self.is_evenly_grouped() {
            let [b, n_kv, k_len, d] = x.size()[..] else {
                unreachable!("keys and values have four axes")
            };
            let group = self.n_heads / self.n_kv_heads;
            return x.unsqueeze(2).expand([b, n_kv, group, k_len, d], false).reshape([
                b,
                self.n_heads,
                k_len,
                d,
            ]);
        }
        x.index_select(1, &Tensor::from_slice(&self.kv_of_head).to_device(x.device()))
    }
}

/// The pretrained projections of a layer, seen by a variant when it is built. Matrices are `[out, in]`.
#[derive(Debug)]
pub struct Projections {
    /// `[n_heads · head_dim, hidden_size]`, and its bias.
    pub q: (Tensor, Option<Tensor>),
    /// `[n_kv_heads · head_dim, hidden_size]`, and its bias.
    pub k: (Tensor, Option<Tensor>),
    /// `[n_kv_heads · head_dim, hidden_size]`, and its bias.
    pub v: (Tensor, Option<Tensor>),
}

/// Masks that a kind adds up.
#[derive(Debug)]
pub struct Combination {
    /// Each mask's name.
    pub names: Vec<String>,
    /// `[1 or n_heads, masks]`: what each counts, for all heads alike or for each.
    pub coefficients: Tensor,
    /// `[1 or n_heads, n, n]`: their sum, a row a query.
    pub mask: Tensor,
}

/// A variant's own parameters: from the checkpoint where it holds them, made as told elsewhere.
#[derive(Debug)]
pub struct Own<'w, 'c> {
    weights: &'w mut Weights<'c>,
    prefix: String,
}

impl<'w, 'c> Own<'w, 'c> {
    pub(crate) fn new(weights: &'w mut Weights<'c>, prefix: &str) -> Self {
        Self { weights, prefix: prefix.to_owned() }
    }

    /// Whether the parameter `name` is made as told: where not, what it starts from need not be worked out.
    pub fn makes(&self, name: &str) -> bool {
        self.weights.makes(&format!("{}.{name}", self.prefix))
    }

    /// The parameter `name` of this layer's variant, with its full name in the checkpoint.
    ///
    /// # Errors
    /// If the checkpoint cannot be read. A checkpoint without it fails the load as a whole, with every such name.
    pub fn get(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Param, Error> {
        let name = format!("{}.{name}", self.prefix);
        let tensor = self.weights.get(&name, shape, init)?;
        Ok(Param { name, tensor })
    }
}

/// A parameter that a variant adds.
#[derive(Debug)]
pub struct Param {
    /// Name in the checkpoint.
    pub name: String,
    /// The value.
    pub tensor: Tensor,
}

impl Param {
    /// Keeps the entries `indices` of axis `dim`.
    pub fn select(&mut self, dim: i64, indices: &[i64]) {
        self.tensor = crate::nn::select(&self.tensor, dim, indices);
    }
}

/// Random numbers as a pure function of seed, step and layer, so that a resumed run draws what an unbroken one would.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step, or any other counter.
    pub step: u64,
    /// The layer; set by the model.
    pub layer: u64,
}

impl Stream {
    /// A generator of its own for this step and layer.
    pub fn rng(&self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.layer);
        rng.set_word_pos(u128::from(self.step) << 36);
        rng
    }
}

/// What a variant sees of a layer's input.
#[derive(Debug)]
pub struct AttnInput<'a> {
    /// The layer's input, after its norm: `[batch, q_len, hidden_size]`.
    pub hidden: &'a Tensor,
    /// Queries, after rotary: `[batch, n_heads, q_len, head_dim]`.
    pub q: &'a Tensor,
    /// Keys, after rotary: `[batch, n_kv_heads, k_len, head_dim]`.
    pub k: &'a Tensor,
    /// Values: `[batch, n_kv_heads, k_len, head_dim]`.
    pub v: &'a Tensor,
    /// `(cos, sin)` of the new tokens' positions, each `[batch, 1, q_len, head_dim]`, where the architecture rotates: q
    /// and k have been turned by them, and keys that a kind makes of its own must be.
    pub rotary: Option<&'a (Tensor, Tensor)>,
    /// The queries' positions: `[batch, q_len]`.
    pub positions: &'a Tensor,
    /// What is hidden.
    pub mask: &'a Mask,
    /// The hidden states that k and v were made from, where they are not `hidden`: `[batch, k_len, hidden_size]`.
    /// `mask` is then the source's.
    pub source: Option<&'a Tensor>,
    /// Share of attention weights dropped in training, 0 otherwise.
    pub dropout: f64,
    /// Whether this is a pass of training: steps then have the slope that they learn by.
    pub train: bool,
    /// Random numbers for kinds that draw.
    pub stream: Stream,
    /// What to attend to, in place of what the kind would choose: [`Selection::chosen`] of an earlier call. Absent
    /// outside of tests and measurements.
    pub selection: Option<&'a Tensor>,
}

/// What laws have to know of a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nature {
    /// Tokens of the longest text that is attended to whole, by its settings: the longest window, or all that may be chosen together.
    /// Longer ones show what is left out. 0 where the length of a text is nothing to it.
    pub reach: i64,
    /// Whether numbers decide what is attended to, so that rounding may tip a choice over: [`Attention::selection`] says which.
    pub chooses: bool,
    /// Whether q and k count by more than their products: turned both by the same rotation, they may give another z.
    pub reads_coordinates: bool,
    /// Whether a training pass has slopes that are not its derivative: a step that learns, a loss of which some parameters alone learn.
    pub has_own_slopes: bool,
}

/// What a discontinuous kind chose to attend to.
#[derive(Debug)]
pub struct Selection {
    /// `[batch, groups, q_len, choices]` bool, true where chosen; groups and choices (keys, blocks) are the kind's own.
    pub chosen: Tensor,
    /// How far the worst choice made is above the best one left out, in units of the scores that are compared:
    /// `[batch, groups, q_len]`, infinite where nothing was left out.
    pub margin: Tensor,
}

/// A pass over one text, by what [`Attention::held`] depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holds {
    /// Tokens.
    pub n_tokens: i64,
    /// Whether a backward pass follows.
    pub trains: bool,
    /// Whether weights are dropped.
    pub dropout: bool,
    /// Whether texts of a batch differ in length, so that a mask says which tokens are real.
    pub is_padded: bool,
}

impl Holds {
    /// Values of weights that are made because some are dropped: three kept of each where it trains, and two at work.
    pub fn dropped_pairs(&self, dims: &Dims) -> i64 {
        let times = if self.trains { 3 } else { 2 };
        let pairs = dims.n_heads.saturating_mul(self.n_tokens.saturating_mul(self.n_tokens));
        if self.dropout { pairs.saturating_mul(times) } else { 0 }
    }

    /// Values of a mask by pairs, which a kind makes of a padded batch.
    pub fn masked_pairs(&self) -> i64 {
        if self.is_padded { self.n_tokens.saturating_mul(self.n_tokens) } else { 0 }
    }
}

/// Values that a kind holds for each channel of its heads and token, where it does not say: alone, and where it trains.
const HELD_PER_CHANNEL: [i64; 2] = [34, 68];

/// Which masks a kind can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masks {
    /// Any.
    Any,
    /// Real keys in one run. The layer then rolls each row so that its real tokens start at 0, and back afterwards:
    /// the kind sees padding on the right or none.
    Contiguous,
}

/// What a decoding kind keeps between steps.
pub trait State: std::fmt::Debug + Any {
    /// Bytes held for the tokens so far.
    fn bytes(&self) -> usize;
    /// For the kind that made it.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// One way to mix values: the seam of this crate.
pub trait Attention: std::fmt::Debug + Send {
    /// The mixed values of each head, `z`: `[batch, n_heads, q_len, head_dim]`, before the output projection.
    ///
    /// Shapes have been checked; outputs at padded queries are unspecified but finite.
    fn forward(&self, input: &AttnInput) -> Tensor;

    /// The effective attention of the queries `rows`: the coefficients of v in z,
    /// `[batch, n_heads, rows.len(), k_len]`. They need not sum to 1.
    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor;

    /// Floating point operations of [`Self::forward`] over `n_tokens` tokens of one sequence without padding, from q, k and
    /// v to z: those of the products that the kind's formula asks for, a multiplication with an addition as two, its own
    /// projections of hidden states among them. What is hidden does not count, whatever a kernel computes of it, and sums
    /// over keys count as a state that goes from token to token; exponentials, masks and the multiplication by gates are left
    /// out.
    fn flops(&self, n_tokens: i64) -> i64;

    /// How many values [`Self::forward`] over one text holds beside q, k, v and z: at once while it runs, or where it trains what it
    /// keeps for the backward pass. An upper bound, by which commands foresee what memory they need; the one here is above all
    /// kinds of this crate.
    fn held(&self, dims: &Dims, pass: Holds) -> i64 {
        let channels = HELD_PER_CHANNEL[usize::from(pass.trains)] * dims.n_heads * dims.head_dim;
        channels * pass.n_tokens + pass.dropped_pairs(dims) + pass.masked_pairs()
    }

    /// What laws have to know of the kind. There is no default: what a kind forgets to say would be left untried.
    fn nature(&self) -> Nature;

    /// Which masks [`Self::forward`] can serve.
    fn masks(&self) -> Masks {
        Masks::Any
    }

    /// What [`Self::forward`] chooses to attend to, for kinds that choose ([`Nature::chooses`]): a small change of the input may change it at
    /// once. Outside of training gradients do not flow through it.
    fn selection(&self, _: &AttnInput) -> Option<Selection> {
        None
    }

    /// Whether z also depends on values that the kind makes of the hidden states itself, beside v.
    fn has_own_values(&self) -> bool {
        false
    }

    /// Whether heads have a part in what others attend to, so that a head that is removed leaves others another output than one
    /// whose gate is closed.
    fn couples_heads(&self) -> bool {
        false
    }

    /// Whether keys and values come from another sequence, [`AttnInput::source`]: [`ModelInput::source`](crate::ModelInput)
    /// must then be given.
    fn needs_source(&self) -> bool {
        false
    }

    /// Whether each head's output follows from a query of its own, so that a query of zeros says something about that head:
    /// [`Fill::ZeroQuery`](crate::gate::Fill::ZeroQuery).
    fn reads_queries(&self) -> bool {
        true
    }

    /// An empty decoding state.
    fn start(&self) -> Box<dyn State> {
        Box::new(KvCache::new(None))
    }

    /// `z` of the next tokens: `input` holds them alone (`hidden`, q, k, v, positions), `state` what came before, and
    /// `input.mask` covers both. Leaves the new tokens in `state`.
    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let cache = KvCache::of(state);
        let (k, v) = cache.append(input.k, input.v);
        let z = self.forward(&AttnInput {
            k: &k,
            v: &v,
            mask: &input.mask.tail(k.size()[2]),
            ..*input
        });
        cache.trim();
        z
    }

    /// The keys and values of all tokens so far that a state of this kind holds, as [`AttnInput`] has them: with them
    /// [`Self::weights`] gives the attention rows of the new queries while decoding. `None` of a kind that keeps fewer
    /// tokens, or something else.
    fn cache<'s>(&self, state: &'s mut dyn State) -> Option<&'s KvCache> {
        let cache: Option<&mut KvCache> = state.as_any_mut().downcast_mut();
        cache.filter(|cache| cache.limit.is_none()).map(|cache| &*cache)
    }

    /// What the kind asks of training, beside the task: a scalar that is added to the loss as it is, in each layer that has
    /// one. Gradients flow to the kind's own parameters.
    fn penalty(&self) -> Option<Tensor> {
        None
    }

    /// What the kind learns from on this input, beside the task: a scalar of at least `f32`, the mean over real queries,
    /// that is added to the loss of a training pass ([`Output::own_loss`](crate::Output)). Gradients flow to the kind's own
    /// parameters alone. `None` where it has none, or its parameters are not trained.
    fn own_loss(&self, _: &AttnInput) -> Option<Tensor> {
        None
    }

    /// The kind's choice of heads by the input, where it makes one.
    fn routes(&self) -> Option<&dyn Routes> {
        None
    }

    /// The fewer key/value heads that a kind has learned, where it is one that merges them. `old`: the layer's projections.
    fn learned_heads(&self, _old: &Projections) -> Option<LearnedHeads> {
        None
    }

    /// Projections of hidden states, and their biases, that make a key and a value for each query head, `[n_heads · head_dim, hidden_size]`,
    /// where softmax attention over these computes what the kind does. `own`: the layer's projections.
    fn full_heads(&self, _own: &Projections) -> Option<[(Tensor, Option<Tensor>); 2]> {
        None
    }

    /// The masks that a kind adds up, where it does, and what they make of `n` tokens that all see each other.
    fn combination(&self, _n: i64) -> Option<Combination> {
        None
    }

    /// Its settings, where they name heads or count them: [`Self::select_heads`] may have changed them.
    fn settings(&self) -> Option<Variant> {
        None
    }

    /// Names the kind's own parameters.
    fn visit(&self, _: &mut crate::nn::Visitor<'_>) {}

    /// Keeps the query heads `heads`, in that order, in the kind's own parameters. `dims` are those afterwards.
    ///
    /// # Errors
    /// [`Error::Refused`] where the kind's parameters cannot be cut by head.
    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error>;

    /// Follows new key/value heads: new head g was made from the old heads `groups[g]`. `dims` are those afterwards.
    ///
    /// # Errors
    /// [`Error::Refused`] where the kind's parameters cannot follow.
    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error>;
}

/// Key/value heads that are to take the place of others.
#[derive(Debug)]
pub struct LearnedHeads {
    /// The old heads of each new one.
    pub groups: Vec<Vec<i64>>,
    /// `[groups · head_dim, hidden_size]`, and its bias.
    pub k: (Tensor, Option<Tensor>),
    /// As `k`.
    pub v: (Tensor, Option<Tensor>),
    /// What each old key, and each old value, is read from the new one by: `[n_kv_heads, head_dim, head_dim]`.
    pub push: [Tensor; 2],
    /// How much of each old head is still in use, from 0 to 1.
    pub open: Vec<f64>,
}

/// A choice of the heads that run, by what comes into the layer.
pub trait Routes {
    /// What each head's output is multiplied by outside of training, from 0, closed, to 1: `[batch, n_heads, q_len]`, or
    /// `[batch, n_heads, 1]` where one choice serves a text. `hidden`: `[batch, q_len, hidden_size]`.
    fn open(&self, hidden: &Tensor, mask: &Mask) -> Tensor;

    /// Whether a head is closed for whole texts, so that a layer need not make its queries, keys, values and output.
    fn spares_whole_heads(&self) -> bool;

    /// The mixed values of the query heads `heads` alone, before they are multiplied: q `[batch, heads, q_len, head_dim]`, k and v
    /// of the key/value heads that these read, ascending.
    fn mix(&self, heads: &[i64], qkv: [&Tensor; 3], mask: &Mask) -> Tensor;
}

/// Keys and values of the tokens so far, `[batch, n_kv_heads, len, head_dim]`, all of them or the last few.
#[derive(Debug)]
pub struct KvCache {
    limit: Option<i64>,
    /// `(keys, values, length)`: buffers that grow by doubling, filled up to `length`.
    held: Option<(Tensor, Tensor, i64)>,
}

impl KvCache {
    /// An empty cache that keeps at most the last `limit` tokens between steps.
    pub fn new(limit: Option<i64>) -> Self {
        Self { limit, held: None }
    }

    /// The cache behind `state`.
    ///
    /// # Panics
    /// If the state was made by another kind.
    pub fn of(state: &mut dyn State) -> &mut Self {
        state
            .as_any_mut()
            .downcast_mut()
            .expect("a decoding state belongs to the kind that started it")
    }

    /// Tokens held.
    pub fn n_tokens(&self) -> i64 {
        self.held.as_ref().map_or(0, |(_, _, length)| *length)
    }

    /// All keys and values that are held; `None` before the first token.
    pub fn held(&self) -> Option<(Tensor, Tensor)> {
        let (keys, values, length) = self.held.as_ref()?;
        Some((keys.narrow(2, 0, *length), values.narrow(2, 0, *length)))
    }

    /// Adds keys and values and returns all that are held.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let (before, new) = (self.n_tokens(), k.size()[2]);
        let capacity = self.held.as_ref().map_or(0, |(k, ..)| k.size()[2]);
        if self.held.is_none() || before + new > capacity {
            let grow = |held: Option<&Tensor>, like: &Tensor| {
                let mut size = like.size();
                size[2] = if before == 0 { new } else { (before + new).max(2 * capacity) };
                let buffer = Tensor::empty(&size, (like.kind(), like.device()));
                if let Some(held) = held {
                    buffer.narrow(2, 0, before).copy_(&held.narrow(2, 0, before));
                }
                buffer
            };
            let (old_k, old_v) =
                self.held.as_ref().map_or((None, None), |(k, v, _)| (Some(k), Some(v)));
            self.held = Some((grow(old_k, k), grow(old_v, v), before));
        }
        let (keys, values, length) = self.held.as_mut().expect("a buffer was made above");
        tch::no_grad(|| {
            keys.narrow(2, before, new).copy_(k);
            values.narrow(2, before, new).copy_(v);
        });
        *length = before + new;
        (keys.narrow(2, 0, *length), values.narrow(2, 0, *length))
    }

    /// Forgets what is beyond the limit.
    pub fn trim(&mut self) {
        if let (Some(limit), Some((k, v, length))) = (self.limit, self.held.as_mut())
            && *length > limit
        {
            // A copy: the old buffer must go, or nothing is saved.
            let last = |x: &Tensor| x.narrow(2, *length - limit, limit).copy();
            (*k, *v) = (last(k), last(v));
            *length = limit;
        }
    }
}

impl State for KvCache {
    fn bytes(&self) -> usize {
        let size = |x: &Tensor| x.numel() * x.kind().elt_size_in_bytes();
        self.held.as_ref().map_or(0, |(k, v, _)| size(k) + size(v))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Calls `kind` on `input` with each row rolled so that its real tokens start at 0, and rolls the result back.
///
/// For kinds that work on blocks or distances and cannot have padding in front. Queries and keys must be of one
/// sequence, and its real tokens one run.
pub fn rolled(input: &AttnInput, kind: &dyn Attention) -> Tensor {
    let Some(keep) = input.mask.keep().filter(|_| input.mask.padding() == Padding::Contiguous)
    else {
        return kind.forward(input);
    };
    let n = keep.size()[1];
    let offset = keep.to_kind(Kind::Int64).argmax(1, true); // [b, 1]
    let place = Tensor::arange(n, (Kind::Int64, keep.device()));
    let forth = (&place + &offset).remainder(n); // [b, n]
    let back = (&place - &offset).remainder(n);

    let hidden = roll(input.hidden, &forth, 1);
    let [q, k, v] = [input.q, input.k, input.v].map(|x| roll(x, &forth, 2));
    let rotary = input.rotary.map(|(cos, sin)| (roll(cos, &forth, 2), roll(sin, &forth, 2)));
    let z = kind.forward(&AttnInput {
        hidden: &hidden,
        q: &q,
        k: &k,
        v: &v,
        rotary: rotary.as_ref(),
        positions: &roll(input.positions, &forth, 1),
        mask: &Mask::with_keep(input.mask.causal(), &keep.gather(1, &forth, false)),
        ..*input
    });
    roll(&z, &back, 2)
}

/// Takes `index` (`[batch, n]`) along axis `dim` of `x` (`[batch, .., n, ..]`).
fn roll(x: &Tensor, index: &Tensor, dim: usize) -> Tensor {
    let mut shape = vec![1; x.dim()];
    (shape[0], shape[dim]) = (index.size()[0], index.size()[1]);
    x.gather(dim as i64, &index.view(shape.as_slice()).expand(x.size(), false), false)
}

/// The weights of a kind that cannot have padding in front, with `rows` counted as the caller sees them. Rows that
/// are padding come out as zeros.
pub(crate) fn rolled_weights(input: &AttnInput, kind: &dyn Attention, rows: &[i64]) -> Tensor {
    let Some(keep) = input.mask.keep().filter(|_| input.mask.padding() == Padding::Contiguous)
    else {
        return kind.weights(input, rows);
    };
    let [b, n] = keep.size()[..] else { unreachable!("a mask has two axes") };
    let n_heads = input.q.size()[1];
    let out = Tensor::zeros([b, n_heads, rows.len() as i64, n], (input.q.kind(), input.q.device()));
    for example in 0..b {
        let first = keep.get(example).to_kind(Kind::Int64).argmax(0, false).int64_value(&[]);
        let length = keep.get(example).sum(Kind::Int64).int64_value(&[]);
        let real: Vec<(i64, i64)> = (0..)
            .zip(rows)
            .filter(|&(_, &row)| (first..first + length).contains(&row))
            .map(|(slot, &row)| (slot, row - first))
            .collect();
        if real.is_empty() {
            continue;
        }
        let cut = |x: &Tensor, dim: i64| x.narrow(0, example, 1).narrow(dim, first, length);
        let rotary = input.rotary.map(|(cos, sin)| (cut(cos, 2), cut(sin, 2)));
        let weights = kind.weights(
            &AttnInput {
                hidden: &cut(input.hidden, 1),
                q: &cut(input.q, 2),
                k: &cut(input.k, 2),
                v: &cut(input.v, 2),
                rotary: rotary.as_ref(),
                positions: &cut(input.positions, 1),
                mask: &Mask::new(input.mask.causal()),
                ..*input
            },
            &real.iter().map(|&(_, row)| row).collect::<Vec<_>>(),
        );
        for (i, &(slot, _)) in real.iter().enumerate() {
            out.narrow(0, example, 1)
                .narrow(2, slot, 1)
                .narrow(3, first, length)
                .copy_(&weights.narrow(2, i as i64, 1));
        }
    }
    out
}
