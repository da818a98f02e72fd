//! Operations that are written down, to be queued later, or again and again.

use std::ops::Range;

use super::{Address, Argument, Driver, Kernel, Launch, Product};
use crate::kernels::cuda::error::CudaError;

/// Something that a device does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation<'a> {
    /// A kernel.
    Launch {
        /// Which.
        kernel: Kernel,
        /// By how many threads.
        launch: Launch,
        /// On what.
        arguments: &'a [Argument],
    },
    /// A dense product, one that the driver has.
    Product(Product),
    /// Bytes set to zero.
    Zero {
        /// From where on.
        address: Address,
        /// How many.
        bytes: usize,
    },
}

impl Operation<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// If the driver refuses it.
    pub fn queue(self, driver: &dyn Driver) -> Result<(), CudaError> {
        match self {
            Self::Launch { kernel, launch, arguments } => driver.launch(kernel, launch, arguments),
            Self::Product(product) => driver.product(&product),
            Self::Zero { address, bytes } => driver.zero(address, bytes),
        }
    }
}

/// Operations in the order in which they were asked for. Two are equal if they would do the same at the same places.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tape {
    entries: Vec<Entry>,
    /// The arguments of all launches, one after the other.
    arguments: Vec<Argument>,
}

#[derive(Clone, Debug, PartialEq)]
enum Entry {
    Launch { kernel: Kernel, launch: Launch, arguments: Range<usize> },
    Product(Product),
    Zero { address: Address, bytes: usize },
}

impl Tape {
    /// Writes an operation down.
    pub fn push(&mut self, operation: Operation<'_>) {
        self.entries.push(match operation {
            Operation::Launch { kernel, launch, arguments } => {
                let first = self.arguments.len();
                self.arguments.extend_from_slice(arguments);
                Entry::Launch { kernel, launch, arguments: first..self.arguments.len() }
            }
            Operation::Product(product) => Entry::Product(product),
            Operation::Zero { address, bytes } => Entry::Zero { address, bytes },
        });
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Forgets them all, and keeps the room that they took.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.arguments.clear();
    }

    /// All of them, the first one first.
    pub fn operations(&self) -> impl Iterator<Item = Operation<'_>> {
        self.entries.iter().map(|entry| match entry {
            Entry::Launch { kernel, launch, arguments } => Operation::Launch {
                kernel: *kernel,
                launch: *launch,
                arguments: &self.arguments[arguments.clone()],
            },
            Entry::Product(product) => Operation::Product(*product),
            &Entry::Zero { address, bytes } => Operation::Zero { address, bytes },
        })
    }
}
