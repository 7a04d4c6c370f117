//! The loop: batches in, a trained model out.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{atomic::Ordering, mpsc::Receiver},
    thread,
    time::Instant,
};

use attn_core::{During, Model, attention::Stream};
use attn_torch::{GradOptions, backward, clip_grad_norm, grad, take_grads};
use tch::{Kind, Tensor};

use crate::{
    batch::{Batch, Batches, fingerprint},
    checkpoint::{self, Adapters, LogPart, RunLock, TrainState},
    environment::{Environment, RngState},
    error::{Error, Place, Result},
    metrics::{Metric, MetricsFile},
    non_finite,
    optimizer::{Optimizer, copy},
    prefetch::{self, Position, StepBatches},
    probe::check_laws,
    progress::{Event, Meter, Progress},
    run::{Best, Outcome, Run, Summary},
};

/// Trains `model` as `run` says.
///
/// Afterwards the model is the one that the run selects, or the last one; after an interruption the last one in any
/// case. On an error it is whatever the last finished step left. LibTorch's random streams are seeded from the
/// settings, and one process should train one model at a time: the streams are shared.
///
/// # Errors
///
/// Before anything slow: [`Error::Setting`], [`Error::Head`], [`Error::NoMatch`], [`Error::AllFrozen`],
/// [`Error::Precision`], [`Error::RunExists`], [`Error::Changed`], [`Error::NoCheckpoint`],
/// [`Error::NoGoodCheckpoint`]; then [`Error::NonFinite`] and [`Error::Laws`] for a model that is broken. On the way:
/// [`Error::NonFinite`], [`Error::NoTargets`], [`Error::Label`], and what batches, evaluation and disk come up with.
pub fn train(model: &mut Model, run: Run<'_>) -> Result<Summary> {
    let started = Instant::now();
    run.config.validate()?;
    run.objective.check(model)?;
    if matches!(model.kind(), Kind::Half | Kind::BFloat16) {
        return Err(Error::Precision { kind: model.kind() });
    }
    if run.config.select.is_some() && run.evaluate.is_none() {
        return Err(Error::Setting {
            field: "select",
            value: format!("`{}`", run.config.select.as_deref().unwrap_or_default()),
            expected: "nothing, as the run has no evaluation",
        });
    }
    model.set_gradient_checkpointing(run.config.gradient_checkpointing)?;
    let result = run_all(model, run, started);
    model.set_gradient_checkpointing(false)?;
    result
}

fn run_all(model: &mut Model, run: Run<'_>, started: Instant) -> Result<Summary> {
    let data = run.data;
    let accumulation = run.config.accumulation;
    let mut session = Session::start(model, run, started)?;
    let position = session.position();
    let n_steps = session.state.total_steps - session.state.step;
    let outcome = thread::scope(|scope| {
        let batches = prefetch::spawn(scope, data, position, accumulation, n_steps);
        session.run(&batches)
    })?;
    session.finish(outcome)
}

/// A run under way.
struct Session<'a, 'm> {
    model: &'m mut Model,
    run: Run<'a>,
    optimizer: Optimizer,
    state: TrainState,
    warmup_steps: u64,
    metrics: Option<MetricsFile>,
    meter: Meter,
    /// When this process began, and the seconds that earlier ones took up to the checkpoint it goes on from.
    started: Instant,
    earlier_s: f64,
    resumed_from: Option<u64>,
    /// Whether the newest checkpoint holds `state`.
    is_saved: bool,
    checkpoint: Option<PathBuf>,
    /// The best model's weights, where there is no folder to put them into.
    best_weights: Option<Vec<Tensor>>,
    _lock: Option<RunLock>,
}

/// What came of the attempt to do a step.
enum Step {
    Done(Progress),
    Stopped,
}

impl<'a, 'm> Session<'a, 'm> {
    fn start(model: &'m mut Model, mut run: Run<'a>, started: Instant) -> Result<Self> {
        let config = run.config;
        let total_steps = match config.max_steps {
            Some(steps) => steps,
            None => (0..config.epochs)
                .map(|epoch| prefetch::steps_in_epoch(run.data, epoch, config.accumulation))
                .sum::<Result<u64>>()?,
        };
        let warmup_steps = config.warmup(total_steps)?;
        let mut optimizer = Optimizer::new(model, config)?;

        let lock = match &run.dir {
            Some(dir) => Some(RunLock::take(dir)?),
            None => None,
        };
        let first = first_batch(run.data)?;
        let mut state = TrainState {
            format_version: checkpoint::FORMAT_VERSION,
            step: 0,
            total_steps,
            epoch: 0,
            batch: 0,
            n_tokens: 0,
            elapsed_s: 0.0,
            evaluated_at: None,
            before: Vec::new(),
            latest: Vec::new(),
            best: None,
            log: LogPart::default(),
            train_loss: None,
            metrics_bytes: 0,
            objective: run.objective.name().to_owned(),
            data: fingerprint(&run.data.plan(0), &first),
            config: config.clone(),
            adapters: match model.lora() {
                None => None,
                Some(lora) => {
                    let names: BTreeSet<&String> = optimizer.names().iter().collect();
                    let base = model.fingerprint(&|name| !names.contains(&name.to_owned()))?;
                    Some(Adapters { lora: lora.clone(), base })
                }
            },
            environment: Environment::of(model)?,
        };

        let mut resumed_from = None;
        let mut found = None;
        match (&run.dir, run.resume) {
            (None, true) => {
                return Err(Error::Setting {
                    field: "resume",
                    value: "true".into(),
                    expected: "a run with a folder",
                });
            }
            (Some(dir), true) => {
                let (stored, path) = checkpoint::resume(dir, model, &mut optimizer, &state)?;
                for (what, here, there) in state.environment.differences(&stored.environment) {
                    tracing::warn!(
                        "the {what} was {there} and is {here}: the run will not end bit for bit where it would have"
                    );
                }
                // What may change is taken from now.
                let TrainState { config, environment, .. } = state;
                state = TrainState { config, environment, ..stored };
                resumed_from = Some(state.step);
                found = Some(path);
            }
            (Some(dir), false) if !checkpoint::list(dir)?.is_empty() => {
                return Err(Error::RunExists { dir: dir.clone() });
            }
            (_, false) => tch::manual_seed(config.seed as i64),
        }

        non_finite::check_parameters(model, state.step)?;
        let verdicts = check_laws(run.laws, run.objective, model, &first)?;
        let metrics = match &run.dir {
            Some(dir) => Some(MetricsFile::open(dir, state.metrics_bytes, config.seed)?),
            None => None,
        };
        (run.observe)(Event::Started {
            step: state.step,
            total_steps,
            n_trainable: optimizer.n_values(),
            n_parameters: model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum(),
            laws: &verdicts,
        });
        let earlier_s = state.elapsed_s;
        Ok(Self {
            model,
            run,
            optimizer,
            state,
            warmup_steps,
            metrics,
            meter: Meter::default(),
            started,
            earlier_s,
            is_saved: resumed_from.is_some(),
            resumed_from,
            checkpoint: found,
            best_weights: None,
            _lock: lock,
        })
    }

    fn position(&self) -> Position {
        Position { epoch: self.state.epoch, batch: self.state.batch }
    }

    /// Does all steps. What is due after a step is found from the state alone, so that a run resumed between a step and
    /// its evaluation makes up for it.
    fn run(&mut self, batches: &Receiver<Result<StepBatches>>) -> Result<Outcome> {
        loop {
            if self.is_due(self.run.config.eval_every)
                && self.state.evaluated_at != Some(self.state.step)
                && !self.evaluate()?
            {
                break;
            }
            if self.state.step > 0 && self.is_due(self.run.config.checkpoint_every) {
                self.save()?;
            }
            if self.state.step == self.state.total_steps {
                return Ok(Outcome::Finished);
            }
            if self.is_stopped() {
                break;
            }
            let step = batches.recv().expect("each step is sent, unless the other thread panics");
            match self.step(&step?)? {
                Step::Done(progress) => (self.run.observe)(Event::Step(&progress)),
                Step::Stopped => break,
            }
        }
        self.save()?;
        Ok(Outcome::Interrupted)
    }

    /// Whether what happens every `every` steps, or after each epoch, happens now.
    fn is_due(&self, every: u64) -> bool {
        let TrainState { step, batch, total_steps, .. } = self.state;
        let in_turn = match every {
            0 => batch == 0,
            every => step % every == 0,
        };
        in_turn || step == 0 || step == total_steps
    }

    fn is_stopped(&self) -> bool {
        self.run.stop.load(Ordering::Relaxed)
    }

    /// One optimizer step. Stopped within it, everything is as it was before.
    fn step(&mut self, step: &StepBatches) -> Result<Step> {
        let start = Instant::now();
        let config = self.run.config;
        let number = self.state.step + 1;
        let place = || Place {
            step: number,
            epoch: step.at.epoch,
            batch: Some(step.at.batch),
            examples: step.batches.iter().flat_map(|b| b.rows.indices.iter().copied()).collect(),
        };
        let counts: Vec<usize> =
            step.batches.iter().map(|batch| self.run.objective.n_targets(batch)).collect();
        let n_targets: usize = counts.iter().sum();
        if n_targets == 0 {
            return Err(Error::NoTargets { place: place() });
        }
        let rng = RngState::now(self.model.device())?;
        // Kinds that draw get other numbers for each batch of a step.
        let stream = |index: usize| Stream {
            seed: config.seed,
            step: self.state.step * config.accumulation as u64 + index as u64,
            layer: 0,
        };

        let mut grads = Gradients::new(self.optimizer.params(), config.gradient_checkpointing)?;
        let mut losses = Vec::with_capacity(counts.len());
        for (index, (batch, &count)) in step.batches.iter().zip(&counts).enumerate() {
            if self.is_stopped() {
                rng.restore()?;
                return Ok(Step::Stopped);
            }
            if count == 0 {
                continue;
            }
            let loss = {
                let _precision = config.precision.enter(self.model.device())?;
                let loss = self.run.objective.loss(self.model, batch, stream(index))?;
                match self.model.penalty() {
                    Some(penalty) => loss + penalty,
                    None => loss,
                }
            };
            if !loss.requires_grad() {
                let trained = self.optimizer.names().iter().take(4).cloned().collect();
                return Err(Error::NothingLearns { objective: self.run.objective.name(), trained });
            }
            losses.push((loss.detach(), count as f64 / n_targets as f64));
            // By its share of the targets, so that the sum is the gradient of one large batch.
            let part =
                if count == n_targets { loss } else { loss * (count as f64 / n_targets as f64) };
            grads.add(&part)?;
        }
        let grads = grads.finish()?;
        let present: Vec<&Tensor> = grads.iter().flatten().collect();
        let max_norm = if config.clip_norm > 0.0 { config.clip_norm } else { f64::INFINITY };
        let grad_norm = clip_grad_norm(&present, max_norm)?; // The step's one wait for the device.
        let loss: f64 = losses.iter().map(|(loss, share)| loss.double_value(&[]) * share).sum();
        if !loss.is_finite() || !grad_norm.is_finite() {
            drop(grads);
            let streams: Vec<Stream> = (0..step.batches.len()).map(stream).collect();
            let Self { model, run, optimizer, .. } = self;
            // The search asks for what recomputed activations do not give; the run ends with it.
            model.set_gradient_checkpointing(false)?;
            let _precision = config.precision.enter(model.device())?;
            return Err(non_finite::find(
                model,
                run.objective,
                optimizer,
                step,
                &streams,
                &rng,
                number,
            )?);
        }

        let factor =
            config.schedule.factor(self.state.step, self.warmup_steps, self.state.total_steps);
        let lr = config.lr * factor;
        self.optimizer.step(&grads, lr)?;

        let tokens: usize = step.batches.iter().map(|batch| batch.rows.n_tokens()).sum();
        let state = &mut self.state;
        state.step = number;
        state.epoch = step.next.epoch;
        state.batch = step.next.batch;
        state.n_tokens += tokens as u64;
        state.log.loss += loss * n_targets as f64;
        state.log.n_targets += n_targets as f64;
        state.log.grad_norm += grad_norm;
        state.log.n_steps += 1;
        self.is_saved = false;
        if number.is_multiple_of(config.log_every) || number == state.total_steps {
            self.log(lr)?;
        }

        self.meter.step(tokens as u64, start);
        let done = (step.at.batch + step.batches.len()) as f64 / step.n_batches as f64;
        Ok(Step::Done(Progress {
            step: number,
            total_steps: self.state.total_steps,
            epoch: step.at.epoch as f64 + done,
            loss,
            lr,
            grad_norm,
            step_tokens: tokens as u64,
            n_tokens: self.state.n_tokens,
            tokens_per_s: self.meter.tokens_per_s(),
            eta: self.meter.eta(self.state.total_steps - number),
        }))
    }

    fn log(&mut self, lr: f64) -> Result<()> {
        let LogPart { loss, n_targets, grad_norm, n_steps } = std::mem::take(&mut self.state.log);
        let loss = loss / n_targets;
        self.state.train_loss = Some(loss);
        let grad_norm = grad_norm / n_steps as f64;
        let lines = [("train_loss", loss, "nats"), ("grad_norm", grad_norm, "1"), ("lr", lr, "1")];
        match &mut self.metrics {
            Some(metrics) => metrics.append(self.state.step, lines),
            None => Ok(()),
        }
    }

    /// Evaluates; false where that was interrupted.
    fn evaluate(&mut self) -> Result<bool> {
        let Some(evaluate) = &mut self.run.evaluate else { return Ok(true) };
        let step = self.state.step;
        (self.run.observe)(Event::Evaluating { step });
        let rng = RngState::now(self.model.device())?;
        let result = {
            let _no_grad = tch::no_grad_guard();
            evaluate(self.model)
        };
        rng.restore()?;
        let metrics = match result {
            Ok(metrics) => metrics,
            Err(_) if self.is_stopped() => return Ok(false),
            Err(source) => return Err(Error::Evaluate { step, source }),
        };

        let is_best = self.is_best(&metrics)?;
        if is_best {
            let best = Best { step, metrics: metrics.clone() };
            self.keep_best(&best)?;
            self.state.best = Some(best);
        }
        if let Some(file) = &mut self.metrics {
            let values = metrics.iter().map(|m| (m.name.as_str(), m.value, m.unit.as_str()));
            file.append(step, values)?;
        }
        (self.run.observe)(Event::Evaluated { step, metrics: &metrics, is_best });
        if step == 0 {
            self.state.before.clone_from(&metrics);
        }
        self.state.latest = metrics;
        self.state.evaluated_at = Some(step);
        self.is_saved = false;
        Ok(true)
    }

    /// Whether a model with `metrics` is the best so far. The model before the first step takes part, so that a run
    /// leaves nothing worse than it began with; of equals the first is taken, but a trained one before that.
    fn is_best(&self, metrics: &[Metric]) -> Result<bool> {
        let Some(name) = &self.run.config.select else { return Ok(false) };
        let find = |metrics: &[Metric]| metrics.iter().find(|metric| metric.name == *name).cloned();
        let Some(metric) = find(metrics) else {
            let given = metrics.iter().map(|metric| metric.name.clone()).collect();
            return Err(Error::NoMetric { metric: name.clone(), given });
        };
        let Some(best) = &self.state.best else { return Ok(true) };
        let Some(found) = find(&best.metrics) else { return Ok(true) };
        let is_equal =
            metric.value == found.value || (metric.value.is_nan() && found.value.is_nan());
        Ok(metric.is_better_than(found.value) || (best.step == 0 && is_equal))
    }

    fn keep_best(&mut self, best: &Best) -> Result<()> {
        let Some(dir) = &self.run.dir else {
            let _no_grad = tch::no_grad_guard();
            let copies = self.model.parameters().into_iter().map(|(_, tensor)| tensor.copy());
            self.best_weights = Some(copies.collect());
            return Ok(());
        };
        let path = checkpoint::save_best(dir, self.model, best, &self.run.files)?;
        (self.run.observe)(Event::Saved { step: best.step, path: &path });
        Ok(())
    }

    /// Saves a checkpoint, where there is a folder and the last one is not of this very state.
    fn save(&mut self) -> Result<()> {
        let Some(dir) = &self.run.dir else { return Ok(()) };
        if self.is_saved {
            return Ok(());
        }
        // A checkpoint of broken weights would in time push out the last good one.
        non_finite::check_parameters(self.model, self.state.step)?;
        if let Some(metrics) = &self.metrics {
            metrics.sync()?;
            self.state.metrics_bytes = metrics.len();
        }
        self.state.elapsed_s = self.elapsed_s();
        let path =
            checkpoint::save(dir, self.model, &self.optimizer, &self.state, &self.run.files)?;
        (self.run.observe)(Event::Saved { step: self.state.step, path: &path });
        self.checkpoint = Some(path);
        self.is_saved = true;
        Ok(())
    }

    /// Seconds of the run so far, those of earlier processes included.
    fn elapsed_s(&self) -> f64 {
        self.earlier_s + self.started.elapsed().as_secs_f64()
    }

    fn finish(self, outcome: Outcome) -> Result<Summary> {
        let elapsed_s = self.elapsed_s();
        let state = self.state;
        non_finite::check_parameters(self.model, state.step)?;
        let mut selected_step = state.step;
        let mut after = state.latest;
        if let (Outcome::Finished, Some(best)) = (outcome, &state.best) {
            if best.step != state.step {
                match (&self.run.dir, &self.best_weights) {
                    (Some(dir), _) => checkpoint::load_best(dir, self.model, best)?,
                    (None, Some(weights)) => {
                        for ((_, mut parameter), best) in
                            self.model.parameters().into_iter().zip(weights)
                        {
                            copy(&mut parameter, best)?;
                        }
                    }
                    (None, None) => unreachable!("a best model is kept where it is found"),
                }
            }
            selected_step = best.step;
            after.clone_from(&best.metrics);
        }
        Ok(Summary {
            outcome,
            step: state.step,
            total_steps: state.total_steps,
            resumed_from: self.resumed_from,
            selected_step,
            before: state.before,
            after,
            best: state.best,
            train_loss: state.train_loss,
            n_tokens: state.n_tokens,
            tokens_per_s: self.meter.mean_tokens_per_s(),
            elapsed_s,
            checkpoint: self.checkpoint,
        })
    }
}

/// The gradients of a step's losses, summed.
struct Gradients<'a> {
    params: &'a [Tensor],
    /// Recomputed activations reach their parameters by a pass of their own, which leaves gradients in the parameters.
    in_place: bool,
    sum: Vec<Option<Tensor>>,
}

impl<'a> Gradients<'a> {
    fn new(params: &'a [Tensor], in_place: bool) -> Result<Self> {
        if in_place {
            take_grads(params)?; // What a step that was stopped has left.
        }
        Ok(Self { params, in_place, sum: Vec::new() })
    }

    fn add(&mut self, loss: &Tensor) -> Result<()> {
        let _doing = During::of("the backward pass", None, "a loss", loss);
        let none: &[Tensor] = &[];
        let options = GradOptions::default();
        if self.in_place {
            backward(&[loss], none, options)?;
            return Ok(());
        }
        let new = grad(&[loss], none, self.params, options)?;
        self.sum = if self.sum.is_empty() {
            new
        } else {
            let pairs = std::mem::take(&mut self.sum).into_iter().zip(new);
            let add = |pair| match pair {
                (Some(mut sum), Some(new)) => Some(Tensor::g_add_(&mut sum, &new)),
                (sum, new) => sum.or(new),
            };
            pairs.map(add).collect()
        };
        Ok(())
    }

    /// One a parameter; `None` where no loss depends on it.
    fn finish(self) -> Result<Vec<Option<Tensor>>> {
        Ok(if self.in_place { take_grads(self.params)? } else { self.sum })
    }
}

fn first_batch(data: &dyn Batches) -> Result<Batch> {
    let plan = data.plan(0);
    let rows = plan.first().ok_or(Error::NoBatches { epoch: 0 })?;
    data.batch(0, rows).map_err(|source| Error::Batch { epoch: 0, batch: 0, source })
}
