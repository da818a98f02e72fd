//! Loss and perplexity over a whole text, in windows with a stated stride.

use std::ops::ControlFlow;

use ndarray::Array2;
use sanderling_common::tokens::Tokens;
use sanderling_worker::kernels::Kernels;

use super::Scoring;

/// How a text is cut: windows of `length` tokens, `stride` apart. Each token but the first is predicted exactly once, by
/// the first window that reaches it; with a stride below the length it has at least `length` − `stride` tokens before
/// it, except in the first window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that a window shows to the model.
    pub length: usize,
    /// Tokens from one window's beginning to the next one's; at most `length`.
    pub stride: usize,
    /// Windows computed together.
    pub batch: usize,
}

/// What came out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LanguageScore {
    /// Sum of the cross-entropy, nats.
    pub loss_sum: f64,
    /// Tokens predicted.
    pub tokens: u64,
}

impl LanguageScore {
    /// Mean cross-entropy, nats per token.
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.tokens as f64
    }

    /// e to the mean loss.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }
}

/// A window: what it shows and which of its predictions count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    start: usize,
    length: usize,
    /// Predictions of tokens that an earlier window has reached already.
    known: usize,
}

impl Windows {
    /// The windows of a text of so many tokens, those of one shape together.
    fn batches(&self, tokens: usize) -> Vec<Vec<Window>> {
        let predictable = tokens.saturating_sub(1);
        let mut windows = Vec::new();
        let (mut start, mut reached) = (0, 0);
        while reached < predictable {
            let length = self.length.min(predictable - start);
            windows.push(Window { start, length, known: reached - start });
            reached = start + length;
            start += self.stride;
        }
        let mut batches: Vec<Vec<Window>> = Vec::new();
        for window in windows {
            match batches.last_mut() {
                Some(batch) if batch.len() < self.batch && batch[0].length == window.length => {
                    batch.push(window)
                }
                _ => batches.push(vec![window]),
            }
        }
        batches
    }
}

/// The loss of a model over a text. `progress` is told how many of how many batches are done.
///
/// # Errors
/// A [`sanderling_worker::model::ModelError`] such as for a token that the model does not have, or
/// [`super::Stopped`].
///
/// # Panics
/// If length, stride or batch is zero, or the stride larger than the length.
pub fn language_loss<K: Kernels>(
    scoring: &Scoring<'_, K>,
    tokens: &Tokens,
    windows: &Windows,
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> anyhow::Result<LanguageScore>
where
    K::Buffer: Sync,
{
    let Windows { length, stride, batch } = *windows;
    assert!(stride >= 1 && stride <= length && batch >= 1, "windows of {length} tokens, {stride} apart");
    let batches = windows.batches(tokens.len());
    let count = batches.len();
    let scored = scoring.each(
        &batches,
        |model, parameters, batch| {
            let shape = (batch.len(), batch[0].length);
            let inputs = Array2::from_shape_fn(shape, |(row, column)| tokens.get(batch[row].start + column));
            let targets =
                Array2::from_shape_fn(shape, |(row, column)| tokens.get(batch[row].start + column + 1));
            let losses = model.token_losses(parameters, inputs.view(), targets.view())?;
            let counted = losses.outer_iter().zip(batch).flat_map(|(row, window)| {
                row.iter().skip(window.known).map(|&loss| f64::from(loss)).collect::<Vec<_>>()
            });
            let (mut loss_sum, mut tokens) = (0.0, 0);
            counted.for_each(|loss| (loss_sum, tokens) = (loss_sum + loss, tokens + 1));
            Ok(LanguageScore { loss_sum, tokens })
        },
        &mut |done| progress(done, count),
    )?;
    let add = |a: LanguageScore, b: LanguageScore| LanguageScore {
        loss_sum: a.loss_sum + b.loss_sum,
        tokens: a.tokens + b.tokens,
    };
    Ok(scored.into_iter().fold(LanguageScore::default(), add))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_counts_once() {
        for (tokens, length, stride, batch) in [
            (1003, 16, 16, 3),
            (1003, 16, 4, 3),
            (17, 16, 16, 1),
            (5, 16, 8, 2),
            (33, 16, 15, 4),
            (1, 4, 4, 1),
            (0, 4, 2, 1),
        ] {
            let windows = Windows { length, stride, batch };
            let mut reached = 0;
            for batch in windows.batches(tokens) {
                assert!(batch.len() <= windows.batch);
                for window in batch {
                    assert_eq!(window.start + window.known, reached, "{windows:?} over {tokens}");
                    assert!(window.start == 0 || window.known >= length - stride);
                    reached = window.start + window.length;
                }
            }
            assert_eq!(reached, tokens.saturating_sub(1), "{windows:?} over {tokens}");
        }
    }
}
