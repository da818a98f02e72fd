//! What became of the claims, in words.

use super::super::lab::held_or_not;
use super::statistics::{Estimate, three_digits};

/// How many times one worker's updates 16 DGS workers made at 1 Gbit/s.
const SPEED_UP: f64 = 12.6;

/// And with how many workers.
const SPEED_UP_WORKERS: u32 = 16;

/// How many times ASGD's updates 8 DGS workers made at 1 Gbit/s, with secondary compression.
const AGAINST_ASGD: f64 = 5.7;

pub(super) const AGAINST_ASGD_WORKERS: u32 = 8;

/// The link that both claims are for.
pub(super) const BITS_PER_SECOND: f64 = 1e9;

/// Whether a number is as large as was claimed, and whether its error leaves that open.
fn at_least(found: Estimate, claimed: f64) -> String {
    let is_open = (found.value - claimed).abs() <= found.error;
    let open = if is_open { ", but within the error of it" } else { "" };
    format!("{found} times: {}{open}", held_or_not(found.value >= claimed))
}

/// Of many workers against one; `most` is how many there were.
pub(super) fn speed_up(most: u32, found: &Result<Estimate, String>) -> String {
    let says = match found {
        Err(reason) => format!("not measured: {reason}"),
        Ok(found) if most == SPEED_UP_WORKERS => at_least(*found, SPEED_UP),
        Ok(found) => format!("not measured: this form ends with {most} workers, which make {found} times"),
    };
    format!(
        "* At 1 Gbit/s {SPEED_UP_WORKERS} DGS workers make at least {SPEED_UP} times one worker's updates: {says}.\n"
    )
}

/// Of the updates per second of DGS against those of ASGD, for steps of `compute_ms` and a model of so many parameters.
pub(super) fn against_asgd(
    [dgs_found, asgd_found]: [&Result<Estimate, String>; 2],
    compute_ms: u64,
    parameters: u64,
) -> String {
    let (dense_s, step_s) = (4.0 * parameters as f64 / (BITS_PER_SECOND / 8.0), compute_ms as f64 / 1e3);
    let workers = f64::from(AGAINST_ASGD_WORKERS);
    let link = 1.0 / dense_s;
    let asgd = link.min(workers / (step_s + 2.0 * dense_s));
    let dgs = workers / step_s;
    let says = match (dgs_found, asgd_found) {
        (Err(reason), _) | (_, Err(reason)) => format!("not measured: {reason}"),
        (Ok(found), Ok(of_asgd)) => format!(
            "{}; against an ASGD that uses all that the link lets it, {}",
            at_least(found.over(*of_asgd), AGAINST_ASGD),
            at_least(Estimate { value: found.value / asgd, error: found.error / asgd }, AGAINST_ASGD),
        ),
    };
    format!(
        "* At 1 Gbit/s {AGAINST_ASGD_WORKERS} DGS workers make at least {AGAINST_ASGD} times the updates of as many of ASGD: \
         {says}. The number depends on what a step takes: a dense exchange takes {} s of the link in each direction, so that \
         ASGD can make at most {} updates/s with {AGAINST_ASGD_WORKERS} workers, and {} with any number; as many DGS workers, \
         whose steps take {compute_ms} ms, at most {}: {} times as many. With steps half as long DGS could make twice as many. A number above that ratio \
         means that ASGD stays below what the link would let it do: this machine's processors work for all.\n",
        three_digits(dense_s),
        three_digits(asgd),
        three_digits(link),
        three_digits(dgs),
        three_digits(dgs / asgd),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(value: f64, error: f64) -> Result<Estimate, String> {
        Ok(Estimate { value, error })
    }

    #[test]
    fn words_fit_the_numbers() {
        assert!(speed_up(16, &estimate(13.5, 0.2)).ends_with("13.50 ± 0.20 times: **held**.\n"));
        assert!(speed_up(16, &estimate(11.0, 0.2)).ends_with("times: **did not hold**.\n"));
        let open = speed_up(16, &estimate(12.5, 0.2));
        assert!(open.ends_with("**did not hold**, but within the error of it.\n"), "{open}");
        let short = speed_up(8, &estimate(7.9, 0.1));
        assert!(short.contains("not measured: this form ends with 8 workers") && !short.contains("held"));
        assert!(speed_up(16, &Err("no server".to_owned())).ends_with("not measured: no server.\n"));
    }

    #[test]
    fn the_arithmetic_is_that_of_the_step() {
        let says = |dgs, asgd, compute_ms| {
            against_asgd([&estimate(dgs, 0.05), &estimate(asgd, 0.01)], compute_ms, 11_689_512)
        };
        let half_a_second = says(15.0, 1.9, 500);
        for part in [
            "7.895 ± 0.049 times: **held**; against",
            "lets it, 5.611 ± 0.019 times: **did not hold**",
            "0.374 s",
            "at most 2.67 updates/s",
            "at most 16.0: 5.99 times",
        ] {
            assert!(half_a_second.contains(part), "{part}: {half_a_second}");
        }
        assert!(says(15.9, 2.6, 500).contains("lets it, 5.948 ± 0.019 times: **held**"));
        assert!(says(30.0, 2.6, 250).contains("at most 32.0: 12.0 times"));
        // Steps so long that they leave the link idle: 8 / (4 + 0.748) updates.
        let long = says(1.9, 1.6, 4000);
        assert!(long.contains("at most 1.68 updates/s with 8 workers, and 2.67 with any"), "{long}");
        assert!(long.contains("**did not hold**"), "{long}");
    }
}
