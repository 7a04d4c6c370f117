//! Classifiers: how often they are right, and about what.

use attn_core::{Config, ForwardOptions, Model, config::Head};
use attn_data::batch::Encoded;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{
    error::{Error, Result},
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, wilson},
};

/// What a classifier says of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Number of the row in its split, from 0.
    pub index: usize,
    /// The class it has; absent where the row is not labelled.
    pub label: Option<i64>,
    /// The class with the largest logit; the first of several.
    pub predicted: i64,
    /// Softmax of the logits in `f64`, one a class.
    pub probabilities: Vec<f64>,
}

/// How often a classifier is right, and how sure that is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// `n_correct / n_labelled`.
    pub accuracy: f64,
    /// The 95 % Wilson interval: what the accuracy may be on other rows of the same kind.
    pub interval_95: Interval,
    /// Rows whose class was predicted.
    pub n_correct: usize,
    /// Rows with a label.
    pub n_labelled: usize,
    /// Mean of −ln p(label), in nats.
    pub loss: f64,
}

/// One class of a [`Classification`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassScore {
    /// Its name in the model's config.
    pub name: String,
    /// Labelled rows of this class.
    pub n_rows: usize,
    /// Of these, rows predicted as each class, in the order of the classes: a line of the confusion matrix.
    pub predicted_as: Vec<usize>,
    /// Rows predicted as this class, labelled or not.
    pub n_predicted: usize,
}

/// What [`classify`] found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Classification {
    /// Absent where no row is labelled.
    pub accuracy: Option<Accuracy>,
    /// One a class.
    pub classes: Vec<ClassScore>,
    /// One a row, in the order of the rows.
    pub predictions: Vec<Prediction>,
}

impl Classification {
    /// The accuracy of always saying `class`: the baseline that counting reaches. `None` where no row is labelled.
    pub fn accuracy_of_always(&self, class: usize) -> Option<f64> {
        let n_labelled: usize = self.classes.iter().map(|class| class.n_rows).sum();
        let n_right = self.classes.get(class)?.n_rows;
        (n_labelled > 0).then(|| n_right as f64 / n_labelled as f64)
    }
}

/// Runs a classifier over `rows`.
///
/// # Errors
///
/// [`Error::Head`] for a model that is no classifier, [`Error::Label`] for a class it does not have,
/// [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and what the model refuses.
pub fn classify(
    model: &Model,
    rows: &[Encoded],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Classification> {
    check_classifier(model.config(), rows, "accuracy")?;
    let mut predictions: Vec<Option<Prediction>> = vec![None; rows.len()];
    let mut losses = vec![0.0; rows.len()];
    for_each_batch(model, rows, batching, progress, |positions, batch| {
        let input = to_input(&batch, model);
        let logits = model.forward(&input, &ForwardOptions::default())?.logits;
        let logits = logits.to_device(Device::Cpu).to_kind(Kind::Double); // [batch, n_classes]
        let log_p: Vec<Vec<f64>> =
            Vec::try_from(logits.log_softmax(-1, Kind::Double)).expect("two axes of f64");
        for (log_p, &at) in log_p.iter().zip(positions) {
            let Encoded { index, label, .. } = rows[at];
            if !log_p.iter().all(|log_p| log_p.is_finite()) {
                return Err(Error::NotFinite { index });
            }
            if let Some(label) = label {
                losses[at] = -log_p[label as usize];
            }
            let probabilities = log_p.iter().map(|log_p| log_p.exp()).collect();
            let predicted = first_largest(log_p);
            predictions[at] = Some(Prediction { index, label, predicted, probabilities });
        }
        Ok(())
    })?;
    let predictions: Vec<Prediction> =
        predictions.into_iter().map(|row| row.expect("a plan holds every row")).collect();
    let classes = count(&model.config().classes(), &predictions);
    let accuracy = accuracy(&predictions, &losses);
    Ok(Classification { accuracy, classes, predictions })
}

/// Refuses a model that is no classifier, and labels that it has no class for.
pub(crate) fn check_classifier(
    config: &Config,
    rows: &[Encoded],
    measure: &'static str,
) -> Result<()> {
    let Head::Classifier { n_classes } = config.head else {
        return Err(Error::Head {
            measure,
            found: config.head,
            expected: "a classifier",
            hint: "fine-tune it on the task first, or score it as a language model",
        });
    };
    let outside = |row: &&Encoded| row.label.is_some_and(|label| !(0..n_classes).contains(&label));
    match rows.iter().find(outside) {
        Some(&Encoded { index, label: Some(label), .. }) => {
            Err(Error::Label { index, label, n_classes })
        }
        _ => Ok(()),
    }
}

pub(crate) fn first_largest(values: &[f64]) -> i64 {
    let best = values.iter().enumerate().rev().max_by(|(_, a), (_, b)| a.total_cmp(b));
    best.map_or(0, |(class, _)| class as i64)
}

pub(crate) fn count(names: &[String], predictions: &[Prediction]) -> Vec<ClassScore> {
    let empty = |name: &String| ClassScore {
        name: name.clone(),
        n_rows: 0,
        predicted_as: vec![0; names.len()],
        n_predicted: 0,
    };
    let mut classes: Vec<ClassScore> = names.iter().map(empty).collect();
    for prediction in predictions {
        classes[prediction.predicted as usize].n_predicted += 1;
        if let Some(label) = prediction.label {
            let class = &mut classes[label as usize];
            class.n_rows += 1;
            class.predicted_as[prediction.predicted as usize] += 1;
        }
    }
    classes
}

pub(crate) fn accuracy(predictions: &[Prediction], losses: &[f64]) -> Option<Accuracy> {
    let labelled = || predictions.iter().zip(losses).filter(|(row, _)| row.label.is_some());
    let n_labelled = labelled().count();
    if n_labelled == 0 {
        return None;
    }
    let n_correct = labelled().filter(|(row, _)| row.label == Some(row.predicted)).count();
    let loss = labelled().map(|(_, loss)| loss).sum::<f64>() / n_labelled as f64;
    Some(Accuracy {
        accuracy: n_correct as f64 / n_labelled as f64,
        interval_95: wilson(n_correct as u64, n_labelled as u64, 0.95)
            .expect("there is a labelled row, and of those as many are right at most"),
        n_correct,
        n_labelled,
        loss,
    })
}
