//! Dense products: cuBLASLt's, and the experts' kernels with a single expert where it has none.

use std::collections::HashMap;
use std::ops::Range;

use super::buffer::Memory;
use super::driver::{Address, Factor, Operation, Product, Scalar};
use super::scratch::Slot;
use super::{Buffer, Cuda, CudaError, Precision, Tokens, Unit, arguments, experts, flat, int, long};
use crate::kernels::{Head, HeadGradient, Weights, Write};

/// Which of the three products of y = x·Wᵀ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Forward,
    InputGradient,
    WeightGradient,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Forward => "product",
            Self::InputGradient => "product_input_gradient",
            Self::WeightGradient => "product_weight_gradient",
        }
    }
}

/// The slots of a single expert that gets all rows, by their number: 0 and that number.
pub(super) type Bounds = HashMap<usize, Memory>;

/// Numbers of rows for which they are kept; when there are more, all are forgotten.
const BOUNDS_MAX: usize = 64;

impl Cuda {
    /// Where the slots of a single expert are that gets so many rows.
    fn all_rows(&mut self, rows: usize) -> Result<Address, CudaError> {
        if let Some(bounds) = self.bounds.get(&rows) {
            return Ok(bounds.address());
        }
        if self.bounds.len() == BOUNDS_MAX {
            // What is queued may use them.
            self.driver().wait()?;
            self.bounds.clear();
        }
        let bounds = [0, int(rows)].map(i32::to_ne_bytes);
        let memory = Memory::new(&self.driver, size_of_val(&bounds))?;
        let address = memory.address();
        self.driver().upload(bounds.as_flattened(), address)?;
        self.bounds.insert(rows, memory);
        Ok(address)
    }

    /// Where some elements lie in the type that products multiply: as they are, in the buffer's twin, or converted.
    pub(super) fn factor(&mut self, buffer: &Buffer, range: Range<usize>, slot: Slot) -> Address {
        let scalar = self.activation();
        if buffer.scalar() == scalar {
            return buffer.at(range);
        }
        if let Some(address) = buffer.twin_at(range.clone(), scalar) {
            if !buffer.is_twin_fresh(range.end) {
                let all = 0..buffer.len();
                let to = buffer.twin_at(all.clone(), scalar).expect("it was asked for a part of it");
                self.convert_to_activations(buffer.at(all), to, buffer.len());
                // Other handles may read it as soon as it counts as fresh: it must not be written down only.
                self.settle();
                self.refresh_twin(buffer, buffer.len());
            }
            return address;
        }
        assert!(buffer.scalar() == Scalar::Float, "{buffer:?} cannot be multiplied");
        let to = self.scratch(slot, range.len() * scalar.bytes());
        self.convert_to_activations(buffer.at(range.clone()), to, range.len());
        to
    }

    fn convert_to_activations(&mut self, from: Address, to: Address, len: usize) {
        let launch = flat(len.div_ceil(4096), 256);
        self.launch(Unit::Pointwise, "convert_to_act", launch, arguments![from, to, long(len)]);
    }

    /// y = x·Wᵀ of some rows of x; those of y start at its beginning.
    pub(super) fn dense_forward(
        &mut self,
        params: &Buffer,
        weights: Weights,
        rows: Range<usize>,
        x: &Buffer,
        y: &mut Buffer,
        write: Write,
    ) {
        let Weights { outputs, inputs, .. } = weights;
        let x = self.factor(x, rows.start * inputs..rows.end * inputs, Slot::Left);
        let rows = rows.len();
        let w = self.factor(params, weights.range(), Slot::Right);
        let result = y.scalar();
        let product = Product {
            sizes: (outputs, rows, inputs),
            a: Factor { address: w, leading: inputs, transposed: true },
            b: Factor { address: x, leading: inputs, transposed: false },
            d: y.at_mut(0..rows * outputs),
            result,
            add: write == Write::Add,
            ..self.blank()
        };
        self.dense(Kind::Forward, (rows, outputs, inputs), (x, w), &product);
    }

    /// dx = dy·W for some rows of dx; those of dy start at its beginning.
    pub(super) fn dense_input_gradient(
        &mut self,
        params: &Buffer,
        weights: Weights,
        rows: Range<usize>,
        dy: &Buffer,
        dx: &mut Buffer,
        write: Write,
    ) {
        let Weights { outputs, inputs, .. } = weights;
        let to = rows.start * inputs..rows.end * inputs;
        let rows = rows.len();
        let dy = self.factor(dy, 0..rows * outputs, Slot::Left);
        let w = self.factor(params, weights.range(), Slot::Right);
        let result = dx.scalar();
        let product = Product {
            sizes: (inputs, rows, outputs),
            a: Factor { address: w, leading: inputs, transposed: false },
            b: Factor { address: dy, leading: outputs, transposed: false },
            d: dx.at_mut(to),
            result,
            add: write == Write::Add,
            ..self.blank()
        };
        self.dense(Kind::InputGradient, (rows, outputs, inputs), (dy, w), &product);
    }

    /// dW = dyᵀ·x over some rows of x; those of dy start at its beginning.
    pub(super) fn dense_weight_gradient(
        &mut self,
        grad: &mut Buffer,
        weights: Weights,
        rows: Range<usize>,
        dy: &Buffer,
        x: &Buffer,
        write: Write,
    ) {
        let Weights { outputs, inputs, .. } = weights;
        let x = self.factor(x, rows.start * inputs..rows.end * inputs, Slot::Right);
        let rows = rows.len();
        let dy = self.factor(dy, 0..rows * outputs, Slot::Left);
        assert!(grad.scalar() == Scalar::Float, "gradients are floats, not {grad:?}");
        let product = Product {
            sizes: (inputs, outputs, rows),
            a: Factor { address: x, leading: inputs, transposed: false },
            b: Factor { address: dy, leading: outputs, transposed: true },
            d: grad.at_mut(weights.range()),
            result: Scalar::Float,
            add: write == Write::Add,
            ..self.blank()
        };
        self.dense(Kind::WeightGradient, (rows, outputs, inputs), (dy, x), &product);
    }

    /// The last product and the loss, with their gradient, block by block.
    pub(super) fn head(
        &mut self,
        params: &Buffer,
        head: Head,
        (x, targets): (&Buffer, &Tokens),
        logits: &mut Buffer,
        losses: &mut Buffer,
        mut gradient: Option<HeadGradient<'_, Buffer>>,
    ) {
        let weights = head.weights;
        for rows in head.blocks() {
            self.dense_forward(params, weights, rows.clone(), x, logits, Write::Replace);
            let scale = gradient.as_ref().map(|gradient| gradient.scale);
            self.loss((rows.clone(), weights.outputs), targets, scale, logits, losses);
            if let Some(HeadGradient { grad, dx, .. }) = &mut gradient {
                let write = if rows.start == 0 { Write::Replace } else { Write::Add };
                self.dense_weight_gradient(grad, weights, rows.clone(), logits, x, write);
                self.dense_input_gradient(params, weights, rows, logits, dx, Write::Replace);
            }
        }
    }

    /// What all products have in common.
    fn blank(&self) -> Product {
        let nothing = Factor { address: 0, leading: 0, transposed: false };
        let tf32 = self.precision == Precision::Tf32;
        let factors = self.activation();
        Product { sizes: (0, 0, 0), factors, a: nothing, b: nothing, d: 0, result: factors, add: false, tf32 }
    }

    fn dense(
        &mut self,
        kind: Kind,
        (rows, outputs, inputs): (usize, usize, usize),
        factors: (Address, Address),
        product: &Product,
    ) {
        if self.failure.is_some() || rows == 0 {
            return;
        }
        let has = self.driver.has_product(product);
        match self.attempt(has) {
            None => return,
            Some(true) => return self.operate(kind.name(), Operation::Product(*product)),
            Some(false) => (),
        }
        let starts = self.all_rows(rows);
        let Some(starts) = self.attempt(starts) else { return };
        let shape = experts::Shape { experts: 1, slots: rows, outputs, inputs, stride: 0 };
        self.expert_tiles(kind, shape, starts, factors, product.d, product.result, product.add);
    }
}
