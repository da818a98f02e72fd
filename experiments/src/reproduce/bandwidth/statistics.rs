//! Rates with their errors.

use std::fmt;

/// Into how many blocks a measurement is cut at least, where it has as many events: fewer would tell next to nothing of their
/// spread.
const BLOCKS_MIN: usize = 4;

/// And at most.
const BLOCKS_MAX: usize = 10;

/// The most decimals that are printed.
const DECIMALS_MAX: usize = 4;

/// A number and its error: the standard error of a measurement, or the standard deviation over the seeds of a simulation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) value: f64,
    pub(super) error: f64,
}

impl Estimate {
    /// Events per second, of those after the first of these moments, which ascend. The error is that of the mean over four
    /// to ten blocks of equally many events, whole rounds of `round` events where there are enough. `None` if there are fewer
    /// than two events after the first, or no time passed.
    pub(super) fn rate(moments: &[f64], round: usize) -> Option<Self> {
        let events = moments.len().checked_sub(1).filter(|&events| events >= 2)?;
        let seconds = moments[events] - moments[0];
        if seconds <= 0.0 {
            return None;
        }
        let blocks = (events / round.max(1)).clamp(BLOCKS_MIN, BLOCKS_MAX).min(events);
        let whole_rounds = events / blocks / round.max(1) * round;
        let size = if whole_rounds > 0 { whole_rounds } else { events / blocks };
        // Events that do not fill a block are left out at the beginning.
        let ends: Vec<f64> = (0..=blocks).map(|block| moments[events - (blocks - block) * size]).collect();
        let took: Vec<f64> = ends.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let count = blocks as f64;
        let mean = took.iter().sum::<f64>() / count;
        let variance = took.iter().map(|took| (took - mean).powi(2)).sum::<f64>() / (count - 1.0);
        let value = events as f64 / seconds;
        let relative = if mean > 0.0 { (variance / count).sqrt() / mean } else { 1.0 };
        Some(Self { value, error: value * relative })
    }

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
    fn a_rate_counts_events_between_moments() {
        let even: Vec<f64> = (0..=20).map(|event| 5.0 + 0.5 * f64::from(event)).collect();
        let rate = Estimate::rate(&even, 1).unwrap();
        assert!((rate.value - 2.0).abs() < 1e-12 && rate.error < 1e-12, "{rate:?}");
        assert_eq!(Estimate::rate(&even[..2], 1), None, "one event has no error");
        assert_eq!(Estimate::rate(&[], 1), None);
        assert_eq!(Estimate::rate(&[1.0, 1.0, 1.0], 1), None, "no time passed");
    }

    #[test]
    fn the_error_is_that_of_the_mean_of_the_blocks() {
        // Four blocks of one event: 1, 3, 1 and 3 s; mean 2, standard deviation 2/√3, so the mean's error is 1/√3.
        let rate = Estimate::rate(&[0.0, 1.0, 4.0, 5.0, 8.0], 1).unwrap();
        assert_eq!(rate.value, 0.5);
        assert!((rate.error - 0.5 * (1.0 / 3f64.sqrt()) / 2.0).abs() < 1e-12, "{rate:?}");
        // In whole rounds of two, the same events are even.
        let more = [0.0, 1.0, 4.0, 5.0, 8.0, 9.0, 12.0, 13.0, 16.0];
        assert!(Estimate::rate(&more, 1).unwrap().error > 0.0);
        assert_eq!(Estimate::rate(&more, 2).unwrap().error, 0.0);
        // Rounds of two, 1 and 3 s, and one event more at the beginning than fills them.
        let odd: Vec<f64> = std::iter::once(-3.0).chain(more).collect();
        assert_eq!(Estimate::rate(&odd, 2).unwrap().error, 0.0);
    }

    #[test]
    fn blocks_leave_out_what_is_too_much_at_the_beginning() {
        // Five events in four blocks of one.
        let rate = Estimate::rate(&[0.0, 9.0, 10.0, 11.0, 12.0, 13.0], 2).unwrap();
        assert_eq!((rate.value, rate.error), (5.0 / 13.0, 0.0));
    }

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
