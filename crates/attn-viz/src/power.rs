//! Fitted exponents: how time or memory grows with the length.

use crate::{Series, Stroke};

/// `y = factor * x^exponent`, by least squares of the logarithms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PowerLaw {
    /// The slope of log y over log x.
    pub exponent: f64,
    /// Its standard error; `None` of two points, through which any line goes.
    pub standard_error: Option<f64>,
    /// y at x = 1.
    pub factor: f64,
}

impl PowerLaw {
    /// Fits points above 0. `None` of fewer than two different x, or where a number has no logarithm.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let is_positive =
            |it: &(f64, f64)| it.0 > 0. && it.1 > 0. && it.0.is_finite() && it.1.is_finite();
        if !points.iter().all(is_positive) {
            return None;
        }
        let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
        let n = logs.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / n;
        let (x_mean, y_mean) = (mean(|it| it.0), mean(|it| it.1));
        let spread: f64 = logs.iter().map(|(x, _)| (x - x_mean).powi(2)).sum();
        if logs.len() < 2 || spread < 1e-12 {
            return None;
        }
        let exponent = logs.iter().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum::<f64>() / spread;
        let intercept = y_mean - exponent * x_mean;
        let left: f64 = logs.iter().map(|(x, y)| (y - intercept - exponent * x).powi(2)).sum();
        let standard_error = (logs.len() > 2).then(|| (left / (n - 2.) / spread).sqrt());
        Some(Self { exponent, standard_error, factor: intercept.exp() })
    }

    /// The fitted line from the first to the last of these x, dashed in the colour `color`.
    pub fn line(&self, name: &str, xs: &[f64], color: usize) -> Series {
        let points = xs.iter().map(|x| (*x, self.factor * x.powf(self.exponent)));
        let error = self.standard_error.map_or(String::new(), |it| format!(" \u{B1} {it:.2}"));
        let name = format!("{name}: n^{:.2}{error}", self.exponent);
        Series { stroke: Stroke::Dashed, color: Some(color), ..Series::new(name, points) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponent_of_a_power_is_found() {
        let square: Vec<(f64, f64)> = [128., 256., 512., 1024.].map(|n| (n, 3e-6 * n * n)).into();
        let found = PowerLaw::fit(&square).unwrap();
        assert!((found.exponent - 2.).abs() < 1e-9 && (found.factor - 3e-6).abs() < 1e-12);
        assert!(found.standard_error.unwrap() < 1e-9);
    }

    /// By hand: log2 y is 0, 1, 3 over log2 x of 0, 1, 2: slope 1.5, residuals 1/6, -1/3, 1/6.
    #[test]
    fn the_standard_error_is_that_of_a_regression() {
        let found = PowerLaw::fit(&[(1., 1.), (2., 2.), (4., 8.)]).unwrap();
        assert!((found.exponent - 1.5).abs() < 1e-12);
        let expected = ((1. / 36. + 1. / 9. + 1. / 36.) / 2_f64).sqrt();
        assert!((found.standard_error.unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn what_has_no_slope_has_no_fit() {
        assert_eq!(PowerLaw::fit(&[(2., 1.)]), None);
        assert_eq!(PowerLaw::fit(&[(2., 1.), (2., 3.)]), None);
        assert_eq!(PowerLaw::fit(&[(1., 0.), (2., 3.)]), None);
    }
}
