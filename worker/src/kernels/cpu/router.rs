//! Routing: softmax, choice of experts, sorting of token slots by expert, and the backward pass.

use pulp::{Simd, WithSimd};
use sanderling_common::model_config::RouterOrder;

use super::simd::{exp, load, store, vectors};
use crate::kernels::{RouterShape, RouterStatistics};

/// Which token goes to which expert with what weight.
///
/// A *choice* (token, j) is a token's jth expert, best first; a *slot* is the same thing sorted by expert, within
/// an expert by token. Buffers are allocated for the most rows and used up to `shape.rows`.
#[derive(Debug)]
pub struct Routing {
    pub(super) shape: RouterShape,
    /// Softmax over all experts (rows, experts).
    probabilities: Vec<f32>,
    /// The expert of each choice (rows, top_k).
    chosen: Vec<u32>,
    /// The slot of each choice (rows, top_k).
    slot_of: Vec<u32>,
    /// The token of each slot (rows · top_k).
    token_of: Vec<u32>,
    /// The weight of each slot, and its gradient (rows · top_k).
    pub(super) weights: Vec<f32>,
    pub(super) weight_gradients: Vec<f32>,
    /// Slots of expert e: starts[e]..starts[e + 1].
    starts: Vec<usize>,
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
        }
    }

    /// Token slots in use.
    pub(super) fn slots(&self) -> usize {
        self.shape.rows * self.shape.top_k
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
        &self.slot_of[..self.slots()]
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
        self.sort();
    }

    /// Picks the top_k logits of each token, best first, ties to the lower index.
    fn choose(&mut self, logits: &[f32]) {
        let RouterShape { experts, top_k, .. } = self.shape;
        self.starts.fill(0);
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
            chosen.iter().for_each(|&expert| self.starts[expert as usize + 1] += 1);
        }
    }

    /// Counting sort of the choices by expert, and each slot's weight.
    fn sort(&mut self) {
        let RouterShape { experts, top_k, order, .. } = self.shape;
        for expert in 0..experts {
            self.starts[expert + 1] += self.starts[expert];
        }
        let slots = self.slots();
        let choices = self.chosen[..slots].chunks_exact(top_k).zip(self.slot_of.chunks_exact_mut(top_k));
        let rows = choices.zip(self.probabilities.chunks_exact(experts));
        for (token, ((chosen, slot_of), p)) in rows.enumerate() {
            let scale = match order {
                RouterOrder::SoftmaxThenTopk => 1.0,
                // Softmax over the kept logits is the softmax over all, renormalised.
                RouterOrder::TopkThenSoftmax => 1.0 / chosen.iter().map(|&e| p[e as usize]).sum::<f32>(),
            };
            for (&expert, slot_of) in chosen.iter().zip(slot_of) {
                let slot = self.starts[expert as usize];
                self.starts[expert as usize] += 1;
                *slot_of = slot as u32;
                self.token_of[slot] = token as u32;
                self.weights[slot] = p[expert as usize] * scale;
            }
        }
        // Each start has moved to its expert's end, which is the next one's start.
        self.starts.copy_within(0..experts, 1);
        self.starts[0] = 0;
    }

    /// d logits (rows, experts), from the slots' weight gradients and auxiliary · N·Σ f_i·p_i with f constant.
    pub(super) fn backward(&self, auxiliary: f32, dlogits: &mut [f32]) {
        let RouterShape { rows, experts, top_k, order } = self.shape;
        // d(N·Σ f_i·p_i)/d p_i(token) = N·f_i / rows, with f_i = tokens_i / (rows · top_k).
        let unit = auxiliary * experts as f32 / (rows as f32 * self.slots() as f32);
        let choices = self.chosen.chunks_exact(top_k).zip(self.slots_of_choices().chunks_exact(top_k));
        let rows = self.probabilities().chunks_exact(experts).zip(dlogits.chunks_exact_mut(experts));
        for ((p, dlogits), (chosen, slots)) in rows.zip(choices) {
            let mut mean = 0.0;
            for (expert, dlogit) in dlogits.iter_mut().enumerate() {
                *dlogit = unit * self.expert(expert).len() as f32;
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
        statistics.expert_tokens.extend((0..experts).map(|expert| self.expert(expert).len() as u64));
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
