//! Routing: softmax, choice of experts, sorting of token slots by expert, and the backward pass.

use std::cmp::Ordering;

use pulp::{Simd, WithSimd};
use sanderling_common::model_config::RouterOrder;

use super::simd::{exp, load, store, vectors};
use crate::kernels::{RouterShape, RouterStatistics};

/// Which token goes to which expert with what weight.
///
/// A *choice* (token, j) is a token's jth expert, best first; a *slot* is the same thing sorted by expert, within
/// an expert by token. Choices that are dropped come after all slots of experts: they have a place there, with the
/// weight that they would have had and no gradient of it, for the sake of the softmax's gradient, and count for nothing
/// else. Buffers are allocated for the most rows and used up to `shape.rows`.
#[derive(Debug)]
pub struct Routing {
    pub(super) shape: RouterShape,
    /// Softmax over all experts (rows, experts).
    probabilities: Vec<f32>,
    /// The expert of each choice (rows, top_k).
    chosen: Vec<u32>,
    /// The slot of each choice (rows, top_k); if it was dropped, a place after all slots.
    slot_of: Vec<u32>,
    /// The token of each slot (rows · top_k).
    token_of: Vec<u32>,
    /// The weight of each slot, and its gradient (rows · top_k).
    pub(super) weights: Vec<f32>,
    pub(super) weight_gradients: Vec<f32>,
    /// Slots of expert e: starts[e]..starts[e + 1].
    starts: Vec<usize>,
    /// Tokens that chose each expert, dropped or not.
    counts: Vec<usize>,
    /// The last token that each overfull expert keeps.
    last_kept: Vec<Option<Candidate>>,
    /// Room for the choices by expert, while `last_kept` is looked for (rows · top_k).
    candidates: Vec<Candidate>,
}

/// A token that chose an expert.
#[derive(Clone, Copy, Debug, Default)]
struct Candidate {
    probability: f32,
    token: u32,
}

impl Candidate {
    /// The order in which an expert keeps them: the larger probability first, ties to the lower token.
    fn order(&self, other: &Self) -> Ordering {
        other.probability.total_cmp(&self.probability).then(self.token.cmp(&other.token))
    }
}

impl Routing {
    pub(super) fn new(shape: RouterShape) -> Self {
        let slots = shape.rows * shape.top_k;
        Self {
            shape,
            probabilities: vec![0.0; shape.rows * shape.experts],
            chosen: vec![0; slots],
            slot_of: vec![0; slots],
            token_of: vec![0; slots],
            weights: vec![0.0; slots],
            weight_gradients: vec![0.0; slots],
            starts: vec![0; shape.experts + 1],
            counts: vec![0; shape.experts],
            last_kept: vec![None; shape.experts],
            candidates: vec![Candidate::default(); slots],
        }
    }

    fn choices(&self) -> usize {
        self.shape.rows * self.shape.top_k
    }

    /// Slots in use: the choices that were not dropped.
    pub(super) fn slots(&self) -> usize {
        self.starts[self.shape.experts]
    }

    /// The slots of one expert.
    pub(super) fn expert(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// Experts with at least one token, and their slots.
    pub(super) fn occupied(&self) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        (0..self.shape.experts).map(|e| (e, self.expert(e))).filter(|(_, slots)| !slots.is_empty())
    }

    pub(super) fn tokens_of_slots(&self) -> &[u32] {
        &self.token_of[..self.slots()]
    }

    pub(super) fn slots_of_choices(&self) -> &[u32] {
        &self.slot_of[..self.choices()]
    }

    fn probabilities(&self) -> &[f32] {
        &self.probabilities[..self.shape.rows * self.shape.experts]
    }

    /// Takes new logits (rows, experts): probabilities, choices, weights and slots.
    pub(super) fn route(&mut self, arch: pulp::Arch, shape: RouterShape, logits: &[f32]) {
        assert!(
            shape.rows * shape.top_k <= self.chosen.len() && shape.experts + 1 == self.starts.len(),
            "routing was allocated for {:?}, not for {shape:?}",
            self.shape
        );
        self.shape = shape;
        let elements = shape.rows * shape.experts;
        let probabilities = &mut self.probabilities[..elements];
        for (p, row) in probabilities.chunks_exact_mut(shape.experts).zip(logits.chunks_exact(shape.experts))
        {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            p.iter_mut().zip(row).for_each(|(p, &logit)| *p = logit - max);
        }
        arch.dispatch(Exponentials(probabilities));
        for row in probabilities.chunks_exact_mut(shape.experts) {
            let scale = 1.0 / row.iter().sum::<f32>();
            row.iter_mut().for_each(|p| *p *= scale);
        }
        self.choose(&logits[..elements]);
        self.limit();
        self.sort();
    }

    /// Picks the top_k logits of each token, best first, ties to the lower index.
    fn choose(&mut self, logits: &[f32]) {
        let RouterShape { experts, top_k, .. } = self.shape;
        self.counts.fill(0);
        for (row, chosen) in logits.chunks_exact(experts).zip(self.chosen.chunks_exact_mut(top_k)) {
            let mut taken = 0;
            for (expert, &logit) in row.iter().enumerate() {
                // Insertion from the back: an equal logit met later stays behind.
                let mut place = taken;
                while place > 0 && logit > row[chosen[place - 1] as usize] {
                    place -= 1;
                }
                if place < top_k {
                    taken = (taken + 1).min(top_k);
                    chosen.copy_within(place..taken - 1, place + 1);
                    chosen[place] = expert as u32;
                }
            }
            chosen.iter().for_each(|&expert| self.counts[expert as usize] += 1);
        }
    }

    /// Finds which choices an expert with more than its capacity keeps.
    fn limit(&mut self) {
        let RouterShape { experts, top_k, capacity, .. } = self.shape;
        self.last_kept.fill(None);
        let Some(capacity) = capacity.filter(|&capacity| self.counts.iter().any(|&count| count > capacity))
        else {
            return;
        };
        let mut end = 0;
        for (start, count) in self.starts.iter_mut().zip(&self.counts) {
            *start = end;
            end += count;
        }
        let rows = self.chosen[..end].chunks_exact(top_k).zip(self.probabilities.chunks_exact(experts));
        for (token, (chosen, p)) in (0..).zip(rows) {
            for &expert in chosen {
                let expert = expert as usize;
                self.candidates[self.starts[expert]] = Candidate { probability: p[expert], token };
                self.starts[expert] += 1;
            }
        }
        // Each start has moved to its expert's end.
        let experts = self.counts.iter().zip(&self.starts).zip(&mut self.last_kept);
        for ((&count, &end), last_kept) in experts.filter(|((count, _), _)| **count > capacity) {
            let candidates = &mut self.candidates[end - count..end];
            *last_kept = Some(*candidates.select_nth_unstable_by(capacity - 1, Candidate::order).1);
        }
    }

    /// Counting sort of the choices by expert, and each slot's weight.
    fn sort(&mut self) {
        let RouterShape { experts, top_k, order, capacity, .. } = self.shape;
        let mut slots = 0;
        for (start, &count) in self.starts.iter_mut().zip(&self.counts) {
            *start = slots;
            slots += capacity.map_or(count, |capacity| count.min(capacity));
        }
        // Where the next dropped choice is put.
        let mut next_dropped = slots;
        let choices = self.choices();
        let choices = self.chosen[..choices].chunks_exact(top_k).zip(self.slot_of.chunks_exact_mut(top_k));
        let rows = choices.zip(self.probabilities.chunks_exact(experts));
        for (token, ((chosen, slot_of), p)) in rows.enumerate() {
            let scale = match order {
                RouterOrder::SoftmaxThenTopk => 1.0,
                // Softmax over the kept logits is the softmax over all, renormalised.
                RouterOrder::TopkThenSoftmax => 1.0 / chosen.iter().map(|&e| p[e as usize]).sum::<f32>(),
            };
            for (&expert, slot_of) in chosen.iter().zip(slot_of) {
                let probability = p[expert as usize];
                let candidate = Candidate { probability, token: token as u32 };
                let dropped = self.last_kept[expert as usize]
                    .is_some_and(|last| candidate.order(&last) == Ordering::Greater);
                let next = if dropped { &mut next_dropped } else { &mut self.starts[expert as usize] };
                let slot = *next;
                *next += 1;
                *slot_of = slot as u32;
                self.token_of[slot] = token as u32;
                self.weights[slot] = probability * scale;
            }
        }
        self.weight_gradients[slots..next_dropped].fill(0.0);
        // Each start has moved to its expert's end, which is the next one's start.
        self.starts.copy_within(0..experts, 1);
        self.starts[0] = 0;
    }

    /// d logits (rows, experts), from the slots' weight gradients and auxiliary · N·Σ f_i·p_i with f constant.
    pub(super) fn backward(&self, auxiliary: f32, dlogits: &mut [f32]) {
        let RouterShape { rows, experts, top_k, order, .. } = self.shape;
        // d(N·Σ f_i·p_i)/d p_i(token) = N·f_i / rows, with f_i = tokens_i / (rows · top_k), dropped ones included.
        let unit = auxiliary * experts as f32 / (rows as f32 * self.choices() as f32);
        let choices = self.chosen.chunks_exact(top_k).zip(self.slots_of_choices().chunks_exact(top_k));
        let rows = self.probabilities().chunks_exact(experts).zip(dlogits.chunks_exact_mut(experts));
        for ((p, dlogits), (chosen, slots)) in rows.zip(choices) {
            let mut mean = 0.0;
            for (expert, dlogit) in dlogits.iter_mut().enumerate() {
                *dlogit = unit * self.counts[expert] as f32;
                mean += *dlogit * p[expert];
            }
            let pairs = || chosen.iter().zip(slots).map(|(&e, &s)| (e as usize, s as usize));
            if order == RouterOrder::SoftmaxThenTopk {
                for (expert, slot) in pairs() {
                    dlogits[expert] += self.weight_gradients[slot];
                    mean += self.weight_gradients[slot] * p[expert];
                }
            }
            // Softmax over all experts: d logit = p·(d p − Σ p·d p).
            dlogits.iter_mut().zip(p).for_each(|(dlogit, &p)| *dlogit = p * (*dlogit - mean));
            if order == RouterOrder::TopkThenSoftmax {
                // Softmax over the chosen ones only.
                let mean: f32 =
                    pairs().map(|(_, slot)| self.weights[slot] * self.weight_gradients[slot]).sum();
                for (expert, slot) in pairs() {
                    dlogits[expert] += self.weights[slot] * (self.weight_gradients[slot] - mean);
                }
            }
        }
    }

    pub(super) fn statistics(&self, statistics: &mut RouterStatistics) {
        let experts = self.shape.experts;
        statistics.expert_tokens.clear();
        statistics.expert_tokens.extend(self.counts.iter().map(|&count| count as u64));
        statistics.dropped = (self.choices() - self.slots()) as u64;
        statistics.probability_sums.clear();
        statistics.probability_sums.resize(experts, 0.0);
        for row in self.probabilities().chunks_exact(experts) {
            statistics.probability_sums.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
    }

    /// Σ over tokens of −Σ p·ln p, in nats.
    pub(super) fn entropy(&self) -> f64 {
        let positive = self.probabilities().iter().map(|&p| f64::from(p)).filter(|&p| p > 0.0);
        -positive.map(|p| p * p.ln()).sum::<f64>()
    }
}

/// x ← eˣ.
struct Exponentials<'a>(&'a mut [f32]);

impl WithSimd for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for i in 0..vectors::<S>(self.0.len()) {
            let value = exp(simd, load(simd, self.0, i));
            store(simd, self.0, i, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routed(capacity: Option<usize>, logits: &[[f32; 3]]) -> Routing {
        let order = RouterOrder::SoftmaxThenTopk;
        let shape = RouterShape { rows: logits.len(), experts: 3, top_k: 2, order, capacity };
        let mut routing = Routing::new(shape);
        routing.route(pulp::Arch::new(), shape, logits.as_flattened());
        routing
    }

    fn tokens(routing: &Routing, expert: usize) -> Vec<u32> {
        routing.tokens_of_slots()[routing.expert(expert)].to_vec()
    }

    #[test]
    fn a_full_expert_keeps_the_likeliest_and_of_equals_the_first() {
        let (strong, weak) = ([2.0, 1.0, 0.0], [1.0, 0.9, 0.8]);
        let logits = [weak, strong, weak, strong, strong];
        let routing = routed(Some(4), &logits);
        assert_eq!([tokens(&routing, 0), tokens(&routing, 1)], [[0, 1, 3, 4], [0, 1, 2, 3]].map(Vec::from));
        let routing = routed(Some(2), &logits);
        assert_eq!(tokens(&routing, 0), [1, 3]);
        // Expert 1 has 0.245 of the strong ones and 0.332 of the weak ones.
        assert_eq!(tokens(&routing, 1), [0, 2]);
        let mut statistics = RouterStatistics::default();
        routing.statistics(&mut statistics);
        assert_eq!((statistics.expert_tokens, statistics.dropped), (vec![5, 5, 0], 6));
    }

    #[test]
    fn every_choice_has_a_place_of_its_own() {
        let logits = [[0.0; 3], [1.0, 0.0, 0.0], [0.0, 0.0, f32::NAN], [0.0, 2.0, 1.0]];
        for capacity in [None, Some(1), Some(2), Some(4)] {
            let routing = routed(capacity, &logits);
            let mut places = routing.slots_of_choices().to_vec();
            places.sort_unstable();
            assert!(places.iter().copied().eq(0..8), "{capacity:?}: {places:?}");
            let most = (0..3).map(|expert| routing.expert(expert).len()).max();
            assert!(most <= capacity.or(Some(4)), "{capacity:?}: {most:?}");
        }
    }
}
