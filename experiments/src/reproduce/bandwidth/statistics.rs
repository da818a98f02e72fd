//! Numbers with their errors.

use std::fmt;

/// The most decimals that are printed.
const DECIMALS_MAX: usize = 4;

/// A number and its error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) value: f64,
    pub(super) error: f64,
}

impl Estimate {
    /// How many times the other one it is; their errors are independent.
    pub(super) fn over(self, other: Self) -> Self {
        let value = self.value / other.value;
        let relative = (self.error / self.value).hypot(other.error / other.value);
        Self { value, error: value * relative }
    }
}

impl fmt::Display for Estimate {
    /// With two digits of the error.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decimals = if self.error > 0.0 {
            (1.0 - self.error.log10().floor()).clamp(0.0, DECIMALS_MAX as f64) as usize
        } else {
            DECIMALS_MAX
        };
        write!(f, "{:.decimals$} ± {:.decimals$}", self.value, self.error)
    }
}

/// A number with about three digits.
pub(super) fn three_digits(value: f64) -> String {
    let decimals = match value.abs() {
        0.0..1.0 => 3,
        1.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_carry_both_errors() {
        let (a, b) = (Estimate { value: 6.0, error: 0.6 }, Estimate { value: 2.0, error: 0.0 });
        let ratio = a.over(b);
        assert!((ratio.value - 3.0).abs() < 1e-12 && (ratio.error - 0.3).abs() < 1e-12, "{ratio:?}");
    }

    #[test]
    fn as_many_digits_are_shown_as_the_error_allows() {
        assert_eq!(Estimate { value: 12.3456, error: 0.123 }.to_string(), "12.35 ± 0.12");
        assert_eq!(Estimate { value: 0.026_712, error: 0.001_23 }.to_string(), "0.0267 ± 0.0012");
        assert_eq!(Estimate { value: 123.4, error: 25.0 }.to_string(), "123 ± 25");
        assert_eq!(Estimate { value: 0.5, error: 0.0 }.to_string(), "0.5000 ± 0.0000");
        assert_eq!([0.0267, 2.672, 16.04, 374.2].map(three_digits), ["0.027", "2.67", "16.0", "374"]);
    }
}
