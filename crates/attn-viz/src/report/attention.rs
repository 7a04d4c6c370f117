use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Serialize;

use super::markup::{json_text, line};
use crate::Error;
use crate::font::{Medium, shown};

/// Attention weights to look into: a sample, a model, a layer, a head, a token.
///
/// Of two or more samples the reader can put a second beside the first: what is chosen is shown of both, model, layer and head by
/// name, the difference of two models, too, and the token where both have as many, else each has one picked of its own. What the
/// second lacks is said in its place. All maps then share one scale of colours, all differences another.
///
/// The page stores a weight in 8 bits, with a scale of its own for each head, and says how far off the worst one is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionViewer {
    /// Texts; at least one.
    pub samples: Vec<Sample>,
}

/// A text that models read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// What it is called.
    pub name: String,
    /// The models; at least one. Of two, layers and heads of one name are shown side by side; beside another sample, models of
    /// one name.
    pub models: Vec<ModelAttention>,
}

/// The attention of one model to one text.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelAttention {
    /// The model.
    pub model: String,
    /// The tokens that attend; at least one.
    pub rows: Vec<String>,
    /// The tokens that are attended to; at least one.
    pub columns: Vec<String>,
    /// Its layers; at least one.
    pub layers: Vec<Layer>,
}

/// The heads of one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Layer {
    /// What it is called: `layer 3`.
    pub name: String,
    /// Its heads; at least one.
    pub heads: Vec<Head>,
    /// What the reader has to know of the weights, as that they need not sum to 1; empty for nothing.
    pub note: String,
}

/// The weights of one head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Head {
    /// What it is called: `head 7`.
    pub name: String,
    /// Row by row, a weight for each column; NaN where there is none.
    pub weights: Vec<f32>,
}

/// The byte of a NaN; the others are steps.
const MISSING: u8 = 255;

/// What a page is given of an [`AttentionViewer`].
#[derive(Serialize)]
struct Packed {
    samples: Vec<PackedSample>,
}

#[derive(Serialize)]
struct PackedSample {
    name: String,
    models: Vec<PackedModel>,
}

#[derive(Serialize)]
struct PackedModel {
    name: String,
    rows: Vec<String>,
    /// Absent where they are the rows.
    columns: Option<Vec<String>>,
    /// Whether nothing is above the diagonal, and the triangle below it is all that is stored.
    causal: bool,
    layers: Vec<PackedLayer>,
    /// The bytes of all heads one behind the other, deflated without a header, in Base64.
    weights: String,
}

#[derive(Serialize)]
struct PackedLayer {
    name: String,
    note: String,
    heads: Vec<PackedHead>,
}

/// A byte `b` stands for `(b - zero) * step`, so that 0 is kept as 0.
#[derive(Serialize)]
struct PackedHead {
    name: String,
    zero: u8,
    step: f64,
}

/// What packing did to the weights.
#[derive(Debug, Default)]
struct Loss {
    largest: f64,
    n_missing: usize,
}

impl AttentionViewer {
    pub(super) fn html(&self) -> Result<String, Error> {
        let (packed, loss) = self.pack()?;
        let mut caption = format!(
            "Weights are stored in 8 bits with a scale of their own for each head: none is off by more than {}",
            bound(loss.largest)
        );
        let is_compared = self.samples.iter().any(|sample| sample.models.len() > 1);
        caption += if is_compared { ", no difference by more than twice that." } else { "." };
        match loss.n_missing {
            0 => {}
            1 => caption += " 1 weight is NaN and grey.",
            n => caption += &format!(" {n} weights are NaN and grey."),
        }
        Ok(format!(
            "<div class=\"viewer\">\n<div class=\"stage\"></div>\n<p class=\"caption\">{}</p>\n\
             <script type=\"application/json\">{}</script>\n</div>\n",
            line(&caption),
            json_text(&packed)
        ))
    }

    fn pack(&self) -> Result<(Packed, Loss), Error> {
        let mut loss = Loss::default();
        some(&self.samples, "sample", || "attention".into())?;
        let samples = self.samples.iter().map(|it| it.pack(&mut loss));
        Ok((Packed { samples: samples.collect::<Result<_, _>>()? }, loss))
    }
}

impl Sample {
    fn pack(&self, loss: &mut Loss) -> Result<PackedSample, Error> {
        let place = format!("attention of sample `{}`", self.name);
        some(&self.models, "model", || place.clone())?;
        let models = self.models.iter().map(|it| it.pack(&place, loss));
        Ok(PackedSample { name: text(&self.name), models: models.collect::<Result<_, _>>()? })
    }
}

impl ModelAttention {
    fn pack(&self, place: &str, loss: &mut Loss) -> Result<PackedModel, Error> {
        let place = format!("{place}, model `{}`", self.model);
        some(&self.rows, "row", || place.clone())?;
        some(&self.columns, "column", || place.clone())?;
        some(&self.layers, "layer", || place.clone())?;
        for layer in &self.layers {
            let place = format!("{place}, layer `{}`", layer.name);
            some(&layer.heads, "head", || place.clone())?;
            for head in &layer.heads {
                self.check(head, || format!("{place}, head `{}`", head.name))?;
            }
        }
        let causal = self.is_causal();
        let mut bytes = Vec::new();
        let layers = self.layers.iter().map(|layer| PackedLayer {
            name: text(&layer.name),
            note: text(&layer.note),
            heads: layer
                .heads
                .iter()
                .map(|head| self.pack_head(head, causal, &mut bytes, loss))
                .collect(),
        });
        let layers = layers.collect();
        let columns = self.columns.iter().map(|it| text(it)).collect();
        Ok(PackedModel {
            name: text(&self.model),
            rows: self.rows.iter().map(|it| text(it)).collect(),
            columns: (self.columns != self.rows).then_some(columns),
            causal,
            layers,
            weights: BASE64_STANDARD.encode(miniz_oxide::deflate::compress_to_vec(&bytes, 9)),
        })
    }

    fn check(&self, head: &Head, place: impl Fn() -> String) -> Result<(), Error> {
        let (n_rows, n_columns) = (self.rows.len(), self.columns.len());
        if head.weights.len() != n_rows * n_columns {
            let n_weights = head.weights.len();
            return Err(Error::Weights { place: place(), n_rows, n_columns, n_weights });
        }
        match head.weights.iter().position(|weight| weight.is_infinite()) {
            None => Ok(()),
            Some(at) => Err(Error::NotFinite {
                place: format!("{}, row {}, column {}", place(), at / n_columns, at % n_columns),
                value: f64::from(head.weights[at]),
            }),
        }
    }

    /// Whether no token attends to a later one, in any head.
    fn is_causal(&self) -> bool {
        let n = self.columns.len();
        // A NaN is not 0, so that one above the diagonal is kept.
        let past = |head: &Head| {
            head.weights
                .chunks_exact(n)
                .enumerate()
                .all(|(i, row)| row[i + 1..].iter().all(|it| *it == 0.))
        };
        n > 1 && self.rows.len() == n && self.layers.iter().flat_map(|it| &it.heads).all(past)
    }

    /// Appends the bytes of a head.
    fn pack_head(
        &self,
        head: &Head,
        causal: bool,
        bytes: &mut Vec<u8>,
        loss: &mut Loss,
    ) -> PackedHead {
        let finite = || head.weights.iter().filter(|it| !it.is_nan()).map(|it| f64::from(*it));
        let most = finite().fold(0., |most: f64, it| most.max(it.abs()));
        let zero = if finite().any(|it| it < 0.) { 127 } else { 0 };
        let step = most / f64::from(MISSING - 1 - zero);
        for (i, row) in head.weights.chunks_exact(self.columns.len()).enumerate() {
            let row = if causal { &row[..=i] } else { row };
            for weight in row {
                bytes.push(byte_of(f64::from(*weight), zero, step, loss));
            }
        }
        PackedHead { name: text(&head.name), zero, step }
    }
}

/// The nearest step, from 0 to 254.
fn byte_of(weight: f64, zero: u8, step: f64, loss: &mut Loss) -> u8 {
    if weight.is_nan() {
        loss.n_missing += 1;
        return MISSING;
    }
    let steps = if step > 0. { (weight / step).round() } else { 0. };
    loss.largest = loss.largest.max((steps * step - weight).abs());
    (steps + f64::from(zero)) as u8
}

/// A number of two digits that is not below `error`.
fn bound(error: f64) -> String {
    if error == 0. {
        return "0".into();
    }
    let digits = 1 - error.log10().floor() as i32;
    let scale = 10_f64.powi(digits);
    let bound = (error * scale).ceil() / scale;
    if (0..7).contains(&digits) {
        format!("{bound:.*}", digits as usize)
    } else {
        format!("{bound:.1e}")
    }
}

/// A text as the page shows it.
fn text(of: &str) -> String {
    shown(of, Medium::Svg)
}

fn some<T>(of: &[T], expected: &'static str, place: impl FnOnce() -> String) -> Result<(), Error> {
    if of.is_empty() { Err(Error::Empty { place: place(), expected }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number from -1 to 1 that needs no generator.
    fn noise(i: usize) -> f64 {
        ((i as f64 * 12.9898).sin() * 43_758.545_3).fract()
    }

    /// Softmax over scores of a spread that trained heads have.
    fn softmax(n: usize, seed: usize, causal: bool) -> Vec<f32> {
        let row = |i: usize| -> Vec<f32> {
            let seen = if causal { i + 1 } else { n };
            let score =
                |j: usize| if j < seen { (3. * noise((seed * n + i) * n + j)).exp() } else { 0. };
            let total: f64 = (0..n).map(score).sum();
            (0..n).map(|j| (score(j) / total) as f32).collect()
        };
        (0..n).flat_map(row).collect()
    }

    fn model(
        name: &str,
        n: usize,
        sizes: (usize, usize),
        weights: impl Fn(usize) -> Vec<f32>,
    ) -> ModelAttention {
        let tokens: Vec<String> = (0..n).map(|i| format!("token {i}")).collect();
        let head = |layer: usize, head: usize| Head {
            name: format!("head {head}"),
            weights: weights(layer * sizes.1 + head),
        };
        let layer = |layer: usize| Layer {
            name: format!("layer {layer}"),
            heads: (0..sizes.1).map(|it| head(layer, it)).collect(),
            note: String::new(),
        };
        ModelAttention {
            model: name.into(),
            rows: tokens.clone(),
            columns: tokens,
            layers: (0..sizes.0).map(layer).collect(),
        }
    }

    fn viewer(models: Vec<ModelAttention>) -> AttentionViewer {
        AttentionViewer { samples: vec![Sample { name: "text".into(), models }] }
    }

    /// What the page makes of the bytes.
    fn unpacked(packed: &PackedModel) -> Vec<Vec<f64>> {
        let bytes = BASE64_STANDARD.decode(&packed.weights).unwrap();
        let mut bytes = miniz_oxide::inflate::decompress_to_vec(&bytes).unwrap().into_iter();
        let n = packed.rows.len();
        let n_columns = packed.columns.as_ref().map_or(n, Vec::len);
        let mut value = |head: &PackedHead, i: usize, j: usize| {
            if packed.causal && j > i {
                return 0.;
            }
            match bytes.next().unwrap() {
                MISSING => f64::NAN,
                byte => (f64::from(byte) - f64::from(head.zero)) * head.step,
            }
        };
        let heads = packed.layers.iter().flat_map(|layer| &layer.heads);
        let heads = heads
            .map(|head| {
                (0..n * n_columns).map(|at| value(head, at / n_columns, at % n_columns)).collect()
            })
            .collect();
        assert_eq!(bytes.next(), None);
        heads
    }

    #[test]
    fn bytes_are_weights_to_the_error_that_is_named() {
        for causal in [false, true] {
            let model = model("m", 9, (2, 2), |seed| softmax(9, seed, causal));
            let (packed, loss) = viewer(vec![model.clone()]).pack().unwrap();
            let packed = &packed.samples[0].models[0];
            assert_eq!(packed.causal, causal);
            let mut largest: f64 = 0.;
            let heads = model.layers.iter().flat_map(|layer| &layer.heads);
            for (head, found) in heads.zip(unpacked(packed)) {
                for (weight, found) in head.weights.iter().zip(found) {
                    largest = largest.max((f64::from(*weight) - found).abs());
                    assert!(*weight != 0. || found == 0.);
                }
            }
            assert!(largest > 0. && largest < 0.5 / 254., "{largest}");
            assert!((largest - loss.largest).abs() < 1e-12, "{largest} {}", loss.largest);
        }
    }

    #[test]
    fn negative_missing_and_huge_weights_are_kept() {
        let cases: [(Vec<f32>, f64); 4] = [
            (vec![-2., 0., 1., f32::NAN], 2. / 254.),
            (vec![0.; 4], 0.),
            (vec![-3e38, 3e38, 0., 1.], 3e38 / 254.),
            (vec![1e-40, 0., 0., 0.], 1e-40),
        ];
        for (weights, bound) in cases {
            let model = model("m", 2, (1, 1), |_| weights.clone());
            let (packed, loss) = viewer(vec![model]).pack().unwrap();
            for (weight, found) in weights.iter().zip(&unpacked(&packed.samples[0].models[0])[0]) {
                assert!(
                    (weight.is_nan() && found.is_nan())
                        || (f64::from(*weight) - found).abs() <= bound,
                    "{weight} {found}"
                );
            }
            assert_eq!(loss.n_missing, usize::from(weights[3].is_nan()));
        }
        let seen = viewer(vec![model("m", 2, (1, 1), |_| vec![f32::NAN, f32::NAN, 0., 1.])]);
        assert!(seen.html().unwrap().contains("2 weights are NaN and grey."));
        assert!(
            !seen.pack().unwrap().0.samples[0].models[0].causal,
            "a NaN above the diagonal is seen"
        );
    }

    #[test]
    fn a_bound_is_not_below_the_error() {
        let said = [0., 0.001_911, 0.1, 0.999, 3.1e-9, 1.2e36].map(bound);
        assert_eq!(said, ["0", "0.0020", "0.10", "1.00", "3.1e-9", "1.2e36"]);
    }

    /// Two models of 12 layers of 12 heads, 128 tokens: random scores, which deflate worse than those of trained heads.
    /// 1.4 MiB and 4.7 MiB.
    #[test]
    fn two_models_take_less_than_5_mib() {
        for causal in [true, false] {
            let models = ["before", "after"].map(|name| {
                model(name, 128, (12, 12), |seed| softmax(128, seed + name.len(), causal))
            });
            let n_bytes = viewer(models.into()).html().unwrap().len();
            assert!(n_bytes < 5 << 20, "causal {causal}: {n_bytes} bytes");
        }
    }

    #[test]
    fn what_cannot_be_shown_is_named() {
        let good = || model("m", 2, (1, 2), |_| vec![0.5; 4]);
        let message = |change: &dyn Fn(&mut ModelAttention)| {
            let mut model = good();
            change(&mut model);
            viewer(vec![model]).html().unwrap_err().to_string()
        };
        let place = "attention of sample `text`, model `m`";
        assert_eq!(
            message(&|m| m.layers[0].heads[1].weights.truncate(3)),
            format!(
                "{place}, layer `layer 0`, head `head 1` has 3 weights, expected 2 x 2, one for each row and column"
            )
        );
        assert_eq!(
            message(&|m| m.layers[0].heads[1].weights[2] = f32::INFINITY),
            format!(
                "{place}, layer `layer 0`, head `head 1`, row 1, column 0 is inf, expected a finite number"
            )
        );
        assert_eq!(
            message(&|m| m.layers.clear()),
            format!("{place} is empty, expected at least one layer")
        );
        assert_eq!(
            message(&|m| m.rows.clear()),
            format!("{place} is empty, expected at least one row")
        );
        assert_eq!(
            message(&|m| m.layers[0].heads.clear()),
            format!("{place}, layer `layer 0` is empty, expected at least one head")
        );
        for viewer in [AttentionViewer::default(), viewer(vec![])] {
            assert!(matches!(viewer.html(), Err(Error::Empty { .. })));
        }
    }

    #[test]
    fn tokens_never_end_the_script() {
        let mut evil = model("</script>", 2, (1, 1), |_| vec![0.5; 4]);
        evil.rows[0] = "</script><img src=x onerror=alert(1)>\u{202E}\u{2028}".into();
        let html = viewer(vec![evil]).html().unwrap();
        assert_eq!(html.matches("</script>").count(), 1, "{html}");
        assert!(!html.contains("<img") && !html.contains('\u{202E}') && !html.contains('\u{2028}'));
    }
}
