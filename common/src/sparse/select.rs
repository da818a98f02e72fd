//! Exact selection of the largest magnitudes.
//!
//! Sorting, or quickselect over a copy, moves every value several times to learn one number, the k-th magnitude.
//! Here a sample predicts a threshold a little below it, one pass collects what is above, and quickselect looks at
//! these survivors alone. The prediction only decides how long that takes: when fewer than k values survive, the
//! whole tensor goes through quickselect, so the selection is exact for every input. A threshold remembered from
//! the previous call would save the sample, a tenth of the time, but make the time depend on history.

/// Values that are compared with the threshold at a time.
const BLOCK: usize = 32;

/// Neighbouring values taken at each place of the sample: one cache line.
const SAMPLE_LINE: usize = 16;

/// One line in this many is sampled,
const SAMPLE_STRIDE: usize = 64;

/// but not fewer lines than this, for the prediction to be of use,
const SAMPLE_LINES_MIN: usize = 16;

/// and not more than this, 64 K values, which predict the threshold of 1 % to within a few percent.
const SAMPLE_LINES_MAX: usize = 1 << 12;

/// From this length on the sample costs less than it saves.
const SAMPLED_LEN_MIN: usize = 1 << 11;

/// Selects the k largest magnitudes of a tensor, reusing its buffers from call to call.
#[derive(Debug, Default)]
pub struct Selector {
    // The sample first, then what quickselect rearranges.
    scratch: Vec<u32>,
    survivors: Survivors,
}

/// Values above a threshold, in ascending order of index.
#[derive(Debug, Default)]
struct Survivors {
    indices: Vec<u32>,
    keys: Vec<u32>,
}

/// Orders magnitudes as integers: the bits of |v|, below 2³¹. Zero is zero whatever its sign.
fn key(value: f32) -> u32 {
    value.to_bits() & 0x7fff_ffff
}

impl Selector {
    /// The indices of the `k` `values` of largest magnitude, ascending, ties to the lower index. Infinity and NaN
    /// count as larger than every finite value.
    ///
    /// # Panics
    /// If `k` exceeds the number of values, or these exceed what a `u32` can index.
    pub fn top_k(&mut self, values: &[f32], k: usize, out: &mut Vec<u32>) {
        assert!(k <= values.len(), "the {k} largest of {} values", values.len());
        self.top_k_nonzero(values, k, out);
        let missing = k - out.len();
        if missing > 0 {
            // All other values are zero: a tie, which goes to the lower indices.
            let zeros = (0_u32..).zip(values).filter(|&(_, &value)| value == 0.0);
            out.extend(zeros.map(|(index, _)| index).take(missing));
            // The stable sort finds the two ascending runs and merges them.
            out.sort();
        }
    }

    /// As [`Self::top_k`], without the values that are zero.
    pub(super) fn top_k_nonzero(&mut self, values: &[f32], k: usize, out: &mut Vec<u32>) {
        assert!(u32::try_from(values.len()).is_ok(), "{} values cannot be indexed", values.len());
        out.clear();
        if k >= values.len() {
            for_each_above(values, 0, |index, _| out.push(index));
        } else if k > 0 && !self.top_k_of_survivors(values, k, out) {
            self.top_k_of_all(values, k, out);
        }
    }

    /// Returns whether a threshold could be predicted and enough values were above it.
    fn top_k_of_survivors(&mut self, values: &[f32], k: usize, out: &mut Vec<u32>) -> bool {
        let Some(floor) = self.predict_floor(values, k) else { return false };
        let Survivors { indices, keys } = &mut self.survivors;
        indices.clear();
        keys.clear();
        for_each_above(values, floor, |index, key| {
            indices.push(index);
            keys.push(key);
        });
        if keys.len() <= k {
            out.extend_from_slice(indices);
            // Above zero, these are all there are.
            return keys.len() == k || floor == 0;
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(keys);
        let mut largest = Largest::find(&mut self.scratch, k);
        out.extend(
            indices.iter().zip(keys).filter(|&(_, &mut key)| largest.has(key)).map(|(&index, _)| index),
        );
        true
    }

    fn top_k_of_all(&mut self, values: &[f32], k: usize, out: &mut Vec<u32>) {
        out.clear();
        self.scratch.clear();
        self.scratch.extend(values.iter().copied().map(key));
        let mut largest = Largest::find(&mut self.scratch, k);
        for_each_above(values, largest.threshold.saturating_sub(1), |index, key| {
            if largest.has(key) {
                out.push(index);
            }
        });
    }

    /// A key that, most likely, somewhat more than `k` of the values exceed; `None` if that would be most of them,
    /// or if there are too few values to be worth it.
    fn predict_floor(&mut self, values: &[f32], k: usize) -> Option<u32> {
        if values.len() < SAMPLED_LEN_MIN {
            return None;
        }
        let lines = values.as_chunks::<SAMPLE_LINE>().0;
        let sampled_lines = (lines.len() / SAMPLE_STRIDE).clamp(SAMPLE_LINES_MIN, SAMPLE_LINES_MAX);
        let sample_len = sampled_lines * SAMPLE_LINE;
        let expected = k as f64 * sample_len as f64 / values.len() as f64;
        // Four standard deviations of the number of sampled values among the k largest, and some for small samples.
        let rank = (expected + 4.0 * expected.sqrt() + 8.0) as usize;
        if rank > sample_len / 4 {
            return None;
        }
        self.scratch.clear();
        for step in 0..sampled_lines as u64 {
            // Multiples of the golden ratio spread evenly, and unlike a fixed stride stay clear of the period of a
            // matrix's rows.
            let fraction = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let line = (u128::from(fraction) * lines.len() as u128) >> 64;
            self.scratch.extend(lines[line as usize].map(key));
        }
        let (_, predicted, _) = self.scratch.select_nth_unstable_by(rank, |a, b| b.cmp(a));
        Some(predicted.saturating_sub(1))
    }
}

/// Recognises the k largest keys as they go by in order of index.
struct Largest {
    threshold: u32,
    // How many more keys equal to the threshold belong to the k largest.
    ties: usize,
}

impl Largest {
    fn find(keys: &mut [u32], k: usize) -> Self {
        let (larger, &mut threshold, _) = keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
        Self { threshold, ties: k - larger.iter().filter(|&&key| key > threshold).count() }
    }

    fn has(&mut self, key: u32) -> bool {
        let tie = key == self.threshold && self.ties > 0;
        self.ties -= usize::from(tie);
        key > self.threshold || tie
    }
}

/// Calls `visit` with index and key of every value whose key exceeds `floor`, in ascending order of index.
fn for_each_above(values: &[f32], floor: u32, mut visit: impl FnMut(u32, u32)) {
    let mut visit_block = |start: usize, values: &[f32; BLOCK]| {
        // One comparison mask per block: this loop compiles to vector comparisons (keys and floor are below 2³¹, so
        // signed ones, which SSE2 has), and the next one runs only for what is found.
        let mut above = values.iter().enumerate().fold(0_u32, |above, (place, &value)| {
            above | u32::from(key(value) as i32 > floor as i32) << place
        });
        while above != 0 {
            let place = above.trailing_zeros() as usize;
            above &= above - 1;
            visit((start + place) as u32, key(values[place % BLOCK]));
        }
    };
    let (blocks, rest) = values.as_chunks::<BLOCK>();
    for (block, values) in blocks.iter().enumerate() {
        visit_block(block * BLOCK, values);
    }
    // Zeros exceed no floor.
    let mut last = [0.0; BLOCK];
    last[..rest.len()].copy_from_slice(rest);
    visit_block(blocks.len() * BLOCK, &last);
}
