//! One attention layer of a model: projections, the attention kind between them, gates.

use std::collections::BTreeMap;

use tch::{Device, Tensor};

use crate::{
    Error,
    attention::{self, Attention, AttnInput, Dims, Masks, Own, Projections, Routes, State, Stream},
    config::LayerSpec,
    gate::{Fill, Gate},
    lora::Slot,
    mask::{Mask, Padding},
    nn::{Layout, Linear, Visitor},
    rotary::rotate,
    variants::Variant,
    weights::Weights,
};

/// Which queries' attention to keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Rows {
    /// None: fused kernels do all the work.
    #[default]
    None,
    /// Every query: memory grows with the square of the length.
    All,
    /// These queries of each layer.
    Some(Vec<i64>),
}

/// What to keep of the layers on the way through, and what was kept: one entry per layer.
#[derive(Debug, Default)]
pub struct Tap {
    /// Attention rows to keep.
    pub rows: Rows,
    /// Whether to keep z, the heads' outputs before gates and output projection.
    pub keep_z: bool,
    /// Whether to keep what goes into the layers.
    pub keep_inputs: bool,
    /// `[batch, n_heads, rows, k_len]` a layer.
    pub weights: Vec<Tensor>,
    /// `[batch, n_heads, q_len, head_dim]` a layer.
    pub z: Vec<Tensor>,
    /// `[batch, q_len, hidden_size]` a layer.
    pub inputs: Vec<Tensor>,
    /// What kinds learn from beside the task, of the layers that have such a loss, in training.
    pub own_losses: Vec<Tensor>,
}

impl Tap {
    /// Whether nothing is kept of what a layer's heads make.
    fn wants_nothing(&self) -> bool {
        self.rows == Rows::None && !self.keep_z && !self.keep_inputs
    }
}

/// A sequence that keys and values are taken from instead of the layer's own input.
#[derive(Debug)]
pub struct Source<'a> {
    /// `[batch, k_len, hidden_size]`.
    pub hidden: &'a Tensor,
    /// The source's own mask.
    pub mask: &'a Mask,
}

/// What accompanies the hidden states through one layer.
#[derive(Debug)]
pub struct LayerPass<'a> {
    /// What is hidden.
    pub mask: &'a Mask,
    /// `[batch, q_len]`.
    pub positions: &'a Tensor,
    /// `(cos, sin)` of the positions, where the architecture rotates.
    pub rotary: Option<&'a (Tensor, Tensor)>,
    /// The gate of this layer's heads, of `fan · batch` rows.
    pub gate: Option<&'a Gate>,
    /// Copies of the batch that go on from the heads' outputs, 1 for itself alone: `[fan · batch, ..]`, copy after copy. What a
    /// layer makes of other gates needs its attention only once.
    pub fan: i64,
    /// Whether dropout is on.
    pub train: bool,
    /// Random numbers, this layer's.
    pub stream: Stream,
    /// Another sequence to attend to.
    pub source: Option<Source<'a>>,
    /// What came before, when decoding.
    pub state: Option<&'a mut dyn State>,
    /// Where the layer's output is wanted, `[n]` places in the flattened batch, copies included (row · q_len + query): it is
    /// then `[n, hidden_size]`. Absent: everywhere.
    pub at: Option<&'a Tensor>,
    /// What to keep.
    pub tap: &'a mut Tap,
}

impl LayerPass<'_> {
    /// `x` (`[batch, q_len, width]`), of every copy, where the output is wanted: what the layer's output is added to.
    pub(crate) fn wanted(&self, x: &Tensor) -> Tensor {
        let x = self.fanned(x);
        self.at.map_or_else(|| x.shallow_clone(), |at| at_places(&x, at))
    }

    /// `x` once for every copy.
    fn fanned(&self, x: &Tensor) -> Tensor {
        fanned(x, self.fan)
    }
}

/// `x` at the places `at` of the flattened batch: `[batch, q_len, width] -> [n, width]`.
pub(crate) fn at_places(x: &Tensor, at: &Tensor) -> Tensor {
    x.flatten(0, 1).index_select(0, at)
}

/// `x` (`[batch, ..]`) once for every copy, copy after copy: `[fan · batch, ..]`.
pub(crate) fn fanned(x: &Tensor, fan: i64) -> Tensor {
    if fan == 1 {
        return x.shallow_clone();
    }
    let mut times = vec![1; x.dim()];
    times[0] = fan;
    x.repeat(times)
}

#[derive(Debug)]
enum Qkv {
    /// One matrix whose outputs are q, k, v side by side, as GPT-2's `c_attn`.
    Fused(Linear),
    Split([Linear; 3]),
}

/// Tokens whose queries, keys, values and output of a head cost about as much as copying the head's matrices: measured with
/// matrices of 768 channels on two threads.
const TOKENS_PER_COPY: i64 = 200;

/// Texts of a batch that are made of the same heads.
#[derive(Debug, PartialEq)]
struct Group {
    /// Key/value heads; `None`: all, with nothing copied.
    kv_heads: Option<Vec<i64>>,
    /// Rows of the batch.
    texts: Vec<i64>,
}

/// The texts, of `n` tokens each, by what they are to be made of: the key/value heads that an open query head reads, where that saves
/// more than it costs. `open`: `[batch, n_heads, 1]`.
fn texts_by_heads(dims: &Dims, open: &Tensor, n: i64) -> Vec<Group> {
    let open = open.squeeze_dim(2).gt(0.0);
    let mut groups: BTreeMap<Vec<i64>, Vec<i64>> = BTreeMap::new();
    for row in 0..open.size()[0] {
        let is_open: Vec<bool> = Vec::try_from(open.get(row)).expect("one axis of booleans");
        let heads: Vec<i64> =
            (0..).zip(&is_open).filter(|(_, is)| **is).map(|(head, _)| head).collect();
        groups.entry(dims.kv_heads_of(&heads)).or_default().push(row);
    }
    let is_worth = |kv_heads: &Vec<i64>, texts: &Vec<i64>| {
        let n_open = kv_heads.len() as i64;
        let n_closed = dims.n_kv_heads - n_open;
        n_closed > 0 && n * texts.len() as i64 * n_closed >= TOKENS_PER_COPY * n_open
    };
    let (worth, whole): (Vec<_>, Vec<_>) =
        groups.into_iter().partition(|(kv_heads, texts)| is_worth(kv_heads, texts));
    let mut groups: Vec<Group> =
        worth.into_iter().map(|(heads, texts)| Group { kv_heads: Some(heads), texts }).collect();
    let texts: Vec<i64> = whole.into_iter().flat_map(|(_, texts)| texts).collect();
    if !texts.is_empty() {
        groups.push(Group { kv_heads: None, texts });
    }
    groups
}

/// The heads side by side: `[batch, heads, n, d] -> [batch, n, heads · d]`.
pub(crate) fn joined(z: &Tensor) -> Tensor {
    let [b, heads, n, d] = z.size()[..] else { unreachable!("z has four axes") };
    z.transpose(1, 2).reshape([b, n, heads * d])
}

/// Names and options of a layer's projections, as the architecture lays them out.
#[derive(Debug)]
pub(crate) struct Naming<'a> {
    /// One name (fused) or three.
    pub(crate) qkv: &'a [String],
    pub(crate) qkv_bias: bool,
    pub(crate) out: String,
    pub(crate) out_bias: bool,
    pub(crate) layout: Layout,
    /// Standard deviations at random initialization: of q, k, v and of the output projection.
    pub(crate) std: [f64; 2],
    /// Prefix of the variant's own parameters.
    pub(crate) kind: String,
}

/// An attention layer: `hidden -> W_O · gate(z(hidden))`.
#[derive(Debug)]
pub struct AttnLayer {
    qkv: Qkv,
    out: Linear,
    kind: Box<dyn Attention>,
    variant: Variant,
    dims: Dims,
    kept_heads: Vec<i64>,
    dropout: f64,
    kind_prefix: String,
}

impl AttnLayer {
    pub(crate) fn new(
        weights: &mut Weights<'_>,
        naming: Naming<'_>,
        spec: &LayerSpec,
        dims: Dims,
        dropout: f64,
    ) -> Result<Self, Error> {
        let (hidden, d) = (dims.hidden_size, dims.head_dim);
        let widths = [dims.n_heads * d, dims.n_kv_heads * d, dims.n_kv_heads * d];
        let Naming { qkv, qkv_bias, out, out_bias, layout, std, kind } = naming;
        let mut linear = |name: &String, width: i64| {
            Linear::new(weights, name.as_str(), [hidden, width], qkv_bias, layout, std[0])
        };
        let qkv = match qkv {
            [fused] => Qkv::Fused(linear(fused, widths.iter().sum())?),
            [q, k, v] => {
                Qkv::Split([linear(q, widths[0])?, linear(k, widths[1])?, linear(v, widths[2])?])
            }
            _ => unreachable!("an architecture names one fused projection or three"),
        };
        let out = Linear::new(weights, out, [widths[0], hidden], out_bias, layout, std[1])?;
        let projections = projections(&qkv, &dims);
        let variant = spec.variant.clone();
        let attention = variant.build(&dims, &projections, &mut Own::new(weights, &kind))?;
        let kept_heads = spec.kept_heads.clone();
        Ok(Self {
            qkv,
            out,
            kind: attention,
            variant,
            dims,
            kept_heads,
            dropout,
            kind_prefix: kind,
        })
    }

    /// The layer's extents.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// The attention kind with its settings.
    pub fn variant(&self) -> &Variant {
        &self.variant
    }

    /// The attention kind at work.
    pub fn kind(&self) -> &dyn Attention {
        self.kind.as_ref()
    }

    /// Floating point operations of the layer over `n_tokens` tokens of one sequence, a multiplication with an addition as two:
    /// its four projections, and what the kind says ([`Attention::flops`]).
    pub fn flops(&self, n_tokens: i64) -> i64 {
        let Dims { n_heads, n_kv_heads, head_dim, hidden_size, .. } = self.dims;
        let projections = 4 * (n_heads + n_kv_heads) * head_dim * hidden_size * n_tokens;
        let mixing = if n_heads > 0 { self.kind.flops(n_tokens) } else { 0 };
        projections + mixing
    }

    /// Whether weights of attention are dropped in training.
    pub(crate) fn drops(&self) -> bool {
        self.dropout > 0.0
    }

    /// What `config.json` says of this layer.
    pub fn spec(&self) -> LayerSpec {
        LayerSpec {
            variant: self.variant.clone(),
            n_heads: self.dims.n_heads,
            n_kv_heads: self.dims.n_kv_heads,
            kept_heads: self.kept_heads.clone(),
            kv_of_head: self.dims.kv_of_head.clone(),
        }
    }

    /// The pretrained projections, views of the layer's own.
    pub fn projections(&self) -> Projections {
        projections(&self.qkv, &self.dims)
    }

    /// What the layer adds to the hidden states where its heads give `z`, no gate on them: `[batch, n_heads, q_len, head_dim] ->
    /// [batch, q_len, hidden_size]`. `train` turns on the dropout of an adapter.
    pub fn put_out(&self, z: &Tensor, train: bool) -> Tensor {
        self.out.forward(&joined(z), train)
    }

    /// The output projection.
    pub fn out(&self) -> &Linear {
        &self.out
    }

    /// Makes another attention kind for this layer, its own parameters made from the projections and from `seed`.
    ///
    /// # Errors
    /// [`Error::Setting`] where the settings do not fit this layer.
    pub(crate) fn build(&self, variant: &Variant, seed: u64) -> Result<Box<dyn Attention>, Error> {
        let weight = &self.out.weight;
        let mut weights = Weights::from_seed(seed, weight.kind(), weight.device());
        variant.build(
            &self.dims,
            &self.projections(),
            &mut Own::new(&mut weights, &self.kind_prefix),
        )
    }

    /// Puts a kind from [`Self::build`] between the projections.
    pub(crate) fn install(&mut self, variant: &Variant, kind: Box<dyn Attention>) {
        self.kind = kind;
        self.variant = variant.clone();
    }

    /// Keeps the query heads `heads`, in that order, and the key/value heads that they read, and cuts every
    /// matrix of the layer accordingly.
    ///
    /// # Errors
    /// [`Error::Index`] for a head that is not there, [`Error::Refused`] by a kind that cannot follow; the layer is
    /// then unchanged.
    pub fn select_heads(&mut self, heads: &[i64]) -> Result<(), Error> {
        let n_heads = self.dims.n_heads;
        if let Some(&index) = heads.iter().find(|head| !(0..n_heads).contains(head)) {
            return Err(Error::Index { what: "head", index, count: n_heads });
        }
        if let Some(twice) = heads.iter().enumerate().find(|(at, head)| heads[..*at].contains(head))
        {
            return Err(Error::Input {
                name: "heads",
                problem: format!("{heads:?} names {} twice", twice.1),
            });
        }
        let kv_heads = self.dims.kv_heads_of(heads);
        let dims = self.dims.of_heads(heads);
        self.kind.select_heads(heads, &dims)?;

        let d = self.dims.head_dim;
        let (q, kv) = (channels(heads, d, 0), channels(&kv_heads, d, 0));
        match &mut self.qkv {
            Qkv::Split([wq, wk, wv]) => {
                wq.select_outputs(&q);
                wk.select_outputs(&kv);
                wv.select_outputs(&kv);
            }
            Qkv::Fused(fused) => {
                let at_k = self.dims.n_heads * d;
                let at_v = at_k + self.dims.n_kv_heads * d;
                let [k, v] = [at_k, at_v].map(|start| channels(&kv_heads, d, start));
                fused.select_outputs(&[q.clone(), k, v].concat());
            }
        }
        self.out.select_inputs(&q);
        self.kept_heads = heads.iter().map(|&head| self.kept_heads[head as usize]).collect();
        self.dims = dims;
        if let Some(settings) = self.kind.settings() {
            self.variant = settings;
        }
        Ok(())
    }

    /// Puts new key/value heads in place of the old ones, new head g made of the old heads `groups[g]`, with the projections that go
    /// with them: `new`, of as many query heads as before, and the output matrix `out`, `[hidden_size, n_heads · head_dim]`. Each query
    /// head reads a new head that its old one went into; where that are several, its readers are dealt out among them in runs. Query
    /// heads, in `new` and `out` in their old order, end up in the order of the heads that they read, their numbers
    /// ([`LayerSpec::kept_heads`]) with them, unless the kind refuses to have them moved.
    ///
    /// # Errors
    /// [`Error::Input`] for groups that leave a head out or hold none, for matrices of other shapes, and where an old head has fewer
    /// readers than new ones came of it; [`Error::Refused`] by a kind that cannot follow. The layer is then unchanged.
    pub fn regroup_kv(
        &mut self,
        groups: &[Vec<i64>],
        new: Projections,
        out: &Tensor,
    ) -> Result<(), Error> {
        let dims = self.dims.regrouped(groups)?;
        let [d, hidden] = [dims.head_dim, dims.hidden_size];
        let old = self.projections();
        let [n_q, n_kv] = [dims.n_heads, dims.n_kv_heads].map(|n| n * d);
        let bias = |of: &(Tensor, Option<Tensor>), n: i64| of.1.as_ref().map(|_| vec![n]);
        for (name, new, expected) in [
            ("q", &new.q, (vec![n_q, hidden], bias(&old.q, n_q))),
            ("k", &new.k, (vec![n_kv, hidden], bias(&old.k, n_kv))),
            ("v", &new.v, (vec![n_kv, hidden], bias(&old.v, n_kv))),
            ("out", &(out.shallow_clone(), None), (vec![hidden, n_q], None)),
        ] {
            let found = (new.0.size(), new.1.as_ref().map(Tensor::size));
            if found != expected {
                let problem = format!("has shape and bias {found:?}, expected {expected:?}");
                return Err(Error::Input { name, problem });
            }
        }
        self.kind.regroup_kv(groups, &dims)?;
        let Projections { q, k, v } = new;
        match &mut self.qkv {
            Qkv::Split(three) => {
                for (linear, (weight, bias)) in three.iter_mut().zip([q, k, v]) {
                    linear.replace(&weight, bias.as_ref());
                }
            }
            Qkv::Fused(fused) => {
                let biases: Option<Vec<Tensor>> = [q.1, k.1, v.1].into_iter().collect();
                let bias = biases.map(|all| Tensor::cat(&all, 0));
                fused.replace(&Tensor::cat(&[q.0, k.0, v.0], 0), bias.as_ref());
            }
        }
        let bias = self.out.bias.as_ref().map(Tensor::shallow_clone);
        self.out.replace(out, bias.as_ref());
        self.dims = dims;
        let mut order: Vec<i64> = (0..self.dims.n_heads).collect();
        order.sort_by_key(|&head| self.dims.kv_of_head[head as usize]);
        if !order.is_sorted() {
            match self.select_heads(&order) {
                // A kind whose settings name heads: they stay where they are, and the layer is unevenly grouped.
                Err(Error::Refused { .. }) => {}
                ordered => ordered?,
            }
        }
        Ok(())
    }

    /// `[batch, q_len, hidden_size] -> [batch, q_len, hidden_size]`, or `-> [n, hidden_size]` where [`LayerPass::at`] names
    /// n places.
    ///
    /// # Errors
    /// [`Error::Refused`] where the kind cannot serve the mask, [`Error::Input`] for a gate of the wrong shape.
    pub fn forward(&self, hidden: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        if let Some(out) = self.forward_open(hidden, pass)? {
            return Ok(out);
        }
        let z = self.mix(hidden, pass)?;
        let z = pass.fanned(&z);
        let z = match pass.gate {
            None => z,
            Some(_) if zeroes_queries(pass) => z,
            Some(gate) => {
                let r = self.of_zero_queries(hidden, gate, pass)?.map(|r| pass.fanned(&r));
                gate.apply(&z, r.as_ref())?
            }
        };
        // Heads mix positions, and what follows does not: from here on the places wanted are enough.
        let z = joined(&z);
        let z = pass.at.map_or_else(|| z.shallow_clone(), |at| at_places(&z, at));
        Ok(self.out.forward(&z, pass.train))
    }

    /// [`Self::forward`] of a kind that closes heads for whole texts: without what the closed ones would be made of. A key/value
    /// head goes with the last query head that reads it, and closed query heads beside an open one are made and multiplied by
    /// 0. Matrices are copied for each set of heads, which few tokens are not worth: those have all heads made. `None` where all
    /// heads are needed, or something of them is asked for.
    fn forward_open(&self, hidden: &Tensor, pass: &LayerPass<'_>) -> Result<Option<Tensor>, Error> {
        let routes = self.kind.routes().filter(|routes| routes.spares_whole_heads());
        let (Some(routes), None, Qkv::Split(qkv)) = (routes, pass.rotary, &self.qkv) else {
            return Ok(None);
        };
        // What a gate learns from heads that are closed is worth the work.
        let is_fixed = |gate: &Gate| matches!(gate.fill, Fill::Zero) && !gate.g.requires_grad();
        let is_plain = !pass.train && pass.gate.is_none_or(is_fixed) && pass.fan == 1;
        let is_alone = pass.source.is_none() && pass.state.is_none() && pass.tap.wants_nothing();
        let has_adapter = self.linears().any(|linear| linear.adapter.is_some());
        if !is_plain || !is_alone || has_adapter || hidden.device() != Device::Cpu {
            return Ok(None);
        }
        let [b, n, _] = hidden.size()[..] else { unreachable!("hidden states have three axes") };
        let open = routes.open(hidden, pass.mask); // [b, h, 1]
        let groups = texts_by_heads(&self.dims, &open, n);
        if groups.iter().all(|group| group.kv_heads.is_none()) {
            return Ok(None);
        }
        let gates = match pass.gate {
            Some(gate) => {
                let n_heads = self.dims.n_heads;
                gate.check(&[b, n_heads, n, self.dims.head_dim])?;
                (open.unsqueeze(-1) * gate.g.to_kind(hidden.kind()))
                    .expand([b, n_heads, -1, 1], true)
            }
            None => open.unsqueeze(-1),
        }; // [b, h, 1 or n, 1]
        let mut order = Vec::new();
        let mut outs = Vec::new();
        for Group { kv_heads, texts } in groups {
            let index = Tensor::from_slice(&texts);
            let of_texts = |x: &Tensor| x.index_select(0, &index);
            let (hidden, gates) = (of_texts(hidden), of_texts(&gates));
            let mask = pass.mask.rows(&index);
            outs.push(self.out_of(kv_heads.as_deref(), qkv, routes, [&hidden, &gates], &mask));
            order.extend(texts);
        }
        let back = Tensor::from_slice(&order).argsort(0, false);
        let out = Tensor::cat(&outs, 0).index_select(0, &back);
        Ok(Some(pass.at.map_or_else(|| out.shallow_clone(), |at| at_places(&out, at))))
    }

    /// What the layer puts out for texts, `hidden` and `gates` theirs, made of the key/value heads `kv_heads` and of the query heads
    /// that read them; of all, without copies of matrices, where none are named.
    fn out_of(
        &self,
        kv_heads: Option<&[i64]>,
        qkv: &[Linear; 3],
        routes: &dyn Routes,
        [hidden, gates]: [&Tensor; 2],
        mask: &Mask,
    ) -> Tensor {
        let Some(kv_heads) = kv_heads else {
            let [q, k, v] = self.heads(hidden, None, false);
            let all: Vec<i64> = (0..self.dims.n_heads).collect();
            let z = routes.mix(&all, [&q, &k, &v], mask) * gates;
            return self.out.forward(&joined(&z), false);
        };
        if kv_heads.is_empty() {
            let bias =
                self.out.bias.as_ref().map(|bias| bias.to_kind(hidden.kind()).expand_as(hidden));
            return bias.unwrap_or_else(|| hidden.zeros_like());
        }
        let reads = |head: &i64| kv_heads.contains(&self.dims.kv_of_head[*head as usize]);
        let heads: Vec<i64> = (0..self.dims.n_heads).filter(reads).collect();
        let of_heads = |heads: &[i64]| Tensor::from_slice(&channels(heads, self.dims.head_dim, 0));
        let part = |linear: &Linear, heads: &[i64]| {
            by_head(&linear.some_outputs(hidden, &of_heads(heads)), self.dims.head_dim)
        };
        let [q, k, v] = [part(&qkv[0], &heads), part(&qkv[1], kv_heads), part(&qkv[2], kv_heads)];
        let gates = gates.index_select(1, &Tensor::from_slice(&heads));
        let z = routes.mix(&heads, [&q, &k, &v], mask) * gates;
        self.out.some_inputs(&joined(&z), &of_heads(&heads))
    }

    /// The projections.
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let of_input = match &self.qkv {
            Qkv::Fused(fused) => std::slice::from_ref(fused),
            Qkv::Split(three) => three,
        };
        of_input.iter().chain([&self.out])
    }

    /// What stands in for the heads that `gate` lets go, where that is what they make of queries of zeros.
    fn of_zero_queries(
        &self,
        hidden: &Tensor,
        gate: &Gate,
        pass: &LayerPass<'_>,
    ) -> Result<Option<Tensor>, Error> {
        if !matches!(gate.fill, Fill::ZeroQuery) {
            return Ok(None);
        }
        if pass.state.is_some() {
            return Err(Error::Refused {
                kind: self.variant.name(),
                what: "decode under a gate that is neither 0 nor 1",
                reason:
                    "a decoding state follows one output of each head\nhint: open or close the gate"
                        .into(),
            });
        }
        let closed = Gate {
            g: Tensor::zeros([1, 1, 1, 1], (hidden.kind(), hidden.device())),
            fill: Fill::ZeroQuery,
        };
        let mut pass = LayerPass {
            gate: Some(&closed),
            fan: 1,
            state: None,
            tap: &mut Tap::default(),
            source: pass.source.as_ref().map(|of| Source { hidden: of.hidden, mask: of.mask }),
            ..*pass
        };
        Ok(Some(self.mix(hidden, &mut pass)?))
    }

    /// z, the heads' outputs before gate and output projection: `[batch, q_len, hidden_size] ->
    /// [batch, n_heads, q_len, head_dim]`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub(crate) fn mix(&self, hidden: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        let [b, q_len, _] = hidden.size()[..] else {
            unreachable!("hidden states have three axes")
        };
        if pass.tap.keep_inputs {
            pass.tap.inputs.push(hidden.shallow_clone());
        }
        if pass.at.is_some_and(|at| at.numel() == 0) {
            // Its input alone was wanted.
            let none = [b, self.dims.n_heads, q_len, self.dims.head_dim];
            return Ok(Tensor::zeros(none, (hidden.kind(), hidden.device())));
        }
        if self.dims.n_heads == 0 {
            // An entry a layer, also of one without heads.
            let k_len = pass.source.as_ref().map_or(q_len, |source| source.hidden.size()[1]);
            let none = |rows: i64, width: i64| {
                Tensor::zeros([b, 0, rows, width], (hidden.kind(), hidden.device()))
            };
            match &pass.tap.rows {
                Rows::None => {}
                Rows::All => pass.tap.weights.push(none(q_len, k_len)),
                Rows::Some(rows) => pass.tap.weights.push(none(rows.len() as i64, k_len)),
            }
            let z = none(q_len, self.dims.head_dim);
            if pass.tap.keep_z {
                pass.tap.z.push(z.shallow_clone());
            }
            return Ok(z);
        }
        if let Some(source) = &pass.source {
            self.check_source(source, pass.rotary.is_some(), pass.state.is_some(), b)?;
        }
        let mask = pass.source.as_ref().map_or(pass.mask, |source| source.mask);
        self.check_mask(mask, pass.state.is_some())?;
        if pass.gate.is_some_and(|gate| matches!(gate.fill, Fill::ZeroQuery))
            && !self.kind.reads_queries()
        {
            return Err(Error::Refused {
                kind: self.variant.name(),
                what: "give a head a query of zeros",
                reason: "no head of it is made from a query of its own\nhint: replace its output instead: zero, mean".into(),
            });
        }

        let source_hidden = pass.source.as_ref().map(|source| source.hidden);
        let [q, k, v] = self.heads(hidden, source_hidden, pass.train);
        let q = match pass.gate {
            Some(gate) if zeroes_queries(pass) => {
                gate.check(&q.size())?;
                q * gate.g.to_kind(hidden.kind())
            }
            _ => q,
        };
        let turned = pass.rotary.map(|tables| (rotate(&q, tables), rotate(&k, tables)));
        let (q_in, k_in) = turned.as_ref().map_or((&q, &k), |(q, k)| (q, k));
        let input = AttnInput {
            hidden,
            q: q_in,
            k: k_in,
            v: &v,
            rotary: pass.rotary,
            positions: pass.positions,
            mask,
            source: pass.source.as_ref().map(|source| source.hidden),
            dropout: if pass.train { self.dropout } else { 0.0 },
            train: pass.train,
            stream: pass.stream,
            selection: None,
        };

        let rows = match &pass.tap.rows {
            Rows::None => None,
            Rows::All => Some((0..q_len).collect::<Vec<_>>()),
            Rows::Some(rows) => Some(rows.clone()),
        };
        if let (Some(rows), None) = (&rows, &pass.state) {
            pass.tap.weights.push(self.weights(&input, rows));
        }
        if pass.train {
            pass.tap.own_losses.extend(self.kind.own_loss(&input));
        }
        let z = match &mut pass.state {
            Some(state) => {
                let z = self.kind.step(&input, &mut **state);
                if let Some(rows) = &rows {
                    let cache = self.kind.cache(&mut **state).expect("checked before the step");
                    let (k, v) = cache.held().expect("a step leaves its tokens");
                    let mask = &mask.tail(k.size()[2]);
                    let all = AttnInput { k: &k, v: &v, mask, ..input };
                    pass.tap.weights.push(self.kind.weights(&all, rows));
                }
                z
            }
            None if self.kind.masks() == Masks::Contiguous => {
                attention::rolled(&input, self.kind.as_ref())
            }
            None => self.kind.forward(&input),
        };
        if pass.tap.keep_z {
            pass.tap.z.push(z.shallow_clone());
        }
        Ok(z)
    }

    /// Whether attention rows can be had while decoding: whether `state` holds all that they are made of.
    pub(crate) fn shows_rows(&self, state: &mut dyn State) -> bool {
        self.dims.n_heads == 0 || self.kind.cache(state).is_some()
    }

    /// Whether [`Self::forward`] decodes batches in which shorter rows are padded on the left.
    pub(crate) fn decodes_padded(&self) -> bool {
        self.kind.masks() == Masks::Any
    }

    /// The projections, to put adapters beside them.
    pub(crate) fn linears_mut(&mut self) -> Vec<Slot<'_>> {
        let d = self.dims.head_dim;
        let [n_q, n_kv] = [self.dims.n_heads * d, self.dims.n_kv_heads * d];
        let mut slots: Vec<Slot<'_>> = match &mut self.qkv {
            Qkv::Fused(fused) => {
                let qkv = vec![(0, 0, n_q), (1, n_q, n_kv), (2, n_q + n_kv, n_kv)];
                vec![Slot { linear: fused, qkv }]
            }
            Qkv::Split(three) => {
                let outputs = [n_q, n_kv, n_kv];
                let slot = |(i, linear)| Slot { linear, qkv: vec![(i, 0, outputs[i])] };
                three.iter_mut().enumerate().map(slot).collect()
            }
        };
        slots.push((&mut self.out).into());
        slots
    }

    /// Names the parameters.
    pub fn visit(&self, f: &mut Visitor<'_>) {
        self.linears().for_each(|linear| linear.visit(f));
        self.kind.visit(f);
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        match self.kind.masks() {
            Masks::Contiguous => attention::rolled_weights(input, self.kind.as_ref(), rows),
            Masks::Any => self.kind.weights(input, rows),
        }
    }

    fn check_source(
        &self,
        source: &Source<'_>,
        rotated: bool,
        decoding: bool,
        batch: i64,
    ) -> Result<(), Error> {
        let refuse = |reason: &str| {
            Err(Error::Refused {
                kind: self.variant.name(),
                what: "attend to another sequence",
                reason: reason.to_owned(),
            })
        };
        if rotated {
            return refuse("rotations place queries and keys in one sequence");
        }
        if decoding {
            return refuse("a decoding state holds the keys of one sequence");
        }
        if self.kind.masks() == Masks::Contiguous {
            return refuse(
                "it works on distances within one sequence\nhint: use `softmax` in this layer",
            );
        }
        if source.mask.causal() {
            return refuse(
                "the source's mask is causal, while the two sequences have no common order",
            );
        }
        let expected =
            [batch, source.hidden.size().get(1).copied().unwrap_or(0), self.dims.hidden_size];
        if source.hidden.size() != expected {
            let problem = format!(
                "has shape {:?}, expected [{batch}, k_len, {}]",
                source.hidden.size(),
                self.dims.hidden_size
            );
            return Err(Error::Input { name: "source", problem });
        }
        Ok(())
    }

    fn check_mask(&self, mask: &Mask, decoding: bool) -> Result<(), Error> {
        let refuse = |what, reason: &str| {
            Err(Error::Refused { kind: self.variant.name(), what, reason: reason.to_owned() })
        };
        match (self.kind.masks(), mask.padding()) {
            (Masks::Contiguous, Padding::Holes) => refuse(
                "serve a mask with holes",
                "it works on distances between neighbouring tokens\nhint: put each row's real tokens in one run, padding before or behind",
            ),
            (Masks::Contiguous, Padding::Right | Padding::Contiguous) if decoding => refuse(
                "decode a padded batch",
                "it works on distances between neighbouring tokens\nhint: decode rows of one length together, or one at a time",
            ),
            _ => Ok(()),
        }
    }

    /// q, k, v by head: `[batch, heads, len, head_dim]`.
    fn heads(&self, hidden: &Tensor, source: Option<&Tensor>, train: bool) -> [Tensor; 3] {
        let d = self.dims.head_dim;
        let kv_hidden = source.unwrap_or(hidden);
        let flat = match &self.qkv {
            Qkv::Fused(fused) => {
                let sizes =
                    [self.dims.n_heads * d, self.dims.n_kv_heads * d, self.dims.n_kv_heads * d];
                let mut parts = fused.forward(hidden, train).split_with_sizes(sizes.as_slice(), -1);
                if source.is_some() {
                    let from_source =
                        fused.forward(kv_hidden, train).split_with_sizes(sizes.as_slice(), -1);
                    parts.splice(1.., from_source.into_iter().skip(1));
                }
                <[Tensor; 3]>::try_from(parts).expect("split into three")
            }
            Qkv::Split([wq, wk, wv]) => [
                wq.forward(hidden, train),
                wk.forward(kv_hidden, train),
                wv.forward(kv_hidden, train),
            ],
        };
        flat.map(|x| by_head(&x, d))
    }
}

/// `[batch, len, heads · d] -> [batch, heads, len, d]`.
fn by_head(x: &Tensor, d: i64) -> Tensor {
    let [b, len, width] = x.size()[..] else { unreachable!("hidden states have three axes") };
    x.view([b, len, width / d, d]).transpose(1, 2)
}

/// The channels of `heads`, each `d` wide, those of head 0 beginning at `start`.
fn channels(heads: &[i64], d: i64, start: i64) -> Vec<i64> {
    heads.iter().flat_map(|&head| start + head * d..start + (head + 1) * d).collect()
}

/// Whether the gate of the layer is served by the queries alone: the heads' outputs are then what they are to be.
fn zeroes_queries(pass: &LayerPass<'_>) -> bool {
    pass.fan == 1 && pass.gate.is_some_and(Gate::is_hard_zero_query)
}

fn projections(qkv: &Qkv, dims: &Dims) -> Projections {
    let cut = |linear: &Linear, start: i64, len: i64| {
        let bias = linear.bias.as_ref().map(|bias| bias.detach().narrow(0, start, len));
        (linear.out_in().detach().narrow(0, start, len), bias)
    };
    let (n_q, n_kv) = (dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim);
    match qkv {
        Qkv::Fused(all) => Projections {
            q: cut(all, 0, n_q),
            k: cut(all, n_q, n_kv),
            v: cut(all, n_q + n_kv, n_kv),
        },
        Qkv::Split([q, k, v]) => {
            Projections { q: cut(q, 0, n_q), k: cut(k, 0, n_kv), v: cut(v, 0, n_kv) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Probe;

    #[test]
    fn texts_share_matrices_where_that_pays() {
        // Four query heads on two key/value heads, and on heads of their own.
        let group = |kv_heads: Option<&[i64]>, texts: &[i64]| Group {
            kv_heads: kv_heads.map(<[i64]>::to_vec),
            texts: texts.to_vec(),
        };
        let open =
            Tensor::from_slice2(&[[0.0, 1.0, 0.0, 0.0], [1.0; 4], [0.0; 4], [0.3, 1.0, 0.0, 0.0]]);
        let open = open.unsqueeze(-1);
        let pairs = Probe::new(1, [1, 1, 1], 4, 2, false).dims;
        let own = Probe::new(1, [1, 1, 1], 4, 4, false).dims;
        let found = |dims: &Dims, n| texts_by_heads(dims, &open, n);
        assert_eq!(
            found(&pairs, 100),
            [group(Some(&[]), &[2]), group(Some(&[0]), &[0, 3]), group(None, &[1])]
        );
        assert_eq!(found(&pairs, 99), [group(Some(&[]), &[2]), group(None, &[0, 3, 1])]);
        let each = found(&own, 200);
        assert_eq!(
            each,
            [
                group(Some(&[]), &[2]),
                group(Some(&[0, 1]), &[3]),
                group(Some(&[1]), &[0]),
                group(None, &[1])
            ]
        );
    }
}
