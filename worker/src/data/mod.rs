//! Batches: which windows of the text a batch number stands for, and the windows of an evaluation.

use ndarray::Array2;
use sanderling_common::ids::BatchId;
use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::tokens::Tokens;

/// Input and target tokens, each of shape (sequences, time); the target of a token is the one after it.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// What the model sees.
    pub inputs: Array2<u32>,
    /// What it should predict.
    pub targets: Array2<u32>,
}

impl Batch {
    /// Tokens predicted.
    pub fn tokens(&self) -> usize {
        self.targets.len()
    }

    fn from_windows(text: &Tokens, starts: &[usize], time: usize) -> Self {
        let at = |row: usize, column: usize| text.get(starts[row] + column);
        let shape = (starts.len(), time);
        Self {
            inputs: Array2::from_shape_fn(shape, |(row, column)| at(row, column)),
            targets: Array2::from_shape_fn(shape, |(row, column)| at(row, column + 1)),
        }
    }
}

/// Batch `id` of a run: `sequences` windows of `time` tokens whose starts are uniform over the text.
///
/// A pure function of (seed, id), so that a batch whose worker vanished is the same batch for the next worker.
///
/// # Panics
/// If the text has no window of `time` + 1 tokens.
pub fn training_batch(text: &Tokens, seed: u64, id: BatchId, sequences: usize, time: usize) -> Batch {
    assert!(text.len() > time, "a text of {} tokens has no window of {} tokens", text.len(), time + 1);
    let mut rng = stream(seed, Purpose::Batch, id.0);
    let places = (text.len() - time) as f64;
    let starts: Vec<usize> = (0..sequences).map(|_| (uniform(&mut rng) * places) as usize).collect();
    Batch::from_windows(text, &starts, time)
}

/// The whole of `text` in non-overlapping windows of `time` tokens, `sequences` at a time.
///
/// Every token but the first is predicted exactly once: what is left over at the end comes as one shorter window.
pub fn evaluation_batches(text: &Tokens, sequences: usize, time: usize) -> impl Iterator<Item = Batch> {
    let predicted = text.len().saturating_sub(1);
    let whole: Vec<usize> = (0..predicted / time).map(|window| window * time).collect();
    let rest = predicted % time;
    let batches: Vec<Vec<usize>> = whole.chunks(sequences).map(<[usize]>::to_vec).collect();
    let tail = (rest > 0).then(|| Batch::from_windows(text, &[predicted - rest], rest));
    batches.into_iter().map(move |starts| Batch::from_windows(text, &starts, time)).chain(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Tokens {
        Tokens::collect(0..1003, 1003)
    }

    #[test]
    fn a_batch_is_a_pure_function_of_seed_and_number() {
        let make = |seed, id| training_batch(&text(), seed, BatchId(id), 4, 16);
        assert_eq!(make(1, 5), make(1, 5));
        assert_ne!(make(1, 5), make(1, 6));
        assert_ne!(make(1, 5), make(2, 5));
    }

    #[test]
    fn targets_are_the_next_tokens_and_starts_reach_both_ends() {
        let text = text();
        let (mut lowest, mut highest) = (u32::MAX, 0);
        for id in 0..2000 {
            let batch = training_batch(&text, 3, BatchId(id), 4, 16);
            ndarray::Zip::from(&batch.inputs).and(&batch.targets).for_each(|i, t| assert_eq!(i + 1, *t));
            lowest = lowest.min(*batch.inputs.first().unwrap());
            highest = highest.max(*batch.targets.last().unwrap());
        }
        assert_eq!(lowest, 0);
        assert!(highest >= 1000, "{highest}");
    }

    #[test]
    fn evaluation_predicts_every_token_once() {
        for len in [17, 33, 100, 1003] {
            let text = Tokens::collect(0..len, 1003);
            let mut seen: Vec<u32> =
                evaluation_batches(&text, 3, 16).flat_map(|batch| batch.targets.into_iter()).collect();
            seen.sort_unstable();
            assert_eq!(seen, (1..len).collect::<Vec<_>>());
        }
    }
}
