//! A forward pass that stops between two blocks: what comes before a change is computed once.

use tch::Tensor;

use crate::{
    Error,
    arch::Tokens,
    attention::{State, Stream},
    doing::During,
    gate::Gate,
    layer::{LayerPass, Source, Tap, at_places, fanned},
    mask::Mask,
    model::{Batch, Encoded, ForwardOptions, Model, ModelInput},
};

/// A batch on its way through a model, in front of a block or behind the last.
///
/// ```text
/// begin -> advance -> advance -> ... -> finish
///             \-> branch -> advance -> ... -> finish
/// ```
///
/// [`Self::branch`] leaves the way with several copies of the batch, each under a gate of its own: a head in layer l
/// changes nothing before l, and not the attention of l either.
#[derive(Debug)]
pub struct Running<'m> {
    model: &'m Model,
    /// `[rows, seq_len, hidden_size]`; behind the last block `[n, hidden_size]` where logits at n places are wanted.
    pub(crate) x: Tensor,
    mask: Mask,
    positions: Tensor,
    rotary: Option<(Tensor, Tensor)>,
    source: Option<Encoded>,
    /// The block in front.
    layer: usize,
    at: Option<Tensor>,
    /// Whether the last block is to leave `at` alone.
    pub(crate) narrows: bool,
    before_vocabulary: bool,
}

/// What goes into one block beside the hidden states.
pub(crate) struct Step<'a> {
    pub(crate) gate: Option<&'a Gate>,
    pub(crate) fan: i64,
    pub(crate) train: bool,
    pub(crate) stream: Stream,
    pub(crate) state: Option<&'a mut dyn State>,
    pub(crate) tap: &'a mut Tap,
}

impl Model {
    /// Begins a pass: embeds the batch. Of `options` count `positions`, `logits_at` and `before_vocabulary`.
    ///
    /// # Errors
    /// As [`Self::forward`]; [`Error::Refused`] where a layer attends to another sequence.
    pub fn begin(
        &self,
        input: &ModelInput,
        options: &ForwardOptions<'_>,
    ) -> Result<Running<'_>, Error> {
        self.check_input(input, options)?;
        if let Some(layer) = self.layers().into_iter().find(|layer| layer.kind().needs_source()) {
            return Err(Error::Refused {
                kind: layer.variant().name(),
                what: "run block by block",
                reason: "the sequence that it attends to has been through the same heads".into(),
            });
        }
        let batch = self.batch(input, options, None)?;
        Ok(Running::new(self, batch, None, options))
    }
}

impl<'m> Running<'m> {
    pub(crate) fn new(
        model: &'m Model,
        batch: Batch,
        source: Option<Encoded>,
        options: &ForwardOptions<'_>,
    ) -> Self {
        let Batch { ids, mask, positions, types } = batch;
        let tokens = Tokens { ids: &ids, positions: &positions, types: types.as_ref() };
        let x = model.embed(&tokens, options.train);
        let rotary = model.arch.rotary().map(|rotary| rotary.tables(&positions, x.kind()));
        let [rows, seq_len] = ids.size()[..] else { unreachable!("ids have two axes") };
        // While decoding the mask covers the past; the head reads of the new tokens alone.
        let at = options.logits_at.map(|at| model.on_device(at)).or_else(|| {
            model.arch.reads().places(&mask.tail(seq_len), [rows, seq_len], model.device)
        });
        let before_vocabulary = options.before_vocabulary;
        Self {
            model,
            x,
            mask,
            positions,
            rotary,
            source,
            layer: 0,
            at,
            narrows: true,
            before_vocabulary,
        }
    }

    /// The block in front: as many as there are where none is.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Rows of the batch, copies included.
    pub fn n_rows(&self) -> i64 {
        self.positions.size()[0]
    }

    /// Stands in front of `layer` with the hidden states `x`, `[rows, seq_len, hidden_size]`, of an earlier pass over the batch.
    pub(crate) fn resume(&mut self, x: &Tensor, layer: usize) {
        self.x = x.shallow_clone();
        self.layer = layer;
    }

    /// Takes the hidden states here for the input that gradients go back to: every layer ahead then takes part in them, whether or
    /// not its parameters do.
    pub fn track_gradients(&mut self) {
        self.x = self.x.detach().set_requires_grad(true);
    }

    /// Goes through the block in front, its heads gated by `gate`.
    ///
    /// # Errors
    /// As [`Model::forward`].
    ///
    /// # Panics
    /// Behind the last block.
    pub fn advance(&mut self, gate: Option<&Gate>) -> Result<(), Error> {
        self.step(Step::plain(gate, &mut Tap::default()))
    }

    /// As [`Self::advance`], and returns the heads' outputs there before the gate, `[rows, n_heads, seq_len, head_dim]`.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn advance_with_z(&mut self, gate: Option<&Gate>) -> Result<Tensor, Error> {
        let mut tap = Tap { keep_z: true, ..Tap::default() };
        self.step(Step::plain(gate, &mut tap))?;
        Ok(tap.z.pop().expect("a layer leaves an entry"))
    }

    /// `fan` copies of the batch behind the block in front, copy after copy, under `gate`, which has a row for every row of
    /// every copy; `self` stays where it is.
    ///
    /// # Errors
    /// As [`Self::advance`].
    ///
    /// # Panics
    /// As [`Self::advance`].
    pub fn branch(&self, fan: i64, gate: &Gate) -> Result<Self, Error> {
        let mut branch = self.fork();
        let mut tap = Tap::default();
        branch.step(Step { fan, ..Step::plain(Some(gate), &mut tap) })?;
        Ok(branch)
    }

    /// The same batch at the same place, to go another way.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            model: self.model,
            x: self.x.shallow_clone(),
            mask: self.mask.clone(),
            positions: self.positions.shallow_clone(),
            rotary: self
                .rotary
                .as_ref()
                .map(|(cos, sin)| (cos.shallow_clone(), sin.shallow_clone())),
            source: None,
            at: self.at.as_ref().map(Tensor::shallow_clone),
            ..*self
        }
    }

    pub(crate) fn step(&mut self, step: Step<'_>) -> Result<(), Error> {
        let Step { gate, fan, train, stream, state, tap } = step;
        let (model, layer, seq_len) = (self.model, self.layer, self.positions.size()[1]);
        let n_layers = model.config.layers.len();
        assert!(layer < n_layers, "there is no block in front");
        // Where the logits of every copy are read.
        if fan > 1 {
            let per_copy = self.n_rows() * seq_len;
            self.at = self.at.as_ref().map(|at| {
                let copies = Tensor::arange(fan, (at.kind(), at.device())) * per_copy;
                (copies.unsqueeze(1) + at.unsqueeze(0)).view([-1])
            });
        }
        let mut pass = LayerPass {
            mask: &self.mask,
            positions: &self.positions,
            rotary: self.rotary.as_ref(),
            gate,
            fan,
            train,
            stream: Stream { layer: layer as u64, ..stream },
            source: self
                .source
                .as_ref()
                .filter(|_| model.arch.layers()[layer].kind().needs_source())
                .map(|source| Source { hidden: &source.inputs[layer], mask: &source.mask }),
            state,
            // What the last block makes elsewhere nobody reads, and makes no difference to any gradient.
            at: self.at.as_ref().filter(|_| layer + 1 == n_layers && self.narrows),
            tap,
        };
        self.x = model.block(layer, &self.x, &mut pass)?;
        self.layer += 1;
        if fan > 1 {
            self.mask = self.mask.fanned(fan);
            self.positions = fanned(&self.positions, fan);
            self.rotary =
                self.rotary.as_ref().map(|(cos, sin)| (fanned(cos, fan), fanned(sin, fan)));
        }
        Ok(())
    }

    /// Goes through the blocks that are left and the head: as [`Output::logits`](crate::Output::logits), for every row of
    /// every copy.
    ///
    /// # Errors
    /// As [`Self::advance`].
    pub fn finish(mut self) -> Result<Tensor, Error> {
        while self.layer < self.model.config.layers.len() {
            self.advance(None)?;
        }
        Ok(self.head(false).1)
    }

    /// The last hidden states, normed, and what the head makes of them.
    pub(crate) fn head(self, train: bool) -> (Tensor, Tensor) {
        let _doing = During::of("the head", None, "hidden states", &self.x);
        let arch = &self.model.arch;
        let last = arch.finish(&self.x);
        let read = match &self.at {
            Some(at) if last.dim() == 3 => at_places(&last, at),
            _ => last.shallow_clone(),
        };
        let logits = match self.before_vocabulary {
            true => arch.before_vocabulary(&read, train),
            false => arch.head(&read, train),
        };
        (last, logits)
    }

    /// What the kinds of the layers learn from on the other sequence.
    pub(crate) fn source_losses(&mut self) -> Vec<Tensor> {
        self.source.as_mut().map_or_else(Vec::new, |source| std::mem::take(&mut source.own_losses))
    }
}

impl<'a> Step<'a> {
    /// Out of training, one copy.
    fn plain(gate: Option<&'a Gate>, tap: &'a mut Tap) -> Self {
        Self { gate, fan: 1, train: false, stream: Stream::default(), state: None, tap }
    }
}
