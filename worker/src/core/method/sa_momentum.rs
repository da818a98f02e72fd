//! SAMomentum, and with it gradient dropping, momentum SGD and SGD; see the table in [`super`].

use sanderling_common::sparse::{NonFinite, Update};

use super::{Accumulators, CompressionMethod, Direction, Sender, for_each_direction, refill};

/// u ← u + η·d; q = top-R of u; u ← u − (1 − m)·q.
#[derive(Debug)]
pub struct SaMomentum {
    /// 1 − m.
    release: f32,
    weight_decay: f32,
    u: Vec<f32>,
    sender: Sender,
}

impl SaMomentum {
    /// With momentum m in [0, 1); what R is, `sender` knows.
    ///
    /// # Panics
    /// If m lies outside [0, 1).
    pub fn new(momentum: f32, weight_decay: f32, sender: Sender) -> Self {
        assert!((0.0..1.0).contains(&momentum), "momentum {momentum} lies outside [0, 1)");
        Self { release: 1.0 - momentum, weight_decay, u: sender.zeros(), sender }
    }
}

impl CompressionMethod for SaMomentum {
    fn accumulate(&mut self, direction: &Direction<'_>) {
        let rate = direction.rate;
        for_each_direction(&mut self.u, direction, self.weight_decay, |u, d| *u += rate * d);
    }

    fn send(&mut self, _: f32, _: f32, payload: &mut Vec<u8>) -> Result<(), NonFinite> {
        self.sender.send(&self.u, 1.0, payload)?;
        let release = self.release;
        self.sender.for_each_sent(&mut self.u, |u, q| *u -= release * q);
        Ok(())
    }

    fn sent(&self) -> &Update {
        &self.sender.update
    }

    fn residual(&self) -> &[f32] {
        &self.u
    }

    fn accumulators(&self) -> Accumulators<'_> {
        Accumulators { scalar: 0.0, vectors: vec![&self.u] }
    }

    fn restore(&mut self, _: f64, vectors: Vec<Vec<f32>>, sent: Update) -> bool {
        self.sender.update = sent;
        refill([&mut self.u], vectors)
    }

    fn momentum(&self) -> &[f32] {
        if self.release == 1.0 { &[] } else { &self.u }
    }
}
