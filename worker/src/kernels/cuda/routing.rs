//! The routing of tokens to experts, in the device's memory.

use std::sync::Arc;

use super::buffer::Memory;
use super::driver::{Address, Driver};
use super::error::CudaError;
use crate::kernels::RouterShape;

/// Which token goes to which expert with what weight: what `cpu::Routing` is, in device memory.
///
/// S = rows · k choices and as many slots; those of expert e are `starts[e]..starts[e + 1]`.
pub struct Routing {
    pub(super) shape: RouterShape,
    memory: Memory,
    /// Rows that there is room for.
    rows: usize,
}

/// The parts of a routing, in the order in which they lie in memory.
#[derive(Clone, Copy)]
enum Part {
    Probabilities,
    Chosen,
    SlotOf,
    TokenOf,
    Weights,
    WeightGradients,
    Starts,
    Counts,
}

/// Each part starts at a multiple of this, in elements of four bytes.
const ALIGNMENT: usize = 64;

impl Part {
    const ALL: [Self; 8] = [
        Self::Probabilities,
        Self::Chosen,
        Self::SlotOf,
        Self::TokenOf,
        Self::Weights,
        Self::WeightGradients,
        Self::Starts,
        Self::Counts,
    ];

    fn len(self, rows: usize, shape: RouterShape) -> usize {
        let len = match self {
            Self::Probabilities => rows * shape.experts,
            Self::Chosen | Self::SlotOf | Self::TokenOf | Self::Weights | Self::WeightGradients => {
                rows * shape.top_k
            }
            Self::Starts | Self::Counts => shape.experts + 1,
        };
        len.next_multiple_of(ALIGNMENT)
    }
}

impl Routing {
    pub(super) fn new(driver: &Arc<dyn Driver>, shape: RouterShape) -> Result<Self, CudaError> {
        Ok(Self { shape, memory: Memory::new(driver, routing_bytes(shape))?, rows: shape.rows })
    }

    /// What it is used for from now on.
    pub(super) fn resize(&mut self, shape: RouterShape) {
        let before = self.shape;
        assert!(
            shape.rows <= self.rows && (shape.experts, shape.top_k) == (before.experts, before.top_k),
            "{shape:?} in room for {} rows of {before:?}",
            self.rows
        );
        self.shape = shape;
    }

    fn at(&self, part: Part) -> Address {
        let before = Part::ALL.iter().take_while(|&&other| other as usize != part as usize);
        let elements: usize = before.map(|part| part.len(self.rows, self.shape)).sum();
        self.memory.address() + (elements * 4) as u64
    }

    /// The most slots that there can be.
    pub(super) fn slots(&self) -> usize {
        self.shape.rows * self.shape.top_k
    }

    pub(super) fn probabilities(&self) -> Address {
        self.at(Part::Probabilities)
    }
    pub(super) fn chosen(&self) -> Address {
        self.at(Part::Chosen)
    }
    pub(super) fn slot_of(&self) -> Address {
        self.at(Part::SlotOf)
    }
    pub(super) fn token_of(&self) -> Address {
        self.at(Part::TokenOf)
    }
    pub(super) fn weights(&self) -> Address {
        self.at(Part::Weights)
    }
    pub(super) fn weight_gradients(&self) -> Address {
        self.at(Part::WeightGradients)
    }
    pub(super) fn starts(&self) -> Address {
        self.at(Part::Starts)
    }
    pub(super) fn counts(&self) -> Address {
        self.at(Part::Counts)
    }

    /// Where the number of slots in use is.
    pub(super) fn used(&self) -> Address {
        self.starts() + 4 * self.shape.experts as u64
    }
}

/// Memory of a routing, in bytes.
pub(super) fn routing_bytes(shape: RouterShape) -> usize {
    Part::ALL.iter().map(|part| part.len(shape.rows, shape)).sum::<usize>() * 4
}
