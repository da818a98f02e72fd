//! A run that a device has not the memory for, as people are told.

/// Bytes in a gigabyte, as memory is told to people.
pub(crate) const GB: f64 = 1e9;

/// A run needs more memory than a GPU has free.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "the run needs about {needed:.1} GB of the GPU's memory with batches of {batch} sequences, and {free:.1} GB are free; {remedy}",
    needed = *.needed_bytes as f64 / GB, free = *.free_bytes as f64 / GB, remedy = remedy(*.fits)
)]
pub struct TooLarge {
    /// What it needs.
    pub needed_bytes: usize,
    /// What there is.
    pub free_bytes: usize,
    /// Sequences of the run's batches.
    pub batch: usize,
    /// The most sequences that would fit.
    pub fits: Option<usize>,
}

fn remedy(fits: Option<usize>) -> String {
    match fits {
        Some(batch) => format!("a batch_size of {batch} would fit"),
        None => "not even one sequence fits beside the model".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_said_with_what_would() {
        let too_large =
            TooLarge { needed_bytes: 91_240_000_000, free_bytes: 79_000_000_000, batch: 64, fits: Some(48) };
        assert_eq!(
            too_large.to_string(),
            "the run needs about 91.2 GB of the GPU's memory with batches of 64 sequences, and 79.0 GB are free; a batch_size \
             of 48 would fit"
        );
        let hopeless = TooLarge { fits: None, ..too_large };
        assert!(
            hopeless.to_string().ends_with("; not even one sequence fits beside the model"),
            "{hopeless}"
        );
    }
}
