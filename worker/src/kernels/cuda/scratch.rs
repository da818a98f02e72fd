//! Memory that an operation needs only while it runs, grown when it is first needed and kept.

use super::buffer::Memory;
use super::driver::Address;
use super::{Cuda, CudaError};

/// What a piece of scratch memory is for. Those that one operation needs at once are different ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// A factor of a product, converted.
    Left,
    /// The other factor.
    Right,
    /// Partial sums.
    Partials,
    /// Tables of integers.
    Integers,
}

const SLOTS: usize = 4;

/// One piece of memory for each [`Slot`]. What is queued is done in order, so that one operation's scratch can be the
/// next one's too.
#[derive(Default)]
pub(super) struct Scratch {
    slots: [Option<Memory>; SLOTS],
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of scratch", self.bytes())
    }
}

impl Scratch {
    /// Bytes in all.
    pub(super) fn bytes(&self) -> usize {
        self.slots.iter().flatten().map(Memory::bytes).sum()
    }
}

impl Cuda {
    /// Scratch memory of at least that size; 0 after a failure.
    pub(super) fn scratch(&mut self, slot: Slot, bytes: usize) -> Address {
        if self.failure.is_some() {
            return 0;
        }
        let place = slot as usize;
        if let Some(memory) = &self.scratch.slots[place]
            && memory.bytes() >= bytes
        {
            return memory.address();
        }
        let grown = self.grow(place, bytes);
        self.attempt(grown).unwrap_or(0)
    }

    fn grow(&mut self, place: usize, bytes: usize) -> Result<Address, CudaError> {
        // What is queued may use the old one.
        self.driver().wait()?;
        self.scratch.slots[place] = None;
        let memory = Memory::new(&self.driver, bytes)?;
        let address = memory.address();
        self.scratch.slots[place] = Some(memory);
        Ok(address)
    }

    /// Scratch memory in all, in bytes.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch.bytes() + self.bounds.values().map(Memory::bytes).sum::<usize>()
    }
}
