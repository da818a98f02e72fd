//! Products over sorted tokens: every expert in one launch.

use std::collections::HashMap;
use std::sync::Arc;

use super::driver::{Address, Argument, Scalar, Tensor, TensorMap};
use super::products::Kind;
use super::scratch::Slot;
use super::{Buffer, Cuda, Routing, Unit, arguments, grid, int, long};
use crate::kernels::ExpertWeights;

/// Rows and columns of a tile of `experts.cu`.
const TILE: usize = 128;
/// Threads of a block there.
const THREADS: usize = 128;

/// The most experts of `experts_hopper.cu`.
const HOPPER_EXPERTS_MAX: usize = 256;
/// What it needs sizes to be multiples of, in elements, and addresses, in bytes.
const HOPPER_ELEMENTS: usize = 8;
const HOPPER_BYTES: u64 = 16;
/// Threads of a block there, and its shared memory in bytes.
const HOPPER_THREADS: usize = 384;
const HOPPER_SHARED_BYTES: usize = 199_936;
/// Elements of a box that the copy engine fetches, in each direction.
const HOPPER_BOX: u32 = 64;
/// Rows and columns of its tiles.
const HOPPER_TILE: (usize, usize) = (128, 256);

/// Bits of the kernels' argument `flags`.
const OUTPUT_FLOAT: i32 = 1;
const OUTPUT_ADD: i32 = 2;

/// Tensor maps that were made, by what they describe.
pub(super) type Tensors = HashMap<Tensor, Option<Arc<TensorMap>>>;

/// Tensor maps kept; when there are more, all are forgotten: buffers that are gone leave theirs behind.
const TENSORS_MAX: usize = 4096;

/// The sizes of a product with one matrix per expert.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) experts: usize,
    /// The most slots that there can be.
    pub(super) slots: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// From one expert's matrix to the next one's, in elements.
    pub(super) stride: usize,
}

impl Cuda {
    pub(super) fn expert_forward(
        &mut self,
        params: &Buffer,
        weights: ExpertWeights,
        routing: &Routing,
        x: &Buffer,
        y: &mut Buffer,
    ) {
        let shape = Shape::new(weights, routing);
        let x = self.factor(x, 0..shape.slots * shape.inputs, Slot::Left);
        let w = self.factor(params, all(weights, shape.experts), Slot::Right);
        let (result, to) = (y.scalar(), y.at_mut(0..shape.slots * shape.outputs));
        self.grouped(Kind::Forward, shape, routing.starts(), (x, w), to, result);
    }

    pub(super) fn expert_input_gradient(
        &mut self,
        params: &Buffer,
        weights: ExpertWeights,
        routing: &Routing,
        dy: &Buffer,
        dx: &mut Buffer,
    ) {
        let shape = Shape::new(weights, routing);
        let dy = self.factor(dy, 0..shape.slots * shape.outputs, Slot::Left);
        let w = self.factor(params, all(weights, shape.experts), Slot::Right);
        let (result, to) = (dx.scalar(), dx.at_mut(0..shape.slots * shape.inputs));
        self.grouped(Kind::InputGradient, shape, routing.starts(), (dy, w), to, result);
    }

    pub(super) fn expert_weight_gradient(
        &mut self,
        grad: &mut Buffer,
        weights: ExpertWeights,
        routing: &Routing,
        dy: &Buffer,
        x: &Buffer,
    ) {
        let shape = Shape::new(weights, routing);
        let dy = self.factor(dy, 0..shape.slots * shape.outputs, Slot::Left);
        let x = self.factor(x, 0..shape.slots * shape.inputs, Slot::Right);
        assert!(grad.scalar() == Scalar::Float, "gradients are floats, not {grad:?}");
        let to = grad.at_mut(all(weights, shape.experts));
        self.grouped(Kind::WeightGradient, shape, routing.starts(), (dy, x), to, Scalar::Float);
    }

    /// By the copy engine and wgmma where the device and the sizes allow, else by tiles of mma.sync.
    fn grouped(
        &mut self,
        kind: Kind,
        shape: Shape,
        starts: Address,
        factors: (Address, Address),
        to: Address,
        result: Scalar,
    ) {
        if !self.hopper(kind, shape, starts, factors, to, result) {
            self.expert_tiles(kind, shape, starts, factors, to, result, false);
        }
    }

    /// `experts.cu`. `factors` are x or dy, and the weights or x.
    #[expect(clippy::too_many_arguments, reason = "they are the kernels' own")]
    pub(super) fn expert_tiles(
        &mut self,
        kind: Kind,
        shape: Shape,
        starts: Address,
        (left, right): (Address, Address),
        to: Address,
        result: Scalar,
        add: bool,
    ) {
        let Shape { experts, slots, outputs, inputs, stride } = shape;
        let row_tiles = slots / TILE + experts;
        let tiles = |width: usize| width.div_ceil(TILE);
        let flags = flags(result, add);
        let shared = match self.activation() {
            Scalar::Bf16 => 65_536,
            Scalar::Float => 61_440,
        };
        let (experts_int, outputs_int, inputs_int) = (int(experts), int(outputs), int(inputs));
        let (name, blocks) = match kind {
            Kind::Forward => ("expert_product", row_tiles * tiles(outputs)),
            Kind::InputGradient => ("expert_product_input_gradient", row_tiles * tiles(inputs)),
            Kind::WeightGradient => {
                ("expert_product_weight_gradient", experts * tiles(outputs) * tiles(inputs))
            }
        };
        let (stride, row_tiles) = (long(stride), int(row_tiles));
        let arguments: &[Argument] = match kind {
            Kind::Forward | Kind::InputGradient => {
                arguments![
                    left,
                    right,
                    stride,
                    starts,
                    experts_int,
                    row_tiles,
                    inputs_int,
                    outputs_int,
                    to,
                    flags
                ]
            }
            Kind::WeightGradient => {
                arguments![left, right, stride, starts, experts_int, inputs_int, outputs_int, to, flags]
            }
        };
        self.launch(Unit::Experts, name, grid([blocks, 1, 1], [THREADS, 1, 1], shared), arguments);
    }

    /// `experts_hopper.cu`; false if it is not for this device or these sizes.
    fn hopper(
        &mut self,
        kind: Kind,
        shape: Shape,
        starts: Address,
        (left, right): (Address, Address),
        to: Address,
        result: Scalar,
    ) -> bool {
        let Shape { experts, slots, outputs, inputs, stride } = shape;
        let fits = self.activation() == Scalar::Bf16
            && self.target().hopper_experts
            && experts <= HOPPER_EXPERTS_MAX
            && [outputs, inputs, stride].iter().all(|size| size.is_multiple_of(HOPPER_ELEMENTS))
            && [left, right, to].iter().all(|address| address.is_multiple_of(HOPPER_BYTES));
        if !fits || self.failure.is_some() {
            return false;
        }
        let (left_width, right_tensor) = match kind {
            Kind::Forward => (inputs, matrices(right, inputs, outputs, experts, stride)),
            Kind::InputGradient => (outputs, matrices(right, inputs, outputs, experts, stride)),
            Kind::WeightGradient => (outputs, rows(right, inputs, slots)),
        };
        let Some(left) = self.tensor(rows(left, left_width, slots)) else { return self.failure.is_some() };
        let Some(right) = self.tensor(right_tensor) else { return self.failure.is_some() };
        let tiles = match kind {
            Kind::Forward => (slots.div_ceil(HOPPER_TILE.0) + experts) * outputs.div_ceil(HOPPER_TILE.1),
            Kind::InputGradient => (slots.div_ceil(HOPPER_TILE.0) + experts) * inputs.div_ceil(HOPPER_TILE.1),
            Kind::WeightGradient => {
                experts * outputs.div_ceil(HOPPER_TILE.0) * inputs.div_ceil(HOPPER_TILE.1)
            }
        };
        let blocks = tiles.min(self.properties().multiprocessors as usize);
        let launch = grid([blocks, 1, 1], [HOPPER_THREADS, 1, 1], HOPPER_SHARED_BYTES);
        let (experts, outputs, inputs) = (int(experts), int(outputs), int(inputs));
        let flags = flags(result, false);
        match kind {
            Kind::Forward => self.launch(
                Unit::Hopper,
                "expert_product_hopper",
                launch,
                arguments![left, right, starts, experts, inputs, outputs, to, flags],
            ),
            Kind::InputGradient => self.launch(
                Unit::Hopper,
                "expert_product_input_gradient_hopper",
                launch,
                arguments![left, right, starts, experts, inputs, outputs, to, flags],
            ),
            Kind::WeightGradient => self.launch(
                Unit::Hopper,
                "expert_product_weight_gradient_hopper",
                launch,
                arguments![left, right, starts, experts, inputs, outputs, long(stride), to],
            ),
        }
        true
    }

    fn tensor(&mut self, tensor: Tensor) -> Option<Arc<TensorMap>> {
        if let Some(map) = self.experts.get(&tensor) {
            return map.clone();
        }
        let made = self.driver.tensor_map(&tensor);
        let map = self.attempt(made)?.map(Arc::new);
        if self.experts.len() >= TENSORS_MAX {
            self.experts.clear();
        }
        self.experts.insert(tensor, map.clone());
        map
    }
}

impl Shape {
    fn new(weights: ExpertWeights, routing: &Routing) -> Self {
        let experts = routing.shape.experts;
        // A single expert has no next one; the copy engine still wants a distance.
        let size = weights.first.outputs * weights.first.inputs;
        let stride = if experts == 1 { size } else { weights.stride };
        let slots = routing.shape.rows * routing.shape.top_k;
        Self { experts, slots, outputs: weights.first.outputs, inputs: weights.first.inputs, stride }
    }
}

fn flags(result: Scalar, add: bool) -> i32 {
    (if result == Scalar::Float { OUTPUT_FLOAT } else { 0 }) | (if add { OUTPUT_ADD } else { 0 })
}

/// From the first expert's matrix to the end of the last one's.
fn all(weights: ExpertWeights, experts: usize) -> std::ops::Range<usize> {
    weights.first.offset..weights.expert(experts - 1).range().end
}

/// Activations (slots, width).
fn rows(address: Address, width: usize, slots: usize) -> Tensor {
    let sizes = vec![width as u64, slots as u64];
    Tensor { address, sizes, strides: vec![2 * width as u64], tile: vec![HOPPER_BOX; 2] }
}

/// Weights (experts, outputs, inputs).
fn matrices(address: Address, inputs: usize, outputs: usize, experts: usize, stride: usize) -> Tensor {
    let sizes = vec![inputs as u64, outputs as u64, experts as u64];
    let strides = vec![2 * inputs as u64, 2 * stride as u64];
    Tensor { address, sizes, strides, tile: vec![HOPPER_BOX, HOPPER_BOX, 1] }
}
