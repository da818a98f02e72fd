//! Golomb–Rice coded index gaps.
//!
//! The gap of an index is the number of indices skipped before it. With parameter p a gap is its quotient
//! ⌊gap/2^p⌋ in unary (that many 0 bits, then a 1), followed by the p low bits of the gap. Bits fill bytes from
//! the least significant up; the last byte is padded with 0 bits.

/// The largest parameter: gaps have 32 bits.
pub const PARAMETER_MAX: u32 = 31;

/// Bits that are certainly in the accumulator after a refill.
const REFILLED_BITS: u32 = 56;

/// How the gaps of certain indices are coded; made by [`plan`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    parameter: u32,
    bytes: usize,
}

impl Plan {
    /// The parameter p, at most [`PARAMETER_MAX`]; 0 if there is no index.
    pub fn parameter(&self) -> u32 {
        self.parameter
    }

    /// How many bytes the gaps take.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Why bytes are not gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RiceError {
    /// The bytes end within a gap.
    #[error("the gaps end too early")]
    Truncated,
    /// An index at or beyond the tensor's length.
    #[error("an index lies beyond the tensor")]
    OutOfRange,
    /// Padding bits that are not zero.
    #[error("the padding after the gaps is not zero")]
    Padding,
}

/// The gaps of strictly ascending indices.
fn gaps(indices: &[u32]) -> impl Iterator<Item = u32> {
    let first = indices.first().copied();
    first.into_iter().chain(indices.windows(2).map(|pair| pair[1] - pair[0] - 1))
}

/// Chooses the parameter that needs the fewest bits, the smaller one of two.
///
/// The number of bits, count·(p+1) + Σ⌊gap/2^p⌋, is convex in p, because ⌊g/2^p⌋ − ⌊g/2^(p+1)⌋ = ⌈⌊g/2^p⌋/2⌉
/// does not grow with p; so walking downhill from an estimate finds the minimum.
pub fn plan(indices: &[u32]) -> Plan {
    let Some(&last) = indices.last() else { return Plan { parameter: 0, bytes: 0 } };
    let bits = |parameter: u32| {
        // At most the last index, so 32 bits are enough, and twice as many fit a vector register.
        let quotients: u32 = gaps(indices).map(|gap| gap >> parameter).sum();
        u64::from(quotients) + indices.len() as u64 * u64::from(parameter + 1)
    };
    let mean = last / indices.len() as u32;
    let estimate = mean.checked_ilog2().unwrap_or(0);
    let mut best = (estimate, bits(estimate));
    for parameter in (0..estimate).rev() {
        let cost = bits(parameter);
        if cost > best.1 {
            break;
        }
        best = (parameter, cost);
    }
    for parameter in estimate + 1..=PARAMETER_MAX {
        let cost = bits(parameter);
        if cost >= best.1 {
            break;
        }
        best = (parameter, cost);
    }
    Plan { parameter: best.0, bytes: best.1.div_ceil(8) as usize }
}

/// Appends the gaps of strictly ascending indices, according to their plan.
///
/// # Panics
/// If the plan was made for other indices (not always detected).
pub fn encode(indices: &[u32], plan: Plan, out: &mut Vec<u8>) {
    let start = out.len();
    // Whole words are written, up to seven bytes beyond the last bit.
    out.resize(start + plan.bytes + 8, 0);
    let mut writer = BitWriter { bytes: &mut out[start..], position: 0, pending: 0, pending_bits: 0 };
    let parameter = plan.parameter;
    for gap in gaps(indices) {
        let (mut quotient, low) = (gap >> parameter, u64::from(gap) & ((1 << parameter) - 1));
        // 31 bits of unary at a time leave room for the rest of the code and seven pending bits.
        while quotient > 23 {
            let zeros = quotient.min(31);
            writer.put(0, zeros);
            quotient -= zeros;
        }
        writer.put((low << 1 | 1) << quotient, quotient + 1 + parameter);
    }
    debug_assert_eq!(writer.position + writer.pending_bits.div_ceil(8) as usize, plan.bytes);
    out.truncate(start + plan.bytes);
}

struct BitWriter<'a> {
    bytes: &'a mut [u8],
    position: usize,
    pending: u64,
    // Fewer than 8 between calls.
    pending_bits: u32,
}

impl BitWriter<'_> {
    /// Appends the `bits` (at most 56) low bits of `code`; its other bits are zero.
    #[inline]
    fn put(&mut self, code: u64, bits: u32) {
        self.pending |= code << self.pending_bits;
        self.pending_bits += bits;
        self.bytes[self.position..self.position + 8].copy_from_slice(&self.pending.to_le_bytes());
        self.position += (self.pending_bits / 8) as usize;
        self.pending >>= self.pending_bits & !7;
        self.pending_bits &= 7;
    }
}

/// Appends `count` indices below `tensor_len` from the start of `bytes`, and returns how many bytes they took. It
/// allocates nothing that `bytes` could not fill.
///
/// # Errors
/// A [`RiceError`] if `bytes` do not start with the canonical code of that many gaps; `out` then has some of them.
///
/// # Panics
/// If the parameter exceeds [`PARAMETER_MAX`].
pub fn decode(
    bytes: &[u8],
    parameter: u32,
    count: usize,
    tensor_len: usize,
    out: &mut Vec<u32>,
) -> Result<usize, RiceError> {
    assert!(parameter <= PARAMETER_MAX, "the Rice parameter {parameter}");
    if count as u64 * u64::from(parameter + 1) > 8 * bytes.len() as u64 {
        return Err(RiceError::Truncated);
    }
    let mut reader = BitReader { bytes, position: 0, bits: 0, available: 0 };
    let mut next = 0;
    out.reserve(count);
    for _ in 0..count {
        let index = next + reader.gap(parameter, tensor_len)?;
        if index >= tensor_len as u64 {
            return Err(RiceError::OutOfRange);
        }
        out.push(index as u32);
        next = index + 1;
    }
    reader.finish()
}

struct BitReader<'a> {
    bytes: &'a [u8],
    // The next byte to load.
    position: usize,
    bits: u64,
    // Valid low bits of `bits`; further ones may be set, to what a refill would set them to.
    available: u32,
}

impl BitReader<'_> {
    /// Makes at least [`REFILLED_BITS`] bits available, or all there are.
    #[inline]
    fn refill(&mut self) {
        if let Some(word) = self.bytes.get(self.position..).and_then(|rest| rest.first_chunk()) {
            self.bits |= u64::from_le_bytes(*word) << self.available;
            self.position += ((63 - self.available) / 8) as usize;
            self.available |= REFILLED_BITS;
        } else {
            self.refill_slowly();
        }
    }

    #[cold]
    fn refill_slowly(&mut self) {
        // Bits beyond the available ones come from a whole word of which these bytes are a part: drop them first.
        self.bits &= (1_u64 << self.available) - 1;
        while self.available < REFILLED_BITS && self.position < self.bytes.len() {
            self.bits |= u64::from(self.bytes[self.position]) << self.available;
            self.position += 1;
            self.available += 8;
        }
    }

    #[inline]
    fn take(&mut self, bits: u32) {
        self.bits >>= bits;
        self.available -= bits;
    }

    #[inline]
    fn gap(&mut self, parameter: u32, tensor_len: usize) -> Result<u64, RiceError> {
        let mut zeros = self.bits.trailing_zeros();
        if zeros + 1 + parameter > self.available {
            self.refill();
            zeros = self.bits.trailing_zeros();
            if zeros + 1 + parameter > self.available {
                return self.long_gap(parameter, tensor_len);
            }
        }
        let low = (self.bits >> zeros >> 1) & ((1 << parameter) - 1);
        self.take(zeros + 1 + parameter);
        Ok(u64::from(zeros) << parameter | low)
    }

    /// A gap whose code is longer than the accumulator, or lies at the end of the bytes.
    #[cold]
    fn long_gap(&mut self, parameter: u32, tensor_len: usize) -> Result<u64, RiceError> {
        let quotient_max = tensor_len as u64 >> parameter;
        let mut quotient = 0;
        loop {
            self.refill();
            if self.available == 0 {
                return Err(RiceError::Truncated);
            }
            let zeros = self.bits.trailing_zeros().min(self.available);
            quotient += u64::from(zeros);
            if quotient > quotient_max {
                return Err(RiceError::OutOfRange);
            }
            let ended = zeros < self.available;
            self.take(zeros);
            if ended {
                break;
            }
        }
        self.take(1);
        self.refill();
        if self.available < parameter {
            return Err(RiceError::Truncated);
        }
        let low = self.bits & ((1 << parameter) - 1);
        self.take(parameter);
        Ok(quotient << parameter | low)
    }

    /// The number of bytes used, after checking the padding of the last one.
    fn finish(self) -> Result<usize, RiceError> {
        let unused = self.available % 8;
        if self.bits & ((1 << unused) - 1) != 0 {
            return Err(RiceError::Padding);
        }
        Ok(self.position - (self.available / 8) as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bits(indices: &[u32], parameter: u32) -> u64 {
        gaps(indices).map(|gap| u64::from(gap >> parameter) + u64::from(parameter) + 1).sum()
    }

    fn plan_with(indices: &[u32], parameter: u32) -> Plan {
        Plan { parameter, bytes: bits(indices, parameter).div_ceil(8) as usize }
    }

    fn check_round_trip(indices: &[u32], plan: Plan) {
        let mut bytes = vec![0xa5];
        encode(indices, plan, &mut bytes);
        assert_eq!(bytes.len(), 1 + plan.bytes);
        let len = indices.last().map_or(0, |&last| last as usize + 1);
        // Whatever follows is not the decoder's business.
        for following in [&[][..], &[0xff; 3], &[0x00; 20]] {
            let mut input = bytes[1..].to_vec();
            input.extend_from_slice(following);
            let mut decoded = Vec::new();
            assert_eq!(decode(&input, plan.parameter, indices.len(), len, &mut decoded), Ok(plan.bytes));
            assert_eq!(decoded, indices);
        }
        for cut in 1..bytes.len() {
            let outcome = decode(&bytes[1..cut], plan.parameter, indices.len(), len, &mut Vec::new());
            assert_eq!(outcome, Err(RiceError::Truncated), "{cut} of {} bytes", bytes.len());
        }
        if let Some(shorter) = len.checked_sub(1) {
            let outcome = decode(&bytes[1..], plan.parameter, indices.len(), shorter, &mut Vec::new());
            assert_eq!(outcome, Err(RiceError::OutOfRange));
        }
    }

    /// Strictly ascending indices whose gaps spread over many magnitudes.
    fn ascending() -> impl Strategy<Value = Vec<u32>> {
        prop::collection::vec((0_u32..20, any::<u32>()), 0..40).prop_map(|gaps| {
            let mut indices = Vec::new();
            let mut next = 0;
            for (bits, random) in gaps {
                indices.push(next + (random & ((1 << bits) - 1)));
                next = indices[indices.len() - 1] + 1;
            }
            indices
        })
    }

    proptest! {
        #[test]
        fn the_plan_is_the_best(indices in ascending()) {
            let plan = plan(&indices);
            let best = (0..=PARAMETER_MAX).min_by_key(|&parameter| bits(&indices, parameter)).unwrap();
            prop_assert_eq!(plan, plan_with(&indices, best));
            check_round_trip(&indices, plan);
        }

        #[test]
        fn every_parameter_round_trips(indices in ascending(), parameter in 0..=PARAMETER_MAX) {
            prop_assume!(bits(&indices, parameter) < 100_000);
            check_round_trip(&indices, plan_with(&indices, parameter));
        }
    }

    #[test]
    fn extremes_round_trip() {
        let cases: [&[u32]; 5] = [&[], &[0], &[u32::MAX - 1], &[0, u32::MAX - 1], &[5, 6, 7, 8, 1 << 31]];
        for indices in cases {
            check_round_trip(indices, plan(indices));
        }
        // Quotients around the sizes of the writer's and the reader's words.
        for gap in 0..200 {
            check_round_trip(
                &[gap, 2 * gap + 1, 2 * gap + 2],
                plan_with(&[gap, 2 * gap + 1, 2 * gap + 2], 0),
            );
        }
    }

    #[test]
    fn padding_is_checked() {
        assert_eq!(decode(&[0b0000_0001], 0, 1, 1, &mut Vec::new()), Ok(1));
        assert_eq!(decode(&[0b0000_0011], 0, 1, 1, &mut Vec::new()), Err(RiceError::Padding));
    }
}
