//! Launches of routing: the choice of experts, its gradient and statistics, and the ways to slots and back.

use sanderling_common::model_config::RouterOrder;

use super::attention::{floats_at, floats_at_mut};
use super::driver::Scalar;
use super::scratch::Slot;
use super::{Buffer, Cuda, CudaError, Routing, Unit, arguments, flat, int};
use crate::kernels::{RouterShape, RouterStatistics};

/// Tokens of a block that chooses.
pub(super) const ROUTE_TOKENS: usize = 128;

/// The most experts that the kernels have room for.
pub(super) const EXPERTS_MAX: usize = 256;

/// Elements of probabilities whose entropy a block sums before there is another one.
const ENTROPY: usize = 1024;

/// Blocks that sum the router's probabilities, each over some of the tokens.
fn statistics_parts(rows: usize) -> usize {
    rows.div_ceil(64).min(256)
}

/// Sums of probabilities, tokens of experts, and slots in use.
fn statistics_results(experts: usize) -> usize {
    2 * experts + 1
}

/// What the router's statistics take while they are summed.
pub(super) fn statistics_bytes(rows: usize, experts: usize) -> usize {
    (statistics_parts(rows) * experts + statistics_results(experts)) * size_of::<f64>()
}

impl Cuda {
    pub(super) fn choose(&mut self, shape: RouterShape, logits: &Buffer, routing: &mut Routing) {
        let RouterShape { rows, experts, top_k, capacity, .. } = shape;
        assert!(experts <= EXPERTS_MAX && top_k <= experts, "no kernel for {shape:?}");
        routing.resize(shape);
        let (blocks, choices) = (rows.div_ceil(ROUTE_TOKENS), rows * top_k);
        // A limit that nothing can reach is none.
        let capacity = capacity.filter(|&capacity| capacity < rows);
        let sorting = if capacity.is_some() { 2 * choices } else { 0 };
        let block_counts = self.scratch(Slot::Integers, (experts * blocks + sorting) * 4);
        let candidates = block_counts + (4 * experts * blocks) as u64;
        let keys = candidates + (4 * choices) as u64;
        let (probabilities, chosen, counts) = (routing.probabilities(), routing.chosen(), routing.counts());
        let (starts, slot_of, token_of) = (routing.starts(), routing.slot_of(), routing.token_of());
        let weights = routing.weights();
        let (rows_int, experts_int, top_k_int) = (int(rows), int(experts), int(top_k));
        let logits = floats_at(logits, 0..rows * experts);
        let arguments =
            arguments![logits, probabilities, chosen, block_counts, rows_int, experts_int, top_k_int];
        self.launch(Unit::Router, "route_choose", flat(blocks, 256), arguments);
        let arguments = arguments![block_counts, counts, int(blocks)];
        self.launch(Unit::Router, "route_scan", flat(experts, 256), arguments);
        let first = softmax_first(shape);
        let Some(capacity) = capacity else {
            let arguments = arguments![
                probabilities,
                chosen,
                block_counts,
                counts,
                starts,
                slot_of,
                token_of,
                weights,
                rows_int,
                experts_int,
                top_k_int,
                first
            ];
            self.launch(Unit::Router, "route_slots", flat(blocks, 256), arguments);
            return;
        };
        let arguments = arguments![
            probabilities,
            chosen,
            block_counts,
            counts,
            candidates,
            keys,
            rows_int,
            experts_int,
            top_k_int
        ];
        self.launch(Unit::Router, "route_candidates", flat(blocks, 256), arguments);
        let arguments = arguments![
            probabilities,
            chosen,
            counts,
            candidates,
            keys,
            starts,
            slot_of,
            token_of,
            weights,
            experts_int,
            top_k_int,
            first,
            int(capacity)
        ];
        self.launch(Unit::Router, "route_limit", flat(experts, 1024), arguments);
    }

    pub(super) fn choose_backward(&mut self, auxiliary: f32, routing: &Routing, dlogits: &mut Buffer) {
        let RouterShape { rows, experts, top_k, .. } = routing.shape;
        let unit = auxiliary * experts as f32 / (rows as f32 * (rows * top_k) as f32);
        let lanes = experts.next_power_of_two().min(32);
        let arguments = arguments![
            routing.probabilities(),
            routing.chosen(),
            routing.slot_of(),
            routing.weights(),
            routing.weight_gradients(),
            routing.counts(),
            routing.starts(),
            floats_at_mut(dlogits, rows * experts),
            int(rows),
            int(experts),
            int(top_k),
            softmax_first(routing.shape),
            unit
        ];
        self.launch(Unit::Router, "router_backward", flat(rows.div_ceil(256 / lanes), 256), arguments);
    }

    pub(super) fn routed(
        &mut self,
        routing: &Routing,
        statistics: &mut RouterStatistics,
    ) -> Result<(), CudaError> {
        let RouterShape { rows, experts, top_k, .. } = routing.shape;
        let (parts, results) = (statistics_parts(rows), statistics_results(experts));
        let partials = self.scratch(Slot::Partials, statistics_bytes(rows, experts));
        let out = partials + (parts * experts * size_of::<f64>()) as u64;
        let arguments = arguments![routing.probabilities(), partials, int(rows), int(experts)];
        self.launch(Unit::Router, "router_sums_parts", flat(parts, 256), arguments);
        let arguments =
            arguments![partials, int(parts), routing.counts(), routing.starts(), int(experts), out];
        self.launch(Unit::Router, "router_statistics", flat(1, 256), arguments);
        let mut bytes = vec![0; results * size_of::<f64>()];
        self.fetch(out, &mut bytes)?;
        let values: Vec<f64> =
            bytes.as_chunks::<8>().0.iter().map(|&bytes| f64::from_ne_bytes(bytes)).collect();
        let counts = values[experts..2 * experts].iter().map(|&count| count as u64);
        statistics.expert_tokens.clear();
        statistics.expert_tokens.extend(counts);
        statistics.probability_sums.clear();
        statistics.probability_sums.extend_from_slice(&values[..experts]);
        statistics.dropped = (rows * top_k) as u64 - values[2 * experts] as u64;
        Ok(())
    }

    pub(super) fn entropy(&mut self, routing: &Routing) -> Result<f64, CudaError> {
        let len = routing.shape.rows * routing.shape.experts;
        self.total((Unit::Router, "router_entropy_parts"), (routing.probabilities(), len), ENTROPY)
    }

    pub(super) fn sort_rows(&mut self, routing: &Routing, width: usize, x: &Buffer, sorted: &mut Buffer) {
        let RouterShape { rows, top_k, .. } = routing.shape;
        let name = if x.scalar() == Scalar::Float { "permute_float" } else { "permute_act" };
        let x = x.at(0..rows * width);
        let sorted = self.activations_at_mut(sorted, routing.slots() * width);
        let arguments = arguments![x, routing.slot_of(), routing.used(), sorted, int(width), int(top_k)];
        self.launch(Unit::Router, name, flat(rows, slot_threads(width)), arguments);
    }

    pub(super) fn sum_slots(&mut self, routing: &Routing, width: usize, sorted: &Buffer, out: &mut Buffer) {
        let RouterShape { rows, top_k, .. } = routing.shape;
        let name = if out.scalar() == Scalar::Float { "unpermute_float" } else { "unpermute_act" };
        let sorted = self.activations_at(sorted, routing.slots() * width);
        let out = out.at_mut(0..rows * width);
        let arguments = arguments![sorted, routing.slot_of(), routing.used(), out, int(width), int(top_k)];
        self.launch(Unit::Router, name, flat(rows, slot_threads(width)), arguments);
    }
}

fn softmax_first(shape: RouterShape) -> i32 {
    i32::from(shape.order == RouterOrder::SoftmaxThenTopk)
}

/// Threads of a row's block.
fn slot_threads(width: usize) -> usize {
    (32 * width.div_ceil(512)).min(256)
}
