//! Memory of a device, in the types that the kernels keep.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::driver::{Address, Driver, Scalar};
use super::error::CudaError;

impl Scalar {
    /// Bytes of one.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Float => 4,
            Self::Bf16 => 2,
        }
    }
}

/// Floats, or activations in the type that the device keeps them in.
pub struct Buffer {
    memory: Memory,
    len: usize,
    scalar: Scalar,
    twin: Option<Twin>,
}

/// The same numbers in the type that products multiply.
struct Twin {
    memory: Memory,
    /// How many of the numbers it has as they are now, from the first on.
    fresh: AtomicUsize,
}

/// Bytes of a device, given back when they are dropped.
pub(super) struct Memory {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl Memory {
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, CudaError> {
        let address = driver.allocate(bytes)?;
        driver.held_bytes().fetch_add(bytes, Ordering::Relaxed);
        Ok(Self { driver: Arc::clone(driver), address, bytes })
    }

    pub(super) fn address(&self) -> Address {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.held_bytes().fetch_sub(self.bytes, Ordering::Relaxed);
        self.driver.free(self.address, self.bytes);
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {:?} at {:#x}", self.len, self.scalar, self.memory.address)
    }
}

impl Buffer {
    pub(super) fn new(
        driver: &Arc<dyn Driver>,
        len: usize,
        scalar: Scalar,
        twin: Option<Scalar>,
    ) -> Result<Self, CudaError> {
        let memory = Memory::new(driver, len * scalar.bytes())?;
        let twin = twin.map(|twin| Memory::new(driver, len * twin.bytes())).transpose()?;
        let twin = twin.map(|memory| Twin { memory, fresh: AtomicUsize::new(0) });
        Ok(Self { memory, len, scalar, twin })
    }

    /// Elements.
    #[expect(clippy::len_without_is_empty, reason = "whether it is empty interests nobody")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// What it holds.
    pub(super) fn scalar(&self) -> Scalar {
        self.scalar
    }

    /// Where a range of elements starts, to be read.
    pub(super) fn at(&self, range: Range<usize>) -> Address {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {self:?}");
        self.memory.address + (range.start * self.scalar.bytes()) as u64
    }

    /// The same to be written: what the twin has of it is old from now on.
    pub(super) fn at_mut(&mut self, range: Range<usize>) -> Address {
        if let Some(twin) = &mut self.twin {
            *twin.fresh.get_mut() = 0;
        }
        self.at(range)
    }

    /// Where the twin's range starts, if there is a twin.
    pub(super) fn twin_at(&self, range: Range<usize>, scalar: Scalar) -> Option<Address> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {self:?}");
        Some(self.twin.as_ref()?.memory.address + (range.start * scalar.bytes()) as u64)
    }

    /// Whether the twin has the first `len` elements as they are now.
    pub(super) fn is_twin_fresh(&self, len: usize) -> bool {
        self.twin.as_ref().is_some_and(|twin| twin.fresh.load(Ordering::Relaxed) >= len)
    }

    /// Says that an operation that is queued brings the twin's first `len` elements up to date.
    pub(super) fn refresh_twin(&self, len: usize) {
        if let Some(twin) = &self.twin {
            twin.fresh.store(len, Ordering::Relaxed);
        }
    }
}

/// Token ids in a device's memory.
pub struct Tokens {
    pub(super) memory: Memory,
    pub(super) rows: usize,
}

impl Tokens {
    /// Where those of some rows are.
    pub(super) fn at(&self, rows: Range<usize>) -> Address {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "{rows:?} of {} token ids", self.rows);
        self.memory.address + (rows.start * size_of::<u32>()) as u64
    }
}

/// Values as a device keeps them.
pub(super) fn encode(values: &[f32], scalar: Scalar) -> Vec<u8> {
    match scalar {
        Scalar::Float => values.iter().flat_map(|value| value.to_ne_bytes()).collect(),
        Scalar::Bf16 => values.iter().flat_map(|&value| to_bf16(value).to_ne_bytes()).collect(),
    }
}

/// What a device keeps, as values.
pub(super) fn decode(bytes: &[u8], scalar: Scalar, values: &mut [f32]) {
    match scalar {
        Scalar::Float => {
            let floats = bytes.as_chunks::<4>().0;
            values.iter_mut().zip(floats).for_each(|(value, bytes)| *value = f32::from_ne_bytes(*bytes));
        }
        Scalar::Bf16 => {
            let halves = bytes.as_chunks::<2>().0;
            values.iter_mut().zip(halves).for_each(|(value, bytes)| {
                *value = f32::from_bits(u32::from(u16::from_ne_bytes(*bytes)) << 16);
            });
        }
    }
}

/// To the nearest, ties to even.
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let rounded = bits + 0x7fff + (bits >> 16 & 1);
    (rounded >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_the_nearest() {
        let rounded = |value: f32| {
            let mut back = [0.0];
            decode(&encode(&[value], Scalar::Bf16), Scalar::Bf16, &mut back);
            back[0]
        };
        assert_eq!([0.0, -1.5, 65536.0].map(rounded), [0.0, -1.5, 65536.0]);
        // 1 + 2⁻⁸ lies between 1 and 1 + 2⁻⁷: the even one is 1; and 1 + 3·2⁻⁸ goes to 1 + 2⁻⁶.
        assert_eq!(rounded(1.0 + 2f32.powi(-8)), 1.0);
        assert_eq!(rounded(1.0 + 3.0 * 2f32.powi(-8)), 1.0 + 2f32.powi(-6));
        assert!(rounded(f32::NAN).is_nan());
        assert_eq!(rounded(f32::MAX), f32::INFINITY);
    }
}
