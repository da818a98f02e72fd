//! A run that a device has not the memory for, as people are told.

/// Bytes in a gigabyte, as memory is told to people.
const GB: f64 = 1e9;

/// Bytes of memory as people are told: megabytes below a gigabyte, and kilobytes where it would be none of these.
pub fn bytes_text(bytes: usize) -> String {
    let bytes = bytes as f64;
    match bytes {
        _ if bytes < 1e5 => format!("{:.1} kB", bytes / 1e3),
        _ if bytes < GB => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} GB", bytes / GB),
    }
}

/// A run needs more memory than a GPU has free.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "{workers} about {needed:.1} GB of the GPU's memory with batches of {batch} sequences, and {free:.1} GB are free; {remedy}",
    workers = who_needs(*.workers), needed = *.needed_bytes as f64 / GB, free = *.free_bytes as f64 / GB,
    remedy = remedy(*.fits, *.workers)
)]
pub struct TooLarge {
    /// What all workers need together.
    pub needed_bytes: usize,
    /// What there is.
    pub free_bytes: usize,
    /// Workers that are to share the GPU.
    pub workers: u32,
    /// Sequences of the run's batches.
    pub batch: usize,
    /// The most sequences that would fit.
    pub fits: Option<usize>,
}

/// How a sentence on what so many workers need begins.
pub(crate) fn who_needs(workers: u32) -> String {
    match workers {
        1 => "the run needs".to_owned(),
        _ => format!("{workers} workers need"),
    }
}

fn remedy(fits: Option<usize>, workers: u32) -> String {
    match (fits, workers) {
        (Some(batch), _) => format!("a batch_size of {batch} would fit"),
        (None, 1) => "not even one sequence fits beside the model".to_owned(),
        (None, _) => "not even one sequence each would fit: take fewer workers".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_memory_is_told_in_megabytes() {
        assert_eq!(bytes_text(2_300_000), "2.3 MB");
        assert_eq!(bytes_text(141_000_000_000), "141.0 GB");
    }

    #[test]
    fn what_does_not_fit_is_said_with_what_would() {
        let (needed_bytes, free_bytes) = (91_240_000_000, 79_000_000_000);
        let too_large = TooLarge { needed_bytes, free_bytes, workers: 1, batch: 64, fits: Some(48) };
        assert_eq!(
            too_large.to_string(),
            "the run needs about 91.2 GB of the GPU's memory with batches of 64 sequences, and 79.0 GB are free; a batch_size \
             of 48 would fit"
        );
        let hopeless = TooLarge { fits: None, ..too_large }.to_string();
        assert!(hopeless.ends_with("; not even one sequence fits beside the model"), "{hopeless}");
        let crowd = TooLarge { fits: None, workers: 9, ..too_large }.to_string();
        assert!(crowd.starts_with("9 workers need about") && crowd.ends_with("fewer workers"), "{crowd}");
    }
}
