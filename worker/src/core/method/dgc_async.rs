//! Deep gradient compression, asynchronously: momentum correction and factor masking.

use sanderling_common::sparse::{NonFinite, Update, ValueFormat};

use super::{Accumulators, CompressionMethod, Direction, Sender, for_each_direction, refill};

/// u ← m·u + d; r ← r + u; q = η·(top-R of r); u and r become 0 where something was sent.
///
/// Zeroing r as published would lose what a coarser format than float32 rounds off, so there r ← r − q/η.
#[derive(Debug)]
pub struct DgcAsync {
    momentum: f32,
    weight_decay: f32,
    u: Vec<f32>,
    r: Vec<f32>,
    sender: Sender,
}

impl DgcAsync {
    /// With momentum m in [0, 1); what R is, `sender` knows.
    ///
    /// # Panics
    /// If m lies outside [0, 1).
    pub fn new(momentum: f32, weight_decay: f32, sender: Sender) -> Self {
        assert!((0.0..1.0).contains(&momentum), "momentum {momentum} lies outside [0, 1)");
        Self { momentum, weight_decay, u: sender.zeros(), r: sender.zeros(), sender }
    }
}

impl CompressionMethod for DgcAsync {
    fn accumulate(&mut self, direction: &Direction<'_>) {
        let momentum = self.momentum;
        let mut r = self.r.iter_mut();
        for_each_direction(&mut self.u, direction, self.weight_decay, |u, d| {
            *u = momentum * *u + d;
            *r.next().expect("r is as long as u") += *u;
        });
    }

    fn send(&mut self, rate: f32, _: f32, payload: &mut Vec<u8>) -> Result<(), NonFinite> {
        self.sender.send(&self.r, rate, payload)?;
        self.sender.for_each_sent(&mut self.u, |u, _| *u = 0.0);
        if self.sender.compression.format == ValueFormat::F32 && rate > 0.0 {
            self.sender.for_each_sent(&mut self.r, |r, _| *r = 0.0);
        } else if rate > 0.0 {
            self.sender.for_each_sent(&mut self.r, |r, q| *r -= q / rate);
        }
        Ok(())
    }

    fn sent(&self) -> &Update {
        &self.sender.update
    }

    fn residual(&self) -> &[f32] {
        &self.r
    }

    fn accumulators(&self) -> Accumulators<'_> {
        Accumulators { scalar: 0.0, vectors: vec![&self.u, &self.r] }
    }

    fn restore(&mut self, _: f64, vectors: Vec<Vec<f32>>, sent: Update) -> bool {
        self.sender.update = sent;
        refill([&mut self.u, &mut self.r], vectors)
    }

    fn momentum(&self) -> &[f32] {
        &self.u
    }
}
