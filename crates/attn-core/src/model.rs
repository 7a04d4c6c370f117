//! A whole model: loaded, run, changed and saved.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    arch::{Architecture, Tokens, Vocabulary},
    attention::{Projections, State, Stream},
    checkpoint::{self, Checkpoint, WriteOptions},
    config::{Config, Head},
    doing::During,
    gate::Gate,
    layer::{AttnLayer, LayerPass, Rows, Source, Tap},
    lora::{Adapter, Lora},
    mask::Mask,
    running::{Running, Step},
    variants::Variant,
    weights::{LoadReport, Weights},
};

/// How to load or make a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What the weights run in, whatever they are stored in.
    pub kind: Kind,
    /// Where they live.
    pub device: Device,
    /// The head wanted.
    pub head: WantedHead,
    /// Seed of what is made anew.
    pub seed: u64,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { kind: Kind::Float, device: Device::Cpu, head: WantedHead::AsSaved, seed: 0 }
    }
}

/// Which head a model is to end in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum WantedHead {
    /// The one in the folder.
    #[default]
    AsSaved,
    /// A language-model head, which the folder must hold.
    LanguageModel,
    /// A new, random classifier of these classes, in place of whatever is there.
    NewClassifier(Vec<String>),
}

/// A batch of token ids.
#[derive(Debug)]
pub struct ModelInput {
    /// `[batch, seq_len]`, 64-bit integers.
    pub input_ids: Tensor,
    /// `[batch, seq_len]`, 1 at real tokens, 0 at padding; absent: all real.
    pub attention_mask: Option<Tensor>,
    /// `[batch, seq_len]`; absent: as [`Positions`] says.
    pub position_ids: Option<Tensor>,
    /// `[batch, seq_len]`, the segment of each token; BERT alone has them.
    pub token_type_ids: Option<Tensor>,
    /// The other sequence of each row, of a length of its own, for layers that attend to one
    /// ([`Model::needs_source`]).
    pub source: Option<Box<ModelInput>>,
}

impl ModelInput {
    /// Ids alone, all real.
    pub fn new(input_ids: Tensor) -> Self {
        Self {
            input_ids,
            attention_mask: None,
            position_ids: None,
            token_type_ids: None,
            source: None,
        }
    }

    /// Ids and mask.
    pub fn masked(input_ids: Tensor, attention_mask: Tensor) -> Self {
        Self { attention_mask: Some(attention_mask), ..Self::new(input_ids) }
    }

    /// Real tokens.
    pub(crate) fn n_real(&self) -> i64 {
        match &self.attention_mask {
            None => self.input_ids.numel() as i64,
            Some(mask) => mask.sum(Kind::Int64).int64_value(&[]),
        }
    }

    /// The same, attending to `source`.
    pub fn attending_to(self, source: Self) -> Self {
        Self { source: Some(Box::new(source)), ..self }
    }
}

/// The rows of real tokens: `[batch, seq_len, width] -> [n, width]`.
pub(crate) fn real_rows(x: &Tensor, input: &ModelInput) -> Tensor {
    let all = x.flatten(0, 1);
    match &input.attention_mask {
        None => all,
        Some(mask) => {
            let real = mask.to_device(x.device()).view([-1]).nonzero().view([-1]);
            all.index_select(0, &real)
        }
    }
}

/// Positions where none are given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Positions {
    /// Real tokens are counted, `max(cumsum(mask) − 1, 0)`, so that padding changes nothing.
    #[default]
    Count,
    /// 0, 1, 2, ... whatever is padding, as transformers' bare forward does.
    Arange,
}

/// How to run a model once.
#[derive(Debug, Default)]
pub struct ForwardOptions<'a> {
    /// Whether dropout is on.
    pub train: bool,
    /// Positions where none are given.
    pub positions: Positions,
    /// A gate per layer; an empty slice gates nothing.
    pub gates: &'a [Option<Gate>],
    /// Whether to return the hidden states.
    pub hidden_states: bool,
    /// Which attention rows to return.
    pub attentions: Rows,
    /// Whether to return the heads' outputs.
    pub z: bool,
    /// Random numbers for kinds that draw.
    pub stream: Stream,
    /// Where logits over the vocabulary are wanted, `[n]` places in the flattened batch (row · seq_len + position):
    /// the logits are then `[n, vocab_size]`. Absent: everywhere. A masked language model is trained at 15 % of its
    /// positions, and the vocabulary is the widest matrix there is.
    pub logits_at: Option<&'a Tensor>,
    /// Whether to return, in place of logits over the vocabulary, what [`Model::vocabulary`] makes them of:
    /// `[.., hidden_size]`.
    pub before_vocabulary: bool,
    /// Whether to return what goes into the attention layers.
    pub attention_inputs: bool,
}

/// What a model returns.
#[derive(Debug)]
pub struct Output {
    /// `[batch, seq_len, vocab_size]`, or `[n, vocab_size]` where asked for at n places, or `[batch, n_classes]`; without a
    /// head the last hidden state, and where [`ForwardOptions::before_vocabulary`] is set what the logits are made of.
    pub logits: Tensor,
    /// `[batch, seq_len, hidden_size]`: what enters the first block, then what leaves each; the last one after the
    /// final norm, as transformers' `output_hidden_states` gives them. Empty unless asked for.
    pub hidden_states: Vec<Tensor>,
    /// `[batch, n_heads, rows, k_len]` a layer. Empty unless asked for.
    pub attentions: Vec<Tensor>,
    /// `[batch, n_heads, q_len, head_dim]` a layer, before gates. Empty unless asked for.
    pub z: Vec<Tensor>,
    /// `[batch, seq_len, hidden_size]` a layer: what queries, keys and values are projected from. Empty unless asked for.
    pub attention_inputs: Vec<Tensor>,
    /// What attention kinds learn from on this input beside the task, a scalar, the sum over the layers (and over both
    /// sequences, where one attends to another): to be added to the loss. `None` outside of training, and where no kind has
    /// such a loss.
    pub own_loss: Option<Tensor>,
}

/// What [`Model::attend`] returns: an entry for each layer that was named.
#[derive(Debug)]
pub struct Attended {
    /// `[batch, n_heads, seq_len, head_dim]`.
    pub z: Vec<Tensor>,
    /// `[batch, n_heads, rows, k_len]`. Empty unless asked for.
    pub attentions: Vec<Tensor>,
    /// As [`Output::own_loss`], of these layers.
    pub own_loss: Option<Tensor>,
}

/// Another sequence, as it comes into each layer that attends to it.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) mask: Mask,
    /// `[batch, k_len, hidden_size]` for the layers up to the last one that attends to it.
    pub(crate) inputs: Vec<Tensor>,
    /// What the kinds of those layers learn from on it.
    pub(crate) own_losses: Vec<Tensor>,
}

/// The tokens of a pass, on the model's device.
pub(crate) struct Batch {
    /// `[batch, seq_len]`.
    pub(crate) ids: Tensor,
    pub(crate) mask: Mask,
    /// `[batch, seq_len]`.
    pub(crate) positions: Tensor,
    /// `[batch, seq_len]`.
    pub(crate) types: Option<Tensor>,
}

/// What a model keeps between decoding steps.
#[derive(Debug)]
pub struct DecodeState {
    layers: Vec<Box<dyn State>>,
    /// `[batch, len]`, 1 at real tokens so far.
    keep: Option<Tensor>,
    /// Rows of the batch, once there is one.
    n_rows: Option<i64>,
    n_tokens: i64,
}

impl DecodeState {
    /// Bytes held by all layers.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|state| state.bytes()).sum()
    }

    /// Tokens so far, padding included.
    pub fn n_tokens(&self) -> i64 {
        self.n_tokens
    }
}

/// A pretrained transformer whose attention can be changed.
#[derive(Debug)]
pub struct Model {
    pub(crate) config: Config,
    pub(crate) arch: Box<dyn Architecture>,
    pub(crate) kind: Kind,
    pub(crate) device: Device,
    /// The settings of the adapters in `arch`.
    pub(crate) lora: Option<Lora>,
    /// What each of them that covers a whole matrix is scaled by.
    pub(crate) lora_scales: BTreeMap<String, f64>,
    /// A second handle on the parameters of `arch`, while activations are recomputed: the backward pass may run when
    /// nobody has the model at hand.
    replica: Option<Arc<Mutex<Box<dyn Architecture>>>>,
}

impl Model {
    /// Loads a Hugging Face model folder: `config.json` and safetensors weights.
    ///
    /// # Errors
    /// Unless every tensor of the file has a place and every parameter a tensor, or the report says which head was
    /// replaced by request.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<(Self, LoadReport), Error> {
        let mut config = Config::from_json(checkpoint::read_json(dir, "config.json")?)?;
        let checkpoint = Checkpoint::open(dir)?;
        let fresh = apply_head(&mut config, &options.head)?;
        let prefix = config.arch.prefix();
        let fresh_prefixes: Vec<String> = if fresh {
            // A pooler belongs to the classifier but is pretrained: it stays where the file has one.
            let is_held = |head: &&&str| {
                head.contains("pooler") && checkpoint.names().any(|name| name.starts_with(**head))
            };
            config
                .arch
                .head_prefixes()
                .iter()
                .filter(|head| !is_held(head))
                .map(|&head| head.to_owned())
                .collect()
        } else {
            Vec::new()
        };
        let Options { kind, device, seed } = Options::from(options);
        let mut weights =
            Weights::from_checkpoint(&checkpoint, prefix, fresh_prefixes, seed, kind, device);
        let arch = config.arch.clone().build(&config, &mut weights)?;
        let replaced = if fresh { config.arch.head_prefixes() } else { &[] };
        let report = weights.finish(&|name| config.arch.is_buffer(name), replaced)?;
        Ok((Self::of(config, arch, kind, device), report))
    }

    /// Makes a model with random weights from a configuration alone.
    ///
    /// # Errors
    /// For sizes that do not fit together, and for settings that do not fit the layers.
    pub fn init(mut config: Config, options: &LoadOptions) -> Result<Self, Error> {
        apply_head(&mut config, &options.head)?;
        let Options { kind, device, seed } = Options::from(options);
        let mut weights = Weights::from_seed(seed, kind, device);
        let arch = config.arch.clone().build(&config, &mut weights)?;
        Ok(Self::of(config, arch, kind, device))
    }

    /// Without adapters, every activation kept.
    fn of(config: Config, arch: Box<dyn Architecture>, kind: Kind, device: Device) -> Self {
        let (lora, lora_scales, replica) = (None, BTreeMap::new(), None);
        Self { config, arch, kind, device, lora, lora_scales, replica }
    }

    /// Writes the model as a folder that [`Self::load`] reads and, where plain transformers computes the same logits,
    /// transformers too. Files of an existing folder that are not the model's own (a tokenizer) stay. A decoder classifier
    /// without a `pad_token_id` gets its `eos_token_id` for one, with a notice.
    ///
    /// # Errors
    /// If it cannot be written; what was there before is then still there. [`Error::Lora`] while there are adapters:
    /// merge them, or write them alone ([`Self::save_adapter`]).
    pub fn save(&self, dir: &Path, options: &WriteOptions) -> Result<(), Error> {
        self.refuse_lora("save an ordinary folder")?;
        let tensors = self.parameters();
        let mut config = self.config.clone();
        let is_classifier = matches!(config.head, Head::Classifier { .. });
        if config.is_causal() && is_classifier && config.pad_token_id().is_none() {
            // transformers' decoder classifiers find the last real token of a row by it.
            match config.raw("eos_token_id").and_then(serde_json::Value::as_i64) {
                Some(eos) => {
                    tracing::info!(
                        "config.json names no pad_token_id: eos_token_id, {eos}, is written for it"
                    );
                    config.set_pad_token_id(eos);
                }
                None => tracing::warn!(
                    "config.json names neither pad_token_id nor eos_token_id: transformers will classify one row at a time"
                ),
            }
        }
        Ok(checkpoint::write_folder(dir, &tensors, &config.to_json(self.kind), &[], options)?)
    }

    /// The configuration, with the attention of each layer as it is now.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The configuration, to name classes or the padding token.
    pub fn config_mut(&mut self) -> &mut Config {
        &mut self.config
    }

    /// What the weights are in.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where the weights are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Converts every parameter, in place: optimizers and views of them follow.
    pub fn to_kind(&mut self, kind: Kind) {
        tch::no_grad(|| {
            self.arch.visit(&mut |_, tensor| {
                let mut shared = tensor.shallow_clone();
                shared.set_data(&tensor.to_kind(kind));
            });
        });
        self.kind = kind;
    }

    /// Every parameter under its name in the checkpoint, in a fixed order; a tied one once.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut parameters = Vec::new();
        self.arch
            .visit(&mut |name, tensor| parameters.push((name.to_owned(), tensor.shallow_clone())));
        parameters
    }

    /// The names of the head's own parameters: none of a language-model head that is tied to the embedding.
    pub fn head_parameters(&self) -> Vec<String> {
        let heads = self.config.arch.head_prefixes();
        let is_head = |name: &String| heads.iter().any(|head| name.starts_with(head));
        self.parameters().into_iter().map(|(name, _)| name).filter(is_head).collect()
    }

    /// What attention kinds ask of training beside the task, over the layers: a scalar to add to the loss. `None` where none
    /// asks for anything.
    pub fn penalty(&self) -> Option<Tensor> {
        let layers = self.arch.layers();
        layers.iter().filter_map(|layer| layer.kind().penalty()).reduce(|sum, one| sum + one)
    }

    /// Whether some layer attends to another sequence: [`ModelInput::source`] must then be given.
    pub fn needs_source(&self) -> bool {
        self.last_cross_layer().is_some()
    }

    /// The last layer that attends to another sequence.
    fn last_cross_layer(&self) -> Option<usize> {
        self.arch.layers().iter().rposition(|layer| layer.kind().needs_source())
    }

    /// The last step of the language-model head, `logits = x Wᵀ + b`; `None` of a model with another head.
    pub fn vocabulary(&self) -> Option<Vocabulary> {
        self.arch.vocabulary()
    }

    /// The attention layers.
    pub fn layers(&self) -> Vec<&AttnLayer> {
        self.arch.layers()
    }

    /// Puts the attention kind `variant` into the layers `layers`, its own parameters made from the pretrained
    /// projections and from `seed`.
    ///
    /// # Errors
    /// For a layer out of range, or settings that do not fit one; no layer is then changed.
    pub fn swap(&mut self, layers: &[usize], variant: &Variant, seed: u64) -> Result<(), Error> {
        self.check_layers(layers)?;
        self.refuse_lora("swap the attention")?;
        // Built for every layer before any is changed.
        let built = layers
            .iter()
            .map(|&layer| self.arch.layer_mut(layer).build(variant, seed))
            .collect::<Result<Vec<_>, _>>()?;
        for (&layer, kind) in layers.iter().zip(built) {
            self.arch.layer_mut(layer).install(variant, kind);
        }
        self.structure_changed()
    }

    /// Keeps the query heads `heads` of one layer and removes the others' weights.
    ///
    /// # Errors
    /// As [`AttnLayer::select_heads`]; for a layer out of range.
    pub fn select_heads(&mut self, layer: usize, heads: &[i64]) -> Result<(), Error> {
        self.check_layers(&[layer])?;
        self.refuse_lora("remove heads")?;
        self.arch.layer_mut(layer).select_heads(heads)?;
        self.structure_changed()
    }

    /// Puts new key/value heads in place of those of one layer.
    ///
    /// # Errors
    /// As [`AttnLayer::regroup_kv`]; for a layer out of range.
    pub fn regroup_kv(
        &mut self,
        layer: usize,
        groups: &[Vec<i64>],
        new: Projections,
        out: &Tensor,
    ) -> Result<(), Error> {
        self.check_layers(&[layer])?;
        self.refuse_lora("change key/value heads")?;
        self.arch.layer_mut(layer).regroup_kv(groups, new, out)?;
        self.structure_changed()
    }

    /// Whether training passes keep the activations between blocks alone and compute the rest again in the backward
    /// pass: a third more work for a fraction of the memory. Chen et al. 2016, <https://arxiv.org/abs/1604.06174>.
    ///
    /// # Errors
    /// None that a model in working order gives.
    pub fn set_gradient_checkpointing(&mut self, on: bool) -> Result<(), Error> {
        self.replica = None;
        if on {
            let adapters: Vec<_> = self
                .arch
                .linears_mut()
                .iter()
                .map(|slot| slot.linear.adapter.as_ref().map(Adapter::share))
                .collect();
            let mut weights = Weights::shared(self.parameters(), self.kind, self.device);
            let mut arch = self.config.arch.clone().build(&self.config, &mut weights)?;
            for (slot, adapter) in arch.linears_mut().into_iter().zip(adapters) {
                slot.linear.adapter = adapter;
            }
            self.replica = Some(Arc::new(Mutex::new(arch)));
        }
        Ok(())
    }

    /// Runs the model.
    ///
    /// # Errors
    /// [`Error::Input`] for ids, masks, positions or gates that do not fit, [`Error::Refused`] for a mask that a layer's
    /// attention kind cannot serve.
    pub fn forward(
        &self,
        input: &ModelInput,
        options: &ForwardOptions<'_>,
    ) -> Result<Output, Error> {
        self.run(input, options, None)
    }

    /// Runs the attention of the layers `layers` alone, each on an input of its own, `[batch, seq_len, hidden_size]` as
    /// [`Output::attention_inputs`] of a pass over `input` holds them: what a layer would make of another model's
    /// hidden states. Of `options` the attention rows, dropout and random numbers count.
    ///
    /// # Errors
    /// As [`Self::forward`]; [`Error::Index`] for a layer out of range.
    ///
    /// # Panics
    /// Unless there is an input for each of the layers.
    pub fn attend(
        &self,
        input: &ModelInput,
        layers: &[usize],
        inputs: &[Tensor],
        options: &ForwardOptions<'_>,
    ) -> Result<Attended, Error> {
        assert_eq!(layers.len(), inputs.len(), "an input a layer");
        self.check_input(input, options)?;
        self.check_layers(layers)?;
        if let Some(&layer) =
            layers.iter().find(|&&layer| self.layers()[layer].kind().needs_source())
        {
            return Err(Error::Refused {
                kind: self.layers()[layer].variant().name(),
                what: "run on another model's hidden states",
                reason: "it attends to a sequence that those say nothing of".into(),
            });
        }
        let Batch { mask, positions, .. } = self.batch(input, options, None)?;
        let kind = inputs.first().map_or(self.kind, Tensor::kind);
        let rotary = self.arch.rotary().map(|rotary| rotary.tables(&positions, kind));
        let mut tap = Tap { rows: options.attentions.clone(), ..Tap::default() };
        let mut z = Vec::with_capacity(layers.len());
        for (&layer, hidden) in layers.iter().zip(inputs) {
            let mut pass = LayerPass {
                mask: &mask,
                positions: &positions,
                rotary: rotary.as_ref(),
                gate: None,
                fan: 1,
                train: options.train,
                stream: Stream { layer: layer as u64, ..options.stream },
                source: None,
                state: None,
                at: None,
                tap: &mut tap,
            };
            z.push(self.arch.layers()[layer].mix(hidden, &mut pass)?);
        }
        Ok(Attended { z, attentions: tap.weights, own_loss: sum(tap.own_losses) })
    }

    /// A second model on the same memory. Either can be swapped and run without the other's taking notice; a parameter
    /// that is to be changed must be given memory of its own first ([`Self::own`]).
    ///
    /// # Errors
    /// [`Error::Lora`] while there are adapters.
    pub fn alias(&self) -> Result<Self, Error> {
        self.refuse_lora("share its parameters")?;
        let parameters =
            self.parameters().into_iter().map(|(name, tensor)| (name, tensor.detach()));
        let mut weights = Weights::shared(parameters.collect(), self.kind, self.device);
        let arch = self.config.arch.clone().build(&self.config, &mut weights)?;
        Ok(Self::of(self.config.clone(), arch, self.kind, self.device))
    }

    /// As [`Self::alias`], and without dropout: a training pass is then the same each time.
    ///
    /// # Errors
    /// As [`Self::alias`].
    pub fn alias_without_dropout(&self) -> Result<Self, Error> {
        let mut raw = self.config.to_json(self.kind);
        // Those that the config leaves out, too: transformers' defaults are not 0.
        for field in self.config.arch.dropouts() {
            raw.insert((*field).into(), 0.0.into());
        }
        let mut alias = self.alias()?;
        let config = Config::from_json(raw)?;
        let mut weights =
            Weights::shared(alias.parameters().into_iter().collect(), self.kind, self.device);
        alias.arch = config.arch.clone().build(&config, &mut weights)?;
        alias.config = config;
        Ok(alias)
    }

    /// Gives the parameters whose names `is_named` memory of their own, shared with no [`Self::alias`]; their values stay.
    pub fn own(&mut self, is_named: &dyn Fn(&str) -> bool) {
        self.arch.visit(&mut |name, tensor| {
            if is_named(name) {
                let mut shared = tensor.shallow_clone();
                tch::no_grad(|| shared.set_data(&tensor.detach().copy()));
            }
        });
    }

    /// An empty decoding state.
    pub fn start(&self) -> DecodeState {
        let layers = self.arch.layers().iter().map(|layer| layer.kind().start()).collect();
        DecodeState { layers, keep: None, n_rows: None, n_tokens: 0 }
    }

    /// Runs the model on the next tokens of each row: `input` holds them alone, `state` what came before.
    ///
    /// Attention rows ([`ForwardOptions::attentions`], queries counted in `input`) span all tokens so far,
    /// `[batch, n_heads, rows, n_tokens]` a layer. One row costs time and memory in proportion to them.
    ///
    /// # Errors
    /// As [`Self::forward`]; for an encoder, which does not decode; [`Error::Refused`] for attention rows of a kind that does
    /// not keep the keys of all tokens ([`Attention::cache`](crate::attention::Attention::cache)). The state is then not to
    /// be used further.
    pub fn step(
        &self,
        input: &ModelInput,
        state: &mut DecodeState,
        options: &ForwardOptions<'_>,
    ) -> Result<Output, Error> {
        if !self.config.is_causal() {
            let problem =
                format!("a {} is an encoder, it has no next token", self.config.base_model_type());
            return Err(Error::Input { name: "state", problem });
        }
        if options.attentions != Rows::None {
            for (layer, state) in self.layers().into_iter().zip(&mut state.layers) {
                if layer.shows_rows(state.as_mut()) {
                    continue;
                }
                return Err(Error::Refused {
                    kind: layer.variant().name(),
                    what: "show attention rows while decoding",
                    reason: "it does not keep the keys of all tokens\nhint: run the whole text"
                        .into(),
                });
            }
        }
        if let (Some(&rows), Some(held)) = (input.input_ids.size().first(), state.n_rows)
            && rows != held
        {
            let problem = format!("has {rows} rows, and the state was begun with {held}");
            return Err(Error::Input { name: "input_ids", problem });
        }
        self.run(input, options, Some(state))
    }

    fn run(
        &self,
        input: &ModelInput,
        options: &ForwardOptions<'_>,
        mut state: Option<&mut DecodeState>,
    ) -> Result<Output, Error> {
        self.check_input(input, options)?;
        let source = self.encode_source(input, options)?;
        let batch = self.batch(input, options, state.as_deref_mut())?;
        let mut running = Running::new(self, batch, source, options);
        running.narrows = !options.hidden_states;
        let mut tap = Tap {
            rows: options.attentions.clone(),
            keep_z: options.z,
            keep_inputs: options.attention_inputs,
            ..Tap::default()
        };
        let mut hidden_states = Vec::new();
        for layer in 0..self.config.layers.len() {
            if options.hidden_states {
                hidden_states.push(running.x.shallow_clone());
            }
            running.step(Step {
                gate: options.gates.get(layer).and_then(Option::as_ref),
                fan: 1,
                train: options.train,
                stream: options.stream,
                state: match &mut state {
                    Some(state) => Some(state.layers[layer].as_mut()),
                    None => None,
                },
                tap: &mut tap,
            })?;
        }
        let of_source = running.source_losses();
        let (last, logits) = running.head(options.train);
        if options.hidden_states {
            hidden_states.push(last);
        }
        let Tap { weights: attentions, z, inputs: attention_inputs, own_losses, .. } = tap;
        let own_loss = sum(of_source.into_iter().chain(own_losses));
        Ok(Output { logits, hidden_states, attentions, z, attention_inputs, own_loss })
    }

    /// Reads the other sequence, up to the last layer that attends to it; `None` where no layer does.
    pub(crate) fn encode_source(
        &self,
        input: &ModelInput,
        options: &ForwardOptions<'_>,
    ) -> Result<Option<Encoded>, Error> {
        let refuse = |problem: String| Err(Error::Input { name: "source", problem });
        let (last, source) = match (self.last_cross_layer(), &input.source) {
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return refuse("is given, and no layer attends to another sequence\nhint: swap a layer to `cross`".into());
            }
            (Some(layer), None) => {
                return refuse(format!(
                    "is absent, and layer {layer} attends to another sequence (`{}`)\nhint: give rows of two texts, as \
                     `data.text_pair` does",
                    self.arch.layers()[layer].variant().name()
                ));
            }
            (Some(last), Some(source)) => (last, source),
        };
        if source.source.is_some() {
            return refuse("has a source of its own, expected none".into());
        }
        // Of the options these concern the source, and the gates, which are the heads' own.
        let own = ForwardOptions {
            train: options.train,
            positions: options.positions,
            stream: options.stream,
            ..ForwardOptions::default()
        };
        self.check_input(source, &own)?;
        let (rows, expected) = (source.input_ids.size()[0], input.input_ids.size()[0]);
        if rows != expected {
            return refuse(format!("has {rows} rows, expected {expected}, as input_ids"));
        }
        let Batch { ids, mask, positions, types } = self.batch(source, &own, None)?;
        let tokens = Tokens { ids: &ids, positions: &positions, types: types.as_ref() };
        let mut x = self.embed(&tokens, own.train);
        let mut tap = Tap { keep_inputs: true, ..Tap::default() };
        let nowhere = Tensor::zeros([0], (Kind::Int64, self.device));
        for layer in 0..=last {
            let mut pass = LayerPass {
                mask: &mask,
                positions: &positions,
                rotary: None, // kinds that need a source refuse rotations
                gate: options.gates.get(layer).and_then(Option::as_ref),
                fan: 1,
                train: own.train,
                stream: Stream { layer: layer as u64, ..own.stream },
                source: None,
                state: None,
                at: (layer == last).then_some(&nowhere),
                tap: &mut tap,
            };
            x = self.block(layer, &x, &mut pass)?;
        }
        Ok(Some(Encoded { mask, inputs: tap.inputs, own_losses: tap.own_losses }))
    }

    /// The hidden states that the first block is given.
    pub(crate) fn embed(&self, tokens: &Tokens<'_>, train: bool) -> Tensor {
        let _doing = During::of("the embedding", None, "token ids", tokens.ids);
        self.arch.embed(tokens, train)
    }

    /// Runs a block; in training without keeping what it computes on the way, where that is asked for.
    pub(crate) fn block(
        &self,
        layer: usize,
        x: &Tensor,
        pass: &mut LayerPass<'_>,
    ) -> Result<Tensor, Error> {
        let _doing = During::of("layer", Some(layer), "hidden states", x);
        match &self.replica {
            Some(replica) if pass.train => recomputed(replica, layer, x, pass),
            _ => self.arch.block(layer, x, pass),
        }
    }

    pub(crate) fn on_device(&self, x: &Tensor) -> Tensor {
        x.to_device(self.device).to_kind(Kind::Int64)
    }

    /// The tokens of a pass with their mask and positions; adds them to those of `state`.
    pub(crate) fn batch(
        &self,
        input: &ModelInput,
        options: &ForwardOptions<'_>,
        state: Option<&mut DecodeState>,
    ) -> Result<Batch, Error> {
        let ids = self.on_device(&input.input_ids);
        let new_keep = input.attention_mask.as_ref().map(|mask| self.on_device(mask));
        let past = state.as_ref().map_or(0, |state| state.n_tokens);
        let keep = match state {
            Some(state) => state.extend(new_keep, &ids),
            None => new_keep,
        };
        let mask = match &keep {
            Some(keep) => Mask::with_keep(self.config.is_causal(), keep),
            None => Mask::new(self.config.is_causal()),
        };
        let positions = match &input.position_ids {
            Some(positions) => self.on_device(positions),
            None => positions(
                &ids,
                keep.as_ref().filter(|_| options.positions == Positions::Count),
                past,
            ),
        };
        self.check_positions(&positions)?;
        let types = input.token_type_ids.as_ref().map(|types| self.on_device(types));
        Ok(Batch { ids, mask, positions, types })
    }

    /// Brings what follows from the layers up to date.
    pub(crate) fn structure_changed(&mut self) -> Result<(), Error> {
        self.config.layers = self.arch.layers().iter().map(|layer| layer.spec()).collect();
        self.set_gradient_checkpointing(self.replica.is_some())
    }

    fn check_layers(&self, layers: &[usize]) -> Result<(), Error> {
        let count = self.config.layers.len();
        match layers.iter().find(|&&layer| layer >= count) {
            Some(&index) => {
                Err(Error::Index { what: "layer", index: index as i64, count: count as i64 })
            }
            None => Ok(()),
        }
    }

    pub(crate) fn check_input(
        &self,
        input: &ModelInput,
        options: &ForwardOptions<'_>,
    ) -> Result<(), Error> {
        let refuse = |name, problem: String| Err(Error::Input { name, problem });
        let ids = &input.input_ids;
        let size = ids.size();
        if size.len() != 2 || size.contains(&0) {
            return refuse(
                "input_ids",
                format!("has shape {size:?}, expected [batch, seq_len], neither of them 0"),
            );
        }
        if !matches!(ids.kind(), Kind::Int64 | Kind::Int) {
            return refuse("input_ids", format!("is of kind {:?}, expected integers", ids.kind()));
        }
        let vocab_size = self.config.sizes.vocab_size;
        if let Some(id) = outside(ids, vocab_size) {
            return refuse(
                "input_ids",
                format!(
                    "holds {id}, expected 0 to {} (`vocab_size` − 1)\nhint: the tokenizer must be the model's own",
                    vocab_size - 1
                ),
            );
        }
        let others = [
            ("attention_mask", &input.attention_mask),
            ("position_ids", &input.position_ids),
            ("token_type_ids", &input.token_type_ids),
        ];
        for (name, tensor) in
            others.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?)))
        {
            if tensor.size() != size {
                return refuse(
                    name,
                    format!("has shape {:?}, expected that of input_ids, {size:?}", tensor.size()),
                );
            }
        }
        if let Some(mask) = &input.attention_mask
            && outside(mask, 2).is_some()
        {
            return refuse(
                "attention_mask",
                "holds other values than 0 and 1 (1 at real tokens)".into(),
            );
        }
        if let Some(types) = &input.token_type_ids {
            let n_types = self.config.n_segments();
            if n_types == 0 {
                return refuse(
                    "token_type_ids",
                    format!("a {} has none", self.config.base_model_type()),
                );
            }
            if let Some(id) = outside(types, n_types) {
                return refuse(
                    "token_type_ids",
                    format!("holds {id}, expected 0 to {}", n_types - 1),
                );
            }
        }
        let n_layers = self.config.layers.len();
        if !options.gates.is_empty() && options.gates.len() != n_layers {
            return refuse(
                "gates",
                format!(
                    "there are {}, expected one for each of {n_layers} layers",
                    options.gates.len()
                ),
            );
        }
        if options.before_vocabulary && self.config.head != Head::LanguageModel {
            return refuse("before_vocabulary", format!("the model ends in {}", self.config.head));
        }
        if let Some(at) = options.logits_at {
            if self.config.head != Head::LanguageModel {
                return refuse(
                    "logits_at",
                    format!(
                        "the model ends in {}, which has no logits by position",
                        self.config.head
                    ),
                );
            }
            if at.dim() != 1 || at.numel() == 0 {
                return refuse(
                    "logits_at",
                    format!("has shape {:?}, expected [n], n at least 1", at.size()),
                );
            }
            if let Some(place) = outside(at, size[0] * size[1]) {
                return refuse(
                    "logits_at",
                    format!("holds {place}, expected places below batch · seq_len"),
                );
            }
        }
        if let Rows::Some(rows) = &options.attentions
            && let Some(row) = rows.iter().find(|row| !(0..size[1]).contains(row))
        {
            return refuse(
                "attention rows",
                format!("{row} is out of range: there are {} queries", size[1]),
            );
        }
        Ok(())
    }

    /// A table has only so many rows; rotations have no end.
    fn check_positions(&self, positions: &Tensor) -> Result<(), Error> {
        let Some(rows) = self.config.sizes.position_table else { return Ok(()) };
        match outside(positions, rows) {
            None => Ok(()),
            Some(position) => Err(Error::Input {
                name: "position_ids",
                problem: format!(
                    "position {position} is not in the model's table of {rows}\nhint: shorten the sequences to {rows} tokens"
                ),
            }),
        }
    }
}

impl DecodeState {
    /// Adds the new tokens' mask and returns the whole.
    fn extend(&mut self, new: Option<Tensor>, ids: &Tensor) -> Option<Tensor> {
        let ones = |len: i64| Tensor::ones([ids.size()[0], len], (Kind::Int64, ids.device()));
        let seq_len = ids.size()[1];
        let keep = match (self.keep.take(), new) {
            (None, None) => None,
            (old, new) => {
                let old = old.unwrap_or_else(|| ones(self.n_tokens));
                let new = new.unwrap_or_else(|| ones(seq_len));
                Some(Tensor::cat(&[old, new], 1))
            }
        };
        self.n_rows = Some(ids.size()[0]);
        self.n_tokens += seq_len;
        self.keep = keep.as_ref().map(Tensor::shallow_clone);
        keep
    }
}

struct Options {
    kind: Kind,
    device: Device,
    seed: u64,
}

impl From<&LoadOptions> for Options {
    fn from(options: &LoadOptions) -> Self {
        Self { kind: options.kind, device: options.device, seed: options.seed }
    }
}

fn sum(losses: impl IntoIterator<Item = Tensor>) -> Option<Tensor> {
    losses.into_iter().reduce(|sum, one| sum + one)
}

/// Sets the wanted head; true where it is made anew.
fn apply_head(config: &mut Config, wanted: &WantedHead) -> Result<bool, Error> {
    match wanted {
        WantedHead::AsSaved => Ok(false),
        WantedHead::LanguageModel if config.head == Head::LanguageModel => Ok(false),
        WantedHead::LanguageModel => Err(Error::Head {
            held: config.head.to_string(),
            wanted: Head::LanguageModel.to_string(),
        }),
        WantedHead::NewClassifier(classes) => {
            config.set_classes(classes);
            Ok(true)
        }
    }
}

/// Runs a block without keeping what it computes on the way.
fn recomputed(
    arch: &Arc<Mutex<Box<dyn Architecture>>>,
    layer: usize,
    x: &Tensor,
    pass: &mut LayerPass<'_>,
) -> Result<Tensor, Error> {
    if pass.state.is_some() {
        let problem = "a decoding step is no training pass\nhint: set `train` to false";
        return Err(Error::Input { name: "state", problem: problem.into() });
    }
    if pass.gate.is_some() || pass.tap.rows != Rows::None || pass.tap.keep_z {
        let problem = "gates, attention weights and heads' outputs are not to be had while activations are recomputed\n\
                       hint: turn gradient checkpointing off";
        return Err(Error::Input { name: "gradient checkpointing", problem: problem.into() });
    }
    let arch = Arc::clone(arch);
    let (mask, positions) = (pass.mask.clone(), pass.positions.shallow_clone());
    let rotary = pass.rotary.map(|(cos, sin)| (cos.shallow_clone(), sin.shallow_clone()));
    let (train, stream, at) = (pass.train, pass.stream, pass.at.map(Tensor::shallow_clone));
    let source_mask = pass.source.as_ref().map(|source| source.mask.clone());
    let keep_inputs = pass.tap.keep_inputs;
    // Gradients flow to the other sequence too: it is an input.
    let inputs: Vec<&Tensor> =
        std::iter::once(x).chain(pass.source.as_ref().map(|source| source.hidden)).collect();
    let run = move |inputs: &[Tensor]| {
        let arch = arch.lock().map_err(|_| "a block failed in an earlier pass")?;
        let mut tap = Tap { keep_inputs, ..Tap::default() };
        let mut pass = LayerPass {
            mask: &mask,
            positions: &positions,
            rotary: rotary.as_ref(),
            gate: None,
            fan: 1,
            train,
            stream,
            source: source_mask.as_ref().map(|mask| Source { hidden: &inputs[1], mask }),
            state: None,
            at: at.as_ref(),
            tap: &mut tap,
        };
        let out = arch.block(layer, &inputs[0], &mut pass)?;
        // What was kept are outputs, too: gradients flow through them.
        Ok([out].into_iter().chain(tap.inputs).chain(tap.own_losses).collect())
    };
    let mut outputs = attn_torch::checkpoint(run, &inputs)?.into_iter();
    let out = outputs.next().expect("a block has an output");
    pass.tap.inputs.extend(outputs.by_ref().take(usize::from(keep_inputs)));
    pass.tap.own_losses.extend(outputs);
    Ok(out)
}

/// Positions of the new tokens: real tokens counted where there is a mask, places where there is none.
fn positions(ids: &Tensor, keep: Option<&Tensor>, past: i64) -> Tensor {
    let [b, seq_len] = ids.size()[..] else { unreachable!("ids have two axes") };
    match keep {
        Some(keep) => {
            let counted = (keep.cumsum(1, Kind::Int64) - 1).clamp_min(0);
            counted.narrow(1, past, seq_len)
        }
        None => Tensor::arange_start(past, past + seq_len, (Kind::Int64, ids.device()))
            .expand([b, seq_len], false),
    }
}

/// The first value that is not in `0..count`. Synchronizes with the device.
fn outside(values: &Tensor, count: i64) -> Option<i64> {
    let (low, high) = values.aminmax(None, false);
    [low.int64_value(&[]), high.int64_value(&[])]
        .into_iter()
        .find(|value| !(0..count).contains(value))
}
