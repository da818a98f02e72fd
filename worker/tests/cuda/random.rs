//! Numbers for the tests, the same ones every time.

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform over [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// From 1 to that.
    pub(crate) fn up_to(&mut self, most: usize) -> usize {
        1 + self.below(most)
    }

    /// Roughly normal, of that standard deviation.
    pub(crate) fn values(&mut self, len: usize, deviation: f64) -> Vec<f32> {
        let mut value = || ((0..6).map(|_| self.unit()).sum::<f64>() - 3.0) * (2.0f64).sqrt() * deviation;
        (0..len).map(|_| value() as f32).collect()
    }

    /// The same, each a number that bfloat16 has too, so that both devices begin with the same.
    pub(crate) fn exact(&mut self, len: usize, deviation: f64) -> Vec<f32> {
        let values = self.values(len, deviation).into_iter();
        values.map(|value| f32::from_bits(value.to_bits() & 0xffff_0000)).collect()
    }
}
