//! What became of the claims, in words.

use super::super::lab::held;
use super::statistics::{Estimate, three_digits};

/// How many times one worker's updates 16 DGS workers made at 1 Gbit/s.
const SPEED_UP: f64 = 12.6;

/// And with how many workers.
const SPEED_UP_WORKERS: u32 = 16;

/// How many times ASGD's updates 8 DGS workers made at 1 Gbit/s, with secondary compression.
const AGAINST_ASGD: f64 = 5.7;

const AGAINST_ASGD_WORKERS: u32 = 8;

/// What a link of 1 Gbit/s carries.
const BYTES_PER_S: f64 = 1e9 / 8.0;

/// Whether a number is as large as was claimed, and whether its error leaves that open.
fn at_least(found: Estimate, claimed: f64) -> String {
    let is_open = (found.value - claimed).abs() <= found.error;
    let open = if is_open { ", but within the error of it" } else { "" };
    format!("{found} times: {}{open}", held(found.value >= claimed))
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

/// Of DGS against ASGD, for steps of `compute_ms` and a model of so many parameters.
pub(super) fn against_asgd(found: &Result<Estimate, String>, compute_ms: u64, parameters: u64) -> String {
    let says = match found {
        Err(reason) => format!("not measured: {reason}"),
        Ok(found) => at_least(*found, AGAINST_ASGD),
    };
    let (dense_s, step_s) = (4.0 * parameters as f64 / BYTES_PER_S, compute_ms as f64 / 1e3);
    let workers = f64::from(AGAINST_ASGD_WORKERS);
    let link = 1.0 / dense_s;
    let asgd = link.min(workers / (step_s + 2.0 * dense_s));
    let dgs = workers / step_s;
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
        let half_a_second = against_asgd(&estimate(5.8, 0.05), 500, 11_689_512);
        for part in ["**held**", "0.374 s", "at most 2.67 updates/s", "at most 16.0: 5.99 times"] {
            assert!(half_a_second.contains(part), "{part}: {half_a_second}");
        }
        assert!(against_asgd(&estimate(5.8, 0.05), 250, 11_689_512).contains("at most 32.0: 12.0 times"));
        // Steps so long that they leave the link idle: 8 / (4 + 0.748) updates.
        let long = against_asgd(&estimate(1.1, 0.05), 4000, 11_689_512);
        assert!(long.contains("at most 1.68 updates/s with 8 workers, and 2.67 with any"), "{long}");
        assert!(long.contains("**did not hold**"), "{long}");
    }
}
